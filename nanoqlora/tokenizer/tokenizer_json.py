"""tokenizer.json: what Hugging Face's tokenizers package does to a text, step by step. Two families of it are read.

    byte-level      pre_tokenizer splits by a rule and spells bytes as characters; BPE with merges
    sentencepiece   normalizer or pre_tokenizer writes spaces as U+2581 and puts one in front; BPE with byte_fallback

Whatever would change ids and is not supported is refused.
"""

import json
from pathlib import Path
from typing import Any

from ..config.errors import UserError
from ..config.files import expect
from .byte_pairs import SPLIT_RULES, has_unreached, merges_of, piece_to_bytes
from .sentencepieces import BYTE_PIECES, UNREACHED, merges_of_scores
from .vocabulary import BYTE, CONTROL, NORMAL, SENTENCEPIECE, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Fields, Vocabulary

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read(path: Path, data: dict[str, Any]) -> Fields:
    """The vocabulary of a tokenizer.json, without its named tokens."""
    model = _checked_model(path, data)
    added = _added_tokens(path, data, model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in model["merges"]]
    by_id = {id: piece for piece, id in model["vocab"].items()}
    ids = [*by_id, *(token["id"] for token in added)]
    if len(by_id) < len(model["vocab"]) or min(ids) < 0 or max(ids) >= 2 * len(by_id) + 10_000:
        raise UserError(f"{path}: ids from {min(ids)} to {max(ids)} for {len(by_id)} tokens. Copy the file again.")
    vocab = [by_id.get(id, f"[PAD{id}]") for id in range(max(ids) + 1)]
    kinds = [UNUSED if piece == f"[PAD{id}]" else NORMAL for id, piece in enumerate(vocab)]
    for token in added:
        vocab[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    original = {path.name: path.read_bytes()}
    fields: Fields = {"vocab": vocab, "kinds": kinds, "merges": merges, "original_files": original}
    if not model.get("byte_fallback"):
        return fields | {"pre": _split_rule(path, data, fields, bool(model.get("ignore_merges")))}

    check_merges(path, fields)
    for id, piece in enumerate(vocab):
        if piece in BYTE_PIECES:
            kinds[id] = BYTE
        elif piece == model.get("unk_token"):
            fields["unk_id"], kinds[id] = id, UNKNOWN
    space_rule = _space_rule(path, data, vocab)
    for token in added:
        check_normalized(path, data, token)
    # All merges that make one piece are adjacent, so the order of the pieces is enough.
    ranks = {piece: rank for rank, piece in enumerate(dict.fromkeys(merge.replace(" ", "") for merge in merges))}
    scores = [float(-ranks[piece]) if piece in ranks else UNREACHED for piece in vocab]
    return fields | {"pre": SENTENCEPIECE, "merges": [], "scores": scores, **space_rule}


def _checked_model(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    where, model = f"{path}: model", expect(f"{path}: model", data.get("model"), dict | None) or {}
    if model.get("type") != "BPE":
        raise UserError(f"{path}: the model is {model.get('type')!r}. Use one of type BPE, as all Llamas have.")
    expect(f"{where}.vocab", model.get("vocab"), dict[str, int] | None)
    expect(f"{where}.merges", model.get("merges"), list[str | list] | None)
    if not model.get("vocab") or model.get("merges") is None:
        raise UserError(f"{path}: the model has no vocab or no merges. Copy the file again.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{path}: {name} is {model[name]!r}, and changes ids. Set it to null.")
    for name, kind in {"byte_fallback": bool, "ignore_merges": bool, "unk_token": str}.items():
        expect(f"{where}.{name}", model.get(name), kind | None)
    return model


def _added_tokens(path: Path, data: dict[str, Any], vocab: dict[str, int]) -> list[dict[str, Any]]:
    listed = expect(f"{path}: added_tokens", data.get("added_tokens"), list | None) or []
    added = [added_token(f"{path}: added_tokens", token) for token in listed]
    next_id = len(vocab)
    for token in added:
        where, id = f"{path}: added_tokens, the id of {token['content']!r},", vocab.get(token["content"], next_id)
        if expect(where, token.get("id"), int) != id:  # the tokenizers package numbers them itself
            raise UserError(f"{where} is {token['id']}, and Hugging Face's tokenizers give it {id}. Correct the id.")
        next_id = max(next_id, id + 1)
    return added


def added_token(where: str, token: Any, special: bool = False) -> dict[str, Any]:
    """An added token as files write it, text or a map, with `special` filled in."""
    token = {"content": token} if isinstance(token, str) else expect(where, token, dict)
    content = expect(f"{where}, content,", token.get("content"), str)
    flags = {name: token.get(name) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
    for name, value in flags.items():
        expect(f"{where}, {name} of {content!r},", value, bool | None)
    if flags["lstrip"] or flags["rstrip"] or flags["single_word"]:
        found = f"the added token {content!r} has lstrip, rstrip or single_word"
        raise UserError(f"{where}: {found}, which are not supported. Set the three to false.")
    return token | {"special": special if flags["special"] is None else flags["special"]}


def check_normalized(path: Path, data: dict[str, Any], token: dict[str, Any]) -> None:
    """Raises UserError for an added token that is found in the rewritten text only."""
    if token.get("normalized") and not token["special"] and steps_of(path, data, "normalizer"):
        found = f"the added token {token['content']!r} has normalized: true, so it is found only behind a space"
        raise UserError(f"{path}: {found}, and by llama.cpp anywhere. Set normalized to false.")


def steps_of(where: Path, data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A normalizer, pre_tokenizer or post_processor as the list of its steps; sequences may be nested or empty."""
    step = expect(f"{where}: {key}", data.get(key), dict | None)
    if not step or step.get("type") != "Sequence":
        return [step] if step else []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}[key]
    parts = expect(f"{where}: {key}.{inner}", step.get(inner), list[dict])
    return [found for part in parts for found in steps_of(where, {key: part}, key)]


def _split_rule(path: Path, data: dict[str, Any], fields: Fields, whole_words: bool) -> str:
    """The split rule of a byte-level BPE.

    `ignore_merges` is part of it, as in GGUF files. It changes nothing where merges lead to every token.
    """
    if steps_of(path, data, "normalizer"):
        found = f"a normalizer, {json.dumps(data['normalizer'])[:200]}, which rewrites text before it is split"
        raise UserError(f"{path}: {found}. Use a byte-level tokenizer without one.")
    steps = _essence(steps_of(path, data, "pre_tokenizer"))
    for name, rule in SPLIT_RULES.items():
        if steps == _essence(rule.steps):
            if whole_words != rule.whole_words:
                check_merges(path, fields | {"pre": name})
            if rule.whole_words == whole_words or whole_words and not has_unreached(fields):
                return name
    found = f"unknown pre_tokenizer {json.dumps(data.get('pre_tokenizer'))[:400]}"
    found += f" with ignore_merges {json.dumps(whole_words)}"
    raise UserError(f"{path}: {found}. Use a model with one of the rules {', '.join(SPLIT_RULES)}.")


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
    steps, words = steps_of(path, data, "normalizer"), steps_of(path, data, "pre_tokenizer")
    if not words and REPLACE_SPACES in steps:
        rest = [step for step in steps if step != REPLACE_SPACES]
        if rest in ([], [PREPEND_SPACE]):
            return {"space_before": "every" if rest else "never"}
    if not steps and len(words) == 1 and words[0].get("type") == "Metaspace":
        metaspace = words[0]
        unsaid = "always" if metaspace.get("add_prefix_space", True) else "never"
        scheme = SCHEMES.get(str(metaspace.get("prepend_scheme", unsaid)))
        # Where words begin with each space, no piece may reach over one; so nothing changes if none could.
        splits = metaspace.get("split", True) and any(SPACE in piece[1:] for piece in vocab)
        if scheme and metaspace.get("replacement") == SPACE and not splits:
            return {"space_before": scheme, "space_before_space": scheme == "never"}
    found = " and ".join(f"{key} {json.dumps(data.get(key))[:200]}" for key in ("normalizer", "pre_tokenizer"))
    advice = "Use a model whose tokenizer writes spaces as U+2581 and does no more"
    raise UserError(f"{path}: the steps before BPE are {found}, and not those of Llama-2 or Mistral. {advice}.")


def token_in_front(path: Path, data: dict[str, Any]) -> str | None:
    """The special token that the template at the end of tokenizer.json puts in front of a text."""
    for step in steps_of(path, data, "post_processor"):
        single = expect(f"{path}: post_processor.single", step.get("single"), list[dict] | None) or [{}]
        token = expect(f"{path}: post_processor.single", single[0].get("SpecialToken"), dict | None)
        if token:
            return expect(f"{path}: post_processor.single", token.get("id"), str)
    return None


def check_merges(path: Path, fields: Fields) -> None:
    """Every merge joins two tokens to a third."""
    known, is_bytes = set(fields["vocab"]), "pre" in fields
    for merge in fields["merges"]:
        left, _, right = merge.partition(" ")
        made = left + right
        if not (left in known and right in known and made in known and (piece_to_bytes(made) or not is_bytes)):
            found = f"the merge {merge!r} joins or makes something that is not a token"
            raise UserError(f"{path}: {found}. Take vocabulary and merges from one model.")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer as Hugging Face's `tokenizers` describes it.

    Added tokens are in the vocabulary too: the library gives ids of its own choice to those that are not.
    """
    vocab, kinds, bos = vocabulary.vocab, vocabulary.kinds, vocabulary.bos_id
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [id for id, kind in enumerate(kinds) if kind in (CONTROL, UNKNOWN, USER_DEFINED)]
    steps, model = (_sentencepiece_steps if vocabulary.is_sentencepiece else _byte_level_steps)(vocabulary)
    unset = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    flags = dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False)
    ids = {piece: id for id, piece in enumerate(vocab)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": vocab[i], **plain, "special": kinds[i] != USER_DEFINED} for i in added],
        **steps,
        "post_processor": _bos_first(vocab[bos], bos) if vocabulary.add_bos and bos is not None else None,
        "model": {"type": "BPE", **unset, **flags, "vocab": ids, **model},
    }


def _byte_level_steps(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a byte-level tokenizer.json does before and after BPE, and its BPE."""
    rule = SPLIT_RULES[vocabulary.pre]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": rule.steps}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    steps = {"normalizer": None, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
    return steps, {"ignore_merges": rule.whole_words, "merges": merges_of(vocabulary)}


def _sentencepiece_steps(vocabulary: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a sentencepiece-style tokenizer.json."""
    scheme = {ours: theirs for theirs, ours in SCHEMES.items()}[vocabulary.space_before]
    before_all = scheme == "always" and vocabulary.space_before_space
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    back = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if scheme != "never" else []
    steps = {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]} if before_all else None,
        "pre_tokenizer": None if before_all else metaspace,
        "decoder": {"type": "Sequence", "decoders": [*back, {"type": "Fuse"}, *strip]},
    }
    unk = None if vocabulary.unk_id is None else vocabulary.vocab[vocabulary.unk_id]
    merges = merges_of_scores(vocabulary)
    return steps, {"fuse_unk": True, "byte_fallback": True, "unk_token": unk, "merges": merges}


def _bos_first(text: str, id: int) -> dict[str, Any]:
    """The rule that puts BOS in front of a text, and of each text of a pair."""
    bos = [{"SpecialToken": {"id": text, "type_id": sequence}} for sequence in (0, 1)]
    texts = [{"Sequence": {"id": name, "type_id": sequence}} for sequence, name in enumerate("AB")]
    tokens = {text: {"id": text, "ids": [id], "tokens": [text]}}
    single, pair = [bos[0], texts[0]], [bos[0], texts[0], bos[1], texts[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
