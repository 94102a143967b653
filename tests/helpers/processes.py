"""Commands in processes of their own that start at once: forked from a server that has imported torch and the rest.

What only an interpreter can show, such as its exit code with a closed stdout, needs `run_interpreter`: 3 s each.
"""

import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from small_runs import ENVIRONMENT, Ended

PRELOADED = ["processes", "ranks", "train", "merge", "export_gguf", "bench", "nanoqlora.evaluate", "nanoqlora.chat"]
PRELOADED += ["bitsandbytes", "matplotlib.pyplot", "torch.distributed.fsdp"]


@functools.cache
def context() -> Any:
    """The context that starts processes. What has touched a GPU, as imports here do, cannot be forked."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # else the server does not find what it is to import
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def _be_command(words: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", 1)
    sys.argv = words
    if words[0] == "-m":
        sys.modules.pop(words[1], None)
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def start_process(
    *words: object, out: Path, err: Path, cwd: Path = ROOT, env: Mapping[str, str] = ENVIRONMENT
) -> BaseProcess:
    """`python *words`, with its streams in files. The caller waits for it."""
    process = context().Process(target=_be_command, args=([str(word) for word in words], cwd, dict(env), out, err))
    process.start()
    return process


def run_process(*words: object, cwd: Path = ROOT, env: Mapping[str, str] = ENVIRONMENT) -> Ended:
    """`python *words` to its end, at most 300 s."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start_process(*words, out=out, err=err, cwd=cwd, env=env)
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"{words} has not ended within 300 s")
        return Ended(process.exitcode, out.read_text(), err.read_text())


def run_interpreter(*words: object, cwd: Path = ROOT, env: Mapping[str, str] = ENVIRONMENT) -> Ended:
    """The same with a Python of its own."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    return Ended(done.returncode, done.stdout, done.stderr)
