"""From files to rows: JSON, CSV, Parquet, Arrow and text.

    read_blocks    a file -> blocks of about a megabyte, as it streams by; cheap, so that one process can do it
    Block.rows     a block -> rows, each with its place ("a.jsonl, line 7"); the work, which many processes share

A row is a map from column names to values. Whatever is wrong with one is told with its place. Which files there are
says data/files.py; read next: data/prepare.py, which turns rows into tokens.
"""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..config.errors import UserError
from ..config.files import unique_keys
from .files import DataFile

Row = dict[str, Any]
Placed = tuple[str, Row | UserError]  # where it stands, for messages; and the row, or why it is none

COLUMNS = ("parquet", "arrow")  # kinds of files that keep columns, not lines
BLOCK_BYTES = 1 << 20
ARROW_ROWS = 512  # of a block
UNREADABLE = (
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    NotImplementedError,
    SystemError,
)
LONGEST_CSV_FIELD = 1 << 26  # bytes; a quote that nobody closes would take the rest of the file for one field
SPACE = re.compile(r"[ \t\r\n]*")


# ------------------------------------------------------------------------------------------------ blocks


@dataclass(frozen=True)
class Block:
    """Some rows of a file, as they stand there or already parsed; small, and ready to be sent to another process."""

    file: DataFile
    first: int  # number of the first line, or row of a Parquet file
    data: list[bytes] | list[Placed] | Any  # lines; rows; or a pyarrow.RecordBatch of rows
    num_bytes: int
    wanted: tuple[int, int | None] = (0, None)  # of its rows, those from the one to the other

    @property
    def num_rows(self) -> int:
        """How many there are, wanted or not."""
        is_lines = self.file.kind not in COLUMNS and isinstance(self.data[0], bytes)
        return sum(not line.isspace() for line in self.data) if is_lines else len(self.data)

    def rows(self) -> Iterator[Placed]:
        """The wanted rows with their places; in place of a row that cannot be read, why. Blank lines are none."""
        return islice(self._rows(), *self.wanted)

    def _rows(self) -> Iterator[Placed]:
        path, kind = self.file.path, self.file.kind
        if kind in COLUMNS:
            yield from ((f"{path}, row {self.first + i}", row) for i, row in enumerate(_arrow_rows(self.data)))
        elif not isinstance(self.data[0], bytes):
            yield from self.data
        else:
            for number, line in enumerate(self.data, self.first):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _tried(_row_of_line, line, kind, where)


def _tried(read: Callable[..., Row], *args: Any) -> Row | UserError:
    try:
        return read(*args)
    except UserError as error:
        return error


def _row_of_line(line: bytes, kind: str, where: str) -> Row:
    text = decode(line, where)
    return {"text": text.rstrip("\r\n")} if kind == "text" else _object(_parse(text, where), where)


def placed_rows(files: list[DataFile], part: str = "") -> Iterator[Placed]:
    """The rows of some files, in order; see `blocks_of`."""
    return (placed for block in blocks_of(files, part) for placed in block.rows())


def read_rows(files: list[DataFile], part: str = "") -> Iterator[tuple[str, Row]]:
    """The same, where every row has to be readable."""
    for where, row in placed_rows(files, part):
        if isinstance(row, UserError):
            raise row
        yield where, row


def blocks_of(files: list[DataFile], part: str = "") -> Iterator[Block]:
    """The rows of some files in blocks, in order.

    Args:
        part: as of a list, with numbers of rows or percentages: ":1000", "10%:20%", "-500:"; "": all rows.
    """
    blocks = (block for file in files for block in read_blocks(file))
    if not part:
        yield from blocks
        return
    total = sum(block.num_rows for file in files for block in read_blocks(file)) if re.search("[%-]", part) else 0

    def place(text: str, if_empty: float) -> float:
        number = round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text) if text else if_empty
        return number + total if text.startswith("-") else number

    start, stop = (place(text, end) for text, end in zip(part.split(":"), (0, math.inf), strict=True))
    first = 0
    for block in blocks:
        wanted = max(0, start - first), min(stop - first, block.num_rows)
        if wanted[0] < wanted[1]:
            yield replace(block, wanted=wanted)
        first += block.num_rows
        if first >= stop:
            return


