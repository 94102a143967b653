"""What the training loop works with."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..config.schema import Config
from ..data.batches import Batch, Samples, collate, micro_batches
from ..data.packing import BatchSchedule
from ..fast.block import Keep
from ..model import Llama
from ..ops import Segments
from ..parallel.fsdp import BlockStore
from ..qlora import set_dropout_rows
from ..weights.adapter import Trained
from ..weights.checkpoint import fingerprint, open_weights
from .early_stopping import Progress
from .log import Metrics
from .neftune import set_noise_rows
from .optimizer_state import Optimizer, gradient_of


@dataclass(kw_only=True)
class Run:
    """A run on this rank."""

    config: Config
    rank: int
    ranks: int
    device: torch.device
    model: Llama
    body: Callable[[Tensor, Segments], Tensor]  # model.model, or the same from recorded graphs
    store: BlockStore | None  # where the base is sharded over the ranks
    keeps: list[Keep]  # what each block keeps for the backward pass
    flat: torch.nn.Parameter  # every trained value, and its gradient
    optimizer: Optimizer
    samples: Samples
    held_out: Samples
    plan: BatchSchedule
    metrics: Metrics
    progress: Progress = field(default_factory=Progress)
    before: dict[str, Any] = field(default_factory=dict)  # what the untrained model could do, for the report

    @property
    def grad(self) -> Tensor:
        """The gradient of every trained value."""
        return gradient_of(self.flat)

    @cached_property
    def base(self) -> str:
        """`fingerprint` of the base model's weights."""
        return fingerprint(open_weights(self.config.base_model))

    @property
    def trained(self) -> Trained:
        """What an adapter records about its training."""
        return Trained(self.config.load_in_4bit, self.model.model.embed_tokens.weight.dtype, self.base)

    def micro_batches(self, number: int) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of step `number` (from 0), each with the number of its first row in the step.

        In the last step of an epoch the first ranks may have one more than the others. Blocks of a sharded base are
        gathered by all ranks or none, so the others get a stand-in, whose number is -1: its losses must not count.
        """
        config, rows = self.config, self.plan[number].rows
        own = [*micro_batches(rows, config.micro_batch_size, self.rank, self.ranks)]
        for first, some_rows in own:
            yield first, self.collate(some_rows, number, first)
        if self.store:
            for _ in range(math.ceil(len(rows) / (config.micro_batch_size * self.ranks)) - len(own)):
                yield -1, self.collate(rows[:1], number, 0)

    def collate(self, rows: list[list[int]], number: int, first: int) -> Batch:
        """The rows as tensors on the device; and tell dropout and NEFTune which rows of which step they are."""
        batch = collate([[self.samples[i] for i in row] for row in rows], self.config.row_width).to(self.device)
        seeds = row_seeds(self.config.seed, number, first, len(rows)).to(self.device)
        set_dropout_rows(self.model, seeds)
        set_noise_rows(self.model, seeds, batch.segments)
        return batch


def row_seeds(seed: int, step: int, first: int, count: int) -> Tensor:
    """(count,) int64, a number for each row that decides its dropout: the same row of the same step, on any rank."""
    return (seed & 0x1FFFFF) << 42 | step << 16 | torch.arange(first, first + count)


def plan_fingerprint(samples: Samples, plan: BatchSchedule) -> str:
    """A hash of everything that decides which tokens stand in which step."""
    return hashlib.sha256((samples.fingerprint + plan.fingerprint()).encode()).hexdigest()
