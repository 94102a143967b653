"""From files to rows: JSON, CSV, Parquet, Arrow and text.

    read_chunks    a file -> chunks of about a megabyte, as it streams by; cheap, so that one process can do it
    Chunk.rows     a chunk -> rows, each with its place ("a.jsonl, line 7"); the work, which many processes share

A row is a map from column names to values. What is wrong with one is reported with its place. A JSON list is cut into
its values by their brackets alone (`_list_values`); json then parses each value.
Read next: data/prepare.py.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.errors import UserError
from ..config.files import unique_keys
from ..config.limits import bounded_memory
from .files import DataFile

Row = dict[str, Any]
BinaryFile = io.BufferedReader | gzip.GzipFile
Placed = tuple[str, Row | UserError]  # its place, for messages; and the row, or why it cannot be read

CHUNK_BYTES = 1 << 20
ARROW_ROWS, FEW_ROWS = 512, 16  # of a chunk; and where a long value may be stored once and be in every row
# What pyarrow raises for a damaged column, or a value that Python cannot have; the row with it is then refused by name.
UNREADABLE = (ValueError, TypeError, LookupError, OverflowError, NotImplementedError, SystemError)
# Bytes of a row (an open quote would make the rest of a CSV file one field); of a data set, or 200 times its files.
LONGEST, LARGEST = 1 << 26, 1 << 28
A_ROW = 64  # bytes of a row as Python holds it, beside its text


# ------------------------------------------------------------------------------------------------ chunks


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file, not yet parsed; small, and ready to be sent to another process."""

    parse: Callable[[Any], Iterable[Placed]]  # a function of this module, with what is the same for all of the file
    unparsed: Sequence[Any] | Any  # what it reads, one item for each row; a list or a pyarrow.RecordBatch
    num_bytes: int
    wanted: tuple[int, int | None] = (0, None)  # of its rows, those from the one to the other

    def rows(self) -> Iterator[Placed]:
        """The wanted rows with their places; for a row that cannot be read, the error."""
        return islice(self.parse(self.unparsed), *self.wanted)


def placed_rows(files: list[DataFile], part: str = "") -> Iterator[Placed]:
    """The rows of some files, in order; see `chunks_of`."""
    return (placed for chunk in chunks_of(files, part) for placed in chunk.rows())


def read_rows(files: list[DataFile], part: str = "") -> Iterator[tuple[str, Row]]:
    """The same, where every row has to be readable."""
    for where, row in placed_rows(files, part):
        if isinstance(row, UserError):
            raise row
        yield where, row


def chunks_of(files: list[DataFile], part: str = "") -> Iterator[Chunk]:
    """The rows of some files in chunks, in order.

    Args:
        part: as of a list, with numbers of rows or percentages: ":1000", "10%:20%", "-500:"; "": all rows.
    """
    is_relative = re.search("[%-]", part)
    total = sum(len(chunk.unparsed) for chunk in _bounded(files)) if is_relative else sys.maxsize

    def place(text: str) -> int | None:
        number = text.removesuffix("%")
        return (int(number) if number == text else round(int(number) * total / 100)) if text else None

    start, stop, _ = slice(*map(place, (part or ":").split(":"))).indices(total)
    first = 0
    for chunk in _bounded(files):
        size = len(chunk.unparsed)
        wanted = max(0, start - first), min(stop - first, size)
        if wanted[0] < wanted[1]:
            yield replace(chunk, wanted=wanted)
        first += size
        if first >= stop:
            return


def _bounded(files: list[DataFile]) -> Iterator[Chunk]:
    """All chunks of some files, until they unpack to far more than the files are: also rows without any bytes count."""
    left = max(LARGEST, 200 * sum(file.path.stat().st_size for file in files))
    for chunk in (chunk for file in files for chunk in read_chunks(file)):
        left -= chunk.num_bytes + A_ROW * len(chunk.unparsed)
        if left < 0:
            raise UserError(f"data {files[0].path}: unpacks to more than 200 times its size. Unpack it, or some of it.")
        yield chunk


def read_chunks(file: DataFile) -> Iterator[Chunk]:
    """The rows of a file in chunks, in order. Memory: one chunk."""
    path = file.path
    try:
        if file.kind in ("parquet", "arrow"):
            yield from _arrow_chunks(file)
            return
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as opened:
            start = opened.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
            if file.kind == "csv":
                yield from _csv_chunks(path, opened)
            else:
                is_list = file.kind == "json" and start.startswith(b"[")
                texts = ((None if text[1].isspace() else text, len(text[1])) for text in _lines(path, opened))
                parse = partial(_rows_of_texts, path, file.kind)
                yield from _in_chunks(parse, _list_values(path, opened) if is_list else texts)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data {path}: cannot be read ({error}). Check the file, or copy it again.") from error


