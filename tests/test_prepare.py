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

from nanoqlora import prepare, rows
from nanoqlora.byte_pairs import LETTERS
from nanoqlora.cli import UserError
from nanoqlora.data_files import find_files
from nanoqlora.prepare import Encoding, Reading, prepare_samples, read_samples
from nanoqlora.prompts import PromptFormat
from nanoqlora.tokenizer import Tokenizer
from nanoqlora.vocabulary import CONTROL, NORMAL

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
    room = lengths[0] + 1

    dropped = read(tmp_path / "a.jsonl", text, room)
    assert dropped.samples.lengths.tolist() == [room - 1, room]
    assert [place.rpartition("line ")[2] for place in dropped.too_long.first] == ["2", "4"]
    assert len(dropped.too_long) == 2 and dropped.longest == lengths[3]
    said = dropped.describe(room, "drop")
    assert said.startswith("2 samples") and "2 longer" in said and "line 2" in said and str(lengths[3]) in said

    cut = read(tmp_path / "a.jsonl", text, room, "truncate")
    assert cut.samples.lengths.tolist() == [room - 1, room, room, room]
    assert ids(cut)[1][-4:] == [*b"xxxx"], "the start of the row is kept"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*sequence_len to {lengths[1]}"):
        read(tmp_path / "a.jsonl", text, room, "raise")


def test_rows_without_a_token_to_learn_are_dropped_counted_and_named(tmp_path):
    """Cut off before the answer begins."""
    text = lines([{"instruction": "i" * n, "output": "x"} for n in (1, 90, 1, 90, 90, 90, 90, 90)])
    room = int(read(tmp_path / "all.jsonl", text, 10_000).samples.lengths[0])
    reading = read(tmp_path / "a.jsonl", text, room, "truncate")
    assert len(reading.samples) == 2 and len(reading.unsupervised) == 6
    said = reading.describe(room, "truncate")
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


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows in a few blocks, and processes for them however little they are."""
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    path = tmp_path / "many.jsonl"
    path.write_text(lines([{"text": f"{i} " + "\u00fc" * (i % 50)} for i in range(30_000)]))
    return path


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

    def never_done(block: rows.Block, encoding: Encoding) -> None:
        sender.send(os.getpid())
        time.sleep(60)

    monkeypatch.setattr(prepare, "encode_block", never_done)

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

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(map(runs, workers)):
        time.sleep(0.02)
    left = [pid for pid in workers if runs(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(workers) == 2 and not left


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_ended_from_outside_is_told(many, monkeypatch, number):
    """By the system, for want of memory, or by hand; in a command, where SIGTERM is as Ctrl-C for the first process."""
    monkeypatch.setattr(prepare, "encode_block", lambda *_: os.kill(os.getpid(), number))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(UserError, match="a process that tokenised data was ended from outside"):
            read_samples(find_files(many), Encoding(COMPLETION, BYTES, 100))
    finally:
        signal.signal(signal.SIGTERM, before)


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
        f"1 rows: large ones (first: {many}, line 20001)",
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
        monkeypatch.setattr(prepare, "SOURCE", b"of another version")
    times = data.stat()
    options = CHANGES[change](data)
    os.utime(data, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(prepare, "_read", lambda *_: (_ for _ in ()).throw(LookupError("read anew")))
    with pytest.raises(LookupError, match="read anew"):
        prepared(data, **(options if isinstance(options, dict) else {}))


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


def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    """Four times as much data: the peak of all Python and numpy objects is the same, but for the lengths."""
    monkeypatch.setattr(rows, "BLOCK_BYTES", 1 << 16)
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
