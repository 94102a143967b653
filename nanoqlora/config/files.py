"""Files and folders that appear complete or not at all, JSON that is checked, and questions to ask before writing."""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pydantic

from .errors import UserError, check_regular

UMASK = os.umask(0o077)  # which can be read only by setting it
os.umask(UMASK)

DISK_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG  # the last on disks that hold no file of more than 4 GB
SIGNS_OF_DISK = "I/O error", "inline_container", "PytorchStreamWriter", "iostream"  # in errors of libraries


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary name; when the block ends well the file is flushed to disk and renamed to `path`.

    A kill at any moment leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    with temporary_folder(path) as folder:  # libraries may write files of their own beside it
        yield folder / path.name
        _flush(folder / path.name)
        os.replace(folder / path.name, path)


def write_text(path: str | Path, text: str) -> None:
    """Write a small text file atomically."""
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: it is filled under a temporary name, then takes the place of `path`."""
    path = Path(path)
    with temporary_folder(path) as new:
        yield new
        for file in new.iterdir():
            _flush(file)
        new.chmod(0o777 & ~UMASK)
        if not os.path.lexists(path) or not exchange(new, path):  # the old one is deleted under its temporary name
            old = path.with_name(f".{path.name}.old.tmp")
            if os.path.lexists(path):
                os.replace(path, old)  # after a kill here `sweep` gives it its name back
            os.replace(new, path)
            _delete(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, so that there is no moment without either. False: this system cannot."""
    renameat2: Any = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc's; -100 is AT_FDCWD, 2 RENAME_EXCHANGE
    return renameat2 is not None and renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked as long as this process lives, and deleted at the end of the block.

    What killed processes have left of the same `path` is deleted first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, re.escape(path.name))
    with ExitStack() as stack:
        while True:
            new = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            with suppress(FileNotFoundError):  # another process swept it before it was locked
                if not stack.enter_context(held(new)) and new.exists():
                    break
        try:
            yield new
        except Exception as error:
            if isinstance(error, OSError):
                error.filename = error.filename or str(path)  # which a full disk does not give
            elif any(sign in str(error) for sign in SIGNS_OF_DISK):
                raise OSError(errno.ENOSPC, str(error), str(path)) from error
            raise
        finally:
            _delete(new)


