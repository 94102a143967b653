"""Files, folders and globs to rows, against the standard library and pyarrow; what is wrong is told with its place."""

import csv
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from nanoqlora.config.errors import UserError
from nanoqlora.config.splits import split_and_part
from nanoqlora.data import rows as rows_module
from nanoqlora.data.files import DataFile, find_files
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.data.rows import chunks_of, read_chunks, read_rows
from nanoqlora.tokenizer.tokenizer import load_tokenizer

ROWS = [
    {"text": "one", "n": "1"},
    {"text": 'two \u00fc "quoted", with\na line \r\n break', "n": ""},
    {"text": "\U0001f642 [{,}] \\ \u2028", "n": "3"},
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of the kind that its name says."""
    lines = "\n\n".join(json.dumps(row) for row in rows)
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        text = lines if path.suffix == ".jsonl" else json.dumps(rows, indent=3, ensure_ascii=False)
        path.write_text(text, "utf-8", newline="\r\n" if "windows" in path.name else "\n")
    return path


def read(path: Path, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(find_files(path, **options))]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize(
    "name", ["a.jsonl", "windows.jsonl", "a.json", "windows.json", "a.csv", "a.parquet", "a.jsonl.gz"]
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_every_kind_of_file_gives_its_rows_in_order(tmp_path, monkeypatch, name, block):
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", block)
    path = write(tmp_path / name, ROWS * 5)
    assert read(path) == ROWS * 5
    numbers = [int(where.split()[-1].strip(")")) for where, _ in read_rows(find_files(path))]
    assert numbers == sorted(set(numbers)), "every row has a place of its own"
    blocks = list(read_chunks(find_files(path)[0]))
    assert (len(blocks) > 1) == (block == 1 and "parquet" not in name)


def test_text_is_a_row_a_line_and_ds_type_says_what_an_ending_does_not(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone \u00fc\r\n\n two\n".encode())
    assert list(read_rows(find_files(tmp_path / "a.txt"))) == [
        (f"{tmp_path}/a.txt, line 1", {"text": "one \u00fc"}),
        (f"{tmp_path}/a.txt, line 3", {"text": " two"}),
    ]
    write(tmp_path / "b.jsonl", ROWS).rename(tmp_path / "b")
    for ds_type in ("json", "jsonl"):
        assert read(tmp_path / "b", ds_type=ds_type) == ROWS
    with pytest.raises(UserError, match="ds_type"):
        read(tmp_path / "b")


def test_parquet_rows_keep_lists_of_messages(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "\u00fc"}]}
        for i in range(999)
    ]
    path = write(tmp_path / "a.parquet", rows)
    assert read(path) == rows
    assert [where for where, _ in read_rows(find_files(path))] == [f"{path}, row {i}" for i in range(1, 1000)]


def test_json_lists_are_read_as_the_standard_library_reads_them(tmp_path, monkeypatch):
    """However the text is cut into pieces: values of all kinds, escapes at every edge, spaces and line breaks."""
    chance = random.Random(0)

    def value(depth: int) -> Any:
        kinds = [None, True, False, -1.5e-7, 10**20, "", '\U0001f642\\"\n\u00fc', "x" * chance.randint(0, 60)]
        if depth:
            kinds += [[value(depth - 1) for _ in range(3)], {str(i): value(depth - 1) for i in range(3)}, [], {}]
        return chance.choice(kinds)

    for i in range(60):
        monkeypatch.setattr(rows_module, "CHUNK_BYTES", chance.choice([1, 2, 7, 50]))
        rows = [{"a": value(2), "b": value(2)} for _ in range(chance.randint(0, 6))]
        text = json.dumps(rows, indent=chance.choice([None, 0, 2]), ensure_ascii=bool(i % 2))
        (tmp_path / "a.json").write_text(f" \n{text}\n", "utf-8")
        assert read(tmp_path / "a.json") == rows
        if text.startswith("[\n"):
            starts = [number for number, line in enumerate(f" \n{text}".split("\n"), 1) if re.match(" {0,2}{", line)]
            places = [int(where.rpartition("line ")[2][:-1]) for where, _ in read_rows(find_files(tmp_path / "a.json"))]
            assert set(places) <= set(starts) and sorted(set(places)) == places


def test_a_line_of_ten_megabytes_is_a_row_like_others(tmp_path):
    rows = [{"text": "a"}, {"text": "word " * 2_000_000}, {"text": "b"}]
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert read(write(tmp_path / name, rows)) == rows


def write_arrow(path: Path, table: pyarrow.Table, is_stream: bool) -> Path:
    open_new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with open_new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


NESTED = [
    {"tools": [{"name": "a", "arguments": {"city": "Oslo"}}, {"name": "b", "arguments": {"x": {"y": 1}}}], "n": 1},
    {"tools": [{"name": "c", "arguments": {"x": {"z": [{"p": 1}, {"q": "\u00fc"}]}}}], "n": 2},
    {"tools": [{"name": "d", "arguments": {}}], "n": 3},
]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_arrow_pads_objects_and_the_padding_goes(tmp_path, kind):
    """At every depth, in lists too: the rows are those of the same JSON lines."""
    table = pyarrow.Table.from_pylist(NESTED)
    assert table.to_pylist() != NESTED
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_arrow(path, table, kind == "stream")
    expected = read(write(tmp_path / "a.jsonl", NESTED))
    found = read(path)
    assert found[:2] == expected[:2] and found[2]["n"] == 3
    given = '{"messages": {"arguments": {"a": null}}}'  # a null that stands in JSON was meant
    (tmp_path / "b.jsonl").write_text(given)
    assert read(tmp_path / "b.jsonl") == [json.loads(given)]


def test_folders_of_the_datasets_library(tmp_path):
    """`save_to_disk` writes streams, its own working files, and JSON files that are no data."""
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        folder = tmp_path / split
        folder.mkdir()
        write_arrow(folder / "data-00000-of-00001.arrow", pyarrow.Table.from_pylist(rows), True)
        write_arrow(folder / "cache-0123.arrow", pyarrow.table({"indices": [1]}), True)
        for name in ("state.json", "dataset_info.json"):
            (folder / name).write_text("{}")
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert read(tmp_path) == ROWS and read(tmp_path, split="test") == ROWS[:1]
    assert read(tmp_path / "test" / "data-00000-of-00001.arrow") == ROWS[:1]


def test_values_that_python_cannot_have_are_wrong_only_where_somebody_wants_them(tmp_path):
    """Text that is no UTF-8, dates that are too late, times of nanoseconds; the row beside them is read."""
    bad = pyarrow.py_buffer(b"ok\xff\xfe")
    offsets = pyarrow.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 2, 4)))
    table = pyarrow.table(
        {
            "text": pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, bad]),
            "date": pyarrow.array([1, 10**7], pyarrow.int32()).cast(pyarrow.date32()),
            "time": pyarrow.array([1, 1], pyarrow.timestamp("ns")),
            "map": pyarrow.array([[("a", "x")], []], pyarrow.map_(pyarrow.string(), pyarrow.string())),
            "answer": ["yes", "no"],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read(tmp_path / "a.parquet")
    assert (first["text"], first["map"], first["answer"], second["answer"]) == ("ok", {"a": "x"}, "yes", "no")
    prompt_format = PromptFormat(type="prompt_completion")
    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    asked = [{"prompt": row["text"], "completion": row["answer"]} for row in (first, second)]
    assert prompt_format.encode_row(tokenizer, asked[0])
    with pytest.raises(UserError, match="prompt is unreadable .Invalid UTF8"):
        prompt_format.encode_row(tokenizer, asked[1])
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    write_arrow(tmp_path / "b.arrow", twice, True)
    with pytest.raises(UserError, match="its columns are text, text"):
        read(tmp_path / "b.arrow")


def test_the_index_that_pandas_writes_into_csv_is_a_column_without_a_name(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n0,one\n1,two\n")
    rows = read(tmp_path / "a.csv")
    assert rows == [{"": "0", "text": "one"}, {"": "1", "text": "two"}]
    notes: list[str] = []
    tokenizer = load_tokenizer("models/SmolLM2-135M-Instruct.Q4_1.gguf")
    PromptFormat(type="completion").encode_row(tokenizer, rows[0], notes.append)
    assert notes == ["the column without a name was not read"]
    PromptFormat(type="alpaca").encode_row(tokenizer, {"": "0", "instruction": "a", "output": "b"}, notes.append)
    assert notes == ["the column without a name was not read"] * 2


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", ROWS)
    assert read(Path("~/a.jsonl")) == read(Path("~/*.jsonl")) == ROWS
    assert read(Path("json"), data_files=("~/a.jsonl",)) == ROWS == read(Path("~"), data_files=("a.jsonl",))


# ------------------------------------------------------------------------------------------------ files


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n---\n# A card\n"


def test_a_folder_chooses_no_file_outside_of_it(tmp_path):
    """Neither its card nor its links; what the user names is the user's."""
    secret = write(tmp_path / "secret" / "a.jsonl", ROWS) if (tmp_path / "secret").mkdir() is None else None
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "own.jsonl", ROWS)
    for pattern in ("../secret/*.jsonl", str(secret), "sub/../../secret/a.jsonl", "..//**/secret/*"):
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "README.md").write_text(CARD.format(json.dumps(pattern)))
        with pytest.raises(UserError, match=f"leads out of the folder, to {secret}"):
            read(folder)
    (folder / "README.md").write_text("---\nconfigs:\n- {data_dir: ../secret}\n---\n")
    with pytest.raises(UserError, match="leads out of the folder"):
        read(folder)
    (folder / "README.md").write_text(CARD.format("own.jsonl"))
    assert read(folder) == ROWS
    (folder / "README.md").unlink()
    (folder / "link.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="link.jsonl leads out of the folder"):
        read(folder)
    assert read(folder / "link.jsonl") == ROWS == read(folder, data_files=("link.jsonl",))
    (folder / "link.jsonl").unlink()
    (folder / "also.jsonl").symlink_to(folder / "own.jsonl")
    assert read(folder) == ROWS * 2, "a link within the folder"
    (folder / "also.jsonl").unlink()
    (folder / "linked").symlink_to(tmp_path / "secret", target_is_directory=True)
    (folder / "README.md").write_text(CARD.format("linked/*.jsonl"))
    with pytest.raises(UserError, match="leads out of the folder"):
        read(folder)


@pytest.mark.parametrize(
    "head",
    [
        "configs: 5", "configs: [5, null, [1]]", "configs: {a: b}", "configs: [{config_name: [1]}]", "- configs", "5",
        "configs: [{data_files: 5}]", "configs: [{data_files: [{split: [1], path: {a: b}}]}]", "a: 2020-99-99",
        "configs: [{data_files: [null]}]", 'configs: [{data_files: "a\\0b"}]', "configs: " + "[" * 5000,
        "configs: [{config_name: default, data_files: [{path: 7}]}]", "configs: !!python/object/apply:os.system [ls]",
        'configs: [{data_files: "/nowhere/*"}]', "configs: [{data_files: '**a/[b'}]", "configs: [{data_files: {a: 1}}]",
    ],
)  # fmt: skip
def test_cards_of_any_shape_are_read_or_told(tmp_path, head):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    try:
        assert read(tmp_path) == ROWS
    except UserError as error:
        assert str(tmp_path) in str(error)


def names(*args: Any, **options: Any) -> list[str]:
    return [file.path.name for file in find_files(*args, **options)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-00001.jsonl", "train-00000.jsonl", "test.jsonl", "constraint.jsonl", ".hidden.jsonl"):
        write(tmp_path / name, ROWS)
    for name in ("README.md", "dataset_infos.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "extra").mkdir()
    write(tmp_path / "extra" / "more.csv", ROWS)
    return tmp_path


def test_folders_give_the_files_of_a_split(folder):
    assert names(folder, ds_type="json") == ["train-00000.jsonl", "train-00001.jsonl"]
    assert names(folder, split="test") == ["test.jsonl"]
    assert names(folder, data_files=("*.jsonl",)) == [
        ".hidden.jsonl", "constraint.jsonl", "test.jsonl", "train-00000.jsonl", "train-00001.jsonl"
    ]  # fmt: skip
    assert names(folder, data_files=("extra/more.csv",)) == ["more.csv"]
    assert names(folder / "extra") == ["more.csv"], "no name tells a split: all of them"
    with pytest.raises(UserError, match="no file found there .*split dev"):
        names(folder, split="dev")
    write(folder / "my.valid.json", ROWS)
    assert names(folder, split="validation") == names(folder, split="dev") == ["my.valid.json"]
    write(folder / "train.csv", ROWS)
    with pytest.raises(UserError, match="several kinds .csv, json.*ds_type"):
        names(folder)
    assert names(folder, ds_type="csv") == ["train.csv"]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_part_of_the_rows_is_that_of_a_list(tmp_path, monkeypatch, kind, block):
    """Over the border between two files, and between blocks; percentages are rounded to whole rows."""
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", block)
    rows = [{"text": str(i)} for i in range(27)]
    files = find_files(write(tmp_path / f"a.{kind}", rows[:11])) + find_files(write(tmp_path / f"b.{kind}", rows[11:]))
    parts = {"[3:13]": rows[3:13], "[:5]": rows[:5], "[20:]": rows[20:], "[-4:]": rows[-4:], "[:-20]": rows[:-20]}
    parts |= {
        "[:20%]": rows[:5],
        "[20%:40%]": rows[5:11],
        "[-50%:]": rows[-14:],
        "[9:9]": [],
        "[25:99]": rows[25:],
        "": rows,
    }
    for text, expected in parts.items():
        name, part = split_and_part(f"train{text}")
        assert name == "train" and [row for _, row in read_rows(files, part)] == expected, text


def test_what_is_a_split():
    assert split_and_part(None) == (None, "") and split_and_part("dev") == ("dev", "")
    for wrong in ("train[5]", "train+test", "train[a:b]", "train[:5", "[:5]"):
        with pytest.raises(UserError, match="split is"):
            split_and_part(wrong)


def test_globs_and_lists_of_files(folder):
    assert names(folder / "t*.jsonl") == ["test.jsonl", "train-00000.jsonl", "train-00001.jsonl"]
    assert names(folder / "**" / "*.csv") == ["more.csv"]
    assert names("json", data_files=(str(folder / "test.jsonl"),)) == ["test.jsonl"]
    for missing in (folder / "x*.jsonl", folder / "absent.jsonl", "absent", "absent.jsonl"):
        with pytest.raises(UserError, match=str(missing).replace("*", r"\*")):
            names(missing)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no file found"):
        names(folder / "empty")


# ------------------------------------------------------------------------------------------------ what is wrong

GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", GOOD + "\n" + '{"text": "broken\n' + GOOD, ["a.jsonl, line 3", "JSON", "column"]),
        ("a.jsonl", GOOD + "{'text': 'quotes'}", ["a.jsonl, line 2", "JSON"]),
        ("rows.jsonl", GOOD + GOOD.strip() + GOOD, ["rows.jsonl, line 2", "Extra data"]),
        ("a.jsonl", GOOD + '["text"]', ["a.jsonl, line 2", "list", "object"]),
        ("a.jsonl", "3\n" + GOOD, ["a.jsonl, line 1", "int", "object"]),
        ("a.jsonl", GOOD + '{"text": ' + "9" * 5000 + "}", ["a.jsonl, line 2", "cannot be read"]),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', ["a.jsonl, line 2", "UTF-8", "0xff at place 11"]),
        ("a.json", json.dumps([{"text": "good"}, "text"]), ["a.json, row 2 (line 1)", "str", "object"]),
        ("a.json", '[{"text": "good"}', ["a.json, line 1", "JSON", "']'"]),
        ("a.json", '[{"text": "good"},\n{"text": "bad",}]', ["a.json, line 2", "JSON"]),
        ("a.json", '[{"text": "good"},\n\n{"text": "never closed}]', ["a.json, line 3", "JSON", "Unterminated"]),
        ("a.json", '[{"text": "good"}\n{"text": "no comma"}]', ["a.json, line 2", "JSON", "']'"]),
        ("a.json", '[{"text": "good"}]\nmore', ["a.json, line 2", "behind the end"]),
        ("a.json", '{"text": "good",\n', ["a.json, line 1", "JSON"]),
        ("a.json", b'[{"text": "good"},\n{"text": "\xff"}]', ["a.json, line 2", "UTF-8"]),
        ("a.csv", 'text,n\n"good",1\n"never closed,2\nx,3\n', ["a.csv, line 3", "CSV", "quote"]),
        ("a.csv", 'text,n\n"two\nlines",1\n"a" b,2\n', ["a.csv, line 4", "CSV"]),
        ("a.csv", "text,n\na,1\nb, c,2\n", ["a.csv, line 3", "3 fields", "2 columns"]),
        ("a.csv", "text,n\na,1\n\nb\n", ["a.csv, line 4", "1 fields"]),
        ("a.csv", "text,text\na,1\n", ["a.csv, line 1", "header"]),
        ("a.csv", "text;n\na;1\n", ["a.csv, line 1", "one column", "commas"]),
        ("a.json", '{\n "rows": []\n}', ["a.json, line 1", "JSON", "one list"]),
        ("a.csv", b"text,n\na,1\n\xe9,2\n", ["a.csv, line 3", "UTF-8"]),
        ("a.txt", b"good\n\xe9\n", ["a.txt, line 2", "UTF-8"]),
        ("a.parquet", b"PAR1 and then nothing", ["a.parquet", "Parquet"]),
        ("a.jsonl.gz", b"\x1f\x8bnothing", ["a.jsonl.gz", "cannot be read"]),
        ("a.json.gz", gzip.compress(b'[{"text": "good"},\n{"text": "\xff"}]', mtime=0), ["a.json.gz, line 2", "UTF-8"]),
        ("a.csv.gz", gzip.compress(b"text\ngood\n\xff\n", mtime=0), ["a.csv.gz, line 3", "UTF-8"]),
        ("a.arrow", b"ARROW1 and then nothing", ["a.arrow", "Arrow"]),
        ("a.arrow", b"nothing", ["a.arrow", "Arrow"]),
        ("a.arrow", b"", ["a.arrow", "Arrow"]),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        read(path)
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_are_damaged_anywhere_are_told(tmp_path):
    """One byte changed, or the end cut off, at many places of compressed and Arrow files: rows, or one line."""
    chance = random.Random(0)
    table = pyarrow.Table.from_pylist(ROWS * 40)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", table, True)
    write_arrow(tmp_path / "b.arrow", table, False)
    write(tmp_path / "a.jsonl.gz", ROWS * 40)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"some words\n" * 5000, mtime=0))
    for path in sorted(tmp_path.glob("*.*")):
        data = path.read_bytes()
        for i in range(120):
            damaged = bytearray(data)
            damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged if i % 3 else data[: chance.randrange(len(data))])
            try:
                read(path)
            except UserError as error:
                assert str(path) in str(error)


