"""Give every reader of files wrong inputs: `make fuzz`, or `fuzz.py [READER ...] [--seconds N] [--seed N] [--list]`.

A reader reads as the commands read. Its right ends are success, and `UserError` or `Failed` with a line of text. A
failure is any other exception, more than 10 s of a processor, more than 1 GiB of memory, or the end of the process;
more than 2 s are reported. Inputs that reach new lines of the package are kept for a while and changed further.

Each reader runs in a process of its own. The counts of all runs, and the first inputs of each failure, are added to
`--out`; a failure is known by its exception and the innermost line of the package. `--replay FILE` reads one of these
inputs again, with the traceback. An input that was mended belongs into `corpus/READER/`, which the tests read.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(HERE)]
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from mutate import dump, mutate_bytes, mutate_json  # noqa: E402
from readers import GENERATED, READERS  # noqa: E402
from right import base, own_work  # noqa: E402

from nanoqlora.config import errors  # noqa: E402
from nanoqlora.config.errors import HIDDEN, Failed, UserError  # noqa: E402

SLOW_S, HANG_S, MEMORY = 2, 10, 1 << 30
ADDRESS_SPACE = 6 << 30  # beyond what the right files need
KEPT = 3  # inputs of each failure
TRACED = 4, 2000, 25  # one execution of so many looks for new lines, after so many executions one of so many


class Hang(BaseException):
    pass


class Lines:
    """The lines of the package that inputs have reached, and the inputs that were the first to reach one."""

    def __init__(self) -> None:
        self.seen: set[tuple[CodeType, int]] = set()
        self.inputs: list[bytes] = []

    def start(self) -> None:
        self.before = len(self.seen)
        sys.settrace(self._call)

    def stop(self, data: bytes) -> None:
        sys.settrace(None)
        if len(self.seen) > self.before and len(data) < 300_000:
            self.inputs = [*self.inputs[-500:], data]

    def _call(self, frame: FrameType, *_: object) -> Any:
        return self._line if "/nanoqlora/" in frame.f_code.co_filename else None

    def _line(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "line":
            self.seen.add((frame.f_code, frame.f_lineno))
        return self._line


def changed(data: bytes, rng: Random) -> bytes:
    """Another input like a kept one: a value of its JSON, or some of its bytes."""
    head, newline, body = data.partition(b"\n")
    if not newline or len(head) > 40:
        head, newline, body = b"", b"", data
    try:
        return head + newline + dump(mutate_json(json.loads(body), rng), rng)
    except (ValueError, RecursionError):
        return head + newline + mutate_bytes(body, rng)


def signature(error: BaseException) -> str:
    """What a failure is known by: the exception, and the innermost line of the package."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/.venv/" not in f.filename]
    ours = [f for f in frames if f"{ROOT}/nanoqlora/" in f.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}" if ours else "?"
    text = f": {str(error)[:60]}" if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__} in {where}{text}"


class Worker:
    """Executes one reader until its time is over, and writes its results from time to time."""

    def __init__(self, name: str, out: Path, seed: int) -> None:
        self.name, self.out = name, out
        self.make, self.read = READERS[name]
        self.rng, self.lines = Random(f"{name} {seed}"), Lines()
        self.is_changed = name not in GENERATED
        self.counts, self.failures, self.slow = Counter[str](), dict[str, Any](), dict[str, Any]()
        self.longest = self.peak = 0

    def work(self, seconds: float) -> None:
        self.read_once(self.make(self.rng))  # imports
        self.limit_memory()
        end = saved = time.time()
        end += seconds
        while time.time() < end:
            if self.is_changed and self.lines.inputs and self.rng.random() < 0.3:
                data = changed(self.rng.choice(self.lines.inputs), self.rng)
            else:
                data = self.make(self.rng)
            (self.out / f"{self.name}.now").write_bytes(data)  # if the process ends, its input is known
            self.execute(data)
            if time.time() > saved + 2:
                errors._noted.clear()
                self.save()
                saved = time.time()
        self.save()

    def limit_memory(self) -> None:
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if sys.platform == "linux":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE,) * 2)

    def read_once(self, data: bytes) -> BaseException | None:
        """What it ends with; the choices of a reader depend on the input alone."""

        def ring(*_: object) -> None:
            raise Hang

        signal.signal(signal.SIGPROF, ring)
        signal.setitimer(signal.ITIMER_PROF, HANG_S)
        try:
            try:
                self.read(data, Random(data))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: B036
            return error
        return None

    def execute(self, data: bytes) -> None:
        often, many, seldom = TRACED
        count = self.counts["executions"]
        is_traced = self.is_changed and count % (often if count < many else seldom) == 0
        self.counts["executions"] += 1
        if is_traced:
            self.lines.start()
        started = time.process_time()
        error = self.read_once(data)
        seconds = time.process_time() - started
        if is_traced:
            self.lines.stop(data)
        if error is None:
            self.counts["accepted"] += 1
        elif isinstance(error, UserError | Failed):
            self.counts["refused"] += 1
            line = " ".join(str(error).split())
            self.longest = max(self.longest, len(line))
            if not line or re.search(HIDDEN, line) or len(line) > errors.LONGEST + 5:
                self.keep(self.failures, f"a message that is no line, of {signature(error)}", data, error)
        else:
            self.keep(self.failures, signature(error), data, error)
        if seconds > SLOW_S * (3 if is_traced else 1) and not isinstance(error, Hang):
            where = signature(error) if error else "success"
            self.keep(self.slow, f"{where}", data, error)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if peak > self.peak + MEMORY:
            self.keep(self.failures, f"MEMORY, {signature(error) if error else 'success'}", data, error)
        self.peak = max(self.peak, peak)

    def keep(self, found: dict[str, Any], sig: str, data: bytes, error: BaseException | None) -> None:
        entry = found.setdefault(sig, {"count": 0, "inputs": [], "error": ""})
        entry["count"] += 1
        if len(entry["inputs"]) >= KEPT:
            return
        if error:
            entry["error"] = "".join(traceback.format_exception(error))[-2500:]
        (self.out / self.name).mkdir(exist_ok=True)
        file = self.out / self.name / f"{hashlib.sha1(sig.encode()).hexdigest()[:8]}-{len(entry['inputs'])}"
        file.write_bytes(data)
        entry["inputs"].append(str(file))

    def save(self) -> None:
        facts = {"counts": self.counts, "failures": self.failures, "slow": self.slow, "longest": self.longest}
        facts["lines"] = len(self.lines.seen)
        (self.out / f"{self.name}.part").write_text(json.dumps(facts))


