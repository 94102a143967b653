"""Rows to samples: tokenised in several processes, kept in a folder, and prepared again when anything changed.

    files -> chunks of rows -> (processes) -> words: the tokens of all samples, in one long array -> Samples

The chunks come back in order, so the samples are in the order of the files for any number of processes. In memory
are some chunks and a few bytes for each sample: the tokens go to a file, and are mapped from it.

Prepared data is kept under a key: a hash of the contents of the files, the tokenizer, the prompt format, the lengths,
`FORMAT`, and the versions of the libraries that tokenise. Data that would come out differently has another key, so a
key that is found is never stale. Read next: data/packing.py, which makes the schedule of a run from the lengths.
"""

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from tqdm import tqdm

from ..config.errors import UserError
from ..config.files import check_writable, sha256_of, sweep, whole_folder, write_text
from ..tokenizer.tokenizer import Tokenizer
from .batches import SUPERVISED, Samples
from .files import DataFile
from .messages import ROLE_SEEN, UNKNOWN_ROLE
from .prompts import PromptFormat, detect_format
from .rows import CHUNK_BYTES, Chunk, chunks_of, placed_rows

SMALL = 8 << 20  # bytes of data; below, to start processes takes longer than the work
PR_SET_PDEATHSIG = 1  # of Linux: the signal that a process gets when the one that started it ends
FORMAT = b"2"  # raise it when the same rows and settings give other samples; older prepared data is then unused
NAMED = 5  # rows of each kind that are named


@dataclass(frozen=True)
class Encoding:
    """How rows become samples."""

    prompt_format: PromptFormat | None  # None: detected from the columns of each row
    tokenizer: Tokenizer
    sequence_len: int  # tokens that a sample may have
    strategy: str = "drop"  # for longer ones: drop, truncate or raise; long `completion` rows are split instead
    part: str = ""  # the rows that are wanted, as of a list: ":20%"
    skip_invalid: bool = False  # leave out rows that cannot be used, and report their number, in place of an error


@dataclass
class Places:
    """Some rows: their number, and the places of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.count

    def add(self, others: "Places") -> None:
        self.count += others.count
        self.first = [*self.first, *others.first][:NAMED]


@dataclass
class Counts:
    """What became of some rows."""

    rows: int = 0
    longest: int = 0  # tokens of the longest
    too_long: Places = field(default_factory=Places)  # longer than sequence_len: dropped or cut
    unsupervised: Places = field(default_factory=Places)  # without a supervised token: dropped
    notes: dict[str, Places] = field(default_factory=dict)  # of `encode_row`: a note -> its rows
    invalid: dict[str, Places] = field(default_factory=dict)  # why rows cannot be used -> those rows

    def note(self, texts: Iterable[str], where: str) -> None:
        """Count the notes on the row at this place: each note once, a role for each of its messages."""
        for text, number in Counter(texts).items():
            count = number if text.startswith(ROLE_SEEN) else 1
            self.notes.setdefault(text, Places()).add(Places(count, [where]))

    def add(self, others: "Counts") -> None:
        self.rows += others.rows
        self.longest = max(self.longest, others.longest)
        self.too_long.add(others.too_long)
        self.unsupervised.add(others.unsupervised)
        for text, places in others.notes.items():
            self.notes.setdefault(text, Places()).add(places)
        for why, places in others.invalid.items():  # few reasons: each may name a value of its row
            why = why if why in self.invalid or len(self.invalid) < NAMED else "other reasons"
            self.invalid.setdefault(why, Places()).add(places)

    def why_invalid(self) -> str:
        """What is wrong with the rows that cannot be used, the first of them by file and line; "" without such rows."""
        total, parts = sum(map(len, self.invalid.values())), []
        for why, places in self.invalid.items():
            where, *others = places.first
            also = [place.removeprefix(where.rpartition(", ")[0] + ", ") for place in others]
            also += [f"{len(places) - len(places.first)} more"] * (len(places) > NAMED)
            parts.append(f"{where}: {why}" + (f" (also {', '.join(also)})" if also else ""))
        if any(why.startswith(UNKNOWN_ROLE) for why in self.invalid):
            roles = [f"{text.removeprefix(ROLE_SEEN)} {len(n)}" for text, n in self.notes.items() if ROLE_SEEN in text]
            parts.append(f"The roles of its messages: {', '.join(roles[:20])}.")
        return (f"{total} of {self.rows} rows cannot be used. " if total > 1 else "") + " ".join(parts)


class InvalidRows(UserError):
    """Some rows cannot be used. `prepare_data` collects those of all data sets before it ends the run."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(counts.why_invalid())
        self.are_all = sum(map(len, counts.invalid.values())) == counts.rows


