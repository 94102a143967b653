"""What every command shares: one kind of error, one way to end, and files that appear whole or not at all.

Exit codes: 0 done; 2 the user's input is wrong (one line, nothing changed); 130 stopped by Ctrl-C or SIGTERM; 1 for the
rest: one line for what can happen to a long run, a traceback for a fault of ours.
"""

import argparse
import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

# What a terminal would obey instead of showing: control characters, except tab and line break, and what changes the
# order or the lines of text.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text of others, for a terminal: characters that it would obey are shown as escapes, such as \\x1b."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape", "backslashreplace").decode(), text)


class UserError(ValueError):
    """Something the user gave is wrong. The message says where, what was found, why it matters, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(visible(str(message)))


class Failed(Exception):
    """The run cannot go on, though the input was right: a rank is gone, a loss is NaN. The message says what to do.

    everywhere: all ranks fail so, with the same message.
    """

    def __init__(self, message: object, everywhere: bool = False) -> None:
        super().__init__(visible(str(message)))
        self.everywhere = everywhere


class Stopped(Exception):
    """The user asked to stop (Ctrl-C, SIGTERM) and what was done so far is saved."""


DISK_FULL = errno.ENOSPC, errno.EDQUOT
OURS = "This is a fault of nanoqlora, not of your input: please report it, with these lines and the command."

asks_ranks: list[Callable[[], bool]] = []  # of several ranks: whether this one is the first to tell why the run ends


def is_first_rank() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1" or (os.environ.get("RANK") or "0") == "0"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and leave the process with the exit code that its outcome deserves."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Stream, streams)
    try:
        for word in sys.argv:
            if any("\udc80" <= character <= "\udcff" for character in word):
                raise UserError(f"command line: {word} is not text in this terminal's encoding. Rename it in UTF-8.")
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
    except Exception as fault:  # it goes on as it came; under torchrun its traceback gets the rank as a title
        if not all(ask() for ask in asks_ranks):
            sys.exit(1)
        if isinstance(fault, OSError) and fault.errno in DISK_FULL:
            what = fault.filename or "stdout or a file"
            _leave(1, f"error: {what} cannot be written ({fault.strerror}). Make room, then run the command again.")
        if "RANK" in os.environ:
            print(f"error: rank {os.environ['RANK']} failed:", file=sys.stderr)
        fault.add_note(OURS)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams


class Stream:
    """stdout or stderr, whose reader or terminal may end, and whose encoding may lack characters: the run goes on.

    It may be closed (`>&-`) too. Of a full disk under stdout, `> log`, nobody would know: that ends the run.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = open(os.devnull, "w") if stream is None else stream  # takes the number of the closed one
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text) or len(text)

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
    """Say this and end, also where torchrun tells this rank to end because another one has just done the same."""
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, signal.SIG_IGN)
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; when the block ends well it is flushed to disk and renamed to `path`.

    A kill at any moment leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp made it private
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file whole."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: it is filled under a temporary name, then takes the place of `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        temporary.chmod(0o755)
        old = path.with_name(f".{path.name}.old.tmp")
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Of a process that was killed: `whole_file` and `whole_folder` in the making, and what a folder took the place of.
LEFTOVER = re.compile(r"\.(.+)\.(old|[a-z0-9_]{8})\.tmp")


def sweep(folder: Path) -> None:
    """Remove what a killed process has left half-written in a folder; a whole folder gets its name back."""
    for path in folder.glob(".*.tmp"):
        if found := LEFTOVER.fullmatch(path.name):
            whole = folder / found[1]
            if found[2] == "old" and not whole.exists():
                os.replace(path, whole)
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file or a folder, under another name: a kill in the middle leaves nothing that looks whole."""
    temporary = path.with_name(f".{path.name}.removing.tmp")  # which `sweep` takes away
    os.replace(path, temporary)
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink()


HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # an escape in JSON for half of a character above U+FFFF
KINDS = {str: "text", dict: "a map", list: "a list", int: "a whole number", float: "a number", bool: "true or false"}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`) whose keys differ; json itself would keep the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the key {twice} stands twice in one object, so it is not clear which value is meant")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that has to hold an object. NaN and infinity are not JSON, but other tools write them."""
    try:
        value = json.loads(text := path.read_text(encoding="utf-8"))
        if HALF_A_PAIR.search(text):  # raises ValueError for a half that stands alone, which no file could be given
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. It is needed to know what the other files mean.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    except (ValueError, RecursionError) as error:  # also a number of more than 4300 digits, and no UTF-8
        raise UserError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is expected.")
    return value