def _lines(path: Path, opened: BinaryFile) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, which may have been compressed to a small part of what they are."""
    for number, line in enumerate(iter(partial(opened.readline, LONGEST), b""), 1):
        if len(line) == LONGEST:
            raise UserError(f"{path}, line {number}: has more than {LONGEST >> 20} MiB. Cut that row into several.")
        yield number, line


def _in_chunks(parse: Callable[[Any], Iterable[Placed]], items: Iterable[tuple[Any, int]]) -> Iterator[Chunk]:
    """Unparsed rows, and None for blank lines, each with its number of bytes, in chunks."""
    unparsed: list[Any] = []
    size = 0
    for item, length in items:
        size += length if item else length + A_ROW
        unparsed += [item] if item else []
        if size >= CHUNK_BYTES:
            yield Chunk(parse, unparsed, size)
            unparsed, size = [], 0
    if unparsed:
        yield Chunk(parse, unparsed, size)


# ------------------------------------------------------------------------------------------------ text and JSON


def _decode(data: bytes, path: Path, line: int) -> str:
    """The text of a line, or of several from `line` on; without a byte order mark."""
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        before, byte = data[: error.start].split(b"\n"), data[error.start]
        where = f"{path}, line {line + len(before) - 1}: byte 0x{byte:02x} at place {len(before[-1]) + 1} of the line"
        raise UserError(f"{where} is not UTF-8. Convert the file, or correct that line.") from error


def _rows_of_texts(path: Path, kind: str, texts: list[tuple[int, bytes] | tuple[int, bytes, int]]) -> Iterator[Placed]:
    """Rows from lines or from JSON, each with the line that it begins in; values of a list also with their number."""
    for line, data, *number in texts:
        where = f"{path}, row {number[0]} (line {line})" if number else f"{path}, line {line}"
        try:
            text = _decode(data, path, line)
            yield where, {"text": text.rstrip("\r\n")} if kind == "text" else _parse(text, path, line, where)
        except UserError as error:
            yield where, error


def _parse(text: str, path: Path, line: int, where: str) -> Row:
    try:
        row = json.loads(text.rstrip("\r\n"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        found = "expected ',' or ']'" if where.endswith(")") and error.msg == "Extra data" else error.msg
        found = f"{path}, line {line + error.lineno - 1}: not valid JSON ({found} at column {error.colno})"
        raise UserError(f"{found}. A row is one object on one line, or the file is one list of them.") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of thousands of digits, lists in lists ...
        raise UserError(f"{where}: JSON that cannot be read ({error}). Correct that row.") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds a {type(row).__name__}, and a row is an object with named fields.")
    return row


# The next bracket or comma that is in no string. Inside of a value of a list only brackets matter, which is faster.
NEXT_MARK, NEXT_BRACKET = (
    re.compile(rb'(?:[^"%b]++|"(?:[^"\\]++|\\.)*+")*+([%b])' % (marks, marks), re.DOTALL)
    for marks in (rb"\[\]{},", rb"\[\]{}")
)


def _cut_at_own_marks(opened: BinaryFile) -> Iterator[tuple[bytes, bytes]]:
    """A JSON list, cut at its own brackets and commas: the text before each, and the mark; then the rest, and b""."""
    text, at, depth = b"", 0, 0
    while more := opened.read(max(CHUNK_BYTES, len(text))):  # twice as much of a long value each time
        text, start = text + more, 0
        while found := (NEXT_BRACKET if depth > 1 else NEXT_MARK).match(text, at):
            at, mark = found.end(), found[1]
            if mark in b"[,]" and depth == (mark != b"["):
                yield text[start : at - 1], mark
                start = at
            depth += (mark in b"[{") - (mark in b"]}")
        text, at = text[start:], at - start
        if len(text) > LONGEST or depth > 10_000:
            raise UserError(f"{opened.name}: a row has more than {LONGEST >> 20} MiB, or lists in lists. Correct it.")
    yield text, b""


def _list_values(path: Path, opened: BinaryFile) -> Iterator[tuple[tuple[int, bytes, int], int]]:
    """The values of a JSON list, not parsed, each with the line that it begins in, its number, and its bytes in all."""
    pieces = _cut_at_own_marks(opened)
    line, number, is_ended = 1 + next(pieces)[0].count(b"\n"), 0, False
    for piece, mark in pieces:
        value = piece.lstrip()
        line += piece.count(b"\n", 0, len(piece) - len(value))
        if is_ended and (value or mark):
            raise UserError(f"{path}, line {line}: more text behind the end of the list. Correct that line.")
        if not mark and not is_ended:
            _parse(_decode(value, path, line), path, line, "")
            raise UserError(f"{path}, line {line}: not valid JSON (expected ']'). Correct that line.")
        if mark == b"," or mark and (value or number):
            number += 1
            yield (line, value, number), len(piece)
        line += value.count(b"\n")
        is_ended = mark == b"]"


# ------------------------------------------------------------------------------------------------ CSV


def _csv_chunks(path: Path, opened: BinaryFile) -> Iterator[Chunk]:
    """The rows of a CSV file with a header, commas and double quotes; a row may span lines.

    The first column may be without a name, as pandas writes the numbers of rows.
    """
    lines = _csv_lines(path, opened)
    where, header = next((line for line in islice(lines, 1000) if line[1]), ("", []))
    if len(set(header)) < len(header) or "" in header[1:] or header == [""]:
        raise UserError(f"{where}: the header is {', '.join(header)}. Give every column a name of its own.")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise UserError(f"{where}: the header is one column, {header[0]!r}. Separate the columns with commas.")
    yield from _in_chunks(partial(_csv_rows, header), ((line[1] and line, sum(map(len, line[1]))) for line in lines))


def _csv_lines(path: Path, opened: BinaryFile) -> Iterator[tuple[str, list[str]]]:
    csv.field_size_limit(LONGEST)
    reader = csv.reader((_decode(line, path, i) for i, line in _lines(path, opened)), strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            yield where, next(reader)  # nothing for a blank line
        except StopIteration:
            return
        except csv.Error as error:
            advice = "A field with commas, quotes or line breaks needs double quotes; write a quote in it twice."
            raise UserError(f"{where}: not valid CSV ({error}). {advice}") from error


def _csv_rows(header: list[str], lines: list[tuple[str, list[str]]]) -> Iterator[Placed]:
    for where, fields in lines:
        if len(fields) == len(header):
            yield where, dict(zip(header, fields, strict=True))
        else:
            found = f"{len(fields)} fields, and the header names {len(header)} columns"
            yield where, UserError(f"{where}: {found}. Correct the row; a field with commas needs double quotes.")


# ------------------------------------------------------------------------------------------------ Parquet and Arrow


def _arrow_chunks(file: DataFile) -> Iterator[Chunk]:
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # Arrow's own takes a GiB ahead; each thread a part
    import pyarrow.parquet  # here, because most runs read none

    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    within = bounded_memory(16 * file.path.stat().st_size)  # a file of a few KB may say that it has pages of GB
    try:
        with open(file.path, "rb") as opened:
            if file.kind == "parquet":
                parquet = pyarrow.parquet.ParquetFile(opened, pre_buffer=False)
                batches = parquet.iter_batches(FEW_ROWS, use_threads=False)
            elif opened.peek(6)[:6] == b"ARROW1":
                reader = pyarrow.ipc.open_file(opened, options=options)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(opened, options=options)
            first = 1
            for batch in iter(within(partial(next, iter(batches), None)), None):
                if not batch.schema.names:
                    raise ValueError("it has no columns")
                batch.validate(full=file.kind == "arrow")  # else to count or to send its bytes reads behind their end
                plain = [f.with_type(f.type.value_type) if hasattr(f.type, "index_type") else f for f in batch.schema]
                rows = ARROW_ROWS if plain == [*batch.schema] else FEW_ROWS  # of a dictionary a value may be in each
                for start in range(0, len(batch), rows):
                    part = batch.slice(start, rows).cast(pyarrow.schema(plain))
                    yield Chunk(partial(_arrow_rows, file.path, batch.schema.names, first), part, part.nbytes)
                    first += len(part)
    except (pyarrow.ArrowException, ValueError, MemoryError) as error:
        why = error or "out of memory"
        raise UserError(f"data {file.path}: not a readable {file.kind.title()} file ({why}). Copy it again.") from error


def _arrow_rows(path: Path, names: list[str], first: int, batch: Any) -> Iterator[Placed]:
    if len(set(names)) < len(names):
        raise UserError(f"data {path}: its columns are {', '.join(names)}. Give each a name of its own.")
    columns = {name: _values_of(column) for name, column in zip(names, batch.columns, strict=True)}
    for i in range(len(batch)):
        yield f"{path}, row {first + i}", {name: _as_in_json(values[i]) for name, values in columns.items()}


def _values_of(column: Any) -> list[Any]:
    """The values of a column. One that Python cannot have, such as text that is not UTF-8, becomes its error."""
    try:
        column.validate(full=True)  # lengths and offsets within the buffers too: nothing else checks them
        return column.to_pylist()
    except UNREADABLE as error:
        if len(column) == 1:
            return [error]
        return [value for i in range(len(column)) for value in _values_of(column.slice(i, 1))]


def _as_in_json(value: Any) -> Any:
    """A value without Arrow's padding, and with its maps as objects.

    Arrow gives every object the keys of all objects, with null where the row has no such key.
    """
    if isinstance(value, dict):
        return {key: _as_in_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return _as_in_json(dict(value)) if len(dict(value)) == len(value) else value
    return [_as_in_json(item) for item in value] if isinstance(value, list) else value
