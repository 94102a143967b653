"""The command `nanoqlora`, one name for all programs from any folder, and where the files of the programs are.

`train.py`, `merge.py`, `export_gguf.py` and `bench.py` stand at the top of the repository, beside `data/`. A wheel has
the same files in `nanoqlora/programs/`. They are run by path: a train.py in the current folder is never meant.
"""

import runpy
import shlex
import sys
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .commands import run_command
from .errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
IS_INSTALLED = (PACKAGE / "programs").is_dir()  # from a wheel; False in a checkout
PROGRAMS = PACKAGE / "programs" if IS_INSTALLED else PACKAGE.parent

COMMANDS = {  # name -> its script or module, what it does
    "train": ("train.py", "fine-tune a model: the run that a YAML file describes"),
    "merge": ("merge.py", "fold a trained adapter into its base"),
    "export": ("export_gguf.py", "write a GGUF file for llama.cpp and Ollama"),
    "evaluate": ("nanoqlora.evaluate", "loss and perplexity of a model on a data file"),
    "chat": ("nanoqlora.chat", "talk to a model in the terminal"),
    "compare": ("nanoqlora.run.compare", "runs side by side: settings, losses, time, memory, curves"),
    "bench": ("bench.py", "time and memory of a training step"),
}
TORCHRUN = f"torchrun --nproc_per_node=N {'--no-python nanoqlora train' if IS_INSTALLED else 'train.py'}"
NAMES = {script: name for name, (script, _) in COMMANDS.items()}


def command_words(script: str) -> tuple[str, ...]:
    """How the user starts one of the programs, by its script or module."""
    if IS_INSTALLED and script in NAMES:
        return "nanoqlora", NAMES[script]
    if not script.endswith(".py"):
        return "python", "-m", script
    path = PROGRAMS / script
    return "python", str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def script_command(script: str, *words: object) -> str:
    """A command of ours as the user can paste it into a shell, in the folder in which this program was started."""
    return shlex.join(map(str, (*command_words(script), *words)))


def this_command(*words: str) -> str:
    """The same of the command that is running."""
    path = Path(sys.argv[0]).resolve()
    script = path.name
    if path.parent != PROGRAMS and path.is_relative_to(PACKAGE):
        script = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)  # a module: nanoqlora.evaluate
    return script_command(script, *words) if script in NAMES else shlex.join(("python", sys.argv[0], *words))


def load_program(script: str) -> Any:
    """One of the programs as a module, for `nq.train`."""
    name = f"nanoqlora.programs.{Path(script).stem}"
    if name not in sys.modules:
        spec = spec_from_file_location(name, PROGRAMS / script)
        assert spec and spec.loader
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def usage() -> str:
    lines = [f"    {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    start = ["QLoRA fine-tuning of Llama models.", "usage: nanoqlora COMMAND ...", ""]
    return "\n".join([*start, *lines, "", "nanoqlora COMMAND --help lists the arguments of a command."])


def answer_without_command() -> None:
    """What `nanoqlora` prints when no command is named. Raises UserError for anything but --help and --version."""
    given = "".join(sys.argv[1:2])
    if given == "--version":
        print(f"nanoqlora {version('nanoqlora')}")
    elif given in ("--help", "-h"):
        print(usage())
    else:
        found = f"there is no command {given}" if given else "no command is given"
        raise UserError(f"nanoqlora: {found}. Give one of {', '.join(COMMANDS)}; nanoqlora --help explains them.")


def main() -> None:
    """The entry point of the command `nanoqlora`: run the program, as if its own script had been started."""
    if "".join(sys.argv[1:2]) not in COMMANDS:
        return run_command(answer_without_command)
    script, _ = COMMANDS[sys.argv.pop(1)]
    if script.endswith(".py"):
        sys.argv[0] = str(PROGRAMS / script)
        sys.path.insert(0, str(PROGRAMS))  # as Python does it for a script: bench.py times the loop of train.py
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
