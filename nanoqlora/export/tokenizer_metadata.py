"""The vocabulary and the chat template of a model, as the metadata of a GGUF file.

llama.cpp runs the Jinja that stands there. Ollama prefers a template in the language of Go's text/template, from the
Modelfile: `go_template.py`.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from ..config.errors import UserError
from ..data.messages import say
from ..data.prompts import PromptFormat
from ..gguf.container import Metadata
from ..tokenizer.byte_pairs import merges_of
from ..tokenizer.chat_template import Messages
from ..tokenizer.sentencepieces import UNREACHED
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.vocabulary import UNUSED

ASKED = json.loads(files(__package__).joinpath("asked.json").read_text("utf-8"))  # texts to try
PROBES = [say(*turns) for turns in ASKED["probes"]]  # conversations of each kind that a template writes
STOPS_BY_NAME = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "</s>")


# llama.cpp gives templates these, with today's date; training does not, and Llama-3.1's then writes a date of its own.
GIVEN_BY_SERVERS = ("date_string", "datetime")


def tokenizer_metadata(
    tok: Tokenizer, fmt: PromptFormat, num_rows: int, model: Path, ends: Sequence[int] = ()
) -> Metadata:
    """The vocabulary, the end tokens, and the template of the training format, as a GGUF file spells them.

    Args:
        num_rows: of the embedding. llama.cpp wants exactly as many tokens.
        ends: tokens that end an answer besides the one that training ended answers with.
    Raises:
        UserError: the file could not say how the model was trained.
    """
    pieces, kinds, padding = list(tok.vocab), list(tok.kinds), num_rows - len(tok.vocab)
    if padding < 0:
        raise UserError(f"{model}: {len(pieces)} tokens and the embedding {num_rows} rows. Take both from one model.")
    pieces += [f"[PAD{id}]" for id in range(len(pieces), num_rows)]
    end = end_of_answer(tok, fmt, model)
    puts_spaces, lead = spaces(tok, fmt)
    # As an expression, because Jinja drops spaces in front of a block.
    jinja = (lead and f"{{{{ {lead!r} }}}}") + (fmt.jinja(tok) or jinja_of_text(fmt, tok))
    for name in GIVEN_BY_SERVERS:
        if name in jinja:
            jinja = f"{{% set {name} = not_given %}}{jinja}"
    for text in (jinja, *(fmt.render(tok, chat) for chat in probes(partial(fmt.render, tok)))):
        if half := re.search("[\ud800-\udfff]", text):
            raise UserError(f"{model}: {half[0]!a} is half of a surrogate pair, no character. Correct chat_template.")
    others = unnamed_ends(tok, [id for id in ends if id != end])
    bos = end if tok.bos_id is None else tok.bos_id  # no token cannot be said: llama.cpp would take token 11
    jinja = _set_names(tok, {"bos_token": tok.vocab[bos], "eos_token": tok.vocab[end]}, jinja) + jinja
    is_llama = tok.is_sentencepiece
    own: Metadata = {"model": ("string", "llama" if is_llama else "gpt2"), "pre": ("string", tok.pre)}
    own |= {"tokens": ("string[]", pieces), "token_type": ("i32[]", kinds + [UNUSED] * padding)}
    scores = ("f32[]", tok.scores + [UNREACHED] * (num_rows - len(tok.scores)))
    own |= {"scores": scores} if is_llama else {"merges": ("string[]", merges_of(tok))}
    # Without these llama.cpp takes token 11 for both, or the first marker that it happens to find.
    own |= {"bos_token_id": ("u32", bos), "eos_token_id": ("u32", end)}
    own |= {"eot_token_id": ("u32", others[1] if len(others) > 1 else end)}
    own |= {"eom_token_id": ("u32", others[0])} if others else {}
    own |= {"add_bos_token": ("bool", fmt.add_bos(tok)), "add_eos_token": ("bool", False)}
    own |= {"add_space_prefix": ("bool", puts_spaces)}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in own.items()}
    metadata["tokenizer.chat_template"] = ("string", jinja)
    for name, id in {"padding": tok.pad_id, "unknown": tok.unk_id}.items():
        if id is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = ("u32", id)
    return metadata


def end_of_answer(tok: Tokenizer, fmt: PromptFormat, model: str | Path = "model") -> int:
    """The token that ends an answer in training."""
    if (end := fmt.end_id(tok)) is not None or (end := tok.eos_id) is not None:
        return end
    raise UserError(f"{model}: no file names the token at which answers end. Set eos_token in tokenizer_config.json.")


def without_bos(tok: Tokenizer, fmt: PromptFormat, text: str) -> str:
    """A prompt without the BOS that the tokenizer will add."""
    return text.removeprefix(tok.vocab[tok.bos_id]) if fmt.add_bos(tok) and tok.bos_id is not None else text


def _set_names(tok: Tokenizer, served: dict[str, str], jinja: str) -> str:
    """Jinja in front of a template that gives named tokens the texts that they had in training.

    Args:
        served: what llama.cpp gives to a template; other names are empty there.
    """
    trained = {name: tok.named_texts.get(name, "") for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return "".join(
        f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n"  # Jinja drops a line break behind a block
        for name, text in trained.items()
        if name in jinja and text != served.get(name, "")
    )


def unnamed_ends(tok: Tokenizer, ends: Sequence[int]) -> list[int]:
    """Those tokens that end an answer in llama.cpp only if a file names them: besides eos it can name two, eom and eot.

    At tokens with the usual names it ends in any case.
    """
    return [id for id in ends if id < len(tok.vocab) and tok.vocab[id] not in STOPS_BY_NAME]


def spaces(tok: Tokenizer, fmt: PromptFormat) -> tuple[bool, str]:
    """What gives prompts the ids in llama.cpp that they had in training, as to sentencepiece's space in front of text.

    llama.cpp puts one in front of every stretch of text between special tokens, or of none. A tokenizer that does so
    only at the beginning has the same ids either way, as most chats begin with a special token and other prompts hold
    none. If a chat begins with text, its template can write that one space.

    Returns:
        Whether llama.cpp shall put spaces, and the text that goes in front of the template.
    Raises:
        UserError: nothing of this does.
    """
    if not tok.is_sentencepiece:
        return False, ""
    chats = probes(partial(fmt.render, tok))
    for is_wanted, lead in ((True, ""), (False, ""), (False, " ")):
        served = replace(tok, space_before="every" if is_wanted else "never", space_before_space=True)
        if all(served_ids(served, fmt, chat, lead) == fmt.encode_prompt(tok, chat) for chat in chats):
            return is_wanted, lead
    what = "llama.cpp puts a space in front of every stretch of text, or of none, and neither gives the ids of training"
    raise UserError(f"{what}. Use a chat template that begins with the BOS token and has no space behind such tokens.")


def probes(render: Callable[[Messages], str]) -> list[Messages]:
    """Conversations of each kind that a template writes."""
    return [chat for chat in PROBES if takes(render, chat)]


def takes(render: Callable[[Messages], str], messages: Messages) -> bool:
    """Whether a template writes such a conversation: some allow no system message."""
    try:
        return bool(render(messages))
    except UserError:
        return False


def served_ids(tok: Tokenizer, fmt: PromptFormat, messages: Messages, lead: str = "") -> list[int]:
    """The ids of a prompt as llama.cpp makes them: it takes the template's BOS away if the tokenizer adds one.

    Args:
        lead: goes in front of the template.
    """
    text = lead + fmt.render(tok, messages, add_generation_prompt=True)
    return tok.encode(without_bos(tok, fmt, text), bos=fmt.add_bos(tok), special=True)


def jinja_of_text(fmt: PromptFormat, tok: Tokenizer) -> str:
    """Jinja for a format that has none: its text before and behind the last message, alpaca's for example."""
    words = [json.dumps(text, ensure_ascii=False) for text in fmt.render(tok, say("user", "\0")).split("\0")]
    # As an expression, because Jinja drops a line break at the very end of a template, where alpaca has one.
    return "{{ " + " + messages[-1]['content'] + ".join(words) + " }}"
