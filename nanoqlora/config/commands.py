"""What every command shares: one way to end.

Exit codes: 0 done; 2 the user's input is wrong (one line, nothing changed); 130 stopped by Ctrl-C or SIGTERM; 1 for the
rest: one line for what can happen to a long run, a traceback for a fault of ours.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable
from traceback import format_exception
from typing import Any, NoReturn

from .errors import Failed, Stopped, UserError, asked, is_out_of_memory, printable
from .files import DISK_FULL, free_on_disk

OURS = "This is a fault of nanoqlora, not of your input: please report it, with these lines and the command."

asks_ranks: list[Callable[[], bool]] = []  # of several ranks: whether this one is the first to tell why the run ends


def is_first_rank() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or (os.environ.get("RANK") or "0") == "0"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with the exit code that its outcome deserves."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # of `answer_early`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Stream, streams)
    try:
        if os.stat(".").st_nlink == 0:
            raise UserError("the folder that this command was started in is deleted. Change to another one.")
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(2, f"error: {' '.join(str(error).split())}" if is_first_rank() else "")
    except Failed as failure:
        is_told = is_first_rank() if failure.everywhere else all(ask() for ask in asks_ranks)
        _leave(1, f"error: {' '.join(str(failure).split())}" if is_told else "")
    except Stopped as stopped:
        _leave(130, str(stopped) if is_first_rank() else "")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as fault:  # it is raised again; under torchrun its traceback gets the rank as a title
        if not all(ask() for ask in asks_ranks):
            sys.exit(1)
        if isinstance(fault, OSError) and fault.errno in DISK_FULL:
            found = f"{fault.filename or 'stdout or a file'} cannot be written ({fault.strerror})"
            found += f": {free_on_disk(fault.filename)}" if fault.filename else ""
            _leave(1, f"error: {found}. Free some space, then run the command again.")
        if isinstance(fault, OSError) and fault.errno in (errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN):
            advice = "Look at the disk or network that it is on, then run the command again."
            _leave(1, f"error: {fault.filename or 'a file'}: {fault.strerror}. {advice}")
        if is_out_of_memory(fault):
            advice = "Use a smaller model or shorter rows, or end other programs."
            _leave(1, f"error: out of memory: {asked(fault)}. {advice}")
        if "RANK" in os.environ:
            print(f"error: rank {os.environ['RANK']} failed:", file=sys.stderr)
        fault.add_note(OURS)
        sys.excepthook = lambda *error: print("".join(format_exception(*error)), file=Stream(sys.stderr), end="")
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


class Stream:
    """stdout or stderr. The run continues if its reader ends, or its encoding lacks a character, or it is closed.

    What a terminal would obey is shown as escapes, but for colours, and the carriage return of a progress bar. A full
    disk under stdout (`> log`) ends the run, because nobody would notice it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # takes the number of the closed one
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, printable(text, but=r"\x1b\[[0-9;]*m|\r"))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable[..., Any], *words: str) -> Any:
        try:
            return work(*words)
        except OSError as error:  # what is still to be written, at the end of the process too, goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if error.errno in DISK_FULL and self._stream.name == "<stdout>":
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leave(code: int, message: str) -> NoReturn:
    """Print this and exit. Signals are ignored: torchrun may stop this rank because another one has just failed too."""
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, signal.SIG_IGN)
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)