@dataclass(kw_only=True)
class Reading(Counts):
    """The samples of a data set, and what became of its rows, which is printed before step 1."""

    samples: Samples
    files: dict[str, str] = field(default_factory=dict)  # path -> SHA-256 of its contents, where they were prepared

    def describe_notes(self) -> list[str]:
        """A line for each thing that was noted of rows, with their number and the first of them."""
        noted = self.notes | {f"left out, {why}": places for why, places in self.invalid.items()}
        return [
            f"{len(places)} row{'s' * (len(places) > 1)}: {text} (first: {places.first[0]})"
            for text, places in noted.items()
            if not text.startswith(ROLE_SEEN)
        ]

    def describe(self, sequence_len: int, strategy: str) -> str:
        """One line on the samples, and on the rows that are too long or have no supervised token."""
        tokens, targets = int(self.samples.lengths.sum()), int(self.samples.num_targets.sum())
        text = f"{len(self.samples)} samples, {tokens} tokens, {targets / max(tokens, 1):.0%} of them supervised"
        if self.too_long:
            action = {"drop": "dropped", "truncate": "cut"}[strategy]
            advice = f"first: {self.too_long.first[0]}; sequence_len {self.longest} would keep all"
            text += f"; {len(self.too_long)} longer than sequence_len {sequence_len} {action} ({advice})"
        if self.unsupervised:
            first = ", ".join(self.unsupervised.first)
            text += f"; {len(self.unsupervised)} without a supervised token dropped (first: {first})"
        return text


def read_samples(files: list[DataFile], encoding: Encoding) -> Reading:
    """Tokenise the rows of some files, into memory.

    Raises:
        UserError: with file and line, for a row that the format cannot read; if there is no usable row.
    """
    parts: list[np.ndarray] = []
    counts, samples = _read(files, encoding, parts.append)
    samples = dataclasses.replace(samples, words=(np.concatenate(parts),))
    return Reading(**vars(counts), samples=samples)


def prepare_samples(files: list[DataFile], encoding: Encoding, folder: Path) -> Reading:
    """The same, taken from `folder` if it was prepared before, else kept there; the tokens stay in a file."""
    before = _stamps(files)
    hashes = {str(file.path): sha256_of(file.path) for file in files}
    prepared = folder / _key(encoding, files, hashes)
    if (reading := _kept(prepared, hashes)) is None:
        check_writable(folder, "dataset_prepared_path")
        sweep(folder, r"[0-9a-f]{32}")
        if prepared.exists():
            print(f"dataset_prepared_path: {prepared} is damaged, so the data is tokenised again", file=sys.stderr)
        with whole_folder(prepared) as temporary:
            with open(temporary / "words.bin", "wb") as words:
                counts, samples = _read(files, encoding, lambda some: words.write(some.data))
            np.save(temporary / "samples.npy", np.stack([samples.lengths, samples.num_targets]))
            facts: dict[str, Any] = {"counts": dataclasses.asdict(counts), "fingerprint": samples.fingerprint}
            facts["seal"] = _seal(facts, temporary)
            write_text(temporary / "counts.json", json.dumps(facts, indent=2) + "\n")
            if before != _stamps(files):
                raise UserError(f"data {_name(files)}: changed while it was read. Run again.")
        reading = _kept(prepared, hashes)
    assert reading is not None
    if reading.invalid and not encoding.skip_invalid:
        raise InvalidRows(reading)
    return reading


