"""Words to ids by byte-level BPE: the split rules of the Llamas, and tiktoken, which follows them.

1. Split.  A regular expression, the split rule, breaks the text into words: "two  cats" gives "two", " " and " cats".
2. Merge.  A word starts as its UTF-8 bytes. Of all neighbours that form a token together, the pair whose token was
           learnt first is joined; this repeats until no two neighbours form a token.

Both run in tiktoken, which is Rust. It wants one number per token, the rank: the order in which the tokens were learnt.
Meta's own files list the tokens in that order. Hugging Face's and GGUF's hold a list of merges instead, and the ranks
are read off that list. `merges_of` does the reverse.

Split rules that are not in `SPLIT_RULES` are refused, because a wrong rule gives plausible but different ids.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import Any

import tiktoken

from ..config.errors import UserError
from .vocabulary import NORMAL, Fields, Vocabulary

LONGEST_BLANK = 500_000  # white space in a row; the regex engine runs out of stack at a little under a million


# ---------------------------------------------------------------------------------------------------------------------
# Split rules


@dataclass(frozen=True)
class SplitRule:
    """How a family of models breaks text into words, in three forms."""

    pattern: str  # one regular expression, for tiktoken
    steps: list[dict[str, Any]]  # the same rule as tokenizer.json writes it
    whole_words: bool  # a word that is a token is taken as it is, even if no merges lead to it ("ignore_merges")
    add_bos: bool  # the default for a GGUF file without it


# By their names in GGUF, `tokenizer.ggml.pre`.
#
# smollm     two rules in one. Every digit is a word. What lies between digits is split as GPT-2 does it, each stretch
#            as if it were the complete text: so spaces in front of a digit stay together ("a  5"), while in front of a
#            letter the last space goes with the letter ("a  b").
# llama-bpe  Llama-3's
# smaug-bpe  the same in a file with `"ignore_merges": false`. llama.cpp has it for a model that was published so.
_TABLE = json.loads(files(__package__).joinpath("split_rules.json").read_text("utf-8"))
SPLIT_RULES = {name: SplitRule(**rule) for name, rule in _TABLE.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Pieces, bytes and merges


# The character that spells each byte in vocabulary files: itself if it prints, else one from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # without 0xAD, the soft hyphen
_OTHERS = sorted({*range(256)} - {*_PRINTED})
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(0x100 + i): byte for i, byte in enumerate(_OTHERS)}
LETTERS = sorted(_BYTE_OF, key=_BYTE_OF.__getitem__)


def piece_to_bytes(piece: str) -> bytes | None:
    """The bytes that a piece spells, or None when it holds a character that spells no byte."""
    return _spell(piece) if _BYTE_OF.keys() >= set(piece) else None


def _spell(piece: str) -> bytes:
    return bytes(_BYTE_OF[letter] for letter in piece)


class BytePairs:
    """Words to token ids, by merging neighbours; one tiktoken `Encoding`, and our id for each of its ranks.

    Ranks 0 to 255 are the single bytes, then come the results of the merges in the order of the merges. tiktoken knows
    tokens but no merges: it joins any two neighbours whose bytes form a token. That gives the same ids as long as every
    token can be reached by its merges, which holds for a vocabulary that was trained as one. A single byte that has no
    token of its own gets a rank all the same, with the id None, and is dropped at the end. So does llama.cpp, while
    transformers drops it before it merges. In SmolLM2 those are six control characters, and bytes that no text has.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        vocab, rule = vocabulary.vocab, SPLIT_RULES[vocabulary.pre]
        ids = {piece: id for id, piece in enumerate(vocab)}
        learnt = dict.fromkeys(merge.replace(" ", "") for merge in vocabulary.merges)  # a set that keeps its order
        words = list(learnt)
        if rule.whole_words:  # tokens without merges are words too, in the order of the ids if the merges are
            in_order = all(ids[a] < ids[b] for a, b in pairwise(words))
            words += [p for p in vocabulary.normal_pieces() if len(p) > 1 and p not in learnt and piece_to_bytes(p)]
            words = sorted(words, key=ids.__getitem__) if in_order else words
        else:  # tiktoken takes a word that is a token as it is; those that merges never make must not be there
            unreached = _unreached(words)
            words = [word for word in words if word not in unreached]
        spelled = [bytes([byte]) for byte in range(256)] + [_spell(word) for word in words]
        self._id_of_rank = [ids.get(letter) for letter in LETTERS] + [ids[word] for word in words]
        self._width_of_rank = [len(token) for token in spelled]
        ranks = {token: rank for rank, token in enumerate(spelled)}
        self._tiktoken = tiktoken.Encoding("words", pat_str=rule.pattern, mergeable_ranks=ranks, special_tokens={})

    def tokens(self, text: str) -> tuple[list[int | None], list[int]]:
        """Split and merge: for each token its id, if it has one, and how many bytes of the text it is."""
        if len(text) > LONGEST_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_BLANK:
            found = f"a text has more than {LONGEST_BLANK} characters of white space in a row"
            raise UserError(f"{found}, which is one word to the split rule, and too long. Shorten it.")
        ranks = self._tiktoken.encode_ordinary(text)
        return [self._id_of_rank[rank] for rank in ranks], [self._width_of_rank[rank] for rank in ranks]


def _unreached(words: list[str]) -> set[str]:
    """The words that merging their own bytes does not lead to, and so no merging of a longer text either.

    Args:
        words: results of merges, in the order of the merges.
    """
    spelled = [_spell(word) for word in words]
    ranks = {bytes([byte]): byte for byte in range(256)} | {token: 256 + i for i, token in enumerate(spelled)}
    engine = tiktoken.Encoding("parts", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
    mark = set(range(256)) - set(b"".join(spelled))  # a byte that joins nothing keeps tiktoken from looking up the word
    if not mark:
        return set()
    end = bytes([max(mark)])
    pairs = zip(words, spelled, strict=True)
    return {word for word, token in pairs if len(engine._encode_single_piece(token + end)) > 2}


def has_unreached(fields: Fields) -> bool:
    """Whether a vocabulary has a token that is found as a complete word only."""
    learnt = list(dict.fromkeys(merge.replace(" ", "") for merge in fields["merges"]))
    words = {piece for piece, kind in zip(fields["vocab"], fields["kinds"], strict=True) if kind == NORMAL}
    return bool(_unreached(learnt)) or any(len(word) > 1 for word in words - set(learnt))


def merges_of(vocabulary: Vocabulary) -> list[str]:
    """The merges of a vocabulary, for files that want them: those of its file, else rebuilt from its ids."""
    return vocabulary.merges or _merges_of_ranks(vocabulary.normal_pieces())


def _merges_of_ranks(pieces: list[str]) -> list[str]:
    """The merges that lead to each piece.

    The last merge of a piece joins the two parts that are left of it when only pieces learnt before may be used. Some
    pieces are left in more parts than two: no merges lead to them, and they are found as complete words only.

    Args:
        pieces: in the order in which they were learnt.
    """
    merges, rank_of = [], {letter: -1 for letter in LETTERS}
    for rank, piece in enumerate(pieces):
        parts = list(piece)
        while len(parts) > 2:
            ranks = [rank_of.get(left + right, rank) for left, right in pairwise(parts)]
            if (best := min(ranks)) == rank:  # no two of them form a piece
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append(" ".join(parts))
        rank_of[piece] = rank
    return merges
