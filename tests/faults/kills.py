"""Kill small trainings, merges, exports and rehearsals, start them again, and compare with what was never killed.

    python tests/faults/kills.py [PART ...] [--minutes 2] [--seed 0] [--folder DIR]

The parts are train, merge, export, rehearse, ranks and, only if it is named, torchrun.

A process is killed with SIGKILL after a random time, before its n-th change of a file, or while it writes a line of the
log. Then everything in place has to be complete, and the same command has to end bit for bit as if nothing had
happened, with nothing left over. Children are forked from a process that has imported everything: a second each. For
`torchrun`, launcher and ranks are started as a user does: ten seconds each.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from worlds import ROOT, VARIANTS, Book, World, cut_log, difference, facts, wait

# isort: split
import torch
from faults import Fault
from safetensors.torch import load_file

import export_gguf
import merge
import train
from nanoqlora.config.commands import OURS, run_command
from nanoqlora.parallel.distributed import MEETING_LIMIT
from nanoqlora.run.output_dir import read_log

COMPLETE = {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json"}


def incomplete(folder: Path) -> str:
    """What is cut off or damaged in an output folder; temporary files may be so."""
    for path in sorted(folder.rglob("*")) if folder.exists() else ():
        parts = path.relative_to(folder).parts
        try:
            if any(part.startswith(".") for part in parts):
                continue
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.is_dir() and path.name.startswith("checkpoint-"):
                if missing := COMPLETE - {file.name for file in path.iterdir()}:
                    return f"{path.name} has no {sorted(missing)}"
        except Exception as error:
            return f"{path.relative_to(folder)} is damaged: {error}"
    return ""


def count_operations(world: World, main: Callable[[], None], *words: object) -> tuple[int, float]:
    """The changes of files of a command that nobody kills, and its seconds."""
    file = world.folder / "count"

    def before() -> None:
        fault = Fault(0).set()
        leave = os._exit
        os._exit = lambda code: (file.write_text(str(fault.count)), leave(code))  # type: ignore[assignment]

    began = time.perf_counter()
    code, log = world.go(main, *words, before=before)
    assert code == 0, log[-2000:]
    return int(file.read_text()), time.perf_counter() - began


def kinds_of_death(rng: random.Random, operations: int, seconds: float, lines: int = 0) -> Iterator[tuple[str, dict]]:
    """Without end: a text, and what `World.go` takes for it. Every operation comes once before one comes again."""
    order: list[int] = []
    while True:
        kind = rng.random()
        if kind < 0.3:
            yield f"after {(delay := rng.random() * seconds):.3f} s", {"kill_after": delay}
        elif kind < 0.4 and lines:
            yield f"in line {(at := rng.randrange(1, lines + 1))} of the log", {"before": cut_log(at)}
        else:
            order = order or rng.sample(range(1, operations + 1), operations)
            yield f"before change {(at := order.pop())} of {operations}", {"before": Fault(at).set}


class Trainings:
    """A run of each variant that was never killed."""

    def __init__(self, world: World) -> None:
        self.world, self.known = world, dict[str, tuple[dict[str, Any], int, float]]()

    def of(self, name: str) -> tuple[dict[str, Any], int, float]:
        """What it leaves, the number of its changes of files, and its seconds."""
        if name not in self.known:
            yml = self.world.new_run(**VARIANTS[name])
            code, log = self.world.go(train.main, yml)
            assert code == 0, log[-2000:]
            right = facts(self.world.out)
            yml = self.world.new_run(**VARIANTS[name])
            operations, seconds = count_operations(self.world, train.main, yml)
            assert not (wrong := difference(right, facts(self.world.out))), f"two runs that nobody kills: {wrong}"
            self.known[name] = right, operations, seconds
            print(f"{name}: {operations} changes of files, {seconds:.2f} s", flush=True)
        return self.known[name]


def trainings(world: World, rng: random.Random, end: float) -> Book:
    book, known = Book("train"), Trainings(world)
    deaths: dict[str, Iterator[tuple[str, dict]]] = {}
    while time.time() < end:
        name = rng.choice(list(VARIANTS))
        right, operations, seconds = known.of(name)
        lines = len(right["metrics.jsonl"])
        death = deaths.setdefault(name, kinds_of_death(rng, operations, seconds, lines))
        yml, story = world.new_run(**VARIANTS[name]), [name]
        if rng.random() < 0.2:
            shutil.rmtree(world.prepared, ignore_errors=True)
        book.counts["runs"] += 1
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            text, how = next(death)
            story.append(text)
            code, log = world.go(train.main, yml, **how)
            if code == 0:
                break
            book.counts["kills"] += 1
            if code != -9:
                book.fault(f"exit {code}: {log[-300:]}", " > ".join(story))
                break
            if wrong := incomplete(world.out):
                book.fault(wrong, " > ".join(story))
        code, log = world.go(train.main, yml)
        if code:
            book.fault(f"cannot be resumed: exit {code}: {log[-400:]}", " > ".join(story))
        elif wrong := difference(right, facts(world.out)):
            book.fault(wrong, " > ".join(story))
        if left := [path.name for path in world.prepared.iterdir() if path.name.startswith(".")]:
            book.fault(f"left over in dataset_prepared_path: {left}", " > ".join(story))
            shutil.rmtree(world.prepared)
    return book


def visible(found: dict[str, Any]) -> dict[str, Any]:
    """Facts without temporary files."""
    names = [name for name in found[""] if not any(part.startswith(".") for part in Path(name).parts)]
    return {"": names} | {name: found[name] for name in names if name in found}


def writers(world: World, rng: random.Random, end: float, part: str) -> Book:
    """merge.py over an earlier merge, export_gguf.py over an earlier file of ours, or of somebody else."""
    book = Book(part)
    yml = world.new_run(val_set_size=3, auto_resume_from_checkpoints=False)
    for main in (train.main, merge.main):
        code, log = world.go(main, yml)
        assert code == 0, log[-2000:]
    starts: dict[str, Path] = {}
    gguf = world.out / "model-q8_0.gguf"
    if part == "merge":
        main, words = merge.main, [yml, "--dtype", "fp16"]
        starts["over an earlier merge"] = shutil.copytree(world.out, world.folder / "earlier")
        shutil.rmtree(world.out / "merged")
        starts["for the first time"] = shutil.copytree(world.out, world.folder / "first")
    else:
        main, words = export_gguf.main, [yml]
        starts["for the first time"] = shutil.copytree(world.out, world.folder / "first")
        gguf.write_bytes(b"a file of another program" * 1000)
        starts["over the file of another"] = shutil.copytree(world.out, world.folder / "others")
        gguf.unlink()
        assert world.go(main, yml, "--type", "f32", "--out", gguf)[0] == 0
        starts["over an earlier file"] = shutil.copytree(world.out, world.folder / "earlier")
    right: dict[str, tuple[dict, dict]] = {}
    deaths: dict[str, Iterator[tuple[str, dict]]] = {}
    for name, start in starts.items():
        shutil.rmtree(world.out)
        shutil.copytree(start, world.out)
        before = facts(world.out)
        operations, seconds = count_operations(world, main, *words)
        right[name] = before, facts(world.out)
        deaths[name] = kinds_of_death(rng, operations, seconds)
        print(f"{part} {name}: {operations} changes of files, {seconds:.2f} s", flush=True)
    while time.time() < end:
        name = rng.choice(list(starts))
        shutil.rmtree(world.out)
        shutil.copytree(starts[name], world.out)
        story, (old, new) = [name], right[name]
        for _ in range(rng.choice((1, 1, 2, 3))):
            text, how = next(deaths[name])
            if "kill_after" in how and rng.random() < 0.3:
                how |= {"signal": rng.choice((signal.SIGTERM, signal.SIGINT))}
                text += f", {how['signal'].name}"
            story.append(text)
            book.counts["runs"] += 1
            code, log = world.go(main, *words, **how)
            if code == 0:
                break
            book.counts["kills"] += 1
            now = facts(world.out)
            if code not in (-9, 130, -signal.SIGTERM):  # the last before the command has begun
                book.fault(f"exit {code}: {log[-300:]}", " > ".join(story))
            if code == 130 and len(story) == 2 and set(now[""]) != set(visible(now)[""]):
                book.counts["stopped by a signal, with something left for the next one to delete"] += 1
            for file in {*visible(old)[""], *visible(now)[""]}:  # each is the old one or the new one
                kept = now.get(f"{file}.old") == old.get(file) and file in old
                if file not in now and file in old and old[file] != new.get(file) and not kept:
                    book.fault(f"{file} is not there any more", " > ".join(story))
                if file in now and now[file] not in (old.get(file), new.get(file)):
                    book.fault(f"{file} is neither the old one nor the new one", " > ".join(story))
            merged = {n: v for n, v in now.items() if n.startswith("merged/")}
            sides = [{n: v for n, v in side.items() if n.startswith("merged/")} for side in (old, new)]
            if merged not in sides:
                book.fault(f"merged is {'not there' if not merged else 'mixed'}", " > ".join(story))
            if gguf.name in old and not gguf.exists():
                book.fault("nothing of this name is there", " > ".join(story))
        code, log = world.go(main, *words)
        if code:
            book.fault(f"does not run again: exit {code}: {log[-300:]}", " > ".join(story))
        elif wrong := difference(new, facts(world.out)):
            book.fault(wrong, " > ".join(story))
    return book


def rehearsals(world: World, rng: random.Random, end: float) -> Book:
    """--rehearse killed with its children, and rehearsed again: nothing is left of either."""
    book = Book("rehearse")
    yml = world.new_run()
    before = facts(world.run)
    operations, seconds = count_operations(world, train.main, yml, "--rehearse")
    deaths = kinds_of_death(rng, operations, seconds)
    while time.time() < end:
        text, how = next(deaths)
        book.counts["runs"] += 1
        code, log = world.go(train.main, yml, "--rehearse", **how)
        if code == 0:
            continue
        book.counts["kills"] += 1
        code, log = world.go(train.main, yml, "--rehearse")
        if code:
            book.fault(f"exit {code}: {log[-400:]}", text)
        if wrong := difference(before, facts(world.run)):
            book.fault(wrong, text)
            world.new_run()
    return book


def be_rank(words: list[str], deaths: dict[int, int]) -> None:
    """What torchrun's agent runs: train.py as a rank; one of them dies before its n-th change of a file."""
    sys.argv = words
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    if rank in deaths:
        Fault(deaths[rank]).set()
    run_command(train.main)


