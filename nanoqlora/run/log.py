"""metrics.jsonl: one line for each logged step."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.errors import Failed
from ..config.files import write_text
from .output_dir import cannot_write, read_log


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
        if self.writes:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise Failed(cannot_write(self.path.parent, self.path.name, error)) from error
            for track in [*self.trackers]:
                try:
                    track(row)
                except Exception as error:  # a disk, a network, a service: the run is worth more than its curve
                    self.trackers.remove(track)
                    print(f"warning: {track.__name__} failed ({error}) and gets no more rows", file=sys.stderr)
