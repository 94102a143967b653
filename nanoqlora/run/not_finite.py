"""A loss or a gradient that is not a number: found in the step where it appears, and traced to its rank and samples."""

import math

from torch import Tensor

from ..config.errors import Failed
from ..parallel import collectives
from .state import Run


def skip_step(run: Run, number: int, losses: dict[int, Tensor], own_norm: Tensor) -> str:
    """Log that step `number` (from 0) is skipped, on all ranks, and return why; or end the run.

    Args:
        losses: of each of this rank's micro-batches, by its first row. own_norm: of its gradient before the sum.
    Raises:
        Failed: unless the run has skip_nonfinite_steps.
    """
    reason = trace(run, number, losses, own_norm)
    if not run.config.skip_nonfinite_steps:
        advice = "Look at these samples, go on from an earlier checkpoint with a lower learning_rate, or set"
        raise Failed(f"{reason}. Nothing was learnt. {advice} skip_nonfinite_steps: true.", everywhere=True)
    run.metrics.write({"step": number + 1, "skipped": reason})
    return reason


def trace(run: Run, number: int, losses: dict[int, Tensor], own_norm: Tensor) -> str:
    """Where a step's NaN or infinity came from, the same text on every rank."""
    size, norm = run.config.micro_batch_size, own_norm.item()
    bad = {first: loss.item() for first, loss in losses.items() if not math.isfinite(loss)}
    what = f"the loss is {next(iter(bad.values()))}" if bad else f"the norm of the gradient is {norm}"
    rows = [row for first in bad or losses for row in run.plan[number].rows[first : first + size]]
    text = f"{what} on rank {run.rank}, in samples {', '.join(str(i) for row in rows for i in row)}"
    texts = collectives.gather_objects(text if bad or not math.isfinite(norm) else "")
    found = "; ".join(filter(None, texts)) or "the sum of the gradients of all ranks is too large for float32"
    return f"step {number + 1}: {found} (counted from 0 in the order of the data)"