def torchrun(words: list[object], deaths: dict[int, int]) -> None:
    """torchrun --nproc_per_node=2 train.py *words, its ranks forked."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"is_host": True},
        start_method="fork",
        monitor_interval=0.1,
        max_restarts=0,
    )
    elastic_launch(config, be_rank)(["train.py", *map(str, words)], deaths)


def on_two_ranks(world: World, rng: random.Random, end: float) -> Book:
    """torchrun with two ranks: one is killed, or the agent with both."""
    book = Book("torchrun, two ranks")
    known: dict[str, tuple[dict[str, Any], float]] = {}

    def start(yml: Path, deaths: dict[int, int]) -> int:
        return world.fork(lambda: torchrun([yml], deaths))

    while time.time() < end:
        name = rng.choice(RANKS_VARIANTS)
        keys = VARIANTS[name] | {"micro_batch_size": 2}
        if name not in known:
            began = time.perf_counter()
            code = wait(start(world.new_run(**keys), {}))
            assert code == 0, world.log.read_text()[-2000:]
            known[name] = facts(world.out), time.perf_counter() - began
            print(f"{name}: {known[name][1]:.1f} s", flush=True)
        right, seconds = known[name]
        yml = world.new_run(**keys)
        book.counts["runs"] += 1
        kind = rng.random()
        if kind < 0.6:
            rank, at = 0, rng.randrange(1, 250)
            story, code = f"{name}, rank {rank} before change {at}", wait(start(yml, {rank: at}))
        else:
            delay = seconds * (0.2 + 0.8 * rng.random())
            pid, story = start(yml, {}), f"{name}, all after {delay:.2f} s"
            time.sleep(delay)
            children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            victims = [pid, *children] if kind < 0.8 or not children else [rng.choice(children)]
            story += "" if victims[0] == pid else ", one rank only"
            for victim in victims:
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            code = wait(pid)
            for child in children:  # orphans of the agent die by themselves or here, before the next run
                for _ in range(100):
                    if not Path(f"/proc/{child}").exists():
                        break
                    time.sleep(0.02)
        if code == 0:
            continue
        book.counts["kills"] += 1
        if wrong := incomplete(world.out):
            book.fault(wrong, story)
        code = wait(start(yml, {}))
        if code:
            book.fault(f"cannot be resumed: exit {code}: {world.log.read_text()[-600:]}", story)
        elif wrong := difference(right, facts(world.out)):
            book.fault(wrong, story)
    return book


RANKS_VARIANTS = ["plain", "dropout and evaluations", "best", "patience", "packed"]
VICTIMS = {"rank 0": (0,), "rank 1": (1,), "both ranks": (0, 1), "the launcher": (2,), "all three": (2, 0, 1)}


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended, unnoticed by the one that started it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes that a torchrun has started, by rank."""
    found = {}
    try:
        for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): int(pid) for word in words if word.startswith(b"RANK=")}
    except OSError:  # one has just ended
        pass
    return found