LONG = {
    "a.jsonl.gz": b'{"text": "' + b"a " * 5000 + b'"}\n',
    "a.json.gz": b'[{"text": "' + b"a " * 5000 + b'"}]',
    "b.json.gz": b"[" * 20_000,
    "a.txt.gz": b"a " * 5000,
    "a.jsonl": b'{"text": "' + b"a " * 5000 + b'"}\n',
    "a.csv.gz": b"text\n" + b"a " * 5000,
}


@pytest.mark.parametrize("name", LONG)
def test_rows_of_any_length_are_not_held_in_memory(tmp_path, monkeypatch, name):
    """A small file can unpack to a row of many gigabytes."""
    monkeypatch.setattr(rows_module, "LONGEST", 1000)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 400)
    (tmp_path / name).write_bytes(gzip.compress(LONG[name]) if name.endswith(".gz") else LONG[name])
    with pytest.raises(UserError, match=f"{name}.*has more than 0 MiB"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_a_file_does_not_unpack_without_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(rows_module, "LARGEST", 1000)
    write(tmp_path / name, [{"text": "a " * 9000, "i": i} for i in range(1000)])
    assert (tmp_path / name).stat().st_size < 80_000
    with pytest.raises(UserError, match=f"{name}: unpacks to more than 200 times its size"):
        read(tmp_path / name)
    monkeypatch.undo()
    assert len(read(tmp_path / name)) == 1000


MANY = 300  # of what follows, where 200 times the size of the file is allowed
NO_ROWS = {
    "blank.jsonl.gz": b"\n" * MANY * 1000,
    "spaces.jsonl.gz": (b" " * 9999 + b"\n") * MANY * 10,
    "blank.csv.gz": b"a\n" + b"\n" * MANY * 1000,
    "no header.csv.gz": b"\n" * MANY * 1000,
    "blank.txt.gz": b"\r\n" * MANY * 1000,
    "braces.jsonl.gz": b"{}\n" * MANY * 1000,
    "list.json.gz": b"[1" + (b"," + b" " * 9999 + b"1") * MANY * 10 + b"]",
}


@pytest.mark.parametrize("name", NO_ROWS)
def test_what_is_no_row_does_not_go_on_without_end(tmp_path, monkeypatch, name):
    """A gzip file of 2 MB may have a billion blank lines; the same text, as it is, is the user's own length of time."""
    monkeypatch.setattr(rows_module, "LARGEST", 1000)
    (tmp_path / name).write_bytes(gzip.compress(NO_ROWS[name]))
    with pytest.raises(UserError, match=f"{name}: unpacks to more than 200 times its size"):
        for _ in chunks_of(find_files(tmp_path / name)):
            pass
    plain = tmp_path / name.removesuffix(".gz")
    plain.write_bytes(NO_ROWS[name])
    for _ in chunks_of(find_files(plain)):
        pass


@pytest.mark.parametrize("part", ["", ":50%"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_rows_without_bytes_do_not_go_on_without_end(tmp_path, monkeypatch, name, part):
    monkeypatch.setattr(rows_module, "LARGEST", 1000)
    table = pyarrow.table({"text": pyarrow.nulls(50_000)})
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, tmp_path / name)
    else:
        with pyarrow.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=f"{name}: unpacks to more than 200 times its size"):
        list(chunks_of([DataFile(tmp_path / name, name[2:])], part))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_value_that_is_stored_once_is_read_for_few_rows(tmp_path, kind):
    """And counts in each of them."""
    table, path = pyarrow.table({"text": pyarrow.array(["a " * 500_000] * 100).dictionary_encode()}), tmp_path / "a"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd")
    else:
        write_arrow(path, table, True)
    sizes = [chunk.num_bytes for chunk in read_chunks(DataFile(path, kind))]
    assert max(sizes) < 17_000_000 and sum(sizes) > 100_000_000


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "LONGEST", 1000)
    (tmp_path / "a.csv").write_text('text\na\n"never closed\n' + "x\n" * 5000)
    with pytest.raises(UserError, match="a.csv, line 3: .*field larger"):
        read(tmp_path / "a.csv")
