"""Samples as the training loop sees them, and how they become batches of tensors.

    data/rows.py: files -> rows    data/prepare.py: rows -> Samples    data/packing.py: lengths -> the plan of all steps
    here: the samples of a row of a step -> Batch

A sample is a row of data as tokens, with a mask of the supervised ones, which the model has to learn to write. Millions
of samples are a few long arrays (`Samples`), which may be in a file: one is cut out when a step needs it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import Segments

IGNORED = -100  # the target of a position that is not supervised
SUPERVISED = np.uint32(1 << 31)  # this bit of a stored token id marks it as supervised; ids stay below a million


@dataclass(frozen=True, eq=False)
class Sample:
    """One row of data as tokens, and for each token whether the model has to learn to write it."""

    tokens: Sequence[int] | np.ndarray  # (n,) ids
    supervised: Sequence[bool] | np.ndarray  # (n,)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Supervised tokens: the first one follows nothing, so it is not one."""
        return int(np.count_nonzero(self.supervised[1:]))


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Many samples. Sample i is words[source[i]][starts[i] : starts[i] + lengths[i]]."""

    words: tuple[np.ndarray, ...]  # for each data set (its tokens,) uint32, in memory or mapped from a file
    source: np.ndarray  # (N,) the data set of each sample
    starts: np.ndarray  # (N,) int64
    lengths: np.ndarray  # (N,) tokens
    num_targets: np.ndarray  # (N,) supervised tokens
    fingerprint: str  # a hash of everything above

    @classmethod
    def of(cls, words: np.ndarray, lengths: np.ndarray, num_targets: np.ndarray, fingerprint: str) -> "Samples":
        """The samples of one data set, one after the other in `words`."""
        source = np.zeros(len(lengths), np.int16)
        return cls((words,), source, lengths.cumsum(dtype=np.int64) - lengths, lengths, num_targets, fingerprint)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:  # type: ignore[override]  # no slices
        start, length = self.starts[i], self.lengths[i]
        words = self.words[self.source[i]][start : start + length]
        return Sample((words & ~SUPERVISED).astype(np.int64), words >= SUPERVISED)

    def take(self, which: np.ndarray) -> "Samples":
        """Some of them, by their numbers."""
        arrays = {name: getattr(self, name)[which] for name in ("source", "starts", "lengths", "num_targets")}
        digest = hashlib.sha256(self.fingerprint.encode() + np.asarray(which, np.int64).tobytes())
        return replace(self, **arrays, fingerprint=digest.hexdigest())


def join(parts: Sequence[Samples]) -> Samples:
    """The samples of several data sets, one data set after the other."""
    fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    if not parts:
        return Samples.of(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), fingerprint)
    firsts = accumulate((len(part.words) for part in parts), initial=0)
    source = np.concatenate([part.source + first for part, first in zip(parts, firsts, strict=False)])
    names = ("starts", "lengths", "num_targets")
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Samples(tuple(words for part in parts for words in part.words), source, **arrays, fingerprint=fingerprint)


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, ready for the model.

    tokens: (B, T) int64, padded at the end of a row. segments: where its documents are; padding is one of them.
    supervised: (N,) int64, supervised places in the flattened (B * T). targets: (N,) int64, the next token there.
    """

    tokens: Tensor
    segments: Segments
    supervised: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        tokens, *others = (to_device(x, device) for x in (self.tokens, self.supervised, self.targets))
        if device.type == "cuda":  # what attention and RoPE will ask for
            self.segments.ends(device), self.segments.positions
        return Batch(tokens, self.segments, *others)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; a GPU's is made while it computes, from pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def collate(rows: list[list[Sample]], pad_to: int = 0) -> Batch:
    """Lay samples one after another in rows. What is padding follows from its place, never from its id.

    Args:
        rows: for each row its samples. pad_to: width of the rows; by default that of the longest.
    """
    T = max(pad_to, *(sum(map(len, row)) for row in rows))
    tokens = torch.zeros(len(rows), T, dtype=torch.int64)
    targets = torch.full((len(rows), T), IGNORED)
    lengths = []
    for b, row in enumerate(rows):
        end = 0
        for sample in row:
            start, end = end, end + len(sample)
            ids = torch.as_tensor(sample.tokens)
            tokens[b, start:end] = ids
            is_learnt = torch.as_tensor(sample.supervised[1:], dtype=torch.bool)
            targets[b, start : end - 1] = torch.where(is_learnt, ids[1:], IGNORED)  # the last token predicts nothing
        lengths.append((*map(len, row), *([T - end] if end < T else ())))
    flat = targets.flatten()
    supervised = (flat != IGNORED).nonzero().squeeze(1)
    return Batch(tokens, Segments(tuple(lengths)), supervised, flat[supervised])


def token_places(row_lengths: Sequence[int], width: int) -> tuple[Tensor, Tensor]:
    """Where the tokens of rows come from that are laid one after another into one of `width` tokens.

    Returns:
        The number of each token's row and its place in that row, both (1, width) int64. Padding is one row more.
    """
    lengths = [*row_lengths, width - sum(row_lengths)]
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return rows[None], torch.cat([torch.arange(n) for n in lengths])[None]


def micro_batches(rows: list[Any], micro_batch_size: int, rank: int, ranks: int) -> Iterator[tuple[int, list[Any]]]:
    """This rank's share of a step: (number of its first row within the step, up to micro_batch_size rows), in turn."""
    for start in range(rank * micro_batch_size, len(rows), ranks * micro_batch_size):
        yield start, rows[start : start + micro_batch_size]
