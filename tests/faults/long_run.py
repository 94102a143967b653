"""A run of many steps: memory, time of a step, log, file handles and processes must be at the end as after a warm-up.

    python tests/faults/long_run.py [--steps 3000] [--folder DIR]

A tiny model on the CPU with evaluations, answers and checkpoints. Looked at after each evaluation.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from worlds import World

# isort: split
import train
from nanoqlora.config.commands import run_command
from nanoqlora.run.log import Metrics

EVERY = 100  # steps


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--folder", help="where the run goes; default: a new one")
    asked = parser.parse_args()
    world = World(asked.folder)
    keys: dict[str, Any] = {"num_epochs": 10_000, "max_steps": asked.steps, "val_set_size": 3, "eval_steps": EVERY}
    keys |= {"save_steps": EVERY, "eval_table_size": 1, "eval_max_new_tokens": 4, "lora_dropout": 0.1}
    yml = world.new_run(**keys, auto_resume_from_checkpoints=False)
    seen: list[dict[str, float]] = []
    write = Metrics.write
    times: list[float] = []

    def look(metrics: Metrics, row: dict[str, Any]) -> None:
        write(metrics, row)
        times.append(time.process_time())  # of a processor: other programs do not count
        if "eval_loss" in row:
            gc.collect()
            threads = len(os.listdir("/proc/self/task"))
            found = {"step": row["step"], "resident_mib": resident_bytes() / 2**20, "threads": threads}
            seen.append(found | {"handles": len(os.listdir("/proc/self/fd")), "children": len(children())})

    Metrics.write = look  # type: ignore[method-assign]
    sys.argv = ["train.py", str(yml)]
    run_command(train.main)
    rows = [json.loads(line) for line in (world.out / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    evaluations = [row["step"] for row in rows if "eval_loss" in row]
    warm = [found for found in seen if found["step"] >= asked.steps // 10]
    took = [b - a for a, b in zip(times, times[1:], strict=False)]
    tenth = len(took) // 10
    medians = [statistics.median(took[i * tenth : (i + 1) * tenth]) * 1e3 for i in range(10)]
    for found in seen:
        print({name: round(value, 2) for name, value in found.items()}, file=sys.stderr)
    grown = warm[-1]["resident_mib"] / warm[0]["resident_mib"] - 1
    first, last, most = warm[0]["resident_mib"], warm[-1]["resident_mib"], max(w["resident_mib"] for w in warm)
    print(f"resident MiB: {first:.1f} after the warm-up, {last:.1f} at the end ({grown:+.2%}), at most {most:.1f}")
    print("ms of a processor between rows of the log, by tenths of the run:", *(f"{median:.2f}" for median in medians))
    wrong = [] if abs(grown) < 0.01 else ["memory is not flat"]
    for what in ("handles", "children", "threads"):
        wrong += [f"{what} leak"] if warm[-1][what] > warm[0][what] else []
    wrong += [] if steps == list(range(1, asked.steps + 1)) else ["a step is missing in the log"]
    wrong += [] if evaluations == list(range(0, asked.steps + 1, EVERY)) else ["an evaluation is missing"]
    wrong += [] if min(medians[-3:]) < 1.2 * min(medians[:3]) else ["steps get slower"]
    shutil.rmtree(world.folder)
    raise SystemExit("; ".join(wrong))


if __name__ == "__main__":
    main()
