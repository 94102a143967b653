"""A loss or a gradient that is no number: found in the step where it appears, and traced to its rank and samples."""

import math

from ..data.packing import Step
from ..parallel import collectives


class NotFinite(Exception):
    """A step's loss or gradient is NaN or infinite. The message says where it came from."""


def trace(number: int, step: Step, rank: int, losses: dict[int, float], micro_batch_size: int, norm: float) -> str:
    """Where a step's NaN or infinity came from, said the same on every rank.

    Args:
        number: of the step, from 1. losses: of each of this rank's micro-batches, by its first row.
        norm: of this rank's own gradient, before it was added to the others'.
    """
    bad = {first: loss for first, loss in losses.items() if not math.isfinite(loss)}
    what = f"the loss is {next(iter(bad.values()))}" if bad else f"the norm of the gradient is {norm}"
    rows = [row for first in bad or losses for row in step.rows[first : first + micro_batch_size]]
    text = f"{what} on rank {rank}, in samples {', '.join(str(i) for row in rows for i in row)}"
    texts = collectives.everyones_object(text if bad or not math.isfinite(norm) else "")
    found = "; ".join(filter(None, texts)) or "the sum of the gradients of all ranks is too large for float32"
    return f"step {number}: {found} (counted from 0 in the order of the data)"
