"""Where vocabularies come from and go to: a Hugging Face folder, Meta's tokenizer.model, the metadata of a GGUF file.

    tokenizer.json    Hugging Face's: vocabulary, merges, added tokens, and in what steps text is taken apart
    tokenizer.model   one name for two files: sentencepiece's (Llama-1/2, Mistral), and Meta's list of Llama-3's tokens
    tokenizer_config.json, chat_template.jinja    the named tokens, and how a chat is written

Where both tokenizer.json and sentencepiece's tokenizer.model are there, pieces and scores are the model's. Whatever
would change ids and is not supported is refused. Readers give the fields of a `Vocabulary`.
"""

import base64
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from ..config.errors import UserError, note
from ..config.files import expect, read_json, read_text, whole_file, write_text
from . import tokenizer_json
from .byte_pairs import LETTERS, SPLIT_RULES
from .sentencepieces import BYTE_PIECES, UNREACHED, read_model, write_model
from .vocabulary import BYTE, CONTROL, NAMED_TOKENS, NORMAL, SENTENCEPIECE, UNKNOWN, USER_DEFINED, Fields, Vocabulary

MARKER = re.compile(r"<\|[^\s|]+\|>")  # a token such as <|im_end|> steers the model, whatever its kind in the file
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
        data, config = read_json(path), read_json(config_path)
        fields = tokenizer_json.read(path, data)
        if fields["pre"] == SENTENCEPIECE and model_path.is_file():
            _take_scores(fields, model_path)
    else:
        path, data, config = model_path, {}, read_json(config_path) if config_path.is_file() else {}
        model = model_path.read_bytes()
        is_ranks = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", model)
        fields = _from_ranks(model_path, model) if is_ranks else _from_model(model_path, model, config_path, config)

    config, added = _tokens_in_other_files(folder, config)
    ids = {piece: id for id, piece in enumerate(fields["vocab"])}
    for token in added:
        _add(path, fields, ids, token)
        tokenizer_json.check_normalized(path, data, token)
    for name in NAMED_TOKENS:
        key, own = f"{name}_id", f"{name}_token"
        if own in config and (config[own] is not None or name != "unk"):
            fields[key] = ids.get(config[own])
        elif key not in fields and str(config.get("tokenizer_class")) not in PLAIN_CLASSES:
            fields[key] = ids.get(LLAMAS_NAMES.get(name, "")) if fields["pre"] == SENTENCEPIECE else None
        fields.setdefault(key, None)
    said = expect(f"{config_path}: add_bos_token", config.get("add_bos_token"), bool | None)
    bos, first = fields["bos_id"], tokenizer_json.token_in_front(path, data)
    named = "null" if bos is None else repr(fields["vocab"][bos])
    differs = first is not None and ids.get(first) != bos
    if differs and bos is not None:
        found = f"post_processor puts {first!r} in front of a text, and bos_token is {named}"
        raise UserError(f"{path}: {found}. Only one of them can begin it: correct the other.")
    if differs or data and said not in (None, first is not None):
        puts, result = "nothing" if first is None else repr(first), "no BOS" if None in (bos, first) else "BOS"
        found = f"add_bos_token is {json.dumps(said)}, bos_token {named}, and tokenizer.json puts {puts} in front"
        note(f"{folder}: {found} of a text: {result} is put there, as tokenizer.json and bos_token decide.")
    fields["add_bos"] = bos is not None and (first is not None if data else said is not False)
    fields["chat_template"] = _chat_template(folder, config)
    return _checked(path, fields)


LLAMAS_NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # of transformers' LlamaTokenizer, where no file names any
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
NAMED_KEYS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]  # transformers' order


