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
from ..data.batches import Batch, Samples, collate, micro_batches, to_device, token_places
from ..data.packing import BatchSchedule
from ..fast.block import Keep, adapter_changed
from ..fast.graphs import recorded_width
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
    ready: dict[int, tuple[Batch, Tensor, Tensor | None]] = field(default_factory=dict)  # step -> its first micro-batch
    step: int = 0  # the one under way, from 1
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
        return Trained(self.config.base_form["load_in_4bit"], self.model.model.embed_tokens.weight.dtype, self.base)

    def micro_batches(self, number: int) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of step `number` (from 0), each with the number of its first row in the step.

        In the last step of an epoch the first ranks may have one more than the others. Blocks of a sharded base are
        gathered by all ranks or none, so the others get a stand-in, whose number is -1: its losses must not count.
        """
        self.step = number + 1
        adapter_changed(self.model)
        ready, parts = self.ready.pop(number, None), self.parts_of(number)
        for i, (first, rows) in enumerate(parts):
            batch = ready if ready and i == 0 else self.collate(rows, number, max(first, 0))
            yield first, self.use(batch)
        # While the device computes the last one, the first of the next step is laid out.
        if self.device.type == "cuda" and number + 1 < len(self.plan) and (following := self.parts_of(number + 1)):
            first, rows = following[0]
            self.ready = {number + 1: self.collate(rows, number + 1, max(first, 0))}
        adapter_changed(self.model)  # by the step that follows

    def parts_of(self, number: int) -> list[tuple[int, list[list[int]]]]:
        """The rows of this rank's micro-batches, each with the number of the first in the step; -1: a stand-in."""
        size, rows = self.config.micro_batch_size, self.plan[number].rows
        own = [*micro_batches(rows, size, self.rank, self.ranks)]
        missing = math.ceil(len(rows) / (size * self.ranks)) - len(own) if self.store else 0
        return own + [(-1, rows[:1])] * missing

    def use(self, prepared: tuple[Batch, Tensor, Tensor | None]) -> Batch:
        """Set the rows of this batch for dropout and NEFTune."""
        batch, seeds, places = prepared
        if self.config.lora_dropout:
            set_dropout_rows(self.model, seeds, places)
        set_noise_rows(self.model, seeds, batch.segments, places)
        return batch

    def collate(self, rows: list[list[int]], number: int, first: int) -> tuple[Batch, Tensor, Tensor | None]:
        """The rows as tensors on the device, with the seeds and places of their tokens as in `ops.Dropout`.

        Rows that are not padded to one width are laid into one, each a document: no padding between them is computed.
        """
        config, samples = self.config, [[self.samples[i] for i in row] for row in rows]
        width, places = config.row_width, None
        seeds = row_seeds(config.seed, number, first, len(rows) + (not width))
        if not width:
            lengths = [sum(map(len, row)) for row in samples]
            width = sum(lengths)
            if self.device.type == "cuda":
                width = min(recorded_width(width), config.micro_batch_size * config.sequence_len)
            of_row, places = token_places(lengths, width)
            seeds, samples = seeds[of_row], [[s for row in samples for s in row]]
        batch = collate(samples, width).to(self.device)
        return batch, to_device(seeds, self.device), None if places is None else to_device(places, self.device)


def row_seeds(seed: int, step: int, first: int, count: int) -> Tensor:
    """(count,) int64, a number for each row that decides its dropout: the same row of the same step, on any rank."""
    return (seed & 0x1FFFFF) << 42 | step << 16 | torch.arange(first, first + count)


def plan_fingerprint(samples: Samples, plan: BatchSchedule) -> str:
    """A hash of everything that decides which tokens stand in which step."""
    return hashlib.sha256((samples.fingerprint + plan.fingerprint).encode()).hexdigest()
