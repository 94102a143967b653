"""Words to ids by sentencepiece BPE (Llama-1/2, TinyLlama, Mistral), and the file tokenizer.model.

There are no words here. The complete text, with U+2581 for each space, starts as single characters. Of all neighbours
that form a piece together, the pair whose piece has the highest score is joined, until no two neighbours form one. A
character that is no piece becomes its bytes in the end. The sentencepiece package does that, in C++.

It reads a message of Google's protocol buffers, `ModelProto`, whose classes come with the package. We fill one in
ourselves where a vocabulary comes from tokenizer.json or GGUF, so all get the same engine. The numbers of GGUF for the
kinds of tokens are those of `ModelProto`. Read next: files.py.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError

from ..config.errors import UserError
from .vocabulary import BYTE, CONTROL, NAMED_TOKENS, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary

BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
UNREACHED = -2e9  # the score of a piece that no merge leads to; Mistral has pieces with half of it


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

    def tokens(self, text: str) -> tuple[list[int | None], list[int]]:
        """For each token its id, and how many bytes of the text it is, with one for U+2581, as for a space."""
        ids = self._engine.encode(text.replace(" ", SPACE))
        return ids, [self._width_of[id] for id in ids]


def width(text: str) -> int:
    """The bytes of a text whose spaces may have been replaced."""
    return len(text.replace(SPACE, " ").encode())


def merges_of_scores(vocabulary: Vocabulary) -> list[str]:
    """Every pair of pieces that forms a piece, the best first: what tokenizer.json has in place of scores."""
    pieces = zip(vocabulary.vocab, vocabulary.kinds, vocabulary.scores, strict=True)
    score_of = {piece: score for piece, kind, score in pieces if kind == NORMAL}
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
        UserError: not such a file, or of a kind that no Llama has: other ids would come out, and nobody would notice.
    """
    model = _new_model()
    try:
        model.ParseFromString(data)
        vocab = [piece.piece for piece in model.pieces if isinstance(piece.piece, str)]  # else it is not UTF-8
    except (ValueError, DecodeError):
        vocab = []
    if not vocab or len(vocab) < len(model.pieces):
        raise UserError(f"{path}: neither a sentencepiece model nor Llama-3's list of tokens. Copy the file again.")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    differences = {
        "is no BPE model": trainer.model_type != trainer.BPE,
        "has no byte fallback": not trainer.byte_fallback,
        "puts spaces behind words": trainer.treat_whitespace_as_suffix,
        "rewrites characters": normalizer.precompiled_charsmap,
        "removes spaces": normalizer.remove_extra_whitespaces,
        "does not mark spaces": not normalizer.escape_whitespaces,
    }
    if found := [difference for difference, is_found in differences.items() if is_found]:
        advice = "Use a model with BPE, byte fallback and normalization identity"
        raise UserError(f"{path}: it {found[0]}, as no Llama's does: llama.cpp would give other ids. {advice}.")
    scores, kinds = [piece.score for piece in model.pieces], [piece.type for piece in model.pieces]
    ids = {f"{name}_id": getattr(trainer, f"{name}_id") for name in NAMED_TOKENS}
    fields = {"vocab": vocab, "scores": scores, "kinds": kinds, "space_in_front": normalizer.add_dummy_prefix}
    return fields | {name: id if 0 <= id < len(vocab) else None for name, id in ids.items()}


def write_model(vocabulary: Vocabulary, kinds: list[int], space_in_front: bool) -> bytes:
    """A tokenizer.model: BPE with byte fallback that rewrites no characters."""
    model = _new_model()
    for piece, score, kind in zip(vocabulary.vocab, vocabulary.scores, kinds, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = trainer.BPE, True
    for name in NAMED_TOKENS:
        id = getattr(vocabulary, f"{name}_id")
        setattr(trainer, f"{name}_id", -1 if id is None else id)
    trainer.unk_id = kinds.index(UNKNOWN)
    normalizer.name, normalizer.add_dummy_prefix = "identity", space_in_front
    normalizer.remove_extra_whitespaces, normalizer.escape_whitespaces = False, True
    return model.SerializeToString()


def _new_model() -> Any:
    """An empty `ModelProto`; imported here, because byte-level tokenizers do without, and it takes 0.2 s."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto()