def expect(where: str, value: Any, *kinds: type | None, each: tuple[type, ...] = ()) -> Any:
    """A value from a file, if it is what the rest of the program takes it for.

    Args:
        where: file and key, for the message.
        kinds: types that it may have, exactly; None allows null.
        each: types of the items of a list, or of the values of a map.
    Raises:
        UserError: it, or an item of it, is of another type.
    """
    wrong = [value] if type(value) not in kinds and not (value is None and None in kinds) else []
    if each and value and not wrong:
        items = value.values() if isinstance(value, dict) else value
        kinds, wrong = each, [item for item in items if type(item) not in each]
    if wrong:
        found, wanted = repr(wrong[0])[:60], " or ".join(KINDS.get(kind, "null") for kind in kinds)
        raise UserError(f"{where} is or holds {found}, where {wanted} is expected. Correct it, or copy the file again.")
    return value


_noted: set[str] = set()


def note(text: str) -> None:
    """Print a line that the user should know of, once, however often the same file is opened."""
    if text not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")
    _noted.add(text)


def wrong_type(value: Any, kind: Any, where: str) -> str:
    """What in a value from JSON is not of the type that it has to be, by its place; nothing: "".

    Args:
        kind: str, bool, int, float, tuple[x, ...], dict[str, x], a dataclass, or one of several as in `str | None`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        found = [wrong_type(value, one, where) for one in inner if one is not NoneType or value is None]
        return "" if "" in found else found[0]
    if is_dataclass(kind) and isinstance(value, dict):
        kinds = {field.name: field.type for field in fields(kind)}
        unknown = [key for key in value if key not in kinds]
        if unknown:
            return f"{where}{' has ' if where else ''}{unknown[0]!r}, which is not one of {', '.join(kinds)}"
        found = [wrong_type(one, kinds[key], f"{where}.{key}".strip(".")) for key, one in value.items()]
    elif origin is tuple and isinstance(value, list):
        found = [wrong_type(one, inner[0], f"{where}[{i}]") for i, one in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        found = [wrong_type(one, inner[1], f"{where}.{key}") for key, one in value.items()]
    elif type(value) is kind or value is None and kind is NoneType:
        found = []
    else:
        named = "a list" if origin is tuple else "a map" if origin is dict or is_dataclass(kind) else kind.__name__
        return f"{where} is {type(value).__name__}, where {named} is expected"
    return next((one for one in found if one), "")


def check_space(path: str | Path, num_bytes: int, advice: str = "write elsewhere with --out") -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        advice: what to do other than to make room.
    Raises:
        UserError: `path`, which need not exist yet, is on a disk with less than `num_bytes` free.
    """
    folder = next(parent for parent in (Path(path).absolute(), *Path(path).absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{path}: takes {_size(num_bytes)} and its disk has {_size(free)} free, so it would break off half-way. "
            f"Free some, or {advice}."
        )


def _size(num_bytes: int) -> str:
    """In the unit that people would take."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def check_writable(folder: str | Path, key: str) -> None:
    """Raises UserError if a folder, which need not exist yet, cannot be made or written to; `key` says whose it is."""
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "may not be written to" if there.is_dir() else "is a file, not a folder"
        raise UserError(f"{key} {folder}: {there} {what}, so nothing could be saved there. Name another {key}.")


def check_file(path: str | Path, key: str) -> None:
    """The same for a file that will be written: before the work, whose result would have no place."""
    if Path(path).is_dir():
        raise UserError(f"{key} {path}: is a folder, so no file can have this name. Give {key} the name of a file.")
    check_writable(Path(path).parent, key)


class Parser(argparse.ArgumentParser):
    """Options of the commands that need no YAML file; a wrong one ends like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}. See --help.")

    def add_model_options(self) -> None:
        """The options that say which model: --model, --adapter, --other_base, --load_in_4bit, --bf16."""
        path = os.path.expanduser
        self.add_argument("--model", required=True, type=path, help="Hugging Face folder, .gguf file, or hub name")
        self.add_argument("--adapter", type=path, help="folder or hub name of a trained adapter")
        other = "use an adapter on other weights than those that it was trained on"
        self.add_argument(
            "--other_base", "--other-base", type=_to_bool, nargs="?", const=True, default=False, help=other
        )
        self.add_argument("--load_in_4bit", "--load-in-4bit", type=_to_bool, nargs="?", const=True, default=False)
        self.add_argument("--bf16", type=lambda text: "auto" if text == "auto" else _to_bool(text), default="auto")


def _to_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"
