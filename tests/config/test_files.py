"""What is written atomically, with a kill or a full disk at every single operation on a file."""

import os
import signal
from pathlib import Path

import pytest
from faults import FORK, Fault, take, under, write_folder
from small_runs import snapshot

from nanoqlora.config.errors import UserError
from nanoqlora.config.files import check_writable, remove, sweep, temporary_folder, whole_file, whole_folder, write_text

OLD, NEW = {"weights": b"old", "config": b"old"}, {"weights": b"new", "config": b"new"}


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", [{}, OLD])
def test_a_killed_folder_is_the_old_one_or_the_new_one(tmp_path: Path, before: dict, can_exchange: bool):
    """Without an exchange of names, a kill between two renames is made good by the next process."""
    path, seen, ended = tmp_path / "model", [], "killed"
    while ended == "killed":
        if before:
            write_folder(path, "old")
        ended, _ = under(Fault(len(seen) + 1), write_folder, path, "new", can_exchange=can_exchange)
        if not can_exchange:
            sweep(tmp_path, "model")
        seen.append(snapshot(path))
        assert seen[-1] in (before, NEW), len(seen)
        write_folder(path, "new")
        assert snapshot(path) == NEW and [p.name for p in tmp_path.iterdir()] == ["model"], len(seen)
        remove(path)
    assert not ended and len(seen) > 10 and seen[0] == before and seen[-1] == NEW


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_full_disk_leaves_the_old_one(tmp_path: Path, can_exchange: bool):
    """It is named in the error, nothing is left over, and with space it works."""
    path, ended = tmp_path / "model", []
    write_folder(path, "old")
    while not ended or ended[-1]:
        ended.append(under(Fault(len(ended) + 1, full=True), write_folder, path, "new", can_exchange=can_exchange)[0])
        if ended[-1]:
            assert ended[-1].startswith("No space left on device: ") and str(tmp_path) in ended[-1]
            assert snapshot(path) == OLD and [p.name for p in tmp_path.iterdir()] == ["model"], len(ended)
    assert len(ended) > 5 and snapshot(path) == NEW


def test_a_killed_file_is_the_old_one_or_the_new_one(tmp_path: Path):
    path, ended, at = tmp_path / "file", "killed", 0
    while ended == "killed":
        write_text(path, "old")
        ended, _ = under(Fault(at := at + 1), write_text, path, "new")
        assert path.read_text() in ("old", "new")
        write_text(path, "new")
        assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"], at
    assert not ended and at > 5


def test_a_killed_removal_leaves_it_complete_or_gone(tmp_path: Path):
    path, ended, at = tmp_path / "model", "killed", 0
    while ended == "killed":
        write_folder(path, "old")
        ended, _ = under(Fault(at := at + 1), remove, path)
        assert snapshot(path) in (OLD, {}), at
        write_folder(path, "old")
        remove(path)
        assert not list(tmp_path.iterdir()), at
    assert not ended and at > 3


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path):
    """And it is named, until it ends, however that is."""
    path = tmp_path / "model"
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=take, args=(path, sender))
    process.start()
    assert receiver.poll(60)
    theirs = Path(receiver.recv())
    try:
        assert sweep(tmp_path, "model") == f"process {process.pid}"
        with pytest.raises(UserError, match=f"process {process.pid} is writing"):
            check_writable(path.parent, "--out", path.name)
        write_folder(path, "new")  # as two runs that prepare the same data do
        assert snapshot(path) == NEW and (theirs / "weights").read_text() == "half"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    check_writable(path.parent, "--out", path.name)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_files_of_others_are_never_swept(tmp_path: Path):
    """Whatever they look like: only temporary names of what is written here, and a link is not followed."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes").write_text("mine")
    for name in (".notes.20240101.tmp", ".model.tmp", ".model.bak.tmp", "model.abcdefgh.tmp"):
        (tmp_path / name).write_text("mine")
    os.mkfifo(tmp_path / ".model.aaaaaaaa.tmp")  # which must not be waited for
    (tmp_path / ".model.abcdefgh.tmp").symlink_to(tmp_path / "theirs")
    before = {p.name for p in tmp_path.iterdir()} - {".model.abcdefgh.tmp", ".model.aaaaaaaa.tmp"}
    write_folder(tmp_path / "model", "new")
    assert {p.name for p in tmp_path.iterdir()} == before | {"model"}
    assert (tmp_path / "theirs" / "notes").read_text() == "mine"


def test_a_link_is_replaced_by_the_folder(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    write_folder(tmp_path / "model", "new")
    assert not (tmp_path / "model").is_symlink() and {p.name for p in tmp_path.iterdir()} == {"model", "elsewhere"}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Everything works; as nobody can tell who lives, nothing is swept."""

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with temporary_folder(tmp_path / "model") as theirs:
        write_folder(tmp_path / "model", "new")
        assert theirs.exists() and not sweep(tmp_path, "model")
    assert snapshot(tmp_path / "model") == NEW


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path):
    for writer in (whole_file, whole_folder):
        with pytest.raises(OSError) as caught, writer(tmp_path / "it"):
            raise OSError(28, "No space left on device")
        assert caught.value.filename == str(tmp_path / "it") and not list(tmp_path.iterdir())
