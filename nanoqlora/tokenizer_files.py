"""Where vocabularies come from and go to: a Hugging Face folder, Meta's tokenizer.model, the metadata of a GGUF file.

    tokenizer.json    Hugging Face's: vocabulary, merges, added tokens, and in what steps text is taken apart
    tokenizer.model   one name for two files: sentencepiece's (Llama-1/2, Mistral), and Meta's list of Llama-3's tokens
    tokenizer_config.json, chat_template.jinja    the named tokens, and how a chat is written

Where both tokenizer.json and sentencepiece's tokenizer.model are there, pieces and scores are the model's. Whatever
would change ids and is not supported is refused. Readers give the fields of a `Vocabulary`.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from nanoqlora.byte_pairs import LETTERS, SPLIT_RULES, byte_level, merges_of, piece_to_bytes
from nanoqlora.cli import UserError, whole_file, write_text
from nanoqlora.sentencepieces import BYTE_PIECES, UNREACHED, merges_of_scores, read_model, write_model
from nanoqlora.vocabulary import (
    BYTE,
    CONTROL,
    MARKER,
    NAMED_TOKENS,
    NORMAL,
    SENTENCEPIECE,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
)

Fields = dict[str, Any]  # of a Vocabulary
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL = (
    *("begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id"),
    *("reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"),
    *(f"reserved_special_token_{i}" for i in range(3, 248)),
)


# ---------------------------------------------------------------------------------------------------------------------
# Reading a folder


def read_folder(folder: Path) -> Fields:
    """The vocabulary of a folder in Hugging Face's or in Meta's format."""
    path, model_path, config_path = (folder / f"tokenizer{end}" for end in (".json", ".model", "_config.json"))
    if path.is_file() or not model_path.is_file():
        data, config = _read_json(path), _read_json(config_path)
        fields = _from_tokenizer_json(path, data)
        if fields["pre"] == SENTENCEPIECE and model_path.is_file():
            _take_scores(fields, model_path)
        is_added = _adds_bos(data)
    else:
        config = _read_json(config_path) if config_path.is_file() else {}
        data = model_path.read_bytes()
        is_ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data)
        fields = _from_ranks(model_path, data) if is_ranks else _from_model(model_path, data, folder, config)
        is_added = True

    ids = {piece: id for id, piece in enumerate(fields["vocab"])}
    for name in NAMED_TOKENS:
        text = config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text  # older files write a whole added token here
        if text is not None and text not in ids:
            raise UserError(
                f"{config_path}: {name}_token is {text!r}, which is not in the vocabulary of the tokenizer. It would "
                "have no id. Correct the text, or take all files from one model."
            )
        fields[f"{name}_id"] = fields.get(f"{name}_id") if text is None else ids[text]
    said = config.get("add_bos_token")
    fields["add_bos"] = bool(is_added if said is None else said) and fields["bos_id"] is not None
    fields["chat_template"] = _chat_template(folder, config)
    return _checked(path if path.is_file() else model_path, fields)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. In Hugging Face's format a tokenizer is tokenizer.json and tokenizer_config.json. "
            "Copy the missing one from the model's page."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). The tokenizer is read from it. Copy it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON {type(data).__name__}, not an object. It must be one. Copy the file again.")
    return data


def _adds_bos(data: dict[str, Any]) -> bool:
    """Whether the template that tokenizer.json ends with puts BOS in front of a text."""
    last = data.get("post_processor") or {}
    steps = last.get("processors", [last])
    return any(step.get("single") and "SpecialToken" in step["single"][0] for step in steps)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the entry of the config: a text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def _from_tokenizer_json(path: Path, data: dict[str, Any]) -> Fields:
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
    vocab = [by_id.get(id, f"[PAD{id}]") for id in range(max([*by_id, *(token["id"] for token in added)]) + 1)]
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

    _check_merges(path, fields)
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


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.model


def _from_model(path: Path, data: bytes, folder: Path, config: dict[str, Any]) -> Fields:
    """A sentencepiece model alone, with the tokens that were added to it."""
    fields = {"pre": SENTENCEPIECE, "merges": [], "original_files": {path.name: data}} | read_model(data, path)
    in_front = fields.pop("space_in_front") and config.get("add_prefix_space") is not False
    fields["space_before"] = ("every" if config.get("legacy") else "first") if in_front else "never"
    file = folder / "added_tokens.json"
    added = {id: {"content": text} for text, id in (_read_json(file) if file.is_file() else {}).items()}
    for id, token in sorted((added | {int(i): t for i, t in config.get("added_tokens_decoder", {}).items()}).items()):
        known = len(fields["vocab"])
        if id < known and fields["vocab"][id] == token["content"]:
            continue
        if id != known:
            raise UserError(
                f"{path}: it has {known} pieces, so the added token {token['content']!r} cannot have the id {id}. The "
                "files are of different models. Take all from one."
            )
        fields["vocab"].append(token["content"])
        fields["kinds"].append(CONTROL if token.get("special", True) else USER_DEFINED)
        fields["scores"].append(UNREACHED)
    return fields


def _take_scores(fields: Fields, path: Path) -> None:
    """Put the scores of a sentencepiece model in the place of those that were read off tokenizer.json."""
    data = path.read_bytes()
    model = read_model(data, path)
    for id, (piece, kind, score) in enumerate(zip(model["vocab"], model["kinds"], model["scores"], strict=True)):
        if fields["vocab"][id : id + 1] != [piece]:
            found = fields["vocab"][id] if id < len(fields["vocab"]) else "nothing"
            raise UserError(
                f"{path}: piece {id} is {piece!r}, and in tokenizer.json beside it {found!r}. So one text would get "
                "two lists of ids. Take both files from one model, or remove one."
            )
        fields["scores"][id] = score
        if fields["kinds"][id] == NORMAL:
            fields["kinds"][id] = kind
    fields["space_before_space"] = True  # as sentencepiece does it
    fields["original_files"][path.name] = data


def _from_ranks(path: Path, data: bytes) -> Fields:
    """Llama-3's tokens as Meta lists them: one a line, its bytes in base64 and its rank. The special ones come last."""
    try:
        lines = [line.split() for line in data.splitlines()]
        tokens = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise UserError(
            f"{path}: a line is not a token in base64 and a number ({error}). Copy the file again."
        ) from error
    if sorted(tokens) != list(range(LLAMA3_RANKS)) or len(set(tokens.values())) != LLAMA3_RANKS:
        raise UserError(
            f"{path}: {len(set(tokens.values()))} different tokens, and Llama-3 has {LLAMA3_RANKS}. Another number "
            "means another split rule and other special tokens. Use a model with a tokenizer.json."
        )
    vocab = ["".join(LETTERS[byte] for byte in tokens[rank]) for rank in range(LLAMA3_RANKS)]
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    return {
        "pre": "llama-bpe",
        "vocab": vocab + special,
        "kinds": [NORMAL] * len(vocab) + [CONTROL] * len(special),
        "merges": [],
        "bos_id": len(vocab),
        "eos_id": len(vocab) + 1,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading GGUF


def read_gguf_metadata(metadata: dict[str, Any], path: Path) -> Fields:
    """The vocabulary that the metadata of a GGUF file describes."""

    def get(name: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}")

    is_sentencepiece = get("model") == "llama"
    pre = SENTENCEPIECE if is_sentencepiece else get("pre")
    if get("model") not in ("gpt2", "llama") or pre not in (SENTENCEPIECE, *SPLIT_RULES):
        raise UserError(
            f"{path}: the tokenizer's model is {get('model')!r} and its split rule {get('pre')!r}. They decide which "
            "ids a text gets. Use a file with the model 'llama' (sentencepiece), or with 'gpt2' (byte-level BPE) and "
            f"one of {', '.join(SPLIT_RULES)}."
        )
    needed = "scores" if is_sentencepiece else "merges"
    if not get("tokens") or get(needed) is None:
        raise UserError(f"{path}: there are no tokens or no {needed}. BPE needs both. Use the file of a whole model.")
    unsaid = {"bos": 1, "eos": 2, "unknown": 0} if is_sentencepiece else {}
    named = zip(NAMED_TOKENS, ("bos", "eos", "padding", "unknown"), strict=True)
    ids = {f"{ours}_id": get(f"{theirs}_token_id") for ours, theirs in named}
    ids |= {f"{ours}_id": unsaid.get(ours) for ours in NAMED_TOKENS if ids[f"{ours}_id"] is None}
    if is_sentencepiece and ids["unk_id"] is None:
        ids["unk_id"] = 0
    fields = {
        "pre": pre,
        "vocab": list(get("tokens")),
        "kinds": list(get("token_type") or [NORMAL] * len(get("tokens"))),
        "merges": [] if is_sentencepiece else list(get("merges")),
        **ids,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    add_bos = get("add_bos_token")
    if is_sentencepiece:
        fields["scores"] = list(get("scores"))
        fields["space_before"] = "never" if get("add_space_prefix") is False else "every"
        fields["add_bos"] = add_bos is not False
    else:
        fields["add_bos"] = SPLIT_RULES[pre].add_bos if add_bos is None else add_bos
    return _checked(path, fields)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold, wherever it comes from


def _checked(path: Path, fields: Fields) -> Fields:
    """The fields, unless the parts do not fit together."""
    vocab, kinds, known = fields["vocab"], fields["kinds"], set(fields["vocab"])
    if len(kinds) != len(vocab) or len(known) != len(vocab):
        raise UserError(
            f"{path}: {len(vocab)} tokens, {len(known)} different ones, {len(kinds)} token types. The three must be "
            "equal, or a token has two ids. The file is damaged: copy it again."
        )
    for name in NAMED_TOKENS:
        id = fields[f"{name}_id"]
        if id is not None and not 0 <= id < len(vocab):
            raise UserError(f"{path}: the {name} token has id {id} of {len(vocab)} tokens. Correct the id.")
    # Some files call their markers words. But then a user's text could end its own turn.
    named = {fields[f"{name}_id"] for name in NAMED_TOKENS}
    for id, kind in enumerate(kinds):
        if kind == USER_DEFINED and (id in named or MARKER.fullmatch(vocab[id])):
            kinds[id] = CONTROL
    if fields["pre"] != SENTENCEPIECE:
        _check_merges(path, fields)
        return fields
    if len(fields["scores"]) != len(vocab):
        raise UserError(f"{path}: {len(vocab)} tokens and {len(fields['scores'])} scores. Copy the file again.")
    byte_tokens = {vocab[id] for id, kind in enumerate(kinds) if kind == BYTE}
    if byte_tokens != set(BYTE_PIECES) or kinds.count(UNKNOWN) > 1 or not {UNKNOWN, CONTROL} & set(kinds):
        raise UserError(
            f"{path}: {len(byte_tokens)} tokens of single bytes, {kinds.count(UNKNOWN)} unknown tokens. A "
            "sentencepiece vocabulary of a Llama has 256, <0x00> to <0xFF>, and one. Without them characters would be "
            "lost. Use another model."
        )
    return fields


def _check_merges(path: Path, fields: Fields) -> None:
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


def write_folder(vocabulary: Vocabulary, folder: Path, chat_template: str | None) -> None:
    """The files that transformers' AutoTokenizer, llama.cpp and `read_folder` read.

    A file that was read is written again byte by byte. The chat template stands in two places, because some readers
    know only the one and some only the other.
    """
    ids = {f"{name}_token": getattr(vocabulary, f"{name}_id") for name in NAMED_TOKENS}
    named = {name: vocabulary.vocab[id] for name, id in ids.items() if id is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "clean_up_tokenization_spaces": False,
        **named,
    }
    if chat_template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # one from an earlier save would be taken for ours
    else:
        config["chat_template"] = chat_template
        write_text(folder / "chat_template.jinja", chat_template)
    # tokenizer.json cannot say all that tokenizer.model says, and llama.cpp's own converter wants the latter. It says
    # that texts which begin with a space get one more, so it must not stand beside a tokenizer.json that does not.
    files = dict(vocabulary.original_files)
    if vocabulary.is_sentencepiece:
        config["legacy"] = vocabulary.space_before == "every"
        if vocabulary.space_before_space and UNKNOWN in vocabulary.kinds:
            in_front = vocabulary.space_before != "never"
            files.setdefault("tokenizer.model", write_model(vocabulary, vocabulary.kinds, in_front))
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _dump(_tokenizer_json(vocabulary)).encode()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    for name, data in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(data)
    write_text(folder / "tokenizer_config.json", _dump(config))
    write_text(folder / "special_tokens_map.json", _dump(named))


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
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
