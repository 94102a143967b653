"""The pirate files, samples in arrays, and batches; each against plain Python."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product

import numpy as np
import pytest
from paths import ROOT

from nanoqlora.data.batches import IGNORED, Sample, Samples, collate, join, micro_batches

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


# ------------------------------------------------------------------------------------------------ samples in arrays


def in_arrays(samples: list[Sample], name: str) -> Samples:
    words = [id | flag << 31 for s in samples for id, flag in zip(s.tokens, s.supervised, strict=True)]
    counts = [sum(s.supervised[1:]) for s in samples]
    return Samples.of(np.array(words, np.uint32), np.array([len(s) for s in samples]), np.array(counts), name)


def as_lists(samples: Iterable[Sample]) -> list[tuple[list[int], list[bool], int]]:
    return [(list(s.tokens), list(s.supervised), s.num_targets) for s in samples]


def test_samples_in_arrays_are_the_samples():
    """Of three data sets, joined, some taken out, joined again; with the largest id there can be."""
    given = [random_samples(n, seed=n) for n in (5, 1, 7)]
    given[1] = [Sample([(1 << 31) - 1, 0], [False, True])]
    one, two, three = (in_arrays(part, str(i)) for i, part in enumerate(given))
    assert as_lists(one) == as_lists(given[0])
    some = join([one, two]).take(np.array([5, 0, 3]))
    expected = [given[1][0], given[0][0], given[0][3], *given[2]]
    assert as_lists(join([some, three])) == as_lists(expected) and len(join([])) == 0
    assert join([some, three]).num_targets.tolist() == [sample.num_targets for sample in expected]


def test_fingerprints_tell_samples_apart():
    one, two = in_arrays(random_samples(3), "one"), in_arrays(random_samples(3), "two")
    made = [one, two, join([one, two]), join([two, one]), one.take(np.array([0, 1])), one.take(np.array([1, 0]))]
    assert len({samples.fingerprint for samples in made}) == len(made)
    assert join([one, two]).fingerprint == join([one, two]).fingerprint


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
