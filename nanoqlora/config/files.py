"""Files and folders that appear complete or not at all, JSON that is checked, and questions to ask before writing."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


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
    """Write a small text file atomically."""
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
            _delete(old)
            os.replace(path, old)
        os.replace(temporary, path)
        _delete(old)
    finally:
        _delete(temporary)


def _delete(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# Of a process that was killed: `whole_file` and `whole_folder` in the making, and what a folder took the place of.
LEFTOVER = re.compile(r"\.(.+)\.(old|[a-z0-9_]{8})\.tmp")


def sweep(folder: Path) -> None:
    """Remove what a killed process has left half-written in a folder; a complete folder gets its name back."""
    for path in folder.glob(".*.tmp"):
        if found := LEFTOVER.fullmatch(path.name):
            complete = folder / found[1]
            if found[2] == "old" and not complete.exists():
                os.replace(path, complete)
            else:
                _delete(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, under another name: a kill in the middle leaves nothing that looks complete."""
    temporary = path.with_name(f".{path.name}.removing.tmp")  # which `sweep` takes away
    os.replace(path, temporary)
    _delete(temporary)


HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # an escape in JSON for half of a character above U+FFFF


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


def check_space(path: str | Path, num_bytes: int, advice: str = "write elsewhere with --out") -> None:
    """Refuse to begin what does not fit the disk.

    Args:
        advice: what to do instead of freeing space.
    Raises:
        UserError: `path`, which need not exist yet, is on a disk with less than `num_bytes` free.
    """
    free = shutil.disk_usage(_nearest(path)).free
    if free < num_bytes:
        sizes = f"takes {_size(num_bytes)} and its disk has {_size(free)} free"
        raise UserError(f"{path}: {sizes}, so it could not be completed. Free some space, or {advice}.")


def _nearest(path: str | Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(parent for parent in (Path(path).absolute(), *Path(path).absolute().parents) if parent.exists())


def _size(num_bytes: int) -> str:
    """In the unit that people would take."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def check_writable(folder: str | Path, key: str) -> None:
    """Raises UserError if a folder, which need not exist yet, cannot be made or written to; `key` says whose it is."""
    there = _nearest(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "may not be written to" if there.is_dir() else "is a file, not a folder"
        raise UserError(f"{key} {folder}: {there} {what}, so nothing could be saved there. Name another {key}.")


def check_file(path: str | Path, key: str) -> None:
    """The same for a file that will be written: before the work, whose result would have no place."""
    if Path(path).is_dir():
        raise UserError(f"{key} {path}: is a folder, so no file can have this name. Give {key} the name of a file.")
    check_writable(Path(path).parent, key)