def read_blocks(file: DataFile) -> Iterator[Block]:
    """The rows of a file in blocks, in order. Memory: one block."""
    try:
        if file.kind in COLUMNS:
            yield from _arrow_blocks(file)
            return
        with _open(file.path) as opened:
            start = opened.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
            if file.kind == "csv":
                yield from _in_blocks(file, _csv_rows(file.path, opened))
            elif file.kind == "json" and start.startswith(b"["):
                yield from _in_blocks(file, JsonList(file.path, opened).rows())
            else:
                first = 1
                while lines := opened.readlines(BLOCK_BYTES):
                    yield Block(file, first, lines, sum(map(len, lines)))
                    first += len(lines)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data {file.path}: cannot be read ({error}). Check the file, or copy it again.") from error


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _in_blocks(file: DataFile, rows: Iterator[tuple[str, Row | UserError, int]]) -> Iterator[Block]:
    """Parsed rows, each with its number of characters, in blocks."""
    block: list[Placed] = []
    size = 0
    for where, row, length in rows:
        block.append((where, row))
        size += length
        if size >= BLOCK_BYTES:
            yield Block(file, 0, block, size)
            block, size = [], 0
    if block:
        yield Block(file, 0, block, size)


def decode(line: bytes, where: str) -> str:
    """The text of a line; a byte order mark is none of it."""
    try:
        return line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{line[error.start]:02x} at place {error.start + 1} of the line). Tokens are "
            "made of UTF-8 text: convert the file, or correct that line."
        ) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}). A row is one object on one line, or the "
            "file is one list of them. Correct that line."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists ...
        raise UserError(f"{where}: JSON that cannot be read ({error}). Correct that line.") from error


def _object(row: Any, where: str) -> Row:
    if isinstance(row, UserError):
        raise UserError(f"{where}: JSON that cannot be read ({row}). Correct that row.")
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds a {type(row).__name__}, and a row is an object with named fields.")
    return row


class JsonList:
    """A JSON file that is one list of objects, read object by object, so that it need not fit into memory."""

    def __init__(self, path: Path, opened: BinaryIO) -> None:
        self.path, self.file = path, io.TextIOWrapper(opened, "utf-8-sig", newline="")
        self.text, self.at, self.line, self.ended = "", 0, 1, False  # what is in memory, and how much of it is done

    def rows(self) -> Iterator[tuple[str, Row | UserError, int]]:
        self.take("[")
        number = 0
        if self.next_char() != "]":
            while True:
                number += 1
                self.next_char()
                where = f"{self.path}, row {number} (line {self.line})"
                value, length = self.value(where)
                yield where, _tried(_object, value, where), length
                if self.next_char() != ",":
                    break
                self.take(",")
        self.take("]")
        if self.next_char():
            raise self.wrong("more text behind the end of the list")

    def next_char(self) -> str:
        """Skip white space and look at what follows; "" at the end of the file."""
        while True:
            self.go_to(SPACE.match(self.text, self.at).end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def take(self, char: str) -> None:
        if self.next_char() != char:
            raise self.wrong(f"expected {char!r}")
        self.go_to(self.at + 1)

    def value(self, where: str) -> tuple[Any, int]:
        """The value that starts here, or why it is not one row, and its number of characters."""
        decoder, repeated = json.JSONDecoder(object_pairs_hook=unique_keys), None
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except UserError as error:
                decoder, repeated = json.JSONDecoder(), error  # which finds where the value ends
            except json.JSONDecodeError as error:
                # It may only be cut off: then the error is at the end of what was read, or a string begins there.
                cut_off = error.pos >= len(self.text) - 16 or error.msg.startswith("Unterminated string")
                if not (cut_off and self.more()):
                    self.go_to(error.pos)
                    raise self.wrong(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: JSON that cannot be read ({error}). Correct that row.") from error
            else:
                length = end - self.at
                self.go_to(end)
                return repeated or value, length

    def more(self) -> bool:
        """Read on, twice as much as is waiting, so that a long value is not tried too often. False at the end."""
        waiting = self.text[self.at :]
        try:
            read = self.file.read(max(BLOCK_BYTES, 2 * len(waiting)))
        except UnicodeDecodeError:
            with _open(self.path) as lines:
                for number, line in enumerate(lines, 1):
                    decode(line, f"{self.path}, line {number}")
            raise
        self.text, self.at = waiting + read, 0
        return bool(read)

    def go_to(self, place: int) -> None:
        self.line += self.text.count("\n", self.at, place)
        self.at = place

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}, line {self.line}: not valid JSON ({what}). Correct that line.")


def _csv_rows(path: Path, opened: BinaryIO) -> Iterator[tuple[str, Row | UserError, int]]:
    """The rows of a CSV file with a header, commas and double quotes; a row may span lines.

    The first column may be without a name, as pandas writes the numbers of rows.
    """
    csv.field_size_limit(LONGEST_CSV_FIELD)
    reader = csv.reader((decode(line, f"{path}, line {i}") for i, line in enumerate(opened, 1)), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where}: not valid CSV ({error}). A field with commas, quotes or line breaks stands in double "
                "quotes, and a quote within it is written twice. Correct the row that begins there."
            ) from error
        if not fields:
            continue  # a blank line
        if header is None:
            header = fields
            if len(set(header)) < len(header) or "" in header[1:] or header == [""]:
                raise UserError(f"{where}: the header is {', '.join(header)}. Give every column a name of its own.")
            if len(header) == 1 and re.search(r"[;\t|]", header[0]):
                raise UserError(f"{where}: the header is one column, {header[0]!r}. Separate the columns with commas.")
        elif len(fields) != len(header):
            error = UserError(
                f"{where}: {len(fields)} fields, but the header names {len(header)} columns, so nobody can tell which "
                "is which. Correct the row; a field with commas stands in double quotes."
            )
            yield where, error, sum(map(len, fields))
        else:
            yield where, dict(zip(header, fields, strict=True)), sum(map(len, fields))


