"""From lengths to the schedule of a run: which samples are in which row of which step, before the first step.

    lengths, seed -> for each epoch: shuffle, put into rows, shuffle the rows, cut into steps -> BatchSchedule

A row is one sequence of a batch. With packing it holds as many samples as fit. Without, it holds one sample, and rows
of similar length come into the same step, so that there is little padding.

The result is a pure function of the lengths and the seed. The number of steps and the learning rates follow from it; a
step is the same for any number of ranks and any split into micro-batches; every rank knows the number of supervised
tokens in a step without communication; and a resumed run needs only the number of its step.

For a million samples it takes seconds and some bytes a sample: everything is arrays, and `Step` objects are made when
they are asked for.
"""

import hashlib
import math
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heappop, heappush

import numpy as np

POOL = 50  # steps whose rows are sorted by length together; fewer waste padding, more make the steps less random


@dataclass(frozen=True)
class Rows:
    """Rows of sample numbers, one after the other: row i is samples[starts[i] : starts[i + 1]]."""

    samples: np.ndarray  # (N,) int64
    starts: np.ndarray  # (number of rows + 1,) int64

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, i: int) -> list[int]:
        return self.samples[self.starts[i] : self.starts[i + 1]].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.__getitem__, range(len(self)))

    def in_order(self, order: np.ndarray) -> "Rows":
        """The same rows in another order."""
        lengths = np.diff(self.starts)[order]
        starts = np.concatenate([[0], lengths.cumsum()])
        from_where = np.repeat(self.starts[order] - starts[:-1], lengths) + np.arange(len(self.samples))
        return Rows(self.samples[from_where], starts)

    @classmethod
    def joined(cls, parts: list["Rows"]) -> "Rows":
        """The rows of all parts, one part after the other."""
        lengths = np.concatenate([np.diff(part.starts) for part in parts])
        return cls(np.concatenate([part.samples for part in parts]), np.concatenate([[0], lengths.cumsum()]))


def pack(lengths: Sequence[int] | np.ndarray, ids: Iterable[int], capacity: int) -> Rows:
    """Put samples into as few rows of `capacity` tokens as we can: best-fit decreasing.

    The longest sample first, each into the row with the least space that is enough, of several the first, or into a new
    one. `bits` says which spaces there are, so that the tightest is found at once: a million samples take a second.

    Args:
        lengths: tokens of every sample, from 1 to `capacity`.
        ids: the samples to pack; of equally long ones the first are placed first.
    """
    ids = np.fromiter(ids, np.int64)
    ids = ids[np.argsort(-np.asarray(lengths)[ids], kind="stable")]
    sizes = np.asarray(lengths)[ids].tolist()
    if sizes and not 0 < sizes[-1] <= sizes[0] <= capacity:
        raise ValueError(f"lengths from {sizes[-1]} to {sizes[0]} do not fit into rows of {capacity} tokens")
    row_of = np.empty(len(ids), np.int64)
    with_space: defaultdict[int, list[int]] = defaultdict(list)  # free tokens -> the rows that have them, as a heap
    bits, num_rows = 0, 0  # bit f is set if there are rows with f free tokens
    for i, size in enumerate(sizes):
        if enough := bits >> size:
            space = size + (enough & -enough).bit_length() - 1  # the lowest bit: the tightest
            row = heappop(with_space[space])
            bits ^= (not with_space[space]) << space
        else:
            space, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[i] = row
        if left := space - size:
            heappush(with_space[left], row)
            bits |= 1 << left
    starts = np.concatenate([[0], np.bincount(row_of, minlength=num_rows).cumsum()])
    return Rows(ids[np.argsort(row_of, kind="stable")], starts)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its rows, each a list of sample numbers, and the share of the data passed after it."""

    rows: list[list[int]]
    epoch: float


@dataclass(frozen=True)
class BatchSchedule(Sequence[Step]):
    """All steps of a run, in the order in which they are taken. The rows of an epoch are made when it begins."""

    rows_of: Callable[[int], Rows]  # of an epoch, counted from 0, in order
    rows_per_epoch: int
    rows_per_step: int
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, number: int) -> Step:  # type: ignore[override]  # no slices
        number = range(self.num_steps)[number]  # or its IndexError
        epoch, step = divmod(number, math.ceil(self.rows_per_epoch / self.rows_per_step))
        rows, start = self.rows_of(epoch), step * self.rows_per_step
        return Step(
            [rows[i] for i in range(start, min(start + self.rows_per_step, len(rows)))], self.epoch_after(number)
        )

    def epoch_after(self, number: int) -> float:
        """The share of the data that is passed after this step, counted from 0."""
        epoch, step = divmod(number, math.ceil(self.rows_per_epoch / self.rows_per_step))
        return epoch + min((step + 1) * self.rows_per_step, self.rows_per_epoch) / self.rows_per_epoch

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the numbers and of the first and the last epoch."""
        digest = hashlib.sha256(f"{self.rows_per_epoch} {self.rows_per_step} {self.num_steps}".encode())
        for epoch in (0, math.ceil(self.epoch_after(self.num_steps - 1)) - 1):
            digest.update(self.rows_of(epoch).samples.data)
            digest.update(self.rows_of(epoch).starts.data)
        return digest.hexdigest()


