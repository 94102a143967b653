"""`Fine-Tuning.png`: loss, gradient norm, learning rate and memory over the steps of a run.

Made from the rows of `metrics.jsonl`. It may be made at any moment of a run, so a row or a key may be missing, and then
its point or line is left out.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.files import whole_file

WIDTH_IN, HEIGHT_IN, DPI = 12, 7.6, 150  # 1800 x 1140 pixels; text stays readable when shown 1200 wide

INK, MUTED, GRID = "#24292f", "#6e7781", "#e7eaee"
BLUE, ORANGE, GREEN, PURPLE = "#2563a6", "#d9702e", "#3a8a5f", "#7a5aa6"

MARGINS = {"left": 0.06, "right": 0.975, "top": 0.83, "bottom": 0.085}
NOTE = {"size": 9.5, "color": MUTED}

MEMORY_LINES = {  # key of metrics.jsonl -> what the legend calls it, its line; allocated often lies under active
    "memory/device_mem_reserved_gib": ("reserved", {"color": MUTED, "linewidth": 2}),
    "memory/max_mem_allocated_gib": ("allocated", {"color": GREEN, "linewidth": 5, "alpha": 0.45}),
    "memory/max_mem_active_gib": ("active", {"color": BLUE, "linewidth": 2}),
    "memory/max_rss_gib": ("process", {"color": GREEN, "linewidth": 2}),
}


def series(rows: list[dict], name: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one key over the rows that have it as a number below 1e30."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float) and "step" in row]
    found = sorted((step, value) for step, value in found if abs(value) < 1e30)
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: list[float]) -> list[float]:
    """A straight line fitted around every point, over about a fifteenth of the curve, and read at that point.

    A running mean would lag behind a falling curve, and end where the curve was; a line does neither. Cumulative sums
    of y and k * y make each fit a handful of operations.
    """
    y, k = np.array(values, float), np.arange(len(values))
    half = max(4, len(values) // 30)
    first, last = np.maximum(0, k - half), np.minimum(len(values) - 1, k + half)
    count, centre = last - first + 1, (first + last) / 2

    def window_sum(x: np.ndarray) -> np.ndarray:
        sums = np.concatenate(([0.0], x.cumsum()))
        return sums[last + 1] - sums[first]

    mean = window_sum(y) / count
    covariance = window_sum(k * y) - centre * mean * count
    spread = np.maximum(0.5, count * (count * count - 1) / 12)  # sum of (k - centre)^2; 0 for one value
    return (mean + (k - centre) * covariance / spread).tolist()


def limits(values: list[float], low: float | None = None, always: Sequence[float] = ()) -> tuple[float, float]:
    """Axis limits that show the curve: all of it, except spikes that would flatten the rest.

    A spike lies further from the middle 96 % of the values than twice their spread.

    Args:
        low: lower limit, where one has a meaning (0 for a norm). Unset: found like the upper one.
        always: values that must be inside, spikes or not.
    """
    ordered = sorted(values) or sorted(always)
    tail = max(1, len(ordered) // 50) if len(ordered) >= 8 else 0
    bottom, top = (ordered[tail] if low is None else low), ordered[-1 - tail]
    reach = 2 * abs(top - bottom)
    shown = [value for value in ordered if bottom - reach <= value <= top + reach] + list(always)
    bottom, top = (min(shown) if low is None else low), max(shown)
    air = 0.08 * (top - bottom) or 0.1 * abs(top) or 1.0
    return (bottom - air if low is None else low), top + air


def plot_metrics(rows: list[dict], path: str | Path, name: str | None = None) -> None:
    """Draw Fine-Tuning.png: loss with evaluations, gradient norm, learning rate, memory, all over steps.

    Args:
        rows: the objects of metrics.jsonl, in any order; none at all gives empty panels.
        path: the PNG, written atomically. 1800 x 1140 pixels.
        name: of the run, for the subtitle; unset: the folder of `path`.
    """
    name = Path(path).resolve().parent.name if name is None else name
    figure = new_figure("Fine-tuning", _subtitle(rows, name))
    grid = figure.add_gridspec(2, 3, height_ratios=(1.45, 1), hspace=0.44, wspace=0.22, **MARGINS)
    for place, title, unit, keys, draw in (
        (grid[0, :], "Loss", "nats per supervised token", ("loss", "eval_loss"), _plot_loss),
        (grid[1, 0], "Gradient norm", "before clipping", ("grad_norm",), _plot_norm),
        (grid[1, 1], "Learning rate", "", ("learning_rate",), _plot_rate),
        (grid[1, 2], "Peak memory", "GiB", MEMORY_LINES, _plot_memory),
    ):
        axes = panel(figure, place, title, unit, rows)
        if any(series(rows, key)[1] for key in keys):
            draw(axes, rows)
        else:
            axes.set(xticks=[], yticks=[], ylabel="")
            axes.text(0.5, 0.5, "nothing logged", transform=axes.transAxes, ha="center", va="center", **NOTE)
    save_figure(figure, path)


def new_figure(title: str, subtitle: str) -> Any:
    """An empty figure of 1800 x 1140 pixels with a title; panels go between `MARGINS`."""
    # Here, because training needs no plotting library until it ends; the Agg canvas needs no screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.06, 0.945, title, size=18, weight="bold", color=INK)
    figure.text(0.06, 0.91, subtitle, size=11, color=MUTED)
    return figure


def save_figure(figure: Any, path: str | Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _subtitle(rows: list[dict], name: str) -> str:
    steps, _ = series(rows, "loss")
    _, epochs = series(rows, "epoch")
    _, perplexities = series(rows, "eval_perplexity")
    parts = [name.replace("$", r"\$"), f"{len(steps)} step{'s' * (len(steps) != 1)}"]
    parts += [f"{epoch:.3g} epoch{'s' * (round(epoch, 2) != 1)}" for epoch in sorted(epochs)[-1:]]
    if len(perplexities) > 1:
        parts.append(f"held-out perplexity {perplexities[0]:.2f} to {perplexities[-1]:.2f}")
    return "   |   ".join(filter(None, parts))


def panel(figure: Any, place: Any, title: str, unit: str, rows: list[dict]) -> Any:
    """An empty panel: title and unit on the left, horizontal grid lines, integer steps below."""
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot(place)
    axes.set_title(title, loc="left", size=12, weight="bold", color=INK, pad=10)
    axes.set_ylabel(unit, size=10, color=MUTED, labelpad=7)
    axes.set_xlabel("step", size=10, color=MUTED)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK, pad=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c3c9d0")
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    steps = [row["step"] for row in rows if "step" in row] or [0]
    margin = max(0.012 * (max(steps) - min(steps)), 0.5)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    return axes


def line(axes: Any, steps: list[float], values: list[float], **style: Any) -> None:
    """A curve; a single point gets a marker, since a line of one point is invisible."""
    axes.plot(steps, values, marker="o" if len(steps) == 1 else None, markersize=5, solid_capstyle="round", **style)


def _curve(axes: Any, rows: list[dict], key: str, colour: str, low: float | None = None, always: Any = ()) -> None:
    """Every step thin, the smoothed curve over it. low, always: as for `limits`.

    Values above the axis have a triangle at its upper edge, and the largest is named: cut off, but not hidden.
    """
    steps, values = series(rows, key)
    axes.set_ylim(limits(values, low, always))
    top = axes.get_ylim()[1]
    is_long = len(values) >= 8
    width, alpha = (1.0, 0.35) if is_long else (1.8, 1)
    line(axes, steps, values, color=colour, linewidth=width, alpha=alpha, label="each step")
    if is_long:  # a spike is marked, and must not bend the curve around it
        smoothed = smooth([min(value, top) for value in values])
        line(axes, steps, smoothed, color=colour, linewidth=2.2, label="smoothed")
    above = [(value, step) for step, value in zip(steps, values, strict=True) if value > top]
    if above:
        axes.plot([step for _, step in above], [top] * len(above), "^", color=colour, markersize=5, clip_on=False)
        value, step = max(above)
        axes.text(1, 0.97, f"peak {value:.3g} at step {step:g}", transform=axes.transAxes, ha="right", va="top", **NOTE)


def _plot_loss(axes: Any, rows: list[dict]) -> None:
    """The curve, evaluations as points with their values, ends of epochs."""
    from matplotlib.patheffects import withStroke

    evaluations = list(zip(*series(rows, "eval_loss"), strict=True))
    _curve(axes, rows, "loss", BLUE, always=[loss for _, loss in evaluations])
    if evaluations:
        points = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "label": "held-out data", "zorder": 5}
        axes.plot(*zip(*evaluations, strict=True), color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), **points)
    stride = max(1, math.ceil(len(evaluations) / 12))  # more labels than this would touch each other
    halo = [withStroke(linewidth=3, foreground="white")]
    style = {"textcoords": "offset points", "size": 9.5, "color": ORANGE, "path_effects": halo, "zorder": 6}
    for step, loss in evaluations[::-stride]:
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 9), ha="center", **style)
    _mark_epochs(axes, rows)
    above = {"loc": "lower right", "bbox_to_anchor": (1, 1.0), "ncols": 3}  # where no curve can run through it
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, borderaxespad=0.2, **above)


def _mark_epochs(axes: Any, rows: list[dict]) -> None:
    """A thin line after every full epoch but the last, if there are few enough to help."""
    steps, epochs = series(rows, "epoch")
    from_the_end = zip(steps[::-1], epochs[::-1], strict=True)  # of each epoch the first step stays
    ends = {math.floor(epoch + 1e-9): step for step, epoch in from_the_end if epoch >= 1}
    for epoch, step in ends.items():
        if len(ends) <= 12 and step < max(steps):
            axes.axvline(step, color="#d0d5db", linewidth=0.9, zorder=0)
            axes.text(step, 0.025, f" epoch {epoch}", transform=axes.get_xaxis_transform(), va="bottom", **NOTE)


def _plot_norm(axes: Any, rows: list[dict]) -> None:
    _curve(axes, rows, "grad_norm", PURPLE, low=0.0)


def _plot_rate(axes: Any, rows: list[dict]) -> None:
    """The schedule in units of its peak's power of ten, which keeps the tick labels short."""
    steps, rates = series(rows, "learning_rate")
    highest = max(rates)
    power = math.floor(math.log10(highest) + 1e-9) if highest > 0 else 0
    scaled = [rate / 10.0**power for rate in rates]
    line(axes, steps, scaled, color=INK, linewidth=2)
    axes.set_ylim(0, 1.15 * max(scaled) or 1)
    axes.set_ylabel(rf"$\times\,10^{{{power}}}$")
    peak = rates.index(highest)
    shift, side = (6, "left") if peak < len(rates) / 2 else (-6, "right")
    place = {"xy": (steps[peak], scaled[peak]), "xytext": (shift, 6), "textcoords": "offset points", "ha": side}
    axes.annotate(f"peak {highest:.3g}", **place, **NOTE)


def _plot_memory(axes: Any, rows: list[dict]) -> None:
    """Each figure that was logged, from zero, with its largest value in the legend."""
    logged = {key: found for key in MEMORY_LINES if (found := series(rows, key))[1]}
    for key, (steps, gib) in logged.items():
        label, style = MEMORY_LINES[key]
        line(axes, steps, gib, label=f"{label} {max(gib):.2f} GiB", **style)
    axes.set_ylim(0, 1.15 * max(max(gib) for _, gib in logged.values()) or 1)
    axes.legend(loc="lower right", frameon=False, fontsize=10, labelcolor=INK, handlelength=1.4)