def _flush(file: Path) -> None:
    """Flush a file to the disk. Others may read it, which safetensors does not let them."""
    file.chmod(0o666 & ~UMASK)
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Lock a file or a folder until the end of the block, or of this process, however it ends.

    Gives "" if it is locked now, who has it already ("process 123"), or None where the file system has no locks.
    """
    handle, holder = os.open(path, os.O_RDONLY | os.O_NONBLOCK), None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder = ""
        except OSError as error:
            if isinstance(error, BlockingIOError):
                locks = Path("/proc/locks")  # "... PROCESS DEVICE:INODE 0 EOF" in each line
                text = locks.read_text() if locks.is_file() else ""
                found = re.search(rf" ([1-9]\d*) \S+:{os.fstat(handle).st_ino} ", text)
                holder = f"process {found[1]}" if found else "another process"
        yield holder
    finally:
        os.close(handle)


def sweep(folder: Path, names: str) -> str:
    """Delete what killed processes have left half-written in a folder; a complete folder gets its name back.

    Args:
        names: of what this program writes there, as a regular expression.
    Returns:
        a process that is writing one of them now; "" for none.
    """
    writer = ""
    for path in folder.glob(".*.tmp"):
        if found := re.fullmatch(rf"\.({names})\.(old|[a-z0-9_]{{8}})\.tmp", path.name):
            with suppress(OSError), held(path) as holder:
                writer = writer or holder or ""
                if found[2] == "old" and not (folder / found[1]).exists():
                    os.replace(path, folder / found[1])
                elif holder == "":
                    _delete(path)
    return writer


def remove(path: Path) -> None:
    """Remove a file or a folder, under another name: a kill in the middle leaves nothing that looks complete."""
    hidden = path.with_name(f".{path.name}.removing.tmp")  # which `sweep` deletes
    _delete(hidden)
    os.replace(path, hidden)
    _delete(hidden)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`) whose keys differ; json itself would keep the last value of each."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise UserError(f"the key {twice} stands twice in one object, so it is not clear which value is meant")
    return found


def read_text(path: str | Path, advice: str, where: str = "") -> str:
    """A text file. Raises UserError, which begins with `where`; of a missing file it says `advice`."""
    try:
        check_regular(path)
        return Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{where}{path}: no such file. {advice}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}{path}: cannot be read ({error}). Give a text file in UTF-8.") from None


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """A JSON file that holds an object, or what `kind` says; see `expect`."""
    is_adapter = path.with_name("adapter_config.json").exists()
    advice = "The folder holds an adapter: give its base model too" if is_adapter else "Copy the folder again"
    return expect(path, read_text(path, f"The others need it. {advice}"), kind, is_json=True)


_adapter = cache(pydantic.TypeAdapter)  # it takes longer to make one than to use it


def expect(where: object, value: Any, kind: Any, is_json: bool = False) -> Any:
    """A value of a file that may come from anybody, if all of it is what the program takes it for.

    Args:
        where: file and key, for the message. kind: a type that pydantic checks.
        is_json: the value is a JSON text. NaN and infinity are not JSON, but other tools write them. Refused are more
            than 200 lists in lists, numbers of thousands of digits, and halves of surrogate pairs.
    """
    adapter = _adapter(kind)
    try:
        return (adapter.validate_json if is_json else adapter.validate_python)(value, strict=True)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(str(part)[:40] for part in found["loc"] if part not in ("[key]", "int", "float"))
        what = found["msg"].removeprefix("Value error, ")
        if found["type"] == "json_invalid":
            half = ": half of a surrogate pair" * ("hex escape" in what or "surrogate" in what)
            what = f": not valid JSON ({what.removeprefix('Invalid JSON: ')}{half})"
        else:
            shown = "missing" if found["type"] == "missing" else json.dumps(found["input"], default=str)[:60]
            what = f"{': ' * bool(place)}{place} is {shown}: {what[0].lower()}{what[1:]}"
        raise UserError(f"{where}{what}. Correct it, or copy the file again.") from error


def real(path: str | Path) -> Path:
    """The path without links. One that leads to itself stays, for which `Path.resolve` has an error of its own."""
    return Path(os.path.realpath(path))


def check_space(path: str | Path, num_bytes: int, advice: str = "write elsewhere with --out") -> None:
    """Refuse to begin what does not fit the disk.

    Args:
        advice: what to do instead of freeing space.
    Raises:
        UserError: `path`, which need not exist yet, is on a disk with less than `num_bytes` free.
    """
    if shutil.disk_usage(_nearest(path)).free < num_bytes:
        sizes = f"takes {_size(num_bytes)} and {free_on_disk(path)}"
        raise UserError(f"{path}: {sizes}, so it could not be completed. Free some space, or {advice}.")


def free_on_disk(path: str | Path) -> str:
    """What a full disk lacks, in words: bytes or, for many small files, inodes."""
    there = _nearest(path)
    disk = os.statvfs(there)
    few = disk.f_files and disk.f_favail < 1000  # some systems do not count them
    files = f" and inodes for {disk.f_favail} files" if few else ""
    return f"its disk has {_size(shutil.disk_usage(there).free)}{files} free"


def _nearest(path: str | Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    return next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if os.path.exists(p))


def _size(num_bytes: int) -> str:
    """In the unit that people would take."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


def check_writable(folder: str | Path, key: str, name: str = "x") -> None:
    """Make a folder's missing parents and the temporary name of a file in it, elsewhere on its disk, and delete them.

    Args:
        folder: need not exist yet. key: of the user, for the message. name: of the file that will be written there.
    Raises:
        UserError: something of this cannot be made, or a process that lives is writing the file; OSError: a full disk.
    """
    there = _nearest(folder)
    parts = [part for part in Path(folder).absolute().relative_to(there).parts if part != ".."]
    try:
        if not there.is_dir() or parts and os.path.islink(there / parts[0]):
            raise OSError(errno.ENOTDIR, "is a link to nothing" if there.is_dir() else "is a file, not a folder")
        with temporary_folder(there / "probe") as probe, temporary_folder(probe.joinpath(*parts, name)):
            pass
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(f"{key} {folder}: {there}: {error.strerror}. Name another {key} to save to.") from error
    if writer := sweep(Path(folder), re.escape(name)):
        raise UserError(f"{key} {folder}: {writer} is writing {name} now. Wait for its end, or give another {key}.")


def check_file(path: str | Path, key: str) -> None:
    """The same for a file that will be written: before the work, whose result would have no place."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{key} {path}: is a folder, a device or a pipe. Give {key} the name of a file.")
    check_writable(Path(path).parent, key, Path(path).name)


def sha256_of(path: Path) -> str:
    """A hash of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
