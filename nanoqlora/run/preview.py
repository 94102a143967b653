"""What `train.py --plan` prints: the steps, the data as the model will see it, and what the run needs, as text."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from ..config.errors import visible
from ..data.batches import Sample
from ..fast.stats import GIB
from ..tokenizer.tokenizer import Tokenizer
from .forecast import Forecast
from .log import duration
from .state import Run

GREEN, DIM, INVERSE, END = "\033[1;32m", "\033[2m", "\033[7m", "\033[0m"
PREVIEWED = 3  # samples
SHOWN = 1200  # characters of each


def plan_text(run: Run, tokenizer: Tokenizer, forecast: Forecast, warmup: int) -> str:
    """The plan, several lines for a terminal; supervised tokens are green."""
    config, plan = run.config, run.plan
    lengths, targets = run.samples.lengths, run.samples.num_targets.sum()
    rows = [row for step in plan for row in step.rows]
    tokens = np.array([lengths[[i for row in step.rows for i in row]].sum() for step in plan])
    slots = len(rows) * config.row_width or tokens.sum()  # padding included
    held_out = int(run.held_out.lengths.sum()) if run.held_out else 0
    warmup = 0 if config.lr_scheduler == "constant" else min(warmup, len(plan))
    lines = [
        f"steps      {len(plan)} in {plan.epoch_after(len(plan) - 1):.4g} epochs, {warmup} of them warm-up; a step has "
        f"{config.micro_batch_size} x {config.gradient_accumulation_steps} x {run.ranks} rows (micro-batch, "
        f"accumulation, ranks) and {tokens.mean():.0f} tokens ({tokens.min()} to {tokens.max()})",
        f"tokens     {tokens.sum():,} in {len(rows):,} rows, which are {tokens.sum() / slots:.1%} full; "
        f"{targets / lengths.sum():.1%} of the data's tokens are supervised",
        f"held out   {len(run.held_out)} samples, {held_out:,} tokens",
        f"lengths    tokens in a sample: median {np.median(lengths):.0f}, 95 % up to "
        f"{np.quantile(lengths, 0.95, method='higher')}, longest {lengths.max()}; sequence_len {config.sequence_len}",
        *histogram(lengths),
        *(f"memory     {name.removeprefix('memory/')} {gib:.2f}" for name, gib in forecast.memory.items()),
        f"time       {duration(forecast.seconds)}",
        f"disk       {forecast.disk_bytes / GIB:.2f} GiB in {config.output_dir}",
        f"           {forecast.basis}",
    ]
    legend = f"{GREEN}what the model learns to write{END}, {DIM}what it only reads{END}, {INVERSE}special tokens{END}"
    for number in range(min(PREVIEWED, len(run.samples))):
        lines += ["", f"sample {number + 1}: {legend}", coloured(run.samples[number], tokenizer)]
    return "\n".join(lines)


def histogram(lengths: Sequence[int] | np.ndarray, bins: int = 8, width: int = 40) -> list[str]:
    """A line for each of up to `bins` ranges of equal width, with a bar as long as its share."""
    size = max(1, -(-int(max(lengths)) // bins))
    counts = np.bincount((np.asarray(lengths) - 1) // size)
    bars = ["#" * round(width * count / counts.max()) for count in counts]
    ranges = [f"{i * size + 1:>7} - {(i + 1) * size:<7}" for i in range(len(counts))]
    return [f"{'':11}{span} {bar:{width}} {n}" for span, bar, n in zip(ranges, bars, counts, strict=True)]


def coloured(sample: Sample, tokenizer: Tokenizer, shown: int = SHOWN) -> str:
    """The text of a sample, supervised tokens in green and the others dim; cut after `shown` characters.

    Special tokens are in inverse video: a marker that is only text, which steers nothing, looks like other text.
    """
    parts, special = [], set(tokenizer.special_tokens.values())
    kinds = [(bool(s), int(id) in special) for s, id in zip(sample.supervised, sample.tokens, strict=True)]
    for (is_supervised, is_special), run in groupby(range(len(sample)), kinds.__getitem__):
        text = visible(b"".join(tokenizer.token_bytes(sample.tokens[i]) for i in run).decode(errors="replace"))
        if len(text) > shown:
            text = text[:shown] + f" ... ({len(sample)} tokens in all)"
        parts.append(f"{GREEN if is_supervised else DIM}{INVERSE * is_special}{text}{END}")
        shown -= len(text)
        if shown <= 0:
            break
    return "".join(parts)
