"""The data of a tokenizer: its tokens, how to break text, and the tokens with a name.

A token has three names: its id; its bytes, which text is made of; and its piece, the way files spell it. There are two
families, and they spell in two ways.

    byte-level BPE (Llama-3, SmolLM)       every byte is one printable character: " cat" is the piece "\\u0120cat"
    sentencepiece BPE (Llama-1/2, Mistral) plain text, with U+2581 for a space: "\\u2581cat"; a byte that is part of no
                                           other piece is a piece of its own, "<0xF0>"

Special tokens are spelled as they look. Read next: byte_pairs.py and sentencepieces.py, which turn words into ids.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of token, by the numbers of GGUF
NAMED_TOKENS = ("bos", "eos", "pad", "unk")
SENTENCEPIECE = "default"  # the split rule of sentencepiece, which has none; the name is GGUF's
SPACE = "\u2581"  # how sentencepiece spells one

Fields = dict[str, Any]  # of a Vocabulary, by name


@dataclass
class Vocabulary:
    """A vocabulary with its named tokens and its chat template."""

    pre: str  # the split rule: a key of SPLIT_RULES, or SENTENCEPIECE
    vocab: list[str] = field(repr=False)  # id -> piece
    kinds: list[int] = field(repr=False)  # id -> NORMAL, CONTROL, ...
    merges: list[str] = field(repr=False)  # byte-level: "left right", pieces, as learnt; none: in the order of the ids
    scores: list[float] = field(default_factory=list, repr=False)  # sentencepiece: the highest is joined first
    # Sentencepiece puts a space in front of a text, so that its first word looks like any other.
    space_before: str = "never"  # or "every": stretch of text between special tokens; or "first": the one that begins
    space_before_space: bool = True  # also in front of a text that begins with one
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False  # plain text starts with BOS; a chat template writes its own
    chat_template: str | None = field(default=None, repr=False)
    original_files: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)  # as they were read

    @property
    def is_sentencepiece(self) -> bool:
        """Whether words are sentencepiece's, with scores, or bytes with merges."""
        return self.pre == SENTENCEPIECE

    @cached_property
    def named_texts(self) -> dict[str, str]:
        """What the named tokens look like: "bos_token" -> "<s>"."""
        ids = {f"{name}_token": getattr(self, f"{name}_id") for name in NAMED_TOKENS}
        return {name: self.vocab[id] for name, id in ids.items() if id is not None}

    def normal_pieces(self) -> list[str]:
        """The pieces that text is made of, in the order of their ids."""
        return [piece for piece, kind in zip(self.vocab, self.kinds, strict=True) if kind == NORMAL]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern with one group that finds any of the texts, the longest that fits; of none, one that finds nothing."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
