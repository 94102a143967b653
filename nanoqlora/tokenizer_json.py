"""tokenizer.json: what Hugging Face's tokenizers package does to a text, step by step. Two families of it are read.

    byte-level      pre_tokenizer splits by a rule and spells bytes as characters; BPE with merges
    sentencepiece   normalizer or pre_tokenizer writes spaces as U+2581 and puts one in front; BPE with byte_fallback

Whatever would change ids and is not supported is refused.
"""

import json
from pathlib import Path
from typing import Any

from .byte_pairs import SPLIT_RULES, byte_level, merges_of, piece_to_bytes
from .cli import UserError
from .sentencepieces import BYTE_PIECES, UNREACHED, merges_of_scores
from .vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    SENTENCEPIECE,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Fields,
    Vocabulary,
)

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_tokenizer_json(path: Path, data: dict[str, Any]) -> Fields:
    model, added = data.get("model"), data.get("added_tokens") or []
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE":
        raise UserError(
            f"{path}: the model is {kind!r}, and only BPE can be read. Read in another way it would give other ids. "
            "Use a model with a BPE tokenizer, as all Llamas have."
        )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"] or not isinstance(model.get("merges"), list):
        raise UserError(f"{path}: the model has no vocab or no merges. BPE needs both. Copy the file again.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{path}: {name} is {model[name]!r}. It changes ids and is not supported. Set it to null.")

    by_id = {id: piece for piece, id in model["vocab"].items()}
    num_ids = max([*by_id, *(token["id"] for token in added)]) + 1
    if min(by_id) < 0 or num_ids > 2 * len(by_id) + 10_000:
        raise UserError(f"{path}: ids from {min(by_id)} to {num_ids - 1} for {len(by_id)} tokens. Copy the file again.")
    vocab = [by_id.get(id, f"[PAD{id}]") for id in range(num_ids)]
    kinds = [UNUSED if piece == f"[PAD{id}]" else NORMAL for id, piece in enumerate(vocab)]
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(
                f"{path}: the added token {token['content']!r} has lstrip, rstrip or single_word. They change what is "
                "found around it, and are not supported. Set the three to false."
            )
        vocab[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    fields = {"vocab": vocab, "kinds": kinds, "merges": merges, "original_files": {path.name: path.read_bytes()}}
    if not model.get("byte_fallback"):
        return fields | {"pre": _split_rule(path, data)}

    check_merges(path, fields)
    unk = model.get("unk_token")
    for id, piece in enumerate(vocab):
        if piece in BYTE_PIECES:
            kinds[id] = BYTE
        elif piece == unk:
            fields["unk_id"], kinds[id] = id, UNKNOWN
    space_rule = _space_rule(path, data, vocab)
    for token in added:
        if token.get("normalized") and not token.get("special") and data.get("normalizer"):
            raise UserError(
                f"{path}: the added token {token['content']!r} has normalized: true, so it is found only where a space "
                "stands before it. llama.cpp finds it anywhere. Set normalized to false."
            )
    # All merges that make one piece stand together, so the order of the pieces says as much as that of the merges.
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(merge.replace(" ", "") for merge in merges))}
    scores = [float(-ranks[piece]) if piece in ranks else UNREACHED for piece in vocab]
    return fields | {"pre": SENTENCEPIECE, "merges": [], "scores": scores, **space_rule}


def _split_rule(path: Path, data: dict[str, Any]) -> str:
    """The split rule of a byte-level BPE."""
    if data.get("normalizer"):
        raise UserError(
            f"{path}: a normalizer, {json.dumps(data['normalizer'])[:200]}. It rewrites text before it is split, which "
            "byte-level BPE has no use for. Only tokenizers without one can be read."
        )
    found = _essence(data.get("pre_tokenizer"))
    for name, rule in SPLIT_RULES.items():
        if found == _essence(rule.pre_tokenizer):
            return name
    raise UserError(
        f"{path}: unknown pre_tokenizer {json.dumps(data.get('pre_tokenizer'))[:400]}. It decides where words begin, "
        f"so a wrong guess gives wrong ids. Use a model with one of the rules {', '.join(SPLIT_RULES)}."
    )