def schedule_batches(
    lengths: Sequence[int] | np.ndarray,
    *,
    rows_per_step: int,
    capacity: int,
    packing: bool,
    num_epochs: float,
    max_steps: int | None,
    seed: int,
    shuffle: bool = True,
) -> BatchSchedule:
    """All steps of a run. Every sample is used once an epoch; the last, smaller batch of an epoch is a step too.

    Args:
        lengths: tokens of each sample, none above `capacity`.
        rows_per_step: micro_batch_size * gradient_accumulation_steps * ranks.
        num_epochs: may end within an epoch. max_steps: ends earlier, or, when larger, goes on with more epochs.
        shuffle: differently in every epoch; else samples come as they stand in the data.
    """
    order = (np.asarray(lengths), rows_per_step, capacity, packing, seed)
    rows_of = lru_cache(maxsize=2)(lambda epoch: _rows_of_epoch(*order, epoch, shuffle))
    num_rows = len(rows_of(0))  # and of every epoch: how many rows are packed does not depend on the order
    in_epoch, (complete, part) = math.ceil(num_rows / rows_per_step), divmod(num_epochs, 1)
    # As transformers counts, but for its rounding: 1.1 - 1 is above 0.1.
    num_steps = max_steps or int(complete) * in_epoch + math.ceil(in_epoch * part - 1e-9)
    return BatchSchedule(rows_of, num_rows, rows_per_step, num_steps)


def _rows_of_epoch(
    lengths: np.ndarray, rows_per_step: int, capacity: int, packing: bool, seed: int, epoch: int, shuffle: bool
) -> Rows:
    rng = random.Random(f"{seed} {epoch}")

    def shuffled(count: int) -> np.ndarray:
        order = array("I", range(count))
        if shuffle:
            rng.shuffle(order)
        return np.array(order, np.int64)

    ids = shuffled(len(lengths))
    if packing:
        # Unshuffled data is packed in stretches: all at once, the longest samples would come first.
        stretch = (lengths.cumsum() - lengths) // (POOL * rows_per_step * capacity)
        parts = [ids] if shuffle else np.split(ids, np.flatnonzero(np.diff(stretch)) + 1)
        rows = Rows.joined([pack(lengths, part, capacity) for part in parts])
        if shuffle:
            return rows.in_order(shuffled(len(rows)))
        return rows.in_order(np.argsort(np.minimum.reduceat(rows.samples, rows.starts[:-1])))  # by their first samples
    if shuffle:
        in_full_steps = len(ids) // rows_per_step * rows_per_step
        pools = range(0, in_full_steps, POOL * rows_per_step)
        parts = [*(ids[i : min(i + POOL * rows_per_step, in_full_steps)] for i in pools), ids[in_full_steps:]]
        by_length = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
        steps = by_length[:in_full_steps].reshape(-1, rows_per_step)
        ids = np.concatenate([steps[shuffled(len(steps))].flatten(), by_length[in_full_steps:]])
    return Rows(ids, np.arange(len(ids) + 1))
