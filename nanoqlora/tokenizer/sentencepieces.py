"""Words to ids by sentencepiece BPE (Llama-1/2, TinyLlama, Mistral), and the file tokenizer.model.

There are no words here. The whole text, with U+2581 for each space, starts as single characters. Of all neighbours that
form a piece together, the pair whose piece has the highest score is joined, until no two neighbours form a piece. A
character that is no piece becomes its bytes in the end. The sentencepiece package does that, in C++.

It reads a message of Google's protocol buffers (`ModelProto` in sentencepiece_model.proto). We read and write that
ourselves, as only a few of its fields matter; so a vocabulary from tokenizer.json or GGUF gets the same engine.

    1 piece, repeated    1 text    2 score (float32)    3 kind (the numbers of GGUF are taken from here)
    2 trainer            3 model type (2 is BPE)    24 spaces behind words    35 byte fallback    40 to 43 named ids
    3 normalizer         2 table of rewritings          3 space in front        4 fewer spaces    5 U+2581 for spaces
"""

import struct
from pathlib import Path
from typing import Any

import sentencepiece

from ..config.errors import UserError
from .vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
UNREACHED = -2e9  # the score of a piece that no merge leads to; Mistral has pieces with half of it
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how protocol buffers store a field
BPE = 2
NAMED_IDS = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, -1)}  # field and default


class SentencePieces:
    """Words to token ids, by joining the neighbours with the best score."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        vocab = vocabulary.vocab
        # Added tokens are cut out of the text before it comes here, so nothing else may become one: they are control
        # tokens to the engine. So is a piece that no merge leads to, unless it is a single character.
        kinds = [
            CONTROL if kind == USER_DEFINED or kind == NORMAL and score == UNREACHED and len(piece) > 1 else kind
            for piece, kind, score in zip(vocab, vocabulary.kinds, vocabulary.scores, strict=True)
        ]
        if UNKNOWN not in kinds:  # sentencepiece insists on one; with a token for every byte it is never found
            kinds[kinds.index(CONTROL)] = UNKNOWN
        self._width_of = [1 if kind == BYTE else width(piece) for piece, kind in zip(vocab, kinds, strict=True)]
        model = write_model(vocabulary, kinds, space_in_front=False)
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:  # an empty piece, or one with a character NUL
            raise UserError(f"the tokenizer's vocabulary is not one that sentencepiece can use ({error}).") from error

    def tokens(self, text: str) -> tuple[list[int], list[int]]:
        """For each token its id, and how many bytes of the text it is, where U+2581 counts as one: as a space does."""
        ids = self._engine.encode(text.replace(" ", SPACE))
        return ids, [self._width_of[id] for id in ids]


def width(text: str) -> int:
    """The bytes of a text whose spaces may have been replaced."""
    return len(text.replace(SPACE, " ").encode())


def merges_of_scores(vocabulary: Vocabulary) -> list[str]:
    """Every pair of pieces that forms a piece, the best first: what tokenizer.json has in place of scores."""
    score_of = {
        piece: score
        for piece, kind, score in zip(vocabulary.vocab, vocabulary.kinds, vocabulary.scores, strict=True)
        if kind == NORMAL
    }
    pairs = [
        (-score, cut, piece)
        for piece, score in score_of.items()
        for cut in range(1, len(piece))
        if score > UNREACHED and piece[:cut] in score_of and piece[cut:] in score_of
    ]
    return [f"{piece[:cut]} {piece[cut:]}" for _, cut, piece in sorted(pairs)]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.model


def read_model(data: bytes, path: Path) -> dict[str, Any]:
    """Pieces, scores, kinds and named ids of a tokenizer.model, as fields of `Vocabulary`; and `space_in_front`.

    Raises:
        UserError: not such a file, or of a kind that no Llama has: other ids would come out, without a word.
    """
    try:
        message = _fields(data)
        pieces = [_fields(piece) for piece in message[1]]
        vocab = [piece[1][-1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, [bytes(4)])[-1])[0] for piece in pieces]
        trainer, normalizer = _fields(message.get(2, [b""])[-1]), _fields(message.get(3, [b""])[-1])
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{path}: neither a sentencepiece model nor Llama-3's list of tokens. Token ids come from it. Copy the "
            "file again."
        ) from error

    def setting(fields: dict[int, list[Any]], number: int, default: int) -> int:
        return fields.get(number, [default])[-1]

    for found, is_found in {
        "is no BPE model": setting(trainer, 3, 1) != BPE,
        "has no byte fallback": not setting(trainer, 35, 0),
        "puts spaces behind words": setting(trainer, 24, 0),
        "rewrites characters": normalizer.get(2, [b""])[-1],
        "removes spaces": setting(normalizer, 4, 1),
        "does not mark spaces": not setting(normalizer, 5, 1),
    }.items():
        if is_found:
            raise UserError(
                f"{path}: it {found}, as no Llama's does. llama.cpp would give other ids than sentencepiece. Use a "
                "model with a tokenizer of Llama's kind: BPE, byte fallback, normalization identity."
            )
    ids = {name: setting(trainer, number, default) for name, (number, default) in NAMED_IDS.items()}
    return {
        "vocab": vocab,
        "scores": scores,
        "kinds": [setting(piece, 3, NORMAL) for piece in pieces],
        "space_in_front": bool(setting(normalizer, 3, 1)),
        **{f"{name}_id": id if 0 <= id < len(vocab) else None for name, id in ids.items()},
    }


def write_model(vocabulary: Vocabulary, kinds: list[int], space_in_front: bool) -> bytes:
    """A tokenizer.model: BPE with byte fallback that rewrites no characters."""
    out = bytearray()
    for piece, score, kind in zip(vocabulary.vocab, vocabulary.scores, kinds, strict=True):
        out += _field(1, _field(1, piece.encode()) + _field(2, float(score)) + _field(3, kind))
    ids = {number: getattr(vocabulary, f"{name}_id") for name, (number, _) in NAMED_IDS.items()}
    ids[NAMED_IDS["unk"][0]] = kinds.index(UNKNOWN)
    none = 2**64 - 1  # -1: negative numbers are stored as their complement
    named = b"".join(_field(number, none if id is None else id) for number, id in ids.items())
    out += _field(2, _field(3, BPE) + _field(35, 1) + named)
    out += _field(3, _field(1, b"identity") + _field(3, int(space_in_front)) + _field(4, 0) + _field(5, 1))
    return bytes(out)


def _field(number: int, value: int | float | bytes) -> bytes:
    """One field of a message."""
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | FIXED32) + struct.pack("<f", value)
    return _varint(number << 3 | BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _fields(data: bytes) -> dict[int, list[Any]]:
    """A message taken apart: number -> its values in order; floats stay four bytes."""
    fields: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == VARINT:
            value: int | bytes = varint()
        else:
            size = varint() if wire == BYTES else {FIXED64: 8, FIXED32: 4}[wire]
            value = data[at : at + size]
            if len(value) < size:
                raise ValueError("the message ends within a field")
            at += size
        fields.setdefault(number, []).append(value)
    return fields
