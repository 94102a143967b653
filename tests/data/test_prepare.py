"""Rows to samples: what is cut, dropped and counted; several processes; the folder that keeps them."""

import json
import os
import signal
import subprocess
import time
import tracemalloc
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from nanoqlora.config.errors import UserError
from nanoqlora.data import prepare, rows
from nanoqlora.data.files import find_files
from nanoqlora.data.prepare import Encoding, InvalidRows, Reading, prepare_samples, read_samples
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.data.row_format import Frame
from nanoqlora.tokenizer.byte_pairs import LETTERS
from nanoqlora.tokenizer.tokenizer import Tokenizer
from nanoqlora.tokenizer.vocabulary import CONTROL, NORMAL

END = 256
# A tokenizer that can be followed by hand: the ids of a text are its UTF-8 bytes, and 256 ends it.
BYTES = Tokenizer("smollm", [*LETTERS, "<|end|>"], [NORMAL] * 256 + [CONTROL], [], eos_id=END, pad_id=END)


def read(path: Path, text: str | bytes, sequence_len: int = 20, strategy: str = "drop") -> Reading:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_samples(find_files(path), Encoding(None, BYTES, sequence_len, strategy))


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ids(reading: Reading) -> list[list[int]]:
    return [sample.tokens.tolist() for sample in reading.samples]


# ------------------------------------------------------------------------------------------------ what becomes of rows


def test_rows_become_samples_in_the_order_of_the_file(tmp_path):
    rows = [{"text": text} for text in ("one", "two \u00fc", "three")]
    reading = read(tmp_path / "a.jsonl", lines(rows))
    assert ids(reading) == [[*row["text"].encode(), END] for row in rows]
    assert [s.supervised.tolist() for s in reading.samples] == [
        [False] + [True] * (len(s) - 1) for s in reading.samples
    ]
    assert reading.samples.num_targets.tolist() == [len(sample) - 1 for sample in reading.samples] == [3, 6, 5]
    assert (reading.rows, reading.longest, len(reading.too_long), len(reading.unsupervised)) == (3, 7, 0, 0)


def test_too_long_rows_are_dropped_cut_or_refused_and_counted(tmp_path):
    """An alpaca row has a prompt of over 150 bytes here, so of 180 tokens some are left for a short answer only."""
    text = lines([{"instruction": "i", "output": "x" * length} for length in (3, 90, 4, 500)])
    lengths = read(tmp_path / "all.jsonl", text, 10_000).samples.lengths.tolist()
    assert [length - lengths[0] for length in lengths] == [0, 87, 1, 497]
    space = lengths[0] + 1

    dropped = read(tmp_path / "a.jsonl", text, space)
    assert dropped.samples.lengths.tolist() == [space - 1, space]
    assert [place.rpartition("line ")[2] for place in dropped.too_long.first] == ["2", "4"]
    assert len(dropped.too_long) == 2 and dropped.longest == lengths[3]
    said = dropped.describe(space, "drop")
    assert said.startswith("2 samples") and "2 longer" in said and "line 2" in said and str(lengths[3]) in said

    cut = read(tmp_path / "a.jsonl", text, space, "truncate")
    assert cut.samples.lengths.tolist() == [space - 1, space, space, space]
    assert ids(cut)[1][-4:] == [*b"xxxx"], "the start of the row is kept"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .* 2 are too long.*sequence_len to {lengths[3]}"):
        read(tmp_path / "a.jsonl", text, space, "raise")


def test_rows_without_a_token_to_learn_are_dropped_counted_and_named(tmp_path):
    """Cut off before the answer begins."""
    text = lines([{"instruction": "i" * n, "output": "x"} for n in (1, 90, 1, 90, 90, 90, 90, 90)])
    space = int(read(tmp_path / "all.jsonl", text, 10_000).samples.lengths[0])
    reading = read(tmp_path / "a.jsonl", text, space, "truncate")
    assert len(reading.samples) == 2 and len(reading.unsupervised) == 6
    said = reading.describe(space, "truncate")
    assert (
        "6 without a supervised token dropped" in said
        and f"{tmp_path}/a.jsonl, line 2" in said
        and "line 8" not in said
    )


