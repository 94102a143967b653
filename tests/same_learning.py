"""Does the fast path learn what the plain one learns? `python -m tests.same_learning [--steps 200]`

Trains the demo's model four times on the demo's data with dropout 0: with everything fast (fused blocks, folded update
and graphs on a GPU), and with autograd through the plain blocks; each with two seeds. Two seeds
of one path differ by the start of A and by the order of the data: that is the noise. Prints, for the held-out loss at
every evaluation, how far the paths and the seeds lie apart, and one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

RUN = """
import sys, train
from nanoqlora.config.commands import run_command
train.judge = lambda *_: {}  # answers take longer than the training
if sys.argv.pop(1) == "plain":
    train.can_fuse = lambda model: False
else:
    fuse = train.fuse_blocks  # merged on a CPU too, as on a GPU
    train.fuse_blocks = lambda model, keeps, merge: fuse(model, keeps, merge=True)
run_command(train.main)
"""


def start(path: str, seed: int, steps: int, folder: Path, place: int) -> subprocess.Popen:
    """A run in a process of its own; all go side by side, each on a GPU of its own if there are so many."""
    options = {"max_steps": steps, "seed": seed, "eval_steps": max(1, steps // 10), "save_strategy": "no"}
    options |= {"output_dir": str(folder), "evals_per_epoch": "null", "saves_per_epoch": "null", "logging_steps": 1}
    arguments = ["train.yml", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    where = os.environ | {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}
    return subprocess.Popen([sys.executable, "-c", RUN, path, *arguments], stdout=subprocess.DEVNULL, env=where)


def held_out_losses(folder: Path) -> list[float]:
    """Held-out losses of a run, at every evaluation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = {(path, seed): Path(folder) / f"{path}-{seed}" for path in ("fast", "plain") for seed in (1, 2)}
        runs = [start(*which, args.steps, place, i) for i, (which, place) in enumerate(folders.items())]
        if any(run.wait() for run in runs):
            raise SystemExit("a run failed; its message stands above")
        curves = {which: held_out_losses(place) for which, place in folders.items()}
    for (path, seed), losses in curves.items():
        print(f"{path:5} seed {seed}: " + " ".join(f"{loss:.4f}" for loss in losses))

    def apart(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    figures = {
        "paths_apart_seed_1": round(apart(curves["fast", 1], curves["plain", 1]), 5),
        "paths_apart_seed_2": round(apart(curves["fast", 2], curves["plain", 2]), 5),
        "seeds_apart_fast": round(apart(curves["fast", 1], curves["fast", 2]), 5),
        "seeds_apart_plain": round(apart(curves["plain", 1], curves["plain", 2]), 5),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
