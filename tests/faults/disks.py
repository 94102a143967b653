"""Full disks under every command, and two processes in one folder.

    python tests/faults/disks.py [operations] [small] [two] [--minutes 2] [--seed 0] [--folder DIR]

operations: no space or no inodes from the n-th change of a file on, for random n. small: real disks (tmpfs, which needs
root) of any size, in bytes and in inodes. two: the same command twice at random distances. Each time: one line, exit 1
or 2, what was there before is there still, nothing is left over, and with space the command ends as it should.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worlds import VARIANTS, Book, World, difference, facts, judge, wait

# isort: split
from faults import Fault
from kills import count_operations, run_parts, visible

import export_gguf
import merge
import train
from nanoqlora.evaluate import main as evaluate

Command = tuple[Callable[[], None], list[Any]]


def commands(world: World, yml: Path, out: Path) -> dict[str, Command]:
    """What writes files, each into `out`."""
    merged, nll = world.out / "merged", out / "nll.jsonl"
    return {
        "merge": (merge.main, [yml, "--out", out / "again"]),
        "export": (export_gguf.main, [yml, "--out", out / "model.gguf"]),
        "export an adapter": (
            export_gguf.main,
            ["--adapter", world.out, "--model", world.model, "--out", out / "a.gguf"],
        ),
        "evaluate": (evaluate, ["--model", merged, "--data", world.data, "--out", nll]),
    }


def a_merged_run(world: World) -> Path:
    yml = world.new_run(val_set_size=3, auto_resume_from_checkpoints=False)
    for main in (train.main, merge.main):
        code, log = world.go(main, yml)
        assert code == 0, log[-2000:]
    return yml


def operations(world: World, rng: random.Random, end: float) -> Book:
    book = Book("full from the n-th change on")
    yml, out = a_merged_run(world), world.folder / "results"
    kept = shutil.copytree(world.run, world.folder / "kept")
    known: dict[str, tuple[int, dict[str, Any]]] = {}
    found = commands(world, yml, out)
    for name, (main, words) in found.items():
        out.mkdir()
        known[name] = count_operations(world, main, *words)[0], facts(out)
        shutil.rmtree(out)
    while time.time() < end:
        if rng.random() < 0.4:
            full_training(world, rng, book)
            shutil.rmtree(world.run)
            shutil.copytree(kept, world.run)
            continue
        name = rng.choice(list(found))
        (main, words), (count, right) = found[name], known[name]
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        has_earlier = rng.random() < 0.5
        if has_earlier:
            assert world.go(main, *words)[0] == 0
        before, at = facts(out), rng.randrange(1, count + 1)
        story = f"{name}{' over an earlier one' if has_earlier else ''}, from change {at} of {count} on"
        code, log = world.go(main, *words, before=Fault(at, full=True).set)
        judge(book, story, code, log)
        now = facts(out)
        if code and set(now[""]) != set(visible(now)[""]):
            book.fault(f"left over: {sorted(set(now['']) - set(visible(now)['']))}", story)
        for file in before[""]:
            if now.get(file) not in (before.get(file), right.get(file)):
                book.fault(f"{file} was lost", story)
        code, log = world.go(main, *words)
        if code or (wrong := difference(right, facts(out))):
            book.fault(f"with space: exit {code}: {log[-200:] if code else wrong}", story)
    return book


RIGHT: dict[str, tuple[int, dict[str, Any]]] = {}


def full_training(world: World, rng: random.Random, book: Book) -> None:
    """A run whose disk is full from some change on goes on when there is space."""
    name = rng.choice(("plain", "best", "patience", "packed"))
    if name not in RIGHT:
        count = count_operations(world, train.main, world.new_run(**VARIANTS[name]))[0]
        RIGHT[name] = count, facts(world.out)
    count, right = RIGHT[name]
    yml, at = world.new_run(**VARIANTS[name]), rng.randrange(1, count + 1)
    story = f"train, {name}, from change {at} of {count} on"
    code, log = world.go(train.main, yml, before=Fault(at, full=True).set)
    judge(book, story, code, log)
    if code and world.out.exists() and (left := [p.name for p in world.out.glob(".*")]):
        book.fault(f"left over: {left}", story)
    code, log = world.go(train.main, yml)
    if code or (wrong := difference(right, facts(world.out))):
        book.fault(f"with space: exit {code}: {log[-200:] if code else wrong}", story)


@contextmanager
def disk(folder: Path, **limits: object) -> Iterator[Path]:
    """A file system in memory of so many bytes (size) or inodes (nr_inodes)."""
    folder.mkdir(exist_ok=True)
    options = ",".join(f"{name}={value}" for name, value in limits.items())
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def small(world: World, rng: random.Random, end: float) -> Book:
    book = Book("small disks")
    place = world.folder / "disk"
    yml = a_merged_run(world)
    right: dict[str, dict[str, Any]] = {}
    sizes: dict[str, int] = {}
    found = commands(world, yml, place)
    with disk(place, size="50m"):
        for name, (main, words) in found.items():
            shutil.rmtree(place / "x", ignore_errors=True)
            code, log = world.go(main, *words)
            assert code == 0, log
            right[name], sizes[name] = facts(place), sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
            for path in place.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = world.folder / "second"
    run.mkdir()
    text = yml.read_text().replace("auto_resume_from_checkpoints: false", "auto_resume_from_checkpoints: true")
    found["train"] = train.main, [run / "train.yml", "--output_dir", place / "out", "--eval_steps", 2]
    (run / "train.yml").write_text(text)
    found["rehearse"] = train.main, [*found["train"][1], "--rehearse"]
    found["plan"] = train.main, [*found["train"][1], "--plan"]
    found["the cache"] = train.main, [*found["train"][1], "--dataset_prepared_path", place / "prepared", "--plan"]
    with disk(place, size="50m"):
        for name in ("train", "rehearse", "plan", "the cache"):
            code, log = world.go(*[found[name][0], *found[name][1]])
            assert code == 0, log
            right[name], sizes[name] = facts(place), sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
            for path in place.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    while time.time() < end:
        name = rng.choice(list(found))
        main, words = found[name]
        limit = rng.choice(("size", "nr_inodes"))
        number = rng.randrange(4, 30) if limit == "nr_inodes" else rng.randrange(4096, 2 * sizes[name] + 500_000, 4096)
        story = f"{name}, {limit} {number}"
        with disk(place, **{limit: number}):
            code, log = world.go(main, *words)
            judge(book, story, code, log)
            if left := [str(p.relative_to(place)) for p in place.rglob(".*")]:
                book.fault(f"left over: {left}", story)
            if code == 1 and name in ("merge", "export", "evaluate") and list(place.iterdir()):
                book.counts["something of a failed command is there"] += 1
            subprocess.run(["mount", "-o", "remount,size=50m,nr_inodes=0", str(place)], check=True)
            code, log = world.go(main, *words)
            if code or (wrong := difference(right[name], facts(place))):
                book.fault(f"with space: exit {code}: {log[-300:] if code else wrong}", story)
    return book


def two(world: World, rng: random.Random, end: float) -> Book:
    """Both at once: one ends well, the other is refused with the number of the first, or comes when it has ended."""
    book = Book("two at once")
    yml = a_merged_run(world)
    out = world.folder / "results"
    found = commands(world, yml, out) | {"train": (train.main, [yml, "--output_dir", out])}
    right: dict[str, tuple[dict[str, Any], float]] = {}
    for name, (main, words) in found.items():
        began = time.perf_counter()
        code, log = world.go(main, *words)
        assert code == 0, log
        right[name] = facts(out), time.perf_counter() - began
        shutil.rmtree(out)
    logs = world.folder / "one.log", world.folder / "other.log"
    while time.time() < end:
        name = rng.choice(list(found))
        main, words = found[name]
        shutil.rmtree(out, ignore_errors=True)
        delay = rng.random() * right[name][1]
        processes = []
        for log, pause in zip(logs, (delay, 0), strict=True):
            world.log = log
            processes.append(world.fork(main, *words))
            time.sleep(pause)
        codes = [wait(process) for process in processes]
        story = f"{name}, {delay:.2f} s apart: exits {codes}"
        book.counts[f"{name}: exits {sorted(codes)}"] += 1
        for code, log, other in zip(codes, logs, reversed(processes), strict=True):
            text = log.read_text()
            judge(book, story, code, text, (0, 2))
            if code == 2 and f"process {other}" not in text and "finished run" not in text:
                book.counts["refused, without a process"] += 1
                print("    ", text.strip().splitlines()[-1][:200])
        if 0 not in codes:
            book.counts["both refused"] += 1
        elif wrong := difference(right[name][0], facts(out)):
            book.fault(wrong, story)
    return book


PARTS = {"operations": operations, "small": small, "two": two}


if __name__ == "__main__":
    run_parts(PARTS, __doc__)