def test_long_completions_are_split_and_nothing_is_lost(tmp_path):
    text = "".join(map(chr, range(32, 122)))
    reading = read(tmp_path / "a.jsonl", json.dumps({"text": text}), 20)
    assert reading.samples.lengths.tolist() == [20, 20, 20, 20, 11]
    assert sum(ids(reading), []) == [*text.encode(), END]
    # 91 tokens and the last piece holds only one: it has nothing to predict.
    reading = read(tmp_path / "b.jsonl", json.dumps({"text": text}), 18)
    assert reading.samples.lengths.tolist() == [18] * 5 and len(reading.unsupervised) == 1


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    "text, words",
    [
        (GOOD + '{"txt": "good"}', ["a.jsonl, line 2", "txt", "text"]),
        (GOOD + '{"text": 5}', ["a.jsonl, line 2", "text", "5"]),
        (GOOD + '{"text": " "}', ["a.jsonl, line 2", "text", "empty"]),
        (GOOD + '{"instruction": "no output", "output": null}', ["a.jsonl, line 2", "output"]),
        (GOOD + '{"messages": []}', ["a.jsonl, line 2", "messages"]),
        ("", ["a.jsonl", "no usable row"]),
        ("\n \n", ["a.jsonl", "no usable row"]),
        ("[]", ["a.jsonl", "no usable row"]),
        (json.dumps({"instruction": "i", "output": "o"}), ["a.jsonl", "no usable row", "1 too long"]),
    ],
)
def test_what_is_wrong_with_a_row_is_told_with_its_place(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.jsonl", text)
    assert all(word in str(error.value) for word in words), error.value


# ------------------------------------------------------------------------------------------------ rows of no use

REASON = "output is int 5, and it must be a text"


def alpaca_csv(path: Path, wrong: int) -> Path:
    """60 rows, of which the 25th has no answer, and `wrong` others one field too many."""
    table = [f"Task {i},{'' if i == 25 else f'Answer {i}'}" for i in range(1, 61)]
    for i in range(wrong):
        table[30 + i] += ",more"
    path.write_text("\n".join(["instruction,output", *table]) + "\n")
    return path


def test_an_empty_answer_is_trained_and_counted(tmp_path):
    path = alpaca_csv(tmp_path / "a.csv", wrong=0)
    reading = read_samples(find_files(path), Encoding(None, BYTES, 400))
    assert len(reading.samples) == 60 and reading.samples[24].tokens[-1] == END and reading.samples[24].num_targets == 1
    assert reading.describe_notes() == [
        f"1 row: the answer is empty, so only the token that ends it is learnt (first: {path}, line 26)"
    ]


def test_all_rows_of_no_use_are_counted_in_one_error(tmp_path):
    """Over lines that are not JSON, rows that are no objects, rows without a column; the first five are named."""
    good, bad = '{"instruction": "i %d", "output": "o"}', '{"instruction": "i", "output": 5}'
    text = [good % i for i in range(40)]
    for number in (3, 5, 7, 11, 13, 17, 19):
        text[number - 1] = bad
    path = tmp_path / "a.jsonl"
    with pytest.raises(InvalidRows) as error:
        read(path, "\n".join(text), 400)
    said = str(error.value)
    assert said.startswith(f"7 of 40 rows cannot be used. {path}, line 3: {REASON}")
    assert "(also line 5, line 7, line 11, line 13, 2 more)" in said
    text[1], text[22], text[30] = "not JSON", "[1]", '{"instruction": "i", "output": null}'
    with pytest.raises(InvalidRows) as error:
        read(path, "\n".join(text), 400)
    said = str(error.value)
    assert said.startswith("10 of 40 rows") and said.count("line 3:") == 1
    for place in ("line 2: not valid JSON", f"line 3: {REASON}", "line 23: holds a list", "line 31: output is missing"):
        assert f"{path}, {place}" in said


def test_rows_of_no_use_may_be_left_out(tmp_path):
    path = alpaca_csv(tmp_path / "a.csv", wrong=3)
    encoding = Encoding(None, BYTES, 400)
    with pytest.raises(InvalidRows, match="3 of 60 rows cannot be used. .*line 32: 3 fields"):
        read_samples(find_files(path), encoding)
    kept = tmp_path / "kept"
    for _ in range(2):  # read, and from the folder
        reading = prepare_samples(find_files(path), replace(encoding, skip_invalid=True), kept)
        assert len(reading.samples) == 57 and reading.rows == 60
        [left_out] = [line for line in reading.describe_notes() if "left out" in line]
        assert left_out.startswith("3 rows: left out, 3 fields") and left_out.endswith(f"(first: {path}, line 32)")
    with pytest.raises(InvalidRows, match="3 of 60 rows"):  # though it was kept
        prepare_samples(find_files(path), encoding, kept)


def test_reasons_that_differ_in_each_row_stay_few(tmp_path):
    text = lines([{"text": i} for i in range(1000)] + [{"text": "good"}])
    with pytest.raises(InvalidRows) as error:
        read(tmp_path / "a.jsonl", text)
    assert "1000 of 1001 rows" in str(error.value) and len(str(error.value)) < 3000


def test_roles_that_no_mapping_knows_are_counted_over_all_rows(tmp_path):
    chats = [[("human", "a"), ("gpt", "b")]] * 3 + [[("human", "a"), ("function_call", "{}"), ("observation", "x")]] * 2
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    (tmp_path / "a.jsonl").write_text(lines(rows))
    chat = PromptFormat(type="chat_template", chat_template=template)
    with pytest.raises(
        InvalidRows, match="2 of 5 rows .*line 4: the roles function_call and observation are unknown"
    ) as error:
        read_samples(find_files(tmp_path / "a.jsonl"), Encoding(chat, BYTES, 40))
    assert str(error.value).endswith("The roles of its messages: human 5, gpt 3, function_call 2, observation 2.")


@pytest.mark.parametrize("blocks", [1, 1 << 20])
def test_rows_that_stand_there_twice_are_counted(tmp_path, monkeypatch, blocks):
    """In one file or in two, in one block or in several."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", blocks)
    texts = [f"text {i}" for i in range(20)]
    for name, some in {"a.jsonl": [*texts, texts[3]], "b.jsonl": ["other", texts[3], texts[19], "other"]}.items():
        (tmp_path / name).write_text("\n" + lines([{"text": text} for text in some]))
    reading = read_samples(find_files(tmp_path / "*.jsonl"), Encoding(None, BYTES, 20))
    assert len(reading.samples) == 25
    [line] = reading.describe_notes()
    assert line.startswith("4 rows: the same as an earlier row") and line.endswith(
        f"(first: {tmp_path}/a.jsonl, line 22)"
    )
    assert [place.rpartition("/")[2] for place in reading.notes.popitem()[1].first] == [
        *("a.jsonl, line 22", "b.jsonl, line 3", "b.jsonl, line 4", "b.jsonl, line 5")
    ]


def test_rows_of_no_use_are_not_counted_as_repeated(tmp_path):
    """Nor do they move the places of those behind them."""
    (tmp_path / "a.jsonl").write_text(lines([{"text": 5}, {"text": "a"}, {"text": 5}, {"text": "a"}]))
    reading = read_samples(find_files(tmp_path / "a.jsonl"), Encoding(None, BYTES, 20, skip_invalid=True))
    [line] = [line for line in reading.describe_notes() if "same as" in line]
    assert line.startswith("1 row:") and line.endswith(f"(first: {tmp_path}/a.jsonl, line 4)")


def test_rows_that_are_dropped_or_learnt_otherwise_are_no_repeated_ones(tmp_path):
    """Too long, or the same tokens with another mask: nothing of them is used twice."""
    long, short = {"text": "a" * 50}, {"text": "b"}
    (tmp_path / "a.jsonl").write_text(lines([long, long, short]))
    fmt = PromptFormat(type="custom", frame=Frame(format="", field_instruction="text", field_output="text"))
    reading = read_samples(find_files(tmp_path / "a.jsonl"), Encoding(fmt, BYTES, 20))
    assert not [line for line in reading.describe_notes() if "same as" in line]
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    fmt = PromptFormat(type="chat_template", chat_template=template)
    chats = []
    for weight in (0, 1, 0, 1):
        turns = [("user", "a", 0), ("assistant", "b", 1), ("user", "c", 0), ("assistant", "d", weight)]
        chats.append({"messages": [{"role": r, "content": text, "weight": w} for r, text, w in turns]})
    (tmp_path / "b.jsonl").write_text(lines(chats[:2]))
    reading = read_samples(find_files(tmp_path / "b.jsonl"), Encoding(fmt, BYTES, 40))
    assert len(reading.samples) == 2 and not [line for line in reading.describe_notes() if "same as" in line]
    (tmp_path / "b.jsonl").write_text(lines(chats))
    reading = read_samples(find_files(tmp_path / "b.jsonl"), Encoding(fmt, BYTES, 40))
    assert [line.startswith("2 rows") for line in reading.describe_notes() if "same as" in line] == [True]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_keys_that_stand_twice_make_a_row_invalid(tmp_path, monkeypatch, name):
    """At any depth, also where only a part of the object is in memory; rows behind it are read."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 8)
    deep = '{"text": "c", "more": {"x": 1, "y": [{"x": 2, "x": 2}]}}'
    objects = ['{"text": "a", "text": "b"}', deep, '{"text": "d"}']
    path = tmp_path / name
    path.write_text("\n".join(objects) + "\n" if name == "a.jsonl" else f"[{', '.join(objects)}]")
    with pytest.raises(InvalidRows, match="2 of 3 rows .*the key text stands twice .*the key x stands twice"):
        read_samples(find_files(path), Encoding(None, BYTES, 20))
    reading = read_samples(find_files(path), Encoding(None, BYTES, 20, skip_invalid=True))
    assert len(reading.samples) == 1 and sum(map(len, reading.invalid.values())) == 2


def test_a_value_of_a_json_list_that_is_not_valid_is_a_row_of_no_use(tmp_path):
    """As a line of a .jsonl file is; the rows around it are read. A list that does not end is refused as a file."""
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": },\n{"text": "]"}\n]')
    with pytest.raises(InvalidRows, match="a.json, row 2 .line 2.: .*line 2: not valid JSON"):
        read_samples(find_files(path), Encoding(None, BYTES, 20))
    encoding = Encoding(None, BYTES, 20, skip_invalid=True)
    assert ids(read_samples(find_files(path), encoding)) == [[*b"a", END], [*b"]", END]]
    path.write_text('[{"text": "a"},\n{"text": "never closed},\n{"text": "b"}]')
    with pytest.raises(UserError, match="line 2: not valid JSON .Invalid control character"):
        read_samples(find_files(path), encoding)