def _kept(prepared: Path, hashes: dict[str, str]) -> Reading | None:
    """The prepared data of a folder, if it is complete and unchanged."""
    try:
        facts = json.loads((prepared / "counts.json").read_text("utf-8"))
        is_right = facts.pop("seal") == _seal(facts, prepared)  # before anything else is believed
        words = np.memmap(prepared / "words.bin", np.uint32, "r")
        if not is_right or (columns := np.load(prepared / "samples.npy"))[0].sum() != len(words):
            return None
        samples = Samples.of(words, columns[0], columns[1], facts["fingerprint"])
        counts = pydantic.TypeAdapter(Counts).validate_python(facts["counts"])
        return Reading(**vars(counts), samples=samples, files=hashes)
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _stamps(files: list[DataFile]) -> list[tuple[int, int]]:
    return [(file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in files]


def _seal(facts: dict, folder: Path) -> str:
    """A hash of all prepared data but the words."""
    samples = (folder / "samples.npy").read_bytes()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + samples).hexdigest()


def _key(encoding: Encoding, files: list[DataFile], hashes: dict[str, str]) -> str:
    """A hash of all that decides what the samples are."""
    tok, form = encoding.tokenizer, encoding.prompt_format
    template = form and form.jinja(tok)
    facts = [
        *(f"{file.path} {file.kind} {hashes[str(file.path)]}" for file in files),
        *(f"{item.name} {getattr(tok, item.name)!r}" for item in dataclasses.fields(tok) if item.compare),
        f"{form} {encoding.sequence_len} {encoding.strategy} {encoding.part}",
        str(date.today()) if "strftime_now" in (template or "") else "",  # the template may write the date
    ]
    versions = "".join(map(version, ("tiktoken", "sentencepiece", "jinja2")))
    known = "\n".join([*facts, ""]).encode(errors="surrogateescape")  # the name of a file may be no UTF-8
    return hashlib.sha256(known + FORMAT + versions.encode()).hexdigest()[:32]


def _name(files: list[DataFile]) -> str:
    return f"{files[0].path}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"


# ------------------------------------------------------------------------------------------------ rows to samples


def _read(files: list[DataFile], encoding: Encoding, write: Callable[[np.ndarray], object]) -> tuple[Counts, Samples]:
    """Tokenise all rows and write their words, in order. Returns the samples without their words."""
    counts, digest = Counts(), hashlib.sha256()
    columns = [(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int64))]
    for part in _encode_files(files, encoding):
        counts.add(part.counts)
        columns.append((part.samples.lengths, part.samples.num_targets, part.rows))
        (words,) = part.samples.words
        digest.update(words.data)
        digest.update(part.samples.lengths.data)
        write(words)
    lengths, num_targets, rows = map(np.concatenate, zip(*columns, strict=True))
    if counts.invalid and not encoding.skip_invalid:
        raise InvalidRows(counts)
    if counts.too_long and encoding.strategy == "raise":
        found = f"{counts.too_long.first[0]}: more tokens than sequence_len={encoding.sequence_len}"
        found += f", and of {counts.rows} rows {len(counts.too_long)} are too long; excess_length_strategy is raise"
        raise UserError(f"{found}. Set sequence_len to {counts.longest}, or drop or truncate.")
    samples = Samples.of(np.empty(0), lengths, num_targets, digest.hexdigest())
    _note_repeated(rows, files, encoding.part, counts)
    if not len(samples):
        num_long, num_empty = len(counts.too_long), len(counts.unsupervised)
        why = f"{num_long} too long for sequence_len {encoding.sequence_len}, {num_empty} without a supervised token"
        why = why if counts.rows else f"the {'part' if encoding.part else 'file'} has no rows"
        advice = f"sequence_len: {counts.longest} would keep all" if num_long else "Check the file and its type"
        raise UserError(f"data {_name(files)}: no usable row ({why}). {advice}.")
    return counts, samples


def _note_repeated(rows: np.ndarray, files: list[DataFile], part: str, counts: Counts) -> None:
    """Count repeated rows. rows: a hash of the tokens of each."""
    _, firsts = np.unique(rows, return_index=True)
    if len(firsts) == len(rows):
        return
    is_repeated = np.ones(len(rows), bool)
    is_repeated[firsts] = False
    named = np.flatnonzero(is_repeated)[:NAMED].tolist()
    placed = enumerate(islice(placed_rows(files, part), named[-1] + 1))
    first = [where for i, (where, _) in placed if i in named]
    counts.notes["the same as an earlier row, so used more than once"] = Places(len(rows) - len(firsts), first)