class Torchrun:
    """`torchrun --nproc_per_node=2 --max-restarts=0 train.py`, as its own process and two more."""

    def __init__(self, world: World, yml: Path) -> None:
        self.world, self.ranks = world, dict[int, int]()
        options = ["--standalone", "--nproc_per_node=2", "--max-restarts=0", "--monitor-interval=0.1"]
        words = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), str(yml)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        self.pid = world.fork(lambda: os.execve(sys.executable, words, environment))

    def wait_for(self, condition: Callable[[], object], limit: float) -> bool:
        """Look at the ranks and wait until `condition`, the launcher's end or the limit; whether it came to be."""
        end = time.monotonic() + limit
        while alive(self.pid) and time.monotonic() < end:
            self.ranks |= ranks_of(self.pid)
            if condition():
                return True
            time.sleep(0.01)
        return False

    def end(self, limit: float = MEETING_LIMIT.total_seconds() + 60) -> int | None:
        """The launcher's exit code; the ranks that it has left are killed after `limit` s: None."""
        code, until = wait(self.pid), time.monotonic() + limit
        while left := [pid for pid in self.ranks.values() if alive(pid)]:
            if time.monotonic() > until:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                return None
            time.sleep(0.05)
        return code


def under_torchrun(world: World, rng: random.Random, end: float) -> Book:
    """The program that users start: a rank, both, the launcher, or all are killed at a random moment."""
    book = Book("torchrun, processes of their own")
    known: dict[str, tuple[dict[str, Any], float]] = {}
    while time.time() < end:
        name = rng.choice(RANKS_VARIANTS)
        keys = VARIANTS[name] | {"micro_batch_size": 2, "num_epochs": 5}
        if name not in known:
            began, run = time.monotonic(), Torchrun(world, world.new_run(**keys))
            run.wait_for(world.out.exists, 300)
            first = time.monotonic() - began
            code = run.end()
            assert code == 0, world.log.read_text()[-2000:]
            known[name] = facts(world.out), first
            print(f"{name}: {first:.1f} s, {time.monotonic() - began:.1f} s in all", flush=True)
        right, first = known[name]
        yml, story = world.new_run(**keys), [name]
        if book.counts["runs"] % 5 == 0:
            print(book, flush=True)
        book.counts["runs"] += 1
        for _ in range(rng.choice((1, 1, 2, 3))):
            log, who, early = world.out / "metrics.jsonl", rng.choice(list(VICTIMS)), rng.random() < 0.12
            before, total = len(read_log(log)), len(right["metrics.jsonl"])
            run, line = Torchrun(world, yml), rng.randint(min(before + 1, total), total)
            if early:  # also while it starts
                run.wait_for(lambda: len(run.ranks) == 2, 60)  # noqa: B023
            else:
                run.wait_for(lambda: len(run.ranks) == 2 and len(read_log(log)) >= line, 300)  # noqa: B023
            delay = rng.random() * (first if early else 0.2)
            run.wait_for(lambda: False, delay)
            story.append(f"{who} {delay:.2f} s after {'the start' if early else f'line {line} of {total}'}")
            for victim in VICTIMS[who]:
                try:
                    os.kill(run.pid if victim == 2 else run.ranks[victim], signal.SIGKILL)
                    book.counts[f"kills of {who}"] += victim == VICTIMS[who][0]
                except (ProcessLookupError, KeyError):
                    book.counts["too late"] += 1
            waits = early and victim == 2 and book.counts["ranks look for their launcher"] > 0  # for minutes
            code = run.end(20) if waits else run.end()
            book.counts["ranks look for their launcher"] += early and victim == 2
            if code is None and not waits:
                book.fault(f"a rank does not end: {world.log.read_text()[-600:]}", " > ".join(story))
            if OURS in (told := world.log.read_text("utf-8", "replace")):
                book.fault(f"a traceback: {told.split(OURS)[0][-500:]}", " > ".join(story))
            if code == 0:
                break
            if wrong := incomplete(world.out):
                book.fault(wrong, " > ".join(story))
        code = Torchrun(world, yml).end()
        if code:
            book.fault(f"cannot be resumed: exit {code}: {world.log.read_text()[-600:]}", " > ".join(story))
        elif wrong := difference(right, facts(world.out)):
            book.fault(wrong, " > ".join(story))
    return book