def test_lists_in_lists_in_lists_are_told(tmp_path):
    """However deep: too deep for the reader of JSON, or only for what comes after it."""
    for depth in (100, 300, 900, 5_000, 100_000):
        text = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": '
        text += '[{"function": {"name": "f", "arguments": ' + '{"a":' * depth + "1" + "}" * depth + "}}]}]}\n"
        with pytest.raises(UserError, match="a.jsonl, line 1"):
            read(tmp_path / "a.jsonl", text)
        nested = json.dumps({"messages": '[{"role":' + "[" * depth})
        with pytest.raises(UserError, match="a.jsonl, line 1"):
            read(tmp_path / "a.jsonl", nested + "\n")


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in a few blocks, and processes for them however little they are."""
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    path = tmp_path / "many.jsonl"
    path.write_text(lines([{"text": f"{i} " + "\u00fc" * (i % 50)} for i in range(30_000)]))
    return path


@pytest.mark.slow
def test_processes_give_what_one_gives(many, monkeypatch):
    encoding = Encoding(PromptFormat(type="completion"), BYTES, 100, "drop")
    files = find_files(many)
    together = read_samples(files, encoding)
    monkeypatch.setattr(prepare, "SMALL", 1 << 30)
    monkeypatch.setattr(prepare, "ProcessPoolExecutor", None)
    alone = read_samples(files, encoding)
    assert together.rows == alone.rows == 30_000
    assert (
        together.samples.fingerprint == alone.samples.fingerprint
        and (together.samples.words[0] == alone.samples.words[0]).all()
    )


@pytest.mark.slow
def test_the_first_wrong_row_is_told_though_later_ones_are_read(many):
    rows = many.read_text().splitlines()
    rows[20_000] = rows[29_000] = '{"text": 5}'
    many.write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"many\.jsonl, line 20001: text is int 5"):
        read_samples(find_files(many), Encoding(PromptFormat(type="completion"), BYTES, 100))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(many, monkeypatch, number):
    """Whatever ends it: otherwise they would wait for work for ever, and hold their memory."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def never_done(block: rows.Chunk, encoding: Encoding) -> None:
        sender.send(os.getpid())
        time.sleep(60)

    monkeypatch.setattr(prepare, "encode_chunk", never_done)

    def read() -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `run_command` does
        read_samples(find_files(many), Encoding(COMPLETION, BYTES, 100))

    first = context.Process(target=read)
    first.start()
    workers = {receiver.recv() for _ in range(2)}
    os.kill(first.pid, number)
    first.join(30)

    def runs(pid: int) -> bool:
        status = Path(f"/proc/{pid}/status")
        return status.exists() and "State:\tZ" not in status.read_text()

    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and any(map(runs, workers)):
        time.sleep(0.02)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_from_outside_is_told(many, monkeypatch, number):
    """By the system, for want of memory, or by hand; in a command, where SIGTERM is as Ctrl-C for the first process."""
    monkeypatch.setattr(prepare, "encode_chunk", lambda *_: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(UserError, match="a process that tokenised data was ended from outside"):
            read_samples(find_files(many), Encoding(COMPLETION, BYTES, 100))
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_what_is_noted_of_rows_is_counted_over_processes_and_kept(many, monkeypatch):
    """A note for every 10,000th row, and another for two of them; the same from the folder that keeps the samples."""
    encode_row = PromptFormat.encode_row

    def encode(self, tok, row, note=lambda _: None):
        number = int(row["text"].split()[0])
        for text in ("round numbers", "large ones")[: (number % 10_000 == 0) + (number == 20_000)]:
            note(text)
        return encode_row(self, tok, row, note)

    monkeypatch.setattr(PromptFormat, "encode_row", encode)
    encoding = Encoding(COMPLETION, BYTES, 100)
    expected = [
        f"3 rows: round numbers (first: {many}, line 1)",
        f"1 row: large ones (first: {many}, line 20001)",
    ]
    assert read_samples(find_files(many), encoding).describe_notes() == expected
    for _ in range(2):
        assert prepare_samples(find_files(many), encoding, many.parent / "kept").describe_notes() == expected


# ------------------------------------------------------------------------------------------------ kept in a folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(lines([{"text": "one"}, {"text": "two", "more": "TWO"}, {"text": "x" * 30}]))
    return path


COMPLETION = PromptFormat(type="completion")


def prepared(
    path: Path, prompt_format: PromptFormat = COMPLETION, tokenizer: Tokenizer = BYTES, **options: Any
) -> Reading:
    encoding = Encoding(prompt_format, tokenizer, **({"sequence_len": 20} | options))
    return prepare_samples(find_files(path), encoding, path.parent / "kept")


def test_prepared_data_is_kept_and_is_the_same(data, monkeypatch):
    first = prepared(data)
    fresh = read_samples(find_files(data), Encoding(COMPLETION, BYTES, 20))
    monkeypatch.setattr(prepare, "_read", None)  # from here on nothing can be tokenised
    again = prepared(data)
    for reading in (first, again):
        assert ids(reading) == ids(fresh) and reading.samples.fingerprint == fresh.samples.fingerprint
        assert reading.samples.num_targets.tolist() == fresh.samples.num_targets.tolist()
        assert reading.describe(20, "drop") == fresh.describe(20, "drop") and reading.longest == 31
    sha256 = subprocess.run(["sha256sum", data], capture_output=True, text=True, check=True).stdout.split()[0]
    assert again.files == {str(data): sha256}
    assert [path.name for path in (data.parent / "kept").iterdir()] != [], "and nothing half-written"
    assert not list(data.parent.glob("kept/.*"))


def test_data_whose_name_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path / "a") + b"\xff.jsonl", "w") as file:
        file.write('{"text": "one"}\n' * 2)
    first, again = prepared(tmp_path / "*.jsonl"), prepared(tmp_path / "*.jsonl")
    assert len(ids(first)) == 2 and ids(first) == ids(again) and len([*(tmp_path / "kept").iterdir()]) == 1


