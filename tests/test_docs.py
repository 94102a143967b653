"""README, docs and the other pages are true: links, names, commands, code blocks, and numbers that can be computed.

CHANGELOG.md and LOG.md are history, and say what was true then.
"""

import ast
import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from paths import ROOT
from small_runs import run_here, save_tiny_model, write_rows

import nanoqlora as nq
from nanoqlora.config import options, scripts
from nanoqlora.config.keys import keys_of
from nanoqlora.config.load import load_options, make_config
from nanoqlora.config.schema import Config
from tour import recompute

PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")), *sorted(ROOT.glob("docs/**/*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def tracked() -> list[str]:
    """All files of the repository; without git, as in an archive, all that are there."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    found = listed.stdout.splitlines() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    return [name for name in found if (ROOT / name).is_file()]


@cache
def ends_of_paths() -> set[str]:
    """`nanoqlora/ops/nf4.py`, `ops/nf4.py` and `nf4.py`, and the same of folders, which end with a slash."""
    paths = set(tracked()) | {f"{parent}/" for name in tracked() for parent in Path(name).parents}
    return {end for path in paths for end in (path, *(path[i + 1 :] for i, c in enumerate(path[:-1]) if c == "/"))}


@cache
def words_of_source() -> set[str]:
    """Every word in the files that are not prose."""
    prose = (".md", ".svg", ".png", ".gguf", ".jsonl")
    texts = [(ROOT / name).read_text("utf-8", "replace") for name in tracked() if not name.endswith(prose)]
    return {word for text in (*texts, " ".join(tracked())) for word in re.findall(r"\w+", text)}


def prose_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^    .*$", "", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), flags=re.M)


def anchors_of(page: Path) -> set[str]:
    """The names by which headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if target.startswith(("http", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors_of(path), target


@every_page
def test_numbered_headings_miss_none(page):
    """A heading that was lost with the text below it leaves a gap, and "step 3" elsewhere means nothing."""
    numbers = [int(n) for n in re.findall(r"^## (\d+)\.", page.read_text("utf-8"), re.M)]
    assert numbers == list(range(1, len(numbers) + 1))


# Files that a run writes, that a model brings, or that are the reader's own.
WRITTEN = "report.md metrics.jsonl adapter_model.safetensors adapter_config.json prompt.json checkpoint-STEP/ merged/ "
WRITTEN += "model-q8_0.gguf imatrix.gguf merge.json nanoqlora/programs/"
BROUGHT = "tokenizer.json tokenizer.model tokenizer_config.json added_tokens.json special_tokens_map.json "
BROUGHT += "generation_config.json examples/"
OWN = "my.yml chats.jsonl"
OUTSIDE = {  # words of other programs
    *("NCCL_WIN_ENABLE", "new_subgroups", "exceeds", "manifest", "supplied", "unsupported"),
}


@every_page
def test_files_and_names_exist(page):
    """Whatever stands in backticks: a path by its end, everything else word by word."""
    known = {*WRITTEN.split(), *BROUGHT.split(), *OWN.split()}
    ending = r"\.(py|md|yml|json|jsonl|txt|csv|gguf|svg|png|toml|model|jinja|safetensors)"
    for quoted in re.findall(r"`([^`\n]+)`", prose_of(page)):
        if re.fullmatch(rf"[\w./-]+{ending}|[\w./-]+/", quoted):
            assert quoted in ends_of_paths() | known, f"{quoted}: no such file"
        elif re.match(r"make [a-z]", quoted):
            assert quoted.split()[1] in make_targets(), quoted
        else:
            words = re.findall(r"[A-Za-z_]\w{2,}", quoted)
            missing = {word for word in words if word not in words_of_source() | OUTSIDE and not word.isupper()}
            patterns = {word for word in missing if f"{word}..." in quoted or word.endswith("_NAME")}
            assert not missing - patterns, f"{quoted}: {missing} is nowhere in the source"


# ------------------------------------------------------------------------------------------------ commands


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@cache
def options_of(program: str) -> set[str]:
    """The options of a program: those of the class that it reads, and the keys of a YAML file; of other modules those
    that their source mentions."""
    script = scripts.COMMANDS.get(program, (program, ""))[0]
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    source = path.read_text("utf-8")
    found = re.search(r"(?:answer_early|load_options)\((\w+Options)", source)
    if script not in scripts.NAMES or not found:
        return set(re.findall(r"--([a-z]\w*)", source))
    own = getattr(options, found[1])
    return {*keys_of(own), *(keys_of(Config) if issubclass(own, options.RunOptions) else ()), "help"}


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command in the code of a page; what is optional stands in brackets and counts."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"^    (.*)$", text, re.M)
    lines = [line.removeprefix("$ ") for line in lines]
    programs = r"(python|nanoqlora|torchrun|make|pip|ollama|\.venv/bin/\w+) "
    found = [re.sub(r"\s+#.*| \[\.\.\.\]", "", line) for line in lines if re.match(programs, line)]
    found += [quoted[0] for quoted in re.findall(rf"`({programs}[^`\n]*)`", prose_of(page))]
    return [shlex.split(re.sub(r"[\[\]](?=[^{}]*$)", " ", line) if "'" not in line else line) for line in found]


def check_command(words: list[str]) -> None:
    """The program is there, it has the options, and files that are named and not the reader's own are there."""
    program, *rest = words
    if program in ("pip", "ollama"):
        return
    if program == "make":
        assert {word for word in rest if "=" not in word} <= make_targets(), words
        return
    if program == "torchrun":
        rest = [word for word in rest if not re.match(r"--(nproc|nnodes|rdzv|max-restarts)", word)]
        rest = rest[1:] if rest[:1] == ["--no-python"] else ["python", *rest]
        return check_command(rest) if len(rest) > 1 else None
    if program == "nanoqlora":
        name, *rest = rest
        assert name in scripts.COMMANDS or name == "COMMAND", words
    elif rest[0] == "-m":
        name, *rest = rest[1:]
    else:
        assert program.endswith("python"), words
        name, *rest = rest
    used = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    assert name in ("pytest", "COMMAND") or not used - options_of(name), words
    own = r"(outputs|output_dir)\b.*|my\.yml|mine\.jsonl|held-out\.jsonl|nll\.jsonl|data\.jsonl"
    for word in rest:
        if re.fullmatch(r"[\w./-]+\.(py|yml|jsonl|gguf|json)|(data|docs|configs|tests|models)/[\w./-]+", word):
            assert re.fullmatch(own, word) or word[:1].isupper() or (ROOT / word).exists(), f"{words}: {word}"


@every_page
def test_commands_are_understood(page):
    for words in commands_of(page):
        check_command(words)


def test_commands_of_make_demo_take_their_words():
    """Each value too, by the reader of the options; the demo's later commands run in no other test."""
    lines = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [shlex.split(line) for line in re.findall(r"bin/python ((?:-m nanoqlora|\w+\.py).*)", lines)]
    readers = {"evaluate": options.EvaluateOptions, "chat": options.ChatOptions, "llama_cpp": options.AskOptions}
    assert len(found) == 10
    for words in found:
        check_command(["python", *words])
        if words[0] == "-m":
            load_options(readers[words[1].split(".")[-1]], words[2:])


# ------------------------------------------------------------------------------------------------ code blocks


def blocks_of(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)


@every_page
def test_code_blocks_are_valid(page):
    """YAML is a configuration, or a part of one; the lines of JSON and CSV are read, Python is parsed."""
    base = {"base_model": "m", "adapter": "qlora", "learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 16}
    base["datasets"] = [{"path": "d", "type": "alpaca"}]
    for language, text in blocks_of(page):
        if language == "yaml":
            make_config(base | yaml.safe_load(text))
        elif language == "json":
            assert [json.loads(line) for line in text.splitlines()]
        elif language == "csv":
            assert len({len(row) for row in csv.reader(text.splitlines())}) == 1
        elif language == "python":
            inside = "".join(f"    {line}" for line in text.splitlines(keepends=True))
            ast.parse(f"def part():\n{inside}")  # parts of functions have a return
        else:
            assert language in ("sh", "mermaid"), language


def block_of_readme(language: str, containing: str) -> str:
    return next(text for found, text in blocks_of(PAGES[0]) if found == language and containing in text)


def runnable(page: Path) -> list[tuple[str, list[str]]]:
    """(script or module, its words) of the commands of a page that train, merge, export, score, chat or compare."""
    found = []
    for program, *words in commands_of(page):
        name = scripts.COMMANDS.get(words[0], ("",))[0] if program == "nanoqlora" else words.pop(0)
        name = words.pop(0) if name == "-m" else name
        words = words[1:] if program == "nanoqlora" else words
        if words and name in scripts.NAMES and name != "bench.py":  # a benchmark takes minutes
            found.append((name, words))
    return found


STANDS_FOR = {"BASE": "model", "FILE": "held-out.jsonl", "RUN": "outputs/mine", "outputs/one": "outputs/mine"}
SHORTER = {"nanoqlora.chat": ["--prompt", "Hi", "--max_new_tokens", "4"], "nanoqlora.run.compare": ["another"]}


@pytest.mark.slow
def test_commands_run_from_data_to_answers(tmp_path, monkeypatch):
    """Those of docs/training.md and README in order, on a tiny model and README's data; then README's Python."""
    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model")
    chat = json.loads(block_of_readme("json", "messages"))
    chats = [[{**turn, "content": f"{turn['content']} {i}"} for turn in chat["messages"]] for i in range(40)]
    write_rows(tmp_path / "chats.jsonl", [{"messages": messages} for messages in chats])
    write_rows(tmp_path / "held-out.jsonl", [{"messages": messages} for messages in chats[:4]])
    config = yaml.safe_load(block_of_readme("yaml", "base_model")) | {"base_model": str(model)}
    config |= {"bf16": False, "max_steps": 8, "save_steps": 4}
    (tmp_path / "my.yml").write_text(yaml.safe_dump(config))
    folder, done = tmp_path / config["output_dir"], set()
    for page in (ROOT / "docs" / "training.md", ROOT / "README.md"):
        for name, words in runnable(page):
            words = [STANDS_FOR.get(word, word.replace("output_dir", config["output_dir"])) for word in words]
            left_out = "--prove", "outputs/two"  # llama.cpp: tests/export/test_proof.py
            words = [word for word in words if word not in left_out]
            if name == "train.py" and folder.exists():
                words += ["--overwrite_output_dir", "true"]
            if name == "nanoqlora.run.compare":
                shutil.copytree(folder, "another", dirs_exist_ok=True)
                words = words[:1]
            module = importlib.import_module(name.removesuffix(".py"))
            ended = run_here(module.main, *words, *SHORTER.get(name, ()))
            assert ended.code == 0, (name, words, ended.err)
            done.add(name)
    assert done == {*scripts.NAMES} - {"bench.py"}
    for name in WRITTEN.split()[:7] + ["Fine-Tuning.png", "train.yml", "model-q4_k_m.gguf", "Modelfile"]:
        assert list(folder.glob(name.rstrip("/").replace("STEP", "*"))), name
    program = block_of_readme("python", "nq.train").replace('"my.yml"', '"my.yml", overwrite_output_dir=True')
    program = program.replace("base folder or .gguf", str(model)).replace("max_new_tokens=80", "max_new_tokens=4")
    (folder / "merged").rename(tmp_path / "earlier")
    exec(compile(program, "README.md", "exec"), {})
    assert (tmp_path / "model-q4_k_m.gguf").is_file()
    rest = (ROOT / "README.md").read_text("utf-8").partition("## From Python")[2].partition("\n## ")[0]
    assert all(hasattr(nq, name) for name in re.findall(r"nq\.(\w+)", rest))


# ------------------------------------------------------------------------------------------------ numbers

GIB_SHARDED = r"\| Llama-3-{} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"


def gib_over_ranks(name: str) -> list[str]:
    """Of the base, replicated and over 2, 4 and 64 ranks; each block is as large as the next."""
    held = []
    for num_blocks in (2, 3):
        model = recompute.geometry(name, r=0, num_hidden_layers=num_blocks)
        held.append([recompute.memory.base_bytes(model, "replicate", 1)])
        held[-1] += [recompute.memory.base_bytes(model, "full_shard", ranks) for ranks in (2, 4, 64)]
    more = recompute.bench.GEOMETRIES[name].num_hidden_layers - 2
    return [f"{(two + more * (three - two)) / 2**30:.1f}" for two, three in zip(*held, strict=True)]


def gathers(name: str) -> list[str]:
    """How many in a micro-batch, MB of each, GB of all."""
    model = recompute.geometry(name, r=0, num_hidden_layers=1)
    count = 2 * recompute.bench.GEOMETRIES[name].num_hidden_layers - 4
    size = recompute.block_bytes(model.model.layers, 4)
    total = count * size / 1e9
    return [str(count), f"{size / 1e6:.0f}", f"{total:.1f}" if total < 10 else f"{total:.0f}"]


def lines_of(*names: str) -> list[str]:
    return [str(len((ROOT / "data" / name).read_text("utf-8").splitlines())) for name in names]


def bits(*types: str) -> list[str]:
    layouts = [recompute.FORMATS[name] for name in types]
    return [f"{8 * layout.block_bytes / layout.block_size + 1e-6:.2g}" for layout in layouts]


NUMBERS = [  # page, where, what it must be
    ("README.md", r"about four minutes on (\d+)\s+chats", lambda: lines_of("pirate.jsonl")),
    ("README.md", r"scores the same (\d+) held-out chats", lambda: lines_of("pirate-heldout.jsonl")),
    ("README.md", r"tokens (\d+)\n", lambda: [str(recompute.samples("pirate-heldout").num_targets.sum())]),
    ("README.md", r"and a (\d+) MB model", lambda: [f"{recompute.MODEL.stat().st_size / 1e6:.0f}"]),
    ("README.md", r"QLoRA in (\d+) lines", lambda: [f"{code_lines(ROOT / 'tour' / 'one_file.py'):.0f}"]),
    ("docs/speed.md", r"has (\d+) TFLOP of matmuls", lambda: [recompute.tflop_of_a_step()]),
    ("docs/speed.md", r"4 x 2048, everything kept \|.* ([\d.]+) \|\n", lambda: [recompute.gib_of_4x2048()]),
    ("docs/speed.md", r"`--memory_gib 18.6` \|.* ([\d.]+) \|\n", lambda: [recompute.gib_of_4x2048_auto()]),
    ("docs/speed.md", r"4 x 2048, offload \|.* ([\d.]+) \|\n", lambda: [recompute.gib_of_4x2048_offload()]),
    ("docs/speed.md", r"offload: the smallest \|.* ([\d.]+) \|\n", lambda: [recompute.gib_of_1x2048_offload()]),
    ("docs/speed.md", r"\| 1 x 2048 \|.* ([\d.]+) \|\n", lambda: [recompute.gib_of_1x2048()]),
    ("docs/speed.md", r"\| 8 x 2048 \|.* ([\d.]+) \|\n", lambda: [recompute.predicted("8 x 2048, everything kept")]),
    ("docs/many-gpus.md", GIB_SHARDED.format("8B"), lambda: gib_over_ranks("llama3-8b")),
    ("docs/many-gpus.md", GIB_SHARDED.format("70B"), lambda: gib_over_ranks("llama3-70b")),
    ("docs/many-gpus.md", r"(\d+) x (\d+) MB = ([\d.]+) GB, of which", lambda: gathers("llama3-8b")),
    ("docs/many-gpus.md", r"\| (\d+) x (\d+) MB = ([\d.]+) GB \|", lambda: gathers("llama3-70b")),
    ("docs/many-gpus.md", r"gradient of LoRA \| (\d+) MB", lambda: [recompute.summed_megabytes()]),
    ("docs/ollama.md", r"`q8_0` \(the default\) \| ([\d.]+)", lambda: bits("Q8_0")),
    ("docs/ollama.md", r"`q6_k` \| ([\d.]+)", lambda: bits("Q6_K")),
    ("docs/ollama.md", r"`q5_1` \| ([\d.]+); (\d)", lambda: bits("Q5_K", "Q5_1")),
    ("docs/ollama.md", r"`q4_1` \| ([\d.]+); (\d)", lambda: bits("Q4_K", "Q4_1")),
    ("docs/ollama.md", r"`iq4_xs` \| ([\d.]+)", lambda: bits("IQ4_XS")),
    ("docs/ollama.md", r"`q3_k_s` \| ([\d.]+)", lambda: bits("Q3_K")),
    ("docs/ollama.md", r"`q2_k` \| ([\d.]+)", lambda: bits("Q2_K")),
]


def code_lines(path: Path) -> float:
    """To a hundred; counted as tests/test_architecture.py does it, but for comments at the end of statements."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if hasattr(node, "lineno")]
    strings = {
        line
        for node in nodes
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    return round(len({node.lineno for node in nodes} - strings), -2)


@pytest.mark.parametrize("page, pattern, compute", NUMBERS, ids=[f"{page}-{i}" for i, (page, *_) in enumerate(NUMBERS)])
def test_numbers_are_what_is_computed(page, pattern, compute):
    found = re.findall(pattern, (ROOT / page).read_text("utf-8"))
    expected = compute()
    assert found and all([*numbers] == expected for numbers in (n if isinstance(n, tuple) else (n,) for n in found))
