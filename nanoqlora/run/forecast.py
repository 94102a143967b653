"""What a run will need and take, measured on its own longest micro-batch before the first step.

    memory   the peak of that micro-batch with the optimizer's state in place, as the allocator counts it
    time     t(micro-batch) = a + b * operations, through the longest and the median micro-batch, summed over the plan;
             the optimizer's step and an evaluation are timed once and counted as often as they will happen
    disk     what output_dir will hold at its fullest

Nothing has learnt afterwards: the step has a learning rate and gradients of zero, its state is dropped, and no random
state is used. The memory model in `fast/memory.py` needs no measurement, but knows nothing of an allocator or of a
CPU's heap.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import ops
from ..config.errors import UserError, asked, is_out_of_memory
from ..config.files import check_space
from ..fast.stats import memory_figures, stage
from ..model import ModelConfig
from ..parallel import collectives
from .optim import set_learning_rate, state_bytes
from .optimizer_state import gradient_of, sum_and_clip
from .out_of_memory import dials
from .scoring import score_samples
from .state import Run

# Tensors of changing sizes leave holes in a CPU's heap, which grows for a hundred steps. What a step adds to the
# process became so many times as much in the demo's 150 steps (0.88 GiB before, 1.45 after the trial, 2.11 at the end).
HEAP_GROWTH = 2.2


@dataclass(frozen=True)
class Forecast:
    """Seconds from the first step to the last, peaks in GiB by the names of metrics.jsonl, bytes on disk, and why."""

    seconds: float
    memory: dict[str, float]
    disk_bytes: int
    basis: str

    def of_part(self, share: float) -> "Forecast":
        """Of a run that takes only a share of the steps: resumed, or stopped early."""
        return replace(self, seconds=self.seconds * share)


def operations(config: ModelConfig, rows: Iterable[list[int]], width: int, supervised: float) -> float:
    """Multiplications and additions of a micro-batch: 4 a weight and token, 4 a weight of the head and counted token.

    Args:
        rows: for each row the lengths of its documents. width: tokens that rows are padded to; 0: they are not.
        supervised: share of the tokens that count. The frozen weights have no gradient: 2 forward, 2 backward.
    """
    D, hd = config.hidden_size, config.head_dim
    heads, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
    block = D * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    rows = list(rows)
    padding = [width - sum(row) for row in rows if width]
    squares = sum(n * n for row in (*rows, padding) for n in row)  # each document attends to itself alone
    tokens = sum(map(sum, rows))
    # Attention: 2 matmuls forward, 4 backward, half a square.
    per_layer = 4 * block * (tokens + sum(padding)) + 6 * heads * squares
    return config.num_hidden_layers * per_layer + 4 * D * config.vocab_size * tokens * supervised


@stage("forecast")
def measure(run: Run, num_evals: int, num_saves: int) -> Forecast:
    """Time the longest micro-batch of the run, and what else a run consists of.

    Args:
        num_evals, num_saves: how often they will happen between the first step and the last.
    Raises:
        UserError: the longest micro-batch does not fit the device, or, on all ranks, the checkpoints rank 0's disk.
    """
    config, size = run.config, run.config.micro_batch_size
    costs = micro_batch_costs(run)
    longest, median = max(costs, key=lambda cost: (cost.tokens, cost.operations)), costs[len(costs) // 2]

    def once(cost: Cost) -> float:
        rows = run.plan[cost.step].rows[cost.first : cost.first + size]
        return timed(lambda: forward_backward(run, rows), run.device)

    before = memory_figures(run.device)
    try:
        once(longest)  # compiles kernels, fills the allocator
        optimizer_s = _trial_step(run)
        longest_s = once(longest)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"the longest micro-batch, in step {longest.step + 1}, does not fit {run.device}"
        raise UserError(f"{what}: {asked(error)}. {dials(run)}.") from error
    eval_s = _evaluation_s(run) if num_evals else 0.0
    memory = memory_figures(run.device)
    if run.device.type == "cpu":
        memory = {name: before[name] + HEAP_GROWTH * (gib - before[name]) for name, gib in memory.items()}
    run.optimizer.state.clear()

    slope, constant = longest_s / longest.operations, 0.0
    if median.operations < 0.75 * longest.operations:  # far enough apart for a line through both
        once(median)
        median_s = once(median)
        slope = max(0.0, longest_s - median_s) / (longest.operations - median.operations)
        constant = max(0.0, median_s - slope * median.operations)
    gradient_of(run.flat).zero_()
    steps_s = constant * len(costs) + slope * sum(cost.operations for cost in costs) + optimizer_s * len(run.plan)
    state = round(state_bytes(config.optimizer) * run.flat.numel())
    best = config.load_best_model_at_end
    num_kept = min(num_saves + best * num_evals, config.save_total_limit + best)
    disk = disk_bytes(run.flat.numel(), state, num_kept)
    with collectives.together():
        if run.rank == 0:
            check_space(config.output_dir, disk, "lower save_total_limit, or name another output_dir")
    basis = (
        f"measured on {run.device.type.upper()}: the longest micro-batch {longest_s:.2f} s "
        f"({longest.operations / longest_s / 1e12:.2f} TFLOP/s), optimizer {optimizer_s:.3f} s; "
        f"{len(costs)} micro-batches in {len(run.plan)} steps, {num_evals} evaluations of {eval_s:.1f} s"
    )
    return Forecast(steps_s + num_evals * eval_s, memory, disk, basis)


def forward_backward(run: Run, rows: list[list[int]]) -> None:
    """Add the gradient of one micro-batch, as the loop of train.py does it."""
    batch = run.use(run.collate(rows, 0, 0))
    hidden = run.body(batch.tokens, batch.segments).flatten(0, 1)  # (B * T, D)
    ops.linear_cross_entropy(hidden[batch.supervised], run.model.lm_head.weight, batch.targets).backward()


class Cost(NamedTuple):
    """Of a micro-batch: its operations, where it stands, and its tokens, padding included."""

    operations: float
    step: int  # from 0
    first: int  # row within the step
    tokens: int


def micro_batch_costs(run: Run) -> list[Cost]:
    """Of each micro-batch that rank 0 will run, the cheapest first."""
    size, stride = run.config.micro_batch_size, run.config.micro_batch_size * run.ranks
    supervised = float(run.samples.num_targets.sum() / run.samples.lengths.sum())
    costs = []
    for number, step in enumerate(run.plan):
        for start in range(0, len(step.rows), stride):
            lengths = [run.samples.lengths[row].tolist() for row in step.rows[start : start + size]]
            work = operations(run.model.config, lengths, run.config.row_width, supervised)
            tokens = sum(run.config.row_width or sum(row) for row in lengths)
            costs.append(Cost(work, number, start, tokens))
    return sorted(costs)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _trial_step(run: Run) -> float:
    """Seconds of an optimizer step and of the sum over ranks; the state that it made is there afterwards.

    The optimizers of bitsandbytes do not forget a state once made; theirs is counted and their step is not timed.
    """
    if not run.config.optimizer.startswith("adamw_torch"):
        num_bytes = round(state_bytes(run.config.optimizer) * getattr(run.optimizer, "part", run.flat).numel())
        run.optimizer.state[run.flat] = {"stand_in": torch.empty(num_bytes, dtype=torch.uint8, device=run.device)}
        return 0.0
    gradient_of(run.flat).zero_()
    set_learning_rate(run.optimizer, 0.0)  # value - 0 * update: every bit stays

    def step() -> None:
        sum_and_clip(run.flat, run.optimizer, run.config.max_grad_norm)
        run.optimizer.step()

    timed(step, run.device)  # makes the state
    return timed(step, run.device)


def _evaluation_s(run: Run) -> float:
    """Seconds of one evaluation, which the ranks share, from a row of held-out samples."""
    lengths, capacity = run.held_out.lengths, run.config.sequence_len
    count = max(1, int(np.searchsorted(lengths.cumsum(), capacity, "right")))
    chosen = [run.held_out[i] for i in range(count)]
    run.model.eval()
    seconds = statistics.median(timed(lambda: score_samples(run.model, chosen, capacity), run.device) for _ in range(2))
    run.model.train()
    return seconds * lengths.sum() / lengths[:count].sum() / run.ranks


def disk_bytes(num_trained: int, optimizer_bytes: int, num_checkpoints: int) -> int:
    """The adapter in float32, and checkpoints of adapter and optimizer, one more until the oldest is removed."""
    return 4 * num_trained + (num_checkpoints + 1) * (4 * num_trained + optimizer_bytes)
