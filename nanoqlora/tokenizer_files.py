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

from .byte_pairs import LETTERS, SPLIT_RULES
from .cli import UserError, read_json, whole_file, write_text
from .sentencepieces import BYTE_PIECES, UNREACHED, read_model, write_model
from .tokenizer_json import adds_bos, check_merges, read_tokenizer_json, write_tokenizer_json
from .vocabulary import (
    BYTE,
    CONTROL,
    MARKER,
    NAMED_TOKENS,
    NORMAL,
    SENTENCEPIECE,
    UNKNOWN,
    USER_DEFINED,
    Fields,
    Vocabulary,
)

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
        fields = read_tokenizer_json(path, data)
        if fields["pre"] == SENTENCEPIECE and model_path.is_file():
            _take_scores(fields, model_path)
        is_added = adds_bos(data)
    else:
        config = read_json(config_path) if config_path.is_file() else {}
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
    fields["chat_template"] = template = _chat_template(folder, config)
    if not isinstance(template, str | None):
        raise UserError(f"{config_path}: chat_template is a JSON {type(template).__name__}, not a text. Correct it.")
    return _checked(path if path.is_file() else model_path, fields)


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
# tokenizer.model


def _from_model(path: Path, data: bytes, folder: Path, config: dict[str, Any]) -> Fields:
    """A sentencepiece model alone, with the tokens that were added to it."""
    fields = {"pre": SENTENCEPIECE, "merges": [], "original_files": {path.name: data}} | read_model(data, path)
    in_front = fields.pop("space_in_front") and config.get("add_prefix_space") is not False
    fields["space_before"] = ("every" if config.get("legacy") else "first") if in_front else "never"
    file = folder / "added_tokens.json"
    added = {id: {"content": text} for text, id in (read_json(file) if file.is_file() else {}).items()}
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
    if not is_sentencepiece and (get("model") != "gpt2" or pre not in SPLIT_RULES):
        raise UserError(
            f"{path}: the tokenizer's model is {get('model')!r} and its split rule {get('pre')!r}. They decide which "
            "ids a text gets. Use a file with the model 'llama' (sentencepiece), or with 'gpt2' (byte-level BPE) and "
            f"one of {', '.join(SPLIT_RULES)}."
        )
    for needed in ("tokens", "token_type", "scores" if is_sentencepiece else "merges"):
        if not get(needed):
            raise UserError(
                f"{path}: there is no tokenizer.ggml.{needed}. Without it text gets other ids, or special tokens are "
                "taken for words. Use the file of a whole model, written by a llama.cpp of 2024 or later."
            )
    # What llama.cpp takes for the named tokens of a sentencepiece vocabulary where the file does not say.
    unsaid = {"bos": 1, "eos": 2, "unk": 0} if is_sentencepiece else {}
    named = zip(NAMED_TOKENS, ("bos", "eos", "padding", "unknown"), strict=True)
    said = {ours: get(f"{theirs}_token_id") for ours, theirs in named}
    ids = {f"{name}_id": unsaid.get(name) if id is None else id for name, id in said.items()}
    fields = {
        "pre": pre,
        "vocab": list(get("tokens")),
        "kinds": list(get("token_type")),
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
        check_merges(path, fields)
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
        files["tokenizer.json"] = _dump(write_tokenizer_json(vocabulary)).encode()
    (folder / "tokenizer.model").unlink(missing_ok=True)
    for name, data in files.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(data)
    write_text(folder / "tokenizer_config.json", _dump(config))
    write_text(folder / "special_tokens_map.json", _dump(named))


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"
