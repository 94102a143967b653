"""Readers of rows, of the files that hold them, of data sets' cards and of prepared data."""

import csv
import gzip
import io
import json
import shutil
import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import yaml
from mutate import dump, mutate_bytes, mutate_json
from read_adapters import named, split_name
from right import base, bytes_of, put, right_run, tokenizer, work

from nanoqlora.data.files import find_files
from nanoqlora.data.prepare import Encoding, read_samples
from nanoqlora.data.prompts import PromptFormat


def rows_of(name: str) -> list[Any]:
    return [json.loads(line) for line in bytes_of(name).decode().splitlines()]


# ------------------------------------------------------------------------------------------------ rows

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
WITH_TOOLS = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "u"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "r", "name": "f"},
        {"role": "assistant", "content": "a"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}],
}
WRITES_ALL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m | tojson }}"
    "{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}{{ m.name }}<|im_end|>\n{% endfor %}{{ tools }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORMATS: list[PromptFormat | None] = [
    *(None, None, PromptFormat(type="chat_template"), PromptFormat(type="alpaca"), PromptFormat(type="completion")),
    PromptFormat(type="chat_template", chat_template=WRITES_ALL),
]


def make_rows(rng: Random) -> bytes:
    rows = rows_of(rng.choice(["alpaca.jsonl", "chat.jsonl"]))[:3]
    if rng.random() < 0.4:
        rows[0] = WITH_TOOLS
    rows = mutate_json(rows, rng)
    rows = rows if isinstance(rows, list) else [rows]
    return b"\n".join(dump(row, rng).replace(b"\n", b" ") for row in rows) + b"\n"


def read_rows(data: bytes, rng: Random) -> None:
    path = put(work() / "rows.jsonl", data)
    strategy = rng.choice(["drop", "truncate", "raise"])
    skips = rng.random() < 0.3
    read_samples(
        find_files(path), Encoding(rng.choice(FORMATS), tokenizer(rng.choice(["hf", "sp"])), 256, strategy, "", skips)
    )


# ------------------------------------------------------------------------------------------------ text, JSON, CSV, gzip

KINDS = "jsonl json csv txt jsonl.gz csv.gz json.gz txt.gz".split()
ODD_FILES = [b"", b"[", b"[]", b"{", b'"', b'a"b\n"', b"\xff\xfe", b"[1]", b"\0" * 100, b"a,b\n" + b'"' * 99]
ODD_FILES += [
    b"[" * 100_000,
    b"[" + b"1," * 5000,
    b"[{}" * 9999,
    b'[{"a": "' + b"\\" * 9999,
    b"[" + b"[]," * 9999 + b"]",
]