def merged(total: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The results of all runs of a reader and of one more."""
    found = {"counts": dict(Counter(total.get("counts", {})) + Counter(part["counts"]))}
    found |= {key: max(total.get(key, 0), part[key]) for key in ("longest", "lines")}
    for kind in ("failures", "slow"):
        found[kind] = dict(total.get(kind, {}))
        for sig, entry in part[kind].items():
            count = found[kind].get(sig, {}).get("count", 0) + entry["count"]
            found[kind][sig] = entry | {"count": count}
    return found


def fuzz(name: str, out: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Run a reader in a process, and again if that ends before its time. Returns the results."""
    results: dict[str, Any] = {}
    end = time.time() + seconds
    while (left := end - time.time()) > 1:
        for kind in ("part", "now"):
            (out / f"{name}.{kind}").unlink(missing_ok=True)
        child = get_context("fork").Process(target=work, args=(name, out, left, seed))
        child.start()
        child.join(left + 300)
        if child.is_alive():
            child.kill()
            child.join()
        part = {"counts": {}, "failures": {}, "slow": {}, "longest": 0, "lines": 0}
        if (file := out / f"{name}.part").exists():
            part = json.loads(file.read_text())
        if child.exitcode:
            (out / name).mkdir(exist_ok=True)
            kept = out / name / f"ended-{seed}"
            if (out / f"{name}.now").exists():
                shutil.copy(out / f"{name}.now", kept)
            sig = f"PROCESS ENDED {child.exitcode}"
            part["failures"][sig] = {"count": 1, "inputs": [str(kept)], "error": ""}
        results = merged(results, part)
        seed += 1000
        if not part["counts"]:  # it did not even start
            break
    return results


def work(name: str, out: Path, seconds: float, seed: int) -> None:
    """The process of a reader."""
    folder = own_work()
    log = os.open(out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)  # what libraries write of themselves
    sys.stdout = open(os.devnull, "w")
    warnings.simplefilter("ignore")
    try:
        Worker(name, out, seed).work(seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="their names; none: all")
    parser.add_argument("--seconds", type=float, default=30, help="for each reader")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the choices; default: the time")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "fuzz", help="folder of results and inputs")
    parser.add_argument("--list", action="store_true", help="print the names of the readers")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="read one input, with the traceback")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.list:
        print(*READERS, sep="\n")
        return 0
    if args.replay:
        data = args.replay.read_bytes()
        READERS[args.readers[0]][1](data, Random(data))
        return 0
    if unknown := [name for name in args.readers if name not in READERS]:
        parser.error(f"no reader {unknown[0]}; see --list")
    num_failures, folder = 0, base().parent
    for name in args.readers or READERS:
        found = fuzz(name, args.out, args.seconds, args.seed)
        file = args.out / "results.json"
        total = json.loads(file.read_text()) if file.exists() else {}
        total[name] = merged(total.get(name, {}), found)
        file.write_text(json.dumps(total, indent=1))
        print(f"{name:22}", *(f"{kind} {count}" for kind, count in found["counts"].items()), f"lines {found['lines']}")
        for kind in ("failures", "slow"):
            for sig, entry in found[kind].items():
                print(f"  {kind}: {entry['count']} {sig}\n    {' '.join(entry['inputs'])}", flush=True)
        num_failures += sum(entry["count"] for entry in found["failures"].values())
        sys.stdout.flush()
    shutil.rmtree(folder)
    print(f"{num_failures} failures; the results are in {args.out}")
    return int(num_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