def _essence(pre_tokenizer: Any) -> Any:
    """A pre_tokenizer without what changes no ids, and with what older files leave unsaid."""
    if isinstance(pre_tokenizer, list):
        return [_essence(step) for step in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    unsaid = {"use_regex": True} if pre_tokenizer.get("type") == "ByteLevel" else {}
    return unsaid | {key: _essence(item) for key, item in pre_tokenizer.items() if key != "trim_offsets"}


REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
SCHEMES = {"always": "every", "first": "first", "never": "never"}  # Metaspace's prepend_scheme -> space_before


def _space_rule(path: Path, data: dict[str, Any], vocab: list[str]) -> Fields:
    """Where a sentencepiece-style tokenizer.json puts a space in front of text. There are two ways to write it."""
    normalizer, pre_tokenizer = data.get("normalizer"), data.get("pre_tokenizer")
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if not pre_tokenizer and REPLACE_SPACES in steps:
        rest = [step for step in steps if step != REPLACE_SPACES]
        if rest in ([], [PREPEND_SPACE]):
            return {"space_before": "every" if rest else "never"}
    if not steps and pre_tokenizer and pre_tokenizer.get("type") == "Metaspace":
        unsaid = "always" if pre_tokenizer.get("add_prefix_space", True) else "never"
        scheme = SCHEMES.get(pre_tokenizer.get("prepend_scheme", unsaid))
        # Where words begin with each space, no piece may reach over one; so nothing changes if none could.
        splits = pre_tokenizer.get("split", True) and any(SPACE in piece[1:] for piece in vocab)
        if scheme and pre_tokenizer.get("replacement") == SPACE and not splits:
            return {"space_before": scheme, "space_before_space": scheme == "never"}
    raise UserError(
        f"{path}: the steps before BPE are normalizer {json.dumps(normalizer)[:200]} and pre_tokenizer "
        f"{json.dumps(pre_tokenizer)[:200]}. They decide the ids, and are not those of Llama-2 or Mistral. Use a model "
        "whose tokenizer writes spaces as U+2581 and does no more."
    )


def adds_bos(data: dict[str, Any]) -> bool:
    """Whether the template that tokenizer.json ends with puts BOS in front of a text."""
    last = data.get("post_processor") or {}
    steps = last.get("processors", [last])
    return any(step.get("single") and "SpecialToken" in step["single"][0] for step in steps)


def check_merges(path: Path, fields: Fields) -> None:
    """Every merge joins two tokens to a third."""
    known, is_bytes = set(fields["vocab"]), "pre" in fields
    for merge in fields["merges"]:
        left, _, right = merge.partition(" ")
        made = left + right
        if not (left in known and right in known and made in known and (piece_to_bytes(made) or not is_bytes)):
            raise UserError(
                f"{path}: the merge {merge!r} joins or makes something that is no token. So these merges do not belong "
                "to this vocabulary. Take both from one model."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer as Hugging Face's `tokenizers` describes it.

    Added tokens are in the vocabulary too: the library gives ids of its own choice to those that are not.
    """
    vocab, kinds, bos = vocabulary.vocab, vocabulary.kinds, vocabulary.bos_id
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [id for id, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    unset = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    family = _sentencepiece_steps if vocabulary.is_sentencepiece else _byte_level_steps
    steps, model = family(vocabulary)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": vocab[id], **plain, "special": kinds[id] != USER_DEFINED} for id in added
        ],
        **steps,
        "post_processor": _bos_first(vocab[bos], bos) if vocabulary.add_bos else None,
        "model": {
            "type": "BPE",
            **dict.fromkeys(unset),
            **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
            "vocab": {piece: id for id, piece in enumerate(vocab)},
            **model,
        },
    }


def _byte_level_steps(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a byte-level tokenizer.json does before and after BPE, and its BPE."""
    rule = SPLIT_RULES[vocabulary.pre]
    steps = {"normalizer": None, "pre_tokenizer": rule.pre_tokenizer, "decoder": byte_level(use_regex=True)}
    return steps, {"ignore_merges": rule.whole_words, "merges": merges_of(vocabulary)}


def _sentencepiece_steps(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a sentencepiece-style tokenizer.json."""
    scheme = {ours: theirs for theirs, ours in SCHEMES.items()}[vocabulary.space_before]
    before_all = scheme == "always" and vocabulary.space_before_space
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if scheme != "never" else []
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]} if before_all else None,
        "pre_tokenizer": None
        if before_all
        else {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False},
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
    }
    unk = None if vocabulary.unk_id is None else vocabulary.vocab[vocabulary.unk_id]
    merges = merges_of_scores(vocabulary)
    return steps, {"fuse_unk": True, "byte_fallback": True, "unk_token": unk, "merges": merges}


def _bos_first(text: str, id: int) -> dict[str, Any]:
    """The rule that puts BOS in front of a text, and of each text of a pair."""

    def one(name: str, sequence: int) -> list[dict[str, Any]]:
        bos = {"SpecialToken": {"id": text, "type_id": sequence}}
        return [bos, {"Sequence": {"id": name, "type_id": sequence}}]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    }
