"""The installed package: its files, and the command `nanoqlora` from a folder that has a train.py of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from small_runs import ENVIRONMENT, Ended, run_here

from nanoqlora.config import scripts

PROGRAMS = ("train.py", "merge.py", "export_gguf.py", "bench.py", "data/plain.txt")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` puts into site-packages, without the dependencies."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--disable-pip-version-check", "--target", folder, ROOT], check=True, timeout=300)
    return folder


def run_installed(site: Path, folder: Path, *words: object) -> Ended:
    """The command `nanoqlora` in `folder`, with a train.py there that must not be run; without PyTorch."""
    (folder / "train.py").write_text("raise SystemExit('this is the train.py of the user')")
    command = [sys.executable, "-X", "importtime", site / "bin" / "nanoqlora", *map(str, words)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    imports, lines = [], []
    for line in done.stderr.splitlines(keepends=True):
        (imports if line.startswith("import time:") else lines).append(line)
    assert imports and not any(line.split()[-1] == "torch" for line in imports), "PyTorch takes seconds"
    return Ended(done.returncode, done.stdout, "".join(lines))


def test_the_wheel_has_the_package_and_the_programs(site):
    """Every file of the package, the four programs beside their data, and nothing else."""
    installed = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    installed = {name for name in installed if name.startswith("nanoqlora/") and not name.endswith(".pyc")}
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "nanoqlora").rglob("*") if path.is_file()}
    ours = {name for name in ours if not name.endswith(".pyc")}
    assert installed == ours | {f"nanoqlora/programs/{name}" for name in PROGRAMS}
    assert all((site / "nanoqlora/programs" / name).read_bytes() == (ROOT / name).read_bytes() for name in PROGRAMS)


def test_the_dependencies_are_the_pins_of_the_requirements(site):
    (metadata,) = site.glob("nanoqlora-*.dist-info/METADATA")
    found = [line.split(": ")[1] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.split("#")[0].strip().lower().replace("_", "-") for line in lines if "==" in line}
    assert pins and {pin.replace("_", "-") for pin in found if ";" not in pin} == pins
    assert {pin.split("==")[0] for pin in found if pin.endswith("extra == 'tracking'")} == {"tensorboard", "wandb"}


def test_the_command_lists_its_programs(site, tmp_path):
    ended = run_installed(site, tmp_path, "--help")
    names = ("train", "merge", "export", "evaluate", "chat", "compare", "bench")
    assert ended.code == 0 and [line.split()[0] for line in ended.out.splitlines() if line[:4] == "    "] == [*names]
    for words, found in (((), "no command is given"), (("tune",), "there is no command tune")):
        ended = run_here(scripts.main, *words)
        assert ended.code == 2 and ended.err.startswith(f"error: nanoqlora: {found}. Give one of train, merge,")


def test_a_program_of_the_command_is_ours_and_says_how_it_is_started(site, tmp_path):
    """Not the train.py of the folder; usage names `nanoqlora train`, which has no script to call by path."""
    ended = run_installed(site, tmp_path, "train", "--help")
    assert ended.code == 0 and "usage: nanoqlora train " in ended.out and ended.err == ""
    ended = run_installed(site, tmp_path, "merge", "no.yml")
    assert ended.code == 2 and "as in nanoqlora merge my.yml." in ended.err
    ended = run_installed(site, tmp_path, "chat", "--help")
    assert ended.code == 0 and "usage: nanoqlora chat " in ended.out
    ended = run_installed(site, tmp_path, "evaluate")
    assert ended.code == 2 and ended.err.startswith("error: command line: --model is missing: ")


@pytest.mark.parametrize(
    "given, loaded, expected",
    [
        ({}, "", "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "", "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "", "None"),
        ({}, "torch", "None"),
    ],
    ids=["unset", "the user's", "the user's policy", "PyTorch is there"],
)
def test_how_threads_wait_is_set_before_pytorch_is_loaded(given, loaded, expected):
    """Where PyTorch is there already it has read the variable, and to set it would say what is not so."""
    program = f"import os, sys; sys.modules.update(dict.fromkeys({loaded.split()}))\n"
    program += "from nanoqlora.config.load import let_waiting_threads_sleep; let_waiting_threads_sleep()\n"
    program += "assert not sys.modules.get('torch'); print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {key: value for key, value in ENVIRONMENT.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", program], env=environment | given, cwd=ROOT, capture_output=True)
    assert done.stdout.decode().strip() == expected, done.stderr