@dataclass(frozen=True)
class Encoded:
    """The samples of a chunk, a hash of each row to find repeated ones, and what became of the rows."""

    samples: Samples
    rows: np.ndarray  # (rows,) int64
    counts: Counts


def encode_chunk(chunk: Chunk, encoding: Encoding) -> Encoded:
    """Tokenise the rows of a chunk."""
    counts, rows = Counts(), list[int]()
    samples: list[np.ndarray] = []
    for where, row in chunk.rows():
        counts.rows += 1
        notes: list[str] = []
        num_samples = len(samples)
        try:
            if isinstance(row, UserError):
                raise row
            prompt_format = encoding.prompt_format or detect_format(row)
            ids, mask = prompt_format.encode_row(encoding.tokenizer, row, notes.append)
        except (UserError, RecursionError) as error:  # the latter of lists in lists in lists ...
            rows.append(hash(where))
            counts.note((note for note in notes if note.startswith(ROLE_SEEN)), where)
            counts.add(Counts(invalid={str(error).removeprefix(f"{where}: "): Places(1, [where])}))
            continue
        counts.note(notes, where)
        counts.longest = max(counts.longest, len(ids))
        words = np.array(ids, np.uint32) | np.array(mask, np.uint32) * SUPERVISED
        pieces = np.split(words, range(encoding.sequence_len, len(words), encoding.sequence_len))
        if len(pieces) > 1 and prompt_format.type != "completion":
            counts.too_long.add(Places(1, [where]))
            pieces = pieces[:1] if encoding.strategy == "truncate" else []
        for piece in pieces:
            if np.any(piece[1:] >= SUPERVISED):
                samples.append(piece)
            else:
                counts.unsupervised.add(Places(1, [where]))
        rows.append(hash(words.tobytes() if len(samples) > num_samples else where))  # only of rows that are used
    lengths = np.array([len(sample) for sample in samples], np.int32)
    num_targets = np.array([np.count_nonzero(sample[1:] >= SUPERVISED) for sample in samples], np.int32)
    words = np.concatenate([np.empty(0, np.uint32), *samples])
    return Encoded(Samples.of(words, lengths, num_targets, ""), np.array(rows, np.int64), counts)


def _encode_files(files: list[DataFile], encoding: Encoding) -> Iterator[Encoded]:
    """The chunks of all files, tokenised, in order; in as many processes as there are cores, if they are worth it."""
    chunks = chunks_of(files, encoding.part)
    num_bytes = sum(file.path.stat().st_size for file in files)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1  # elsewhere a forked process may crash
    workers = min(cores, 1 + num_bytes // CHUNK_BYTES)
    if num_bytes < SMALL or workers < 2:
        yield from (encode_chunk(chunk, encoding) for chunk in chunks)
        return
    # Forked, a process starts at once and has the tokenizer. It must not touch torch, whose threads it does not have.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (encoding,))
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    with tqdm(total=num_bytes, disable=None, unit="B", unit_scale=True, desc="tokenising", dynamic_ncols=True) as bar:

        def finished(but: int) -> Iterator[Encoded]:
            while len(waiting) > but:
                size, future = waiting.popleft()
                yield future.result()
                bar.update(size)

        try:
            for chunk in chunks:
                waiting.append((chunk.num_bytes, pool.submit(_encode_in_worker, chunk)))
                yield from finished(but=3 * workers)  # not all at once: they would be held in memory
            yield from finished(but=0)
        except BrokenProcessPool as error:
            advice = "Free memory, or split the longest rows"
            raise UserError(f"a process that tokenised data was ended from outside. {advice}.") from error
        except KeyboardInterrupt:  # Ctrl-C, SIGTERM: what is under way is not waited for
            for worker in active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_encoding: Encoding  # of a worker


def _start_worker(encoding: Encoding) -> None:
    global _encoding
    _encoding = encoding
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the first process, which ends these
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and so does whatever kills it


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode_chunk(chunk, _encoding)
