"""Faults at the n-th file operation: the process is killed, or the disk is full. For processes of their own.

`sys.addaudithook` reports every opened, renamed, made and removed file before it happens, and the names are those of
the operations themselves, whoever calls them. What C++ and Rust write (torch.save, safetensors) is not reported: it is
killed before and behind it only.
"""

import errno
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
from processes import context
from small_runs import ENVIRONMENT

from nanoqlora.config import files

CHANGES = {f"os.{name}" for name in ("rename", "remove", "mkdir", "rmdir", "chmod", "truncate", "link", "symlink")}
TAKES_SPACE = {"open", "os.mkdir", "os.link", "os.symlink"}


FORK: Any = multiprocessing.get_context("fork")  # at once; the work must not need threads or a GPU


def begins_change(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is an operation that changes a file or a folder."""
    if event != "open":
        return event in CHANGES
    path, _, flags = arguments
    is_file = isinstance(path, str | bytes | Path) and not os.fsdecode(path).startswith(("/dev/", "/proc/"))
    return is_file and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class Fault:
    """Counts the operations of this process, and acts at one of them.

    Args:
        at: the number, from 1, of the operation before which it acts; 0: never.
        full: from there on the disk has no space for new files, in place of a kill. False: neither.
    """

    def __init__(self, at: int, full: bool = False, inside: str = "") -> None:
        self.at, self.full, self.inside, self.count = at, full, inside, 0
        self.names: list[str] = []  # of the operations, in order

    def set(self) -> "Fault":
        sys.addaudithook(self._hook)
        if exchange := getattr(files, "exchange", None):  # a call of the C library is no event

            def exchanged(*paths: Path) -> bool:
                self._hook("os.rename", paths)
                return exchange(*paths)

            files.exchange = exchanged
        return self

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not begins_change(event, arguments):
            return
        self.count += 1
        if len(self.names) < 10_000:
            self.names.append(f"{event} {arguments[0]}")
        if self.full and self.at and self.count >= self.at and event in TAKES_SPACE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
        if self.count == self.at and not self.full:
            os.kill(os.getpid(), signal.SIGKILL)


def with_fault(fault: Fault, can_exchange: bool, work: Callable[..., None], arguments: tuple, pipe: Any) -> None:
    """In a process of its own: `work(*arguments)` with a fault; the pipe gets how it ended, unless it was killed."""
    if not can_exchange:
        files.exchange = lambda *_: False
    fault.set()
    try:
        work(*arguments)
        ended = ""
    except OSError as error:
        ended = f"{error.strerror}: {error.filename}"
    pipe.send((ended, fault.count))


def under(fault: Fault, work: Callable[..., None], *arguments: object, can_exchange: bool = True) -> tuple[str, int]:
    """How `work` ended under a fault, and after how many operations; ("killed", 0) if it was."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=with_fault, args=(fault, can_exchange, work, arguments, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "killed", 0
    finally:
        process.join()


def write_folder(path: Path, text: str) -> None:
    """Two files, of which one is written atomically too."""
    with files.whole_folder(path) as folder:
        (folder / "weights").write_text(text)
        files.write_text(folder / "config", text)


def take(path: Path, pipe: Any) -> None:
    """Write a folder and never end."""
    with files.whole_folder(path) as folder:
        (folder / "weights").write_text("half")
        pipe.send(str(folder))
        signal.pause()


def be_command(fault: Fault, words: list[str], out: Path, err: Path, pipe: Any) -> None:
    """`python *words` with a fault; the pipe gets the number of operations, unless it was killed."""
    fault.set()
    try:
        processes._be_command(words, out.parent, dict(ENVIRONMENT), out, err)
    finally:
        pipe.send(fault.count)


def run_under(fault: Fault, folder: Path, *words: object) -> tuple[int, int, str]:
    """The exit code of a command under a fault, its operations, and what it wrote to stderr."""
    receiver, sender = context().Pipe(duplex=False)
    out, err = folder / "stdout", folder / "stderr"
    process = context().Process(target=be_command, args=(fault, [*map(str, words)], out, err, sender))
    process.start()
    sender.close()
    count = 0
    with suppress(EOFError):
        count = receiver.recv() if receiver.poll(300) else 0
    process.join(60)
    return process.exitcode, count, err.read_text("utf-8") if err.exists() else ""
