"""Files, folders and globs to rows, against the standard library and pyarrow; what is wrong is told with its place."""

import csv
import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from nanoqlora import rows as rows_room
from nanoqlora.cli import UserError
from nanoqlora.data_files import find_files, split_and_part
from nanoqlora.rows import read_blocks, read_rows

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
    monkeypatch.setattr(rows_room, "BLOCK_BYTES", block)
    path = write(tmp_path / name, ROWS * 5)
    assert read(path) == ROWS * 5
    numbers = [int(where.split()[-1].strip(")")) for where, _ in read_rows(find_files(path))]
    assert numbers == sorted(set(numbers)), "every row has a place of its own"
    blocks = list(read_blocks(find_files(path)[0]))
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
        monkeypatch.setattr(rows_room, "BLOCK_BYTES", chance.choice([1, 2, 7, 50]))
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


# ------------------------------------------------------------------------------------------------ files


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
    monkeypatch.setattr(rows_room, "BLOCK_BYTES", block)
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
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError) as error:
        read(path)
    assert all(word in str(error.value) for word in words), error.value


def test_a_quote_that_is_never_closed_does_not_take_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_room, "LONGEST_CSV_FIELD", 1000)
    (tmp_path / "a.csv").write_text('text\na\n"never closed\n' + "x\n" * 5000)
    with pytest.raises(UserError, match="a.csv, line 3: .*field larger"):
        read(tmp_path / "a.csv")