def _arrow_blocks(file: DataFile) -> Iterator[Block]:
    import pyarrow  # here, because most runs read none
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        with open(file.path, "rb") as opened:
            if file.kind == "parquet":
                batches = pyarrow.parquet.ParquetFile(opened).iter_batches(batch_size=ARROW_ROWS)
            elif opened.peek(6)[:6] == b"ARROW1":
                reader = pyarrow.ipc.open_file(opened)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(opened)
            first = 1
            for batch in batches:
                names = batch.schema.names
                if len(set(names)) < len(names):
                    raise UserError(
                        f"data {file.path}: its columns are {', '.join(names)}. Give every column a name of its own."
                    )
                for start in range(0, len(batch), ARROW_ROWS):
                    part = batch.slice(start, ARROW_ROWS)
                    yield Block(file, first, part, part.nbytes)
                    first += len(part)
    except (pyarrow.ArrowException, ValueError) as error:
        if isinstance(error, UserError):
            raise
        kind = {"parquet": "Parquet", "arrow": "Arrow"}[file.kind]
        raise UserError(f"data {file.path}: not a readable {kind} file ({error}). Copy it again.") from error


def _arrow_rows(batch: Any) -> Iterator[Row]:
    """The rows of a batch. A value that Python cannot have, such as text that is no UTF-8, becomes the reason."""
    try:
        batch.validate(full=True)  # lengths and places within the buffers too: nobody else compares them
        rows = batch.to_pylist()
    except UNREADABLE:
        if len(batch) > 1:
            for i in range(len(batch)):
                yield from _arrow_rows(batch.slice(i, 1))
            return
        rows = [{}]
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                column.validate(full=True)
                rows[0][name] = column.to_pylist()[0]
            except UNREADABLE as error:
                rows[0][name] = Unreadable(str(error))
    yield from ({key: _as_in_json(value) for key, value in row.items()} for row in rows)


@dataclass(frozen=True)
class Unreadable:
    """In place of a value that cannot be read: wrong only where somebody wants it."""

    why: str


def _as_in_json(value: Any) -> Any:
    """A value without Arrow's padding, and with its maps as objects.

    Arrow gives every object the keys of all, with null for those that it has not: they were never in the row.
    """
    if isinstance(value, dict):
        return {key: _as_in_json(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and value and all(isinstance(item, tuple) and len(item) == 2 for item in value):
        return _as_in_json(dict(value)) if len(dict(value)) == len(value) else value
    return [_as_in_json(item) for item in value] if isinstance(value, list) else value
