"""Conversations that llama.cpp is asked for the prompt of: fixed ones, and those of the run's own data."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

from ..config.errors import UserError
from ..config.schema import Config
from ..data.prompts import PromptFormat
from ..data.rows import read_rows
from ..run.inputs import data_files, prompt_format_of
from ..tokenizer.chat_template import Messages
from ..tokenizer.tokenizer import Tokenizer
from .tokenizer_metadata import ASKED

Chat = tuple[str, Messages, list[Any] | None]  # its name, its messages, its tools
CHATS: list[Chat] = [
    (c["name"], c["messages"], ASKED["tools"] * c["with_tools"] or None) for c in ASKED["conversations"]
]
NUM_ROWS = 8  # of the run's data, whose conversations are asked


def conversations(tok: Tokenizer, fmt: PromptFormat, config: Config | None, not_asked: list[str]) -> list[Chat]:
    """Those that are to be asked: all of which training's own prompt holds every part; the others go to `not_asked`."""
    asked, skipped = list[Chat](), dict[str, list[str]]()
    for name, messages, tools in [*CHATS, *chats_of_run(tok, fmt, config, not_asked)]:
        why = _why_not(tok, fmt, messages, tools)
        if why is None:
            asked.append((name, messages, tools))
        else:
            skipped.setdefault(why, []).append(name)
    not_asked += [f"{', '.join(names)} ({why})" for why, names in skipped.items()]
    return asked


def _why_not(tok: Tokenizer, fmt: PromptFormat, messages: Messages, tools: list[Any] | None) -> str | None:
    try:
        text = fmt.render(tok, messages, True, tools)
    except UserError:
        return "training's own template refuses it"
    parts = [message["content"].split("</think>")[-1].strip() for message in messages if message.get("content")]
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    parts += [each["function"]["name"] for each in [*calls, *(tools or [])] if "function" in each]
    if not all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in parts):
        return "training's prompt leaves a part of it out"
    if any(token in part for part in parts for token in tok.special_tokens):
        return "its text holds special tokens, which llama.cpp reads as such"
    return None


def chats_of_run(tok: Tokenizer, used: PromptFormat, config: Config | None, not_asked: list[str]) -> Iterator[Chat]:
    """The first conversations of the run's held-out data, or of what it trained on, up to their last answer."""
    if config is None or used.type != "chat_template":
        return
    dataset = (config.test_datasets or config.datasets)[0]
    try:
        fmt = prompt_format_of(config, dataset, tok)
        if fmt.jinja(tok) != used.jinja(tok):
            raise UserError("it has a chat template of its own")
        for where, row in islice(read_rows(data_files(dataset)), NUM_ROWS):
            yield where, *fmt.last_question(row)
    except UserError as error:
        not_asked.append(f"conversations of {dataset.path} ({error})")


def as_sent(messages: Messages) -> Messages:
    """Messages as programs send them to a server: the arguments of a call are a JSON text."""

    def with_text(call: dict[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        text = json.dumps(function.get("arguments", {}), ensure_ascii=False)
        return {"type": "function", **call, "function": {**function, "arguments": text}}

    return [m | {"tool_calls": [*map(with_text, m["tool_calls"])]} if m.get("tool_calls") else m for m in messages]
