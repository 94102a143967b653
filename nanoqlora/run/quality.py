"""What training did to the model beside the held-out loss: how much of the data's language it speaks, what it forgot.

Domain score: the words that mark the data are those in at least 1 % of its answers (and in two of them) that are more
than three times as frequent there as in plain text. The score of some text is the share of its words that are such.
It needs no judge and is the same for everybody; what the data's own answers score is the mark to compare with.

Forgetting: the loss on plain text that has nothing to do with the data. It should hardly rise.

`data/plain.txt`, 32 paragraphs written for this purpose, is the plain text of both.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..config.scripts import PROGRAMS
from ..data.batches import Sample
from ..data.prompts import PromptFormat
from ..tokenizer.tokenizer import Tokenizer

TIMES_AS_FREQUENT = 3
SHARE_OF_ANSWERS = 0.01
ANSWERS_READ = 2000
WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]*)*")  # letters, with apostrophes within and behind: o', ye've


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def domain_words(answers: Sequence[str], plain: str) -> set[str]:
    """The words that mark the answers, against plain text."""
    usual, counts = Counter(words_of(plain)), Counter(word for text in answers for word in words_of(text))
    in_answers = Counter(word for text in answers for word in set(words_of(text)))
    often = max(2, SHARE_OF_ANSWERS * len(answers))
    num_words, num_usual = counts.total(), usual.total()
    return {
        word
        for word, count in counts.items()
        if in_answers[word] >= often and count * num_usual > TIMES_AS_FREQUENT * usual[word] * num_words
    }


def domain_score(texts: Iterable[str], marks: set[str]) -> float:
    """Share of the words of all texts that are among `marks`; 0 for no words."""
    words = [word for text in texts for word in words_of(text)]
    return sum(word in marks for word in words) / max(1, len(words))


def supervised_texts(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[str]:
    """What the model learns to write, as text, of the first samples."""
    some = [samples[i] for i in range(min(len(samples), ANSWERS_READ))]
    chosen = ([id for id, counts in zip(s.tokens, s.supervised, strict=True) if counts] for s in some)
    return [tokenizer.decode(ids, skip_special=True) for ids in chosen]


def plain_text() -> str:
    return (PROGRAMS / "data" / "plain.txt").read_text("utf-8")


def plain_samples(tokenizer: Tokenizer, capacity: int) -> list[Sample]:
    """The paragraphs of the plain text as samples, every token supervised; at most `capacity` tokens of each."""
    prompt_format = PromptFormat(type="completion")
    encoded = [prompt_format.encode_row(tokenizer, {"text": text}) for text in plain_text().split("\n\n")]
    return [Sample(tokens[:capacity], supervised[:capacity]) for tokens, supervised in encoded]
