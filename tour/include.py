"""The code in the chapters is the project's own: this script copies it in, and a test fails when the two differ.

    python -m tour.include            rewrite every code block of docs/tour that has a mark
    python -m tour.include --check    only name those that differ; exit code 1 if there are any

A mark is a comment above a block: a file, and the name of a function, a class, a method or a constant in it. Of a long
function a part is taken, from the line that contains one text to the line that contains another:

    <!-- code: nanoqlora/ops/nf4.py quantize_nf4 -->
    <!-- code: train.py train_loop "run.grad.zero_()" "losses[first_row]" -->

Docstrings are left out, and the text is moved to the left margin.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = ROOT / "docs" / "tour"
BLOCK = re.compile(r'(<!-- code: (\S+) (\S+?)(?: "(.+?)" "(.+?)")? -->\n```python\n)(.*?)(```\n)', re.S)


def find(tree: ast.AST, name: str) -> ast.stmt:
    """The function, class, method (`Class.method`) or constant of that name."""
    first, _, rest = name.partition(".")
    for node in ast.iter_child_nodes(tree):
        names = {getattr(node, "name", None)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.stmt) and first in names:
            return find(node, rest) if rest else node
    raise LookupError(f"nothing is called {name}")


def source_of(file: str, name: str, first: str | None = None, last: str | None = None) -> str:
    """The lines of a name, without its docstrings, under a comment that says where they stand."""
    text = (ROOT / file).read_text("utf-8")
    try:
        node = find(ast.parse(text), name)
    except LookupError as error:
        raise LookupError(f"{file}: {error}; correct the mark in docs/tour") from None
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    left_out, lines = set[int](), text.splitlines()
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
            docstring = inner.body[0]
            end = docstring.end_lineno or 0
            left_out |= {*range(docstring.lineno, end + 1 + (not lines[end].strip()))}  # with the blank line after it
    kept = [lines[i - 1] for i in range(start, (node.end_lineno or 0) + 1) if i not in left_out]
    if first and last:
        begin = next(i for i, line in enumerate(kept) if first in line)
        end = next(i for i in range(begin, len(kept)) if last in kept[i])
        kept = kept[begin : end + 1]
    body = textwrap.dedent("\n".join(kept)).strip("\n")
    return f"# {file}\n{body}\n"


def rewritten(text: str) -> str:
    """A chapter with every marked block as the source has it now."""
    return BLOCK.sub(lambda m: m[1] + source_of(*m.group(2, 3, 4, 5)) + m[7], text)


def main() -> int:
    differing = 0
    for path in sorted(CHAPTERS.glob("*.md")):
        text = path.read_text("utf-8")
        if (new := rewritten(text)) != text:
            differing += 1
            print(f"{path.relative_to(ROOT)}: its code differs from the source")
            if "--check" not in sys.argv:
                path.write_text(new, "utf-8")
    return differing if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(min(main(), 1))
