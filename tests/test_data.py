"""The pirate files, reading and its errors, and batches; each against plain Python."""

import json
import random
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from nanoqlora.cli import UserError
from nanoqlora.data import IGNORED, Reading, Sample, collate, micro_batches, read_samples
from nanoqlora.prompts import PromptFormat, detect_format
from nanoqlora.tokenizer import CONTROL, LETTERS, NORMAL, Tokenizer

# ------------------------------------------------------------------------------------------------ the pirate files

FILES = {"data/pirate.jsonl": 400, "data/pirate-heldout.jsonl": 60}  # and the rows that each has at least


def conversations(file: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (ROOT / file).read_text("utf-8").splitlines()]


def texts(file: str, role: str) -> list[str]:
    return [message["content"] for messages in conversations(file) for message in messages if message["role"] == role]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def grams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    found = words(text)
    return frozenset(tuple(found[i : i + n]) for i in range(max(1, len(found) - n + 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("file", FILES)
def test_pirate_rows_are_whole_conversations(file):
    rows = conversations(file)
    assert len(rows) >= FILES[file]
    for messages in rows:
        roles = [message["role"] for message in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2)
        assert all(message.keys() == {"role", "content"} and message["content"].strip() for message in messages)
    several = sum(Counter(m["role"] for m in messages)["assistant"] > 1 for messages in rows)
    assert several >= 0.1 * len(rows)


def test_pirate_files_share_no_question_and_no_answer():
    """Held-out perplexity means something only if nothing of it was trained on, not even in other words.

    Measured: the most alike questions share 29 % of their word pairs ("what does the ... do/connect?"), the most alike
    answers 4 % of their word triples. A copy with one word changed in ten shares 66 % and 54 %.
    """
    train, held_out = FILES
    for role, n, limit in (("user", 2, 0.4), ("assistant", 3, 0.1)):
        ours, theirs = texts(train, role), texts(held_out, role)
        assert not {" ".join(words(text)) for text in ours} & {" ".join(words(text)) for text in theirs}
        pairs = product([grams(text, n) for text in ours], [grams(text, n) for text in theirs])
        assert max(jaccard(a, b) for a, b in pairs) < limit
        copy = max(ours, key=len).split()
        copy[::10] = ["other"] * len(copy[::10])
        assert max(jaccard(grams(text, n), grams(" ".join(copy), n)) for text in ours) > limit, "a copy is not seen"


@pytest.mark.parametrize("file", FILES)
def test_pirate_rows_are_written_one_by_one(file):
    """No row twice, not even nearly, and no stamp: few answers begin with the same one, two or three words, or end so.

    Measured in pirate.jsonl: the most alike answers share 15 % of their word triples, which is a line of code; "a"
    begins 7 % of the answers, "here be" 1.2 %, "here be a" 0.5 %; "says I" ends 0.8 %.
    """
    answers = texts(file, "assistant")
    first_questions = [next(m["content"] for m in row if m["role"] == "user") for row in conversations(file)]
    assert len({" ".join(words(text)) for text in first_questions}) == len(first_questions)
    for some, n, limit in ((first_questions, 2, 0.7), (answers, 3, 0.3)):
        assert max(jaccard(a, b) for a, b in combinations([grams(text, n) for text in some], 2)) < limit
    for part, share in ((slice(1), 0.1), (slice(2), 0.03), (slice(3), 0.03), (slice(-2, None), 0.03)):
        (stamp, count), *_ = Counter(tuple(words(answer)[part]) for answer in answers).most_common(1)
        assert count <= share * len(answers), f"{count} of {len(answers)} answers have {' '.join(stamp)!r} there"


# ------------------------------------------------------------------------------------------------ reading

END = 256
# A tokenizer that can be followed by hand: the ids of a text are its UTF-8 bytes, and 256 ends it.
BYTES = Tokenizer("smollm", [*LETTERS, "<|end|>"], [NORMAL] * 256 + [CONTROL], [], eos_id=END, pad_id=END)


def read(path: Path, text: str | bytes, sequence_len: int = 20, **options: Any) -> Reading:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_samples(path, detect_format, BYTES, sequence_len, **options)


def test_rows_become_samples_in_the_order_of_the_file(tmp_path):
    """The same from lines, with blank ones and Windows line ends, and from a list."""
    rows = [{"text": text} for text in ("one", "two \u00fc", "three")]
    lines = "\n\n".join(json.dumps(row) for row in rows)
    expected = [[*row["text"].encode(), END] for row in rows]
    for name, text in {"a.jsonl": lines, "b.jsonl": lines.replace("\n", "\r\n"), "c.json": json.dumps(rows)}.items():
        samples = read(tmp_path / name, text).samples
        assert [sample.tokens for sample in samples] == expected
        assert [sample.num_targets for sample in samples] == [len(tokens) - 1 for tokens in expected]


def test_too_long_rows_are_dropped_cut_or_refused_and_counted(tmp_path):
    """An alpaca row has a prompt of over 150 bytes here, so of 180 tokens some are left for a short answer only."""
    rows = [{"instruction": "i", "output": "x" * length} for length in (3, 90, 4, 500)]
    text = "\n".join(json.dumps(row) for row in rows)
    lengths = [len(sample) for sample in read(tmp_path / "all.jsonl", text, 10_000).samples]
    assert [length - lengths[0] for length in lengths] == [0, 87, 1, 497]
    room = lengths[0] + 1

    dropped = read(tmp_path / "a.jsonl", text, room)
    assert [len(sample) for sample in dropped.samples] == [room - 1, room]
    assert [place.rpartition("line ")[2] for place in dropped.too_long] == ["2", "4"] and dropped.longest == lengths[3]
    said = dropped.describe(room, "drop")
    assert said.startswith("2 samples") and "2 longer" in said and "line 2" in said and str(lengths[3]) in said

    cut = read(tmp_path / "a.jsonl", text, room, excess_length_strategy="truncate")
    assert [len(sample) for sample in cut.samples] == [room - 1, room, room, room]
    assert cut.samples[1].tokens[-4:] == [*b"xxxx"], "the start of the row is kept"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*sequence_len to {lengths[1]}"):
        read(tmp_path / "a.jsonl", text, room, excess_length_strategy="raise")


def test_long_completions_are_split_and_nothing_is_lost(tmp_path):
    text = "".join(map(chr, range(32, 122)))
    samples = read(tmp_path / "a.jsonl", json.dumps({"text": text}), 20).samples
    assert [len(sample) for sample in samples] == [20, 20, 20, 20, 11]
    assert [token for sample in samples for token in sample.tokens] == [*text.encode(), END]
    # 91 tokens and the last piece holds only one: it has nothing to predict.
    reading = read(tmp_path / "b.jsonl", json.dumps({"text": text}), 18)
    assert [len(sample) for sample in reading.samples] == [18] * 5 and reading.unsupervised == 1


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.jsonl", GOOD + "\n" + '{"text": "broken\n' + GOOD, ["a.jsonl, line 3", "JSON", "column"]),
        ("a.jsonl", GOOD + "{'text': 'quotes'}", ["a.jsonl, line 2", "JSON"]),
        ("a.jsonl", GOOD + '["text"]', ["a.jsonl, line 2", "list", "object"]),
        ("a.jsonl", "3\n" + GOOD, ["a.jsonl, line 1", "int", "object"]),
        ("a.json", json.dumps([{"text": "good"}, "text"]), ["a.json, row 2", "str", "object"]),
        ("a.json", '[{"text": "good"}', ["a.json", "JSON"]),
        ("a.json", '{"text": "good",\n', ["a.json, line 1", "JSON"]),
        ("a.jsonl", GOOD + '{"txt": "good"}', ["a.jsonl, line 2", "txt", "text"]),
        ("a.jsonl", GOOD + '{"text": 5}', ["a.jsonl, line 2", "text", "5"]),
        ("a.jsonl", GOOD + '{"instruction": "no output", "output": null}', ["a.jsonl, line 2", "output"]),
        ("a.jsonl", GOOD + '{"messages": []}', ["a.jsonl, line 2", "messages"]),
        ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}', ["a.jsonl", "UTF-8"]),
        ("a.jsonl", "", ["a.jsonl", "no usable row"]),
        ("a.jsonl", "\n \n", ["a.jsonl", "no usable row"]),
        ("a.json", "[]", ["a.json", "no usable row"]),
        ("a.jsonl", json.dumps({"instruction": "i", "output": "o"}), ["a.jsonl", "no usable row", "1 too long"]),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_place(tmp_path, name, text, words):
    with pytest.raises(UserError) as error:
        read(tmp_path / name, text)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_data_and_folders_are_told(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(path))):
            read_samples(path, lambda _: PromptFormat(type="completion"), BYTES, 20)


# ------------------------------------------------------------------------------------------------ batches


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    """Ids from 0, which is also what rows are filled up with, to 3, so that every id is padding, end and content."""
    chance = random.Random(seed)
    lengths = [chance.randint(2, 9) for _ in range(count)]
    return [
        Sample([chance.randrange(4) for _ in range(n)], [chance.random() < 0.6 for _ in range(n - 1)] + [True])
        for n in lengths
    ]


@pytest.mark.parametrize("pad_to", [0, 40])
def test_targets_are_the_next_tokens_of_supervised_places(pad_to):
    a, b, c, d, e, f = random_samples(6)
    rows = [[a, b], [c], [d, e, f]]
    batch = collate(rows, pad_to)
    T = pad_to or max(sum(map(len, row)) for row in rows)
    expected, counted = {}, 0
    for number, row in enumerate(rows):
        place = number * T
        for sample in row:
            for i in range(len(sample) - 1):
                if sample.supervised[i + 1]:
                    expected[place + i] = sample.tokens[i + 1]
            place += len(sample)
            counted += sample.num_targets
        ids = [token for sample in row for token in sample.tokens]
        assert batch.tokens[number].tolist() == ids + [0] * (T - len(ids))
        padding = [T - len(ids)] if T > len(ids) else []
        assert list(batch.segments.lengths[number]) == [*map(len, row), *padding]
    assert dict(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert len(batch.targets) == counted and 0 in batch.targets and IGNORED not in batch.targets
    assert batch.num_tokens == sum(map(len, (a, b, c, d, e, f)))


def test_an_end_token_that_is_also_the_padding_is_learnt():
    """Masked by id, as in tools that pad with the end token, nobody would learn to stop."""
    batch = collate([[Sample([5, 6, 0], [False, True, True])], [Sample([5, 6, 7, 8, 0], [False] * 3 + [True] * 2)]])
    assert list(zip(batch.supervised.tolist(), batch.targets.tolist(), strict=True)) == [(0, 6), (1, 0), (7, 8), (8, 0)]


def test_any_split_of_a_step_has_the_same_rows():
    """(micro, accumulation, ranks) of one product: all rows once, over all ranks and their micro-batches.

    A row keeps its number within the step, which decides its dropout. The last step is smaller.
    """
    for num_rows in (12, 7, 1):
        rows = [f"row {i}" for i in range(num_rows)]
        for micro, accumulation, ranks in product((1, 2, 3, 4, 6, 12), repeat=3):
            if micro * accumulation * ranks != 12:
                continue
            shares = [list(micro_batches(rows, micro, rank, ranks)) for rank in range(ranks)]
            assert all(len(share) <= accumulation for share in shares)
            assert all(1 <= len(batch) <= micro for share in shares for _, batch in share)
            numbered = [(first + i, row) for share in shares for first, batch in share for i, row in enumerate(batch)]
            assert sorted(numbered) == sorted(enumerate(rows))
