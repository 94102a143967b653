"""From data files to batches: read and tokenise rows, and lay samples into tensors.

rows of a file -> Sample (tokens, supervised) -> packing.py: the plan of all steps -> Batch of tensors
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cli import UserError
from .ops import Segments
from .prompts import PromptFormat
from .tokenizer import Tokenizer

IGNORED = -100  # the target of a position whose loss does not count


@dataclass(frozen=True)
class Sample:
    """One row of a data file as tokens, and for each token whether the model has to learn to write it."""

    tokens: list[int]
    supervised: list[bool]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Tokens that count: the first one follows nothing, so it never does."""
        return sum(self.supervised[1:])


# ------------------------------------------------------------------------------------------------ reading


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON Lines file, or of a JSON file that holds a list, each with its place for error messages."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"data {path}: no such file. Give the path of a .jsonl or .json file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data {path}: cannot be read as UTF-8 text ({error}).") from error
    if path.suffix == ".json" and text.lstrip().startswith("["):
        rows = ((f"{path}, row {i}", row) for i, row in enumerate(_parse(text, str(path)), start=1))
    else:
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
        rows = ((where, _parse(line, where)) for where, line in lines)
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds a {type(row).__name__}, and a row is an object with named fields.")
        yield where, row


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg} at column {error.colno}). Correct that line.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists ...
        raise UserError(f"{where}: JSON that cannot be read ({error}). Correct that line.") from error


@dataclass
class Reading:
    """What became of the rows of the data files; said before step 1, so that nothing is lost in silence."""

    samples: list[Sample]
    too_long: list[str]  # places of rows longer than sequence_len
    longest: int = 0  # tokens of the longest row
    unsupervised: int = 0  # rows with no token that counts

    def describe(self, sequence_len: int, strategy: str) -> str:
        targets, tokens = sum(s.num_targets for s in self.samples), sum(map(len, self.samples))
        text = f"{len(self.samples)} samples, {tokens} tokens, {targets / max(tokens, 1):.0%} of them supervised"
        if self.too_long:
            action = {"drop": "dropped", "truncate": "cut"}[strategy]
            text += (
                f"; {len(self.too_long)} longer than sequence_len {sequence_len} {action} (first: {self.too_long[0]}; "
                f"sequence_len {self.longest} would keep all)"
            )
        if self.unsupervised:
            text += f"; {self.unsupervised} without a supervised token dropped"
        return text


def read_samples(
    path: str | Path,
    format_of: Callable[[dict[str, Any]], PromptFormat],
    tokenizer: Tokenizer,
    sequence_len: int,
    excess_length_strategy: str = "drop",
) -> Reading:
    """Tokenise a data file.

    Args:
        format_of: the prompt format of a row.
        sequence_len: tokens that a sample may have.
        excess_length_strategy: for longer ones: drop, truncate or raise. Long `completion` rows are split instead.
    Raises:
        UserError: with file and line, for a row that the format cannot read; for a file without any usable row.
    """
    reading = Reading([], [])
    for where, row in read_rows(path):
        try:
            prompt_format = format_of(row)
            tokens, supervised = prompt_format.encode_row(tokenizer, row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        reading.longest = max(reading.longest, len(tokens))
        pieces = [Sample(tokens, supervised)]
        if len(tokens) > sequence_len:
            starts = range(0, len(tokens), sequence_len)
            pieces = [Sample(tokens[i : i + sequence_len], supervised[i : i + sequence_len]) for i in starts]
            if prompt_format.type != "completion":
                if excess_length_strategy == "raise":
                    raise UserError(
                        f"{where}: {len(tokens)} tokens, more than sequence_len={sequence_len}, and "
                        f"excess_length_strategy is raise. Set sequence_len to {len(tokens)}, or drop or truncate."
                    )
                reading.too_long.append(where)
                pieces = pieces[:1] if excess_length_strategy == "truncate" else []
        for sample in pieces:
            if sample.num_targets:
                reading.samples.append(sample)
            else:
                reading.unsupervised += 1
    if not reading.samples:
        raise UserError(
            f"data {path}: no usable row ({len(reading.too_long)} too long, {reading.unsupervised} without a token to "
            f"learn), so there is nothing to train or score. Check the file, its format and sequence_len."
        )
    return reading


# ------------------------------------------------------------------------------------------------ batches


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, ready for the model.

    tokens: (B, T) int64, padded at the end of a row. segments: where its documents are; padding is one of them.
    supervised: (N,) int64, places in the flattened (B * T) that count. targets: (N,) int64, the next token there.
    num_tokens: all tokens but padding.
    """

    tokens: Tensor
    segments: Segments
    supervised: Tensor
    targets: Tensor
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        moved = (x.to(device, non_blocking=True) for x in (self.tokens, self.supervised, self.targets))
        tokens, supervised, targets = moved
        return Batch(tokens, self.segments, supervised, targets, self.num_tokens)


def collate(rows: list[list[Sample]], pad_to: int = 0) -> Batch:
    """Lay samples one after another in rows. Padding is told from tokens by its place, never by its id.

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
            ids = torch.tensor(sample.tokens)
            tokens[b, start:end] = ids
            counted = torch.tensor(sample.supervised[1:], dtype=torch.bool)
            targets[b, start : end - 1] = torch.where(counted, ids[1:], IGNORED)  # the last token predicts nothing
        lengths.append((*map(len, row), *([T - end] if end < T else ())))
    flat = targets.flatten()
    supervised = (flat != IGNORED).nonzero().squeeze(1)
    num_tokens = sum(len(sample) for row in rows for sample in row)
    return Batch(tokens, Segments(tuple(lengths)), supervised, flat[supervised], num_tokens)


def micro_batches(rows: list[Any], micro_batch_size: int, rank: int, ranks: int) -> Iterator[tuple[int, list[Any]]]:
    """This rank's share of a step: (number of its first row within the step, up to micro_batch_size rows), in turn."""
    for start in range(rank * micro_batch_size, len(rows), ranks * micro_batch_size):
        yield start, rows[start : start + micro_batch_size]