PARTS: dict[str, Callable[[World, random.Random, float], Book]] = {
    "train": trainings,
    "merge": lambda *args: writers(*args, "merge"),
    "export": lambda *args: writers(*args, "export"),
    "rehearse": rehearsals,
    "ranks": on_two_ranks,
}
LONGER: dict[str, Callable[[World, random.Random, float], Book]] = {"torchrun": under_torchrun}


def run_parts(
    parts: dict[str, Callable[..., Book]], description: str | None, longer: dict[str, Callable[..., Book]] | None = None
) -> None:
    """The command line of a program of this folder; exit 1 if anything failed.

    Args:
        longer: parts that are run only when they are asked for.
    """
    every = parts | (longer or {})
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(every))
    parser.add_argument("--minutes", type=float, default=2, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the small runs go; default: a new one")
    asked = parser.parse_args()
    books = []
    for part in asked.parts or parts:
        world = World(f"{asked.folder}/{part}" if asked.folder else None)
        rng = random.Random(f"{part} {asked.seed}")
        books.append(every[part](world, rng, time.time() + 60 * asked.minutes))
        print(books[-1], flush=True)
        shutil.rmtree(world.folder)
    raise SystemExit(any(book.faults for book in books))


if __name__ == "__main__":
    run_parts(PARTS, __doc__, LONGER)