CHANGES = {
    "data": lambda path: path.write_text(path.read_text().replace("one", "eno")),  # as long as before
    "format": lambda path: {"prompt_format": replace(COMPLETION, field="more")},
    "mask": lambda path: {"prompt_format": replace(COMPLETION, train_on_inputs=True)},
    "tokenizer": lambda path: {"tokenizer": replace(BYTES, eos_id=65)},
    "length": lambda path: {"sequence_len": 19},
    "strategy": lambda path: {"strategy": "truncate"},
    "part": lambda path: {"part": ":2"},
    "code": lambda path: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_prepared_data_is_never_stale(data, change, monkeypatch):
    """Whatever changes, nothing is taken from the folder; even if the file's size and time are as before."""
    prepared(data)
    if change == "code":
        monkeypatch.setattr(prepare, "FORMAT", b"of another version")
    times = data.stat()
    options = CHANGES[change](data)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(prepare, "_read", lambda *_: (_ for _ in ()).throw(LookupError("read anew")))
    with pytest.raises(LookupError, match="read anew"):
        prepared(data, **(options if isinstance(options, dict) else {}))


@pytest.mark.parametrize("file", ["counts.json", "samples.npy", "words.bin"])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other", "other shape"])
def test_damaged_prepared_data_is_prepared_anew(data, file, damage, capsys):
    """Whatever was done to it, the samples are those of the first time."""
    first = prepared(data)
    expected, counts = ids(first), (first.rows, first.longest)
    del first  # its words are mapped from the file
    (folder,) = (data.parent / "kept").iterdir()
    path = folder / file
    content = path.read_bytes()
    other = {
        "counts.json": b'{"facts": [], "seal": 3}',
        "samples.npy": content[:-8] + bytes(8),
        "words.bin": content * 2,
    }
    new = {"cut": content[:-5], "empty": b"", "other": b"[1]", "other shape": other[file]}
    path.unlink() if damage == "missing" else path.write_bytes(new[damage])
    again = prepared(data)
    assert ids(again) == expected and (again.rows, again.longest) == counts
    assert "is damaged" in capsys.readouterr().err and len(list((data.parent / "kept").iterdir())) == 1


def test_what_a_killed_process_left_of_other_data_is_deleted(data):
    """Its key does not come again once the data has changed. Files of others stay."""
    kept = data.parent / "kept"
    (half := kept / f".{'0' * 32}.abcdefgh.tmp").mkdir(parents=True)
    (half / "words.bin").write_bytes(b"half")
    (kept / ".notes.20240101.tmp").write_text("mine")
    prepared(data)
    assert not half.exists() and (kept / ".notes.20240101.tmp").exists()


def test_templates_that_write_the_date_are_not_kept_over_night(data, monkeypatch):
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    chat = PromptFormat(type="chat_template", chat_template=template)
    keys = []
    for day in (1, 1, 2):
        monkeypatch.setattr(prepare, "date", type("", (), {"today": staticmethod(lambda day=day: f"2026-01-0{day}")}))
        keys.append(prepare._key(Encoding(chat, BYTES, 20), [], {}))
    assert keys[0] == keys[1] != keys[2]


def test_a_run_that_fails_leaves_nothing_in_the_folder(data):
    data.write_text(GOOD + '{"text": 5}')
    with pytest.raises(UserError, match="line 2"):
        prepared(data)
    assert not list((data.parent / "kept").iterdir())
    (data.parent / "kept").rmdir()
    (data.parent / "kept").write_text("a file")
    data.write_text(GOOD)
    with pytest.raises(UserError, match="dataset_prepared_path"):
        prepared(data)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """Four times as much data: the peak of all Python and numpy objects is the same, but for the lengths."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    peaks = []
    for count in (2_000, 8_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text(lines([{"text": f"{i}" + "a pirate's life " * 12} for i in range(count)]))
        tracemalloc.start()
        reading = prepared(path, sequence_len=200)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(reading.samples) == count and not len(reading.too_long)
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 4 * reading.samples.words[0].size, peaks