def make_file(rng: Random) -> bytes:
    kind, rows = rng.choice(KINDS), rows_of("alpaca.jsonl")[:6]
    text = bytes_of("alpaca.jsonl")[:1500]
    if kind.startswith("json") and not kind.startswith("jsonl"):
        text = json.dumps(rows, indent=rng.choice([None, 1])).encode()
    elif kind.startswith("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue().encode()
    elif kind.startswith("txt"):
        text = b"one\ntwo\nthree\n"
    if kind.endswith(".gz"):
        text = gzip.compress(text if rng.random() < 0.4 else mutate_bytes(text, rng), 1)
    return named(kind, mutate_bytes(text, rng) if rng.random() < 0.95 else rng.choice(ODD_FILES))


PARTS = ["", "", "", ":50%", "-2:", "1:3", "50%:", "5:2", "-1%:"]


def read_file(data: bytes, rng: Random) -> None:
    kind, body = split_name(data, KINDS)
    path = put(work() / f"rows.{kind}", body)
    prompts = PromptFormat(type="completion") if kind.startswith("txt") else None
    read_samples(find_files(path), Encoding(prompts, tokenizer(), 256, "drop", rng.choice(PARTS)))


# ------------------------------------------------------------------------------------------------ Parquet and Arrow


@cache
def parquet_files() -> list[bytes]:
    rows, chats, found = rows_of("alpaca.jsonl"), rows_of("chat.jsonl"), []
    plain = {"compression": "none", "version": "1.0"}
    for some, options in (
        (rows, {}),
        (chats, {}),
        (rows, {"compression": "gzip", "use_dictionary": False}),
        (rows, plain),
    ):
        out = io.BytesIO()
        pa.parquet.write_table(pa.Table.from_pylist(some), out, **options)
        found.append(out.getvalue())
    return found


def make_parquet_bytes(rng: Random) -> bytes:
    raw = rng.choice(parquet_files())
    if rng.random() < 0.5:
        return mutate_bytes(raw, rng)
    footer = len(raw) - 8 - struct.unpack("<I", raw[-8:-4])[0]  # which has the structure
    end = raw[-8:] if rng.random() < 0.9 else mutate_bytes(raw[-8:], rng)
    return raw[:footer] + mutate_bytes(raw[footer:-8], rng) + end


MESSAGES = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def text_of_bytes(data: bytes, *ends: int) -> pa.Array:
    """An array that calls these bytes text, with these ends of its values."""
    offsets = struct.pack(f"<{len(ends) + 1}i", 0, *ends)
    return pa.Array.from_buffers(pa.string(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


COLUMNS: list[Callable[[], pa.Array]] = [
    *(lambda unit=unit: pa.array([2**62, 5, -(2**62)], pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")),
    *(
        lambda zone=zone: pa.array([5, 6, 7], pa.timestamp("s", tz=zone))
        for zone in ("Nowhere/X", "+99:99", "Asia/Tokyo")
    ),
    *(lambda kind=kind: pa.array([2**31 - 1, -(2**31), 0], kind) for kind in (pa.date32(), pa.time32("s"))),
    *(lambda kind=kind: pa.array([2**62, 1, 2], kind) for kind in (pa.date64(), pa.duration("ns"), pa.time64("ns"))),
    *(lambda: pa.array([b"\xff\xfe", b"x", None], pa.binary()), lambda: pa.array([True, None, False])),
    *(lambda: pa.array([{"a": 1}, None, {"a": 2}]), lambda: pa.array([1.5, float("nan"), None])),
    *(lambda: pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int64())), lambda: pa.array([MESSAGES] * 3)),
    *(lambda: pa.array(["a", "b", None]).dictionary_encode(), lambda: pa.nulls(3), lambda: pa.array([[[[1]]]] * 3)),
    *(lambda: text_of_bytes(b"\xff\xfe\xc3\x28ab", 2, 4, 6), lambda: pa.array(["x" * 100_000] * 3)),
]
NAMES = [["instruction", "output"], ["messages", "x"], ["text", "y"], ["prompt", "completion"], ["", "output"]]
NAMES += [["instruction", "instruction"], ["text", "text"]]


def odd_table(rng: Random) -> pa.Table:
    columns = [rng.choice(COLUMNS)(), pa.array(["one", "two", "three"])]
    return pa.Table.from_arrays(columns if rng.random() < 0.6 else columns[::-1], names=rng.choice(NAMES))


def written(table: pa.Table, rng: Random, is_parquet: bool) -> bytes | None:
    """The bytes of a file; None: no such file can be."""
    out = io.BytesIO()
    try:
        if is_parquet:
            pa.parquet.write_table(table, out, store_schema=rng.random() < 0.8)
        else:
            with rng.choice([pa.ipc.new_file, pa.ipc.new_stream])(out, table.schema) as writer:
                writer.write_table(table)
    except pa.ArrowException:
        return None
    return out.getvalue()


def make_parquet_types(rng: Random) -> bytes:
    return written(odd_table(rng), rng, is_parquet=True) or make_parquet_types(rng)


def make_arrow(rng: Random) -> bytes:
    table = odd_table(rng) if rng.random() < 0.5 else pa.Table.from_pylist(rows_of("alpaca.jsonl"))
    data = written(table, rng, is_parquet=False)
    if data is None:
        return make_arrow(rng)
    return mutate_bytes(data, rng) if rng.random() < 0.6 else data


def table_reader(name: str) -> Callable[[bytes, Random], None]:
    def read(data: bytes, rng: Random) -> None:
        path = put(work() / name, data)
        read_samples(
            find_files(path), Encoding(rng.choice(FORMATS), tokenizer(), 256, "drop", rng.choice(["", ":50%"]))
        )

    return read


# ------------------------------------------------------------------------------------------------ cards, prepared data

CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
CONFIGS += [{"config_name": "b", "data_dir": "data"}]
PATTERNS = ["/etc/*", "../*", "../../**", "**x", "", "***", "a/**b", "[", "[!", "data/../../*", ["data/*", None], [5]]
PATTERNS += [{"train": "data/*"}, "\0", "a" * 300, "~/*", "data/**/**/**/**/**/**/*", "**/" * 9]
FOLDERS = ["/etc", "..", "\0", 5, ["x"], "", "data", "data/link"]
HEADS = ["x: 2024-99-99", "x: " + "[" * 3000, "a: &a [*a]", "x: !!python/object:os.system y", "x: 0b_", "- 1"]
HEADS += ["x: " + "9" * 5000, "? [a]\n: b", "x: !!int y", "configs: 2024-99-99", "a: &a {b: *a}\nconfigs: *a"]
HEADS += [
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(f'*{a}' for _ in range(9))}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
    + "configs: *h"
]


def make_card(rng: Random) -> bytes:
    tree = mutate_json({"configs": CONFIGS, "license": "mit"}, rng)
    if isinstance(tree, dict) and rng.random() < 0.3:
        tree["configs"] = [{"config_name": "default", "data_files": rng.choice(PATTERNS)}]
    if isinstance(tree, dict) and rng.random() < 0.1:
        tree["configs"] = [{"config_name": "default", "data_dir": rng.choice(FOLDERS)}]
    try:
        text = yaml.safe_dump(tree)
    except (RecursionError, ValueError, yaml.YAMLError):
        text = "x: 2024-99-99"
    text = rng.choice(HEADS) if rng.random() < 0.1 else text
    data = f"---\n{text}\n---\n".encode("utf-8", "surrogatepass")
    return mutate_bytes(data, rng) if rng.random() < 0.15 else data


def read_card(data: bytes, rng: Random) -> None:
    """No file outside of the data set's folder is taken."""
    folder = work() / "card"
    if not folder.is_dir():
        (folder / "data").mkdir(parents=True)
        shutil.copy(base() / "alpaca.jsonl", folder / "data" / "train-0.jsonl")
        (folder / "data" / "link").symlink_to(base())
    put(folder / "README.md", data)
    split, name = rng.choice([None, "train", "test"]), rng.choice([None, None, "b", "default"])
    for file in find_files(folder, split=split, name=name):
        assert file.path.resolve().is_relative_to(folder.resolve()), f"{file.path} is outside of the folder"


def make_prepared(rng: Random) -> bytes:
    files = right_run().prepared_files
    name = rng.choice(list(files))
    if name.endswith(".json") and rng.random() < 0.7:
        return named(name, dump(mutate_json(json.loads(files[name]), rng), rng))
    return named(name, mutate_bytes(files[name], rng, within=rng.choice([None, 130])))


def read_prepared(data: bytes, rng: Random) -> None:
    """Damaged prepared data is refused or prepared anew, and gives batches."""
    from nanoqlora.data.batches import collate
    from nanoqlora.run.inputs import prepare_data

    right = right_run()
    name, body = split_name(data, list(right.prepared_files))
    right.prepared.mkdir(exist_ok=True)
    for file, text in right.prepared_files.items():
        put(right.prepared / file, body if file == name else text)
    found = prepare_data(right.run.config, tokenizer(), 1)
    for step in list(found.plan)[:2]:
        collate([[found.samples[i] for i in row] for row in step.rows])


READERS: dict[str, tuple[Callable[[Random], bytes], Callable[[bytes, Random], None]]] = {
    "rows": (make_rows, read_rows),
    "file": (make_file, read_file),
    "parquet_bytes": (make_parquet_bytes, table_reader("rows.parquet")),
    "parquet_types": (make_parquet_types, table_reader("rows.parquet")),
    "arrow": (make_arrow, table_reader("rows.arrow")),
    "card": (make_card, read_card),
    "prepared": (make_prepared, read_prepared),
}