def _tokens_in_other_files(folder: Path, config: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The tokens in tokenizer_config.json, special_tokens_map.json and added_tokens.json, as transformers reads them.

    Returns:
        tokenizer_config.json, with special_tokens_map.json in it and named tokens as text; and all tokens, in the order
        in which those that are not in the vocabulary get their ids. A token whose id was named has it as "id".
    """
    where, path, config = folder / "tokenizer_config.json", folder / "special_tokens_map.json", dict(config)
    extra, older = "extra_special_tokens", "additional_special_tokens"
    decoder = expect(f"{where}: added_tokens_decoder", config.get("added_tokens_decoder"), dict[str, dict] | None)
    if not config.get(extra) and older in config:
        config[extra] = config.pop(older)
    maps = [config.pop(extra)] if isinstance(config.get(extra), dict) else []
    named = read_json(path) if path.is_file() else {}
    places = dict.fromkeys(named if "added_tokens_decoder" not in config else (), path)  # of what is taken from there
    for key, value in ((key, named[key]) for key in places):
        if key in (extra, older):
            expect(f"{path}: {key}", value, list[str | dict] | dict[str, str | dict] | None)
        if key == extra and isinstance(value, list) and isinstance(config.get(extra), list):
            value = config[extra] + [token for token in value if _text(token) not in map(_text, config[extra])]
        config[key] = value
    maps += [config.pop(extra)] if isinstance(config.get(extra), dict) else []
    if extra not in config and older in config:
        config[extra] = config.pop(older)
    special, specials = partial(tokenizer_json.added_token, special=True), {}
    for key in [*NAMED_KEYS, *config]:
        if key in NAMED_KEYS or key.endswith("_token") and isinstance(config[key], str | dict):
            place = f"{places.get(key, where)}: {key}"
            if expect(place, config.get(key), str | dict | None) is not None:
                specials[key] = special(place, config[key])
                config[key] = specials[key]["content"]
    for tokens in maps:
        specials |= {key: special(f"{where}: {extra}", token) for key, token in tokens.items()}
    several = expect(f"{where}: {extra}", config.get(extra), list[str | dict] | None) or []
    last = [*specials.values(), *(special(f"{where}: {extra}", token) for token in several)]
    unread = {key: _text(named[key]) for key in NAMED_KEYS if key in named and _text(named[key]) != config.get(key)}
    unread |= {older: config[older]} if config.get(older) else {}
    for key, value in unread.items():
        note(f"{folder}: of two files that name {key}, the one with {value!r} is not read, as in transformers.")

    first = []
    if decoder is not None:
        for id, token in decoder.items():
            if not re.fullmatch("[0-9]{1,9}", id):
                raise UserError(f"{where}: added_tokens_decoder has the key {id!r}, and its keys are ids.")
            first.append(tokenizer_json.added_token(f"{where}: added_tokens_decoder", token) | {"id": int(id)})
    elif (path := folder / "added_tokens.json").is_file():
        for text, id in read_json(path, dict[str, int]).items():
            is_special = text in [token["content"] for token in last]
            first.append({"content": text, "special": is_special, "normalized": not is_special, "id": id})
    return config, sorted(first, key=lambda token: token["id"]) + last


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _add(path: Path, fields: Fields, ids: dict[str, int], token: dict[str, Any]) -> None:
    """Add a token to a vocabulary, with the id that the tokenizers package gives to it; or make a piece of it one."""
    vocab, kinds, text = fields["vocab"], fields["kinds"], token["content"]
    id = ids.get(text, len(vocab))
    if token.get("id", id) != id:
        found = f"the added token {text!r} cannot have the id {token['id']}: here it is {id} of {len(vocab)}"
        raise UserError(f"{path}: {found}. Take all files from one model.")
    kind = CONTROL if token["special"] else USER_DEFINED
    if id == len(vocab):
        if "id" not in token:
            note(f"{path}: {text!r}, which a file beside it names, is new to the vocabulary: it gets the id {id}.")
        ids[text] = id
        vocab.append(text)
        kinds.append(kind)
        fields.get("scores", []).append(UNREACHED)
    elif kinds[id] == NORMAL or "id" in token and kinds[id] in (CONTROL, USER_DEFINED) and kinds[id] != kind:
        kinds[id] = kind
    else:
        return
    fields["original_files"].pop("tokenizer.json", None)  # it does not have the token


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder that need not have a vocabulary."""
    path = folder / "tokenizer_config.json"
    return _chat_template(folder, read_json(path) if path.is_file() else {})


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the entry of the config: a text, or a list of named ones."""
    path, where = folder / "chat_template.jinja", f"{folder / 'tokenizer_config.json'}: chat_template"
    if path.is_file():
        return read_text(path, "Copy it again")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(entry.get("name")): entry.get("template") for entry in expect(where, template, list[dict])}
        template = named.get("default")
    return expect(where, template, str | None)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.model


def _from_model(path: Path, data: bytes, config_path: Path, config: dict[str, Any]) -> Fields:
    """A sentencepiece model alone."""
    for key in ("add_prefix_space", "legacy"):
        expect(f"{config_path}: {key}", config.get(key), bool | None)
    fields = {"pre": SENTENCEPIECE, "merges": [], "original_files": {path.name: data}} | read_model(data, path)
    in_front = fields.pop("space_in_front") and config.get("add_prefix_space") is not False
    fields["space_before"] = ("every" if config.get("legacy") else "first") if in_front else "never"
    return fields


def _take_scores(fields: Fields, path: Path) -> None:
    """Put the scores of a sentencepiece model in the place of those that were read off tokenizer.json."""
    data = path.read_bytes()
    model = read_model(data, path)
    for id, (piece, kind, score) in enumerate(zip(model["vocab"], model["kinds"], model["scores"], strict=True)):
        if fields["vocab"][id : id + 1] != [piece]:
            other = "".join(fields["vocab"][id : id + 1])
            found = f"piece {id} is {piece!r}, and in tokenizer.json beside it {other!r}"
            raise UserError(f"{path}: {found}. Take both files from one model, or remove one.")
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
    except ValueError as error:
        raise UserError(f"{path}: a line is not a token in base64 and a number ({error}). Copy it again.") from error
    if sorted(tokens) != list(range(LLAMA3_RANKS)) or len(set(tokens.values())) != LLAMA3_RANKS:
        found = f"{len(set(tokens.values()))} different tokens, and Llama-3 has {LLAMA3_RANKS}"
        raise UserError(f"{path}: {found}. Use a model with a tokenizer.json.")
    vocab = ["".join(LETTERS[byte] for byte in tokens[rank]) for rank in range(LLAMA3_RANKS)]
    special = [f"<|{name}|>" for name in LLAMA3_SPECIAL]
    kinds = [NORMAL] * len(vocab) + [CONTROL] * len(special)
    fields: Fields = {"pre": "llama-bpe", "vocab": vocab + special, "kinds": kinds, "merges": [], "original_files": {}}
    return fields | {"bos_id": len(vocab), "eos_id": len(vocab) + 1}


# ---------------------------------------------------------------------------------------------------------------------
# Reading GGUF


def read_gguf_metadata(metadata: dict[str, Any], path: Path) -> Fields:
    """The vocabulary that the metadata of a GGUF file describes."""

    def get(name: str, kind: Any = Any) -> Any:
        key = f"tokenizer.ggml.{name}"
        return expect(f"{path}: {key}", metadata.get(key), kind if kind is Any else kind | None)

    is_sentencepiece = get("model", str) == "llama"
    pre = SENTENCEPIECE if is_sentencepiece else get("pre", str)
    if not is_sentencepiece and (get("model") != "gpt2" or pre not in SPLIT_RULES):
        found = f"the tokenizer's model is {get('model')!r} and its split rule {get('pre')!r}, which decide the ids"
        known = f"the model 'llama' (sentencepiece), or 'gpt2' with one of {', '.join(SPLIT_RULES)}"
        raise UserError(f"{path}: {found}. Use a file with {known}.")
    for needed in ("tokens", "token_type", "scores" if is_sentencepiece else "merges"):
        if not get(needed):
            advice = "Use the file of a complete model, written by a llama.cpp of 2024 or later"
            raise UserError(f"{path}: there is no tokenizer.ggml.{needed}. {advice}.")
    # The defaults of llama.cpp.
    unsaid = {"bos": 1, "eos": 2, "unk": 0} if is_sentencepiece else {}
    add_bos = get("add_bos_token", bool)
    fields: Fields = {
        "pre": pre,
        "vocab": get("tokens", list[str]),
        "kinds": get("token_type", list[int]),
        "merges": [] if is_sentencepiece else get("merges", list[str]),
        "scores": get("scores", list[float]) if is_sentencepiece else [],
        "space_before": "every" if is_sentencepiece and get("add_space_prefix") is not False else "never",
        "add_bos": (is_sentencepiece or SPLIT_RULES[pre].add_bos) if add_bos is None else add_bos,
        "chat_template": expect(f"{path}: chat_template", metadata.get("tokenizer.chat_template"), str | None),
    }
    for name, theirs in zip(NAMED_TOKENS, ("bos", "eos", "padding", "unknown"), strict=True):
        id = get(f"{theirs}_token_id", int)
        fields[f"{name}_id"] = unsaid.get(name) if id is None else id
    return _checked(path, fields)


# ---------------------------------------------------------------------------------------------------------------------
# What must hold, wherever it comes from


def _checked(path: Path, fields: Fields) -> Fields:
    """The fields, unless the parts do not fit together."""
    vocab, kinds, known = fields["vocab"], fields["kinds"], set(fields["vocab"])
    if len(kinds) != len(vocab) or len(known) != len(vocab):
        found = f"{len(vocab)} tokens, {len(known)} different ones, {len(kinds)} token types"
        raise UserError(f"{path}: {found}. The three must be equal. Copy the file again.")
    if unknown := {*kinds} - {*range(NORMAL, BYTE + 1)}:
        raise UserError(f"{path}: token types {sorted(unknown)[:5]}; known are 1 to {BYTE}. Copy the file again.")
    for name in NAMED_TOKENS:
        id = fields[f"{name}_id"]
        if id is not None and not 0 <= id < len(vocab):
            raise UserError(f"{path}: the {name} token has id {id} of {len(vocab)} tokens. Correct the id.")
    # Some files call their markers ordinary tokens. But then a user's text could end its own turn.
    named = {fields[f"{name}_id"] for name in NAMED_TOKENS}
    for id, kind in enumerate(kinds):
        if kind == USER_DEFINED and (id in named or MARKER.fullmatch(vocab[id])):
            kinds[id] = CONTROL
    if fields["pre"] != SENTENCEPIECE:
        tokenizer_json.check_merges(path, fields)
        return fields
    if len(fields["scores"]) != len(vocab):
        raise UserError(f"{path}: {len(vocab)} tokens and {len(fields['scores'])} scores. Copy the file again.")
    byte_tokens = {vocab[id] for id, kind in enumerate(kinds) if kind == BYTE}
    if byte_tokens != set(BYTE_PIECES) or kinds.count(UNKNOWN) > 1 or not {UNKNOWN, CONTROL} & set(kinds):
        found = f"{len(byte_tokens)} tokens of single bytes, {kinds.count(UNKNOWN)} unknown tokens"
        raise UserError(f"{path}: {found}. A Llama's vocabulary has 256, <0x00> to <0xFF>, and 1. Use another model.")
    return fields


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_folder(vocabulary: Vocabulary, folder: Path, chat_template: str | None) -> None:
    """The files that transformers' AutoTokenizer, llama.cpp and `read_folder` read.

    A file that was read is copied unchanged. The chat template is written to two places, because some readers
    know only the one and some only the other.
    """
    named = vocabulary.named_texts
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": vocabulary.add_bos}
    config |= {"clean_up_tokenization_spaces": False, **named}
    if chat_template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # one from an earlier save would be taken for ours
    else:
        config["chat_template"] = chat_template
        write_text(folder / "chat_template.jinja", chat_template)
    # tokenizer.json cannot hold all of tokenizer.model, and llama.cpp's own converter needs the latter. With it
    # texts that begin with a space get one more, so it must not be beside a tokenizer.json that differs in that.
    files = dict(vocabulary.original_files)
    if vocabulary.is_sentencepiece:
        config["legacy"] = vocabulary.space_before == "every"
        if vocabulary.space_before_space and UNKNOWN in vocabulary.kinds:
            in_front = vocabulary.space_before != "never"
            files.setdefault("tokenizer.model", write_model(vocabulary, vocabulary.kinds, in_front))
    if "tokenizer.json" not in files:
        files["tokenizer.json"] = _dump(tokenizer_json.write(vocabulary)).encode()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    for name, data in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(data)
    write_text(folder / "tokenizer_config.json", _dump(config))
    write_text(folder / "special_tokens_map.json", _dump(named))


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"
