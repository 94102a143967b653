"""The packages and who may import whom, read from the import statements; docs/architecture.md is the picture."""

import ast
import io
import re
import tokenize
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

# A package imports what stands before it, never what stands behind it.
ORDER = (
    *("config", "ops", "model", "qlora", "gguf", "parallel", "weights", "fast", "tokenizer", "data"),
    *("run", "evaluate", "chat", "export", "train", "merge", "export_gguf", "bench"),
)
FILES = sorted([*ROOT.glob("nanoqlora/**/*.py"), *(ROOT / f"{name}.py" for name in ORDER[-4:])])


def code_lines(path: Path) -> int:
    """Lines with code: no blank lines, comments, docstrings."""
    text = path.read_text("utf-8")
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in skipped for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            lines -= {*range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)}
    return len(lines)


def test_the_code_keeps_its_budget():
    """The total may only fall: lower the bound with it. README has it, to a hundred."""
    counts = {path: code_lines(path) for path in FILES}
    total = sum(counts.values())
    assert total <= 14_202 and max(counts.values()) <= 350
    written = re.search(r"([\d,]+) code lines", (ROOT / "README.md").read_text("utf-8"))
    assert written and int(written[1].replace(",", "")) == round(total, -2)
    core = ["nanoqlora/model.py", "nanoqlora/qlora.py", "nanoqlora/run/optim.py", "train.py"]
    core += [f"nanoqlora/ops/{name}.py" for name in "nf4 lora loss attention elementwise block_parts".split()]
    core += [f"nanoqlora/ops/{name}.py" for name in "lora_parts mlp_backward".split()]
    assert sum(counts[ROOT / name] for name in core) <= 900, "what one reads in an evening"


def module_of(path: Path) -> str:
    """nanoqlora/run/log.py -> nanoqlora.run.log; a package by its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return {name for name in found if name in MODULES and name != module}


def place_of(module: str) -> str:
    """Its package, or the module itself where it stands alone."""
    return module.split(".")[1] if module.startswith("nanoqlora.") else module


ARROWS = {module: imports_of(module) for module in MODULES if module != "nanoqlora"}


def test_no_file_imports_itself_through_others():
    try:
        TopologicalSorter(ARROWS).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("module", ARROWS)
def test_imports_point_down(module: str):
    place = ORDER.index(place_of(module))
    upward = [name for name in ARROWS[module] if name == "nanoqlora" or ORDER.index(place_of(name)) > place]
    assert not upward


def test_few_places_and_few_levels():
    places: dict[str, set[str]] = {}
    for module, found in ARROWS.items():
        own = places.setdefault(place_of(module), set())
        own |= {place_of(name) for name in found} - {place_of(module)}
    level: dict[str, int] = {}
    for place in TopologicalSorter(places).static_order():
        level[place] = 1 + max((level[below] for below in places[place]), default=0)
    assert len(places) <= 40 and max(level.values()) <= 10
    entries = [path for path in (ROOT / "nanoqlora").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 15


def test_no_test_imports_from_another_test():
    """What tests share stands in tests/helpers or in a conftest.py."""
    names = {path.stem for path in ROOT.glob("tests/**/test_*.py")}
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not names & {name.split(".")[-1] for name in found}, f"{path}, line {node.lineno}"
