"""What a run reports while it trains: metrics.jsonl, and the bar or the lines in the terminal."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..config.files import write_text
from .output_dir import read_log

Say = Callable[..., None]  # prints a line for the user


class Metrics:
    """metrics.jsonl: one object a line, each step once, also after a resume. Only rank 0 writes."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows: list[dict[str, Any]] = []
        self.trackers: list[Callable[[dict[str, Any]], None]] = []  # that want each row too

    def go_on_after(self, step: int) -> None:
        """Keep the lines up to `step` of an earlier run in the same folder, none for 0."""
        self.rows = [row for row in read_log(self.path) if step and row["step"] <= step]
        if self.writes:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if not self.writes:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            error.filename = str(self.path)  # which a full disk does not give
            raise
        for track in [*self.trackers]:
            try:
                track(row)
            except Exception as error:  # a disk, a network, a service: the run is worth more than its curve
                self.trackers.remove(track)
                print(f"warning: {track.__name__} failed ({error}) and gets no more rows", file=sys.stderr)


class Display:
    """A bar in a terminal, else a line for each logged step. Only rank 0 shows anything."""

    def __init__(self, num_steps: int, start: int, rank: int) -> None:
        self.num_steps, self.start, self.rank, self.began = num_steps, start, rank, time.perf_counter()
        hidden = rank != 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=num_steps, initial=start, unit="step", smoothing=0.1, dynamic_ncols=True, disable=hidden)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if self.rank == 0:
            self.bar.write(text, file=sys.stderr)

    def logged(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        step, loss, norm, rate = row["step"], row["loss"], row["grad_norm"], row["learning_rate"]
        speed = row["tokens_per_second"]
        self.bar.set_postfix(loss=f"{loss:.3f}", norm=f"{norm:.2f}", lr=f"{rate:.1e}", tok_s=f"{speed:.0f}")
        if self.bar.disable:
            left = (time.perf_counter() - self.began) / (step - self.start) * (self.num_steps - step)
            self.note(
                f"step {step}/{self.num_steps}  epoch {row['epoch']:.2f}  loss {loss:.4f}  norm {norm:.2f}  "
                f"lr {rate:.1e}  {speed:.0f} tok/s  {duration(left)} left"
            )


def duration(seconds: float) -> str:
    """Seconds in words: "45 s", "12 min 5 s", "3 h 20 min"."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {s} s" if minutes else f"{s} s"
