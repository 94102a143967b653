"""`nanoqlora compare RUN RUN ...`: how runs differ in their settings, what came out, and their curves in one picture.

It reads what a run leaves in its output_dir: metrics.jsonl, train.yml, and two figures of report.md. A run that did not
end has only the first.
"""

import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

from ..config.load import answer_early, load_options
from ..config.options import CompareOptions

if __name__ == "__main__":
    answer_early(CompareOptions)

from ..config.commands import run_command
from ..config.errors import UserError, visible
from ..config.files import check_file, read_text
from ..config.parser import load_yaml
from . import figure
from .output_dir import LOG, read_log

IN_REPORT = {  # what report.md has and the log may not, as it is written there
    "eval_loss": re.compile(r"Held-out loss: .* before, (\d+\.?\d*) after"),
    "seconds": re.compile(r"^\| time, s \|.*\| (\d[\d,]*) \|$", re.M),
}
# What came out: its name -> key of metrics.jsonl, which of its values, how it is written.
FIGURES: dict[str, tuple[str, Callable[[list[float]], float], str]] = {
    "held-out loss, first": ("eval_loss", lambda losses: losses[0], ".4f"),
    "held-out loss, lowest": ("eval_loss", min, ".4f"),
    "held-out loss, last": ("eval_loss", lambda losses: losses[-1], ".4f"),
    "training loss, smoothed, last": ("loss", lambda losses: figure.smooth(losses)[-1], ".4f"),
    "steps": ("step", max, ".0f"),
    "time, s": ("seconds", max, ",.0f"),
    "tokens per second, mean": ("tokens_per_second", fmean, ",.0f"),
    **{f"{key.removeprefix('memory/')}, peak": (key, max, ".2f") for key in figure.MEMORY_LINES},
}
Run = tuple[dict[str, Any], list[dict[str, Any]]]  # values of train.yml by their path; rows of metrics.jsonl


def read_run(folder: str) -> Run:
    """Raises UserError: there is no run in the folder, or its files cannot be read."""
    rows, files = read_log(Path(folder, LOG)), (Path(folder, "train.yml"), Path(folder, "report.md"))
    settings, report = (read_text(file, "") if file.is_file() else "" for file in files)
    values = flat(load_yaml(settings, str(files[0])) or {})
    if not rows:
        raise UserError(f"{folder}: no {LOG} with a step, so no run to compare. Give the output_dir of each run.")
    logged = {key for row in rows if row["step"] for key in row}
    found = {key: match[1] for key, line in IN_REPORT.items() if key not in logged and (match := line.search(report))}
    last = {key: float(text.replace(",", "")) for key, text in found.items()}
    return values, [*rows, {"step": rows[-1]["step"]} | last]


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested maps and lists by their path, such as datasets.0.path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [flat(item, f"{name}.{key}".strip(".")) for key, item in items]
    return {path: item for found in below for path, item in found.items()} or ({name: value} if name else {})


def table(runs: dict[str, Run]) -> str:
    """A column for each run: the settings that differ, then what came out; "-" where a run does not have it."""
    known = [settings for settings, _ in runs.values() if settings]
    names = dict.fromkeys(name for settings in known for name in settings if name != "output_dir")
    differ = [name for name in names if len({repr(settings.get(name)) for settings in known}) > 1]
    columns = []
    for settings, rows in runs.values():
        texts = {name: shorten(visible(str(settings.get(name, "-"))), 60) for name in differ}
        values = ((name, take, spec, figure.series(rows, key)[1]) for name, (key, take, spec) in FIGURES.items())
        columns.append(texts | {name: format(take(found), spec) for name, take, spec, found in values if found})
    lines = [[name, *(column.get(name, "-") for column in columns)] for name in dict.fromkeys(chain(*columns))]
    lines = [["", *runs], *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines)


def plot(runs: dict[str, Run], path: str) -> None:
    """Training loss, smoothed, and held-out loss over steps, in one picture."""
    picture = figure.new_figure("Runs compared", f"{len(runs)} runs")
    grid = picture.add_gridspec(1, 2, wspace=0.16, **figure.MARGINS)
    every_row = [row for _, rows in runs.values() for row in rows]
    for i, (key, title) in enumerate({"loss": "Training loss, smoothed", "eval_loss": "Held-out loss"}.items()):
        axes = figure.panel(picture, grid[i], title, "nats per supervised token", every_row)
        for folder, (_, rows) in runs.items():
            steps, values = figure.series(rows, key)
            values = figure.smooth(values) if key == "loss" else values
            figure.line(axes, steps, values, linewidth=2, label=folder.replace("$", r"\$"))
        axes.legend(frameon=False, fontsize=10, labelcolor=figure.INK)
    figure.save_figure(picture, path)


def main() -> None:
    args = load_options(CompareOptions)
    check_file(args.out, "--out")
    runs = {folder: read_run(folder) for folder in args.runs}
    if len(runs) < 2:
        raise UserError("nanoqlora compare: one run is given, and a comparison needs two. Name another output_dir.")
    print(table(runs))
    plot(runs, args.out)
    print(f"curves: {args.out}")


if __name__ == "__main__":
    run_command(main)
