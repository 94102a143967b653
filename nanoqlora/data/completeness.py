"""Whether the text of a chat template is complete: holds all that is in the row.

A template may leave out what it does not know: tools, calls, system messages, the thinking before an answer. Then a
model would learn to answer what it never read, and the run would look right. So every content, call and tool is looked
for in the text. What is missing is an error; what a template cuts, or may leave out, is noted.
"""

import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from ..config.errors import UserError
from .masks import Spans
from .messages import OWN_KEYS, Chat, Note, plain

NOT_LEARNT = "is neither read nor learnt; chat_template_jinja can name a template that writes it"
HEADER = len("<think>\n\n")
SHORT = 24  # characters at either end of a text that show that a part of it was written


def check_complete(
    text: str, spans: Spans, chat: Chat, without_tools: Callable[[], str | None], keys: frozenset[str], note: Note
) -> None:
    """Look for all text of the messages and tools.

    Args:
        text: what the template wrote of them.
        spans: for some messages the characters of the text that are theirs; else all of it is searched.
        without_tools: writes the same without the tools; None where the template refuses that.
        keys: of messages, that the template reads beside role and content.
        note: called with what the template cuts.
    Raises:
        UserError: a call, the tools, or what a message says is not in the text at all.
    """
    missing: list[str] = []
    edges = [0, *(edge for span in sorted(spans.values()) for edge in span), len(text)]
    others = "".join(text[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True))  # what no span has
    for i, message in enumerate(chat.messages):
        before = max((end for j, (_, end) in spans.items() if j < i), default=0)
        behind = min((begin for j, (begin, _) in spans.items() if j > i), default=len(text))
        if i in spans:
            part = text[slice(*spans[i])]
        elif message["role"] == "tool":  # which no template moves elsewhere
            part = text[before:behind]
        else:
            part = others
        for call in message.get("tool_calls") or []:
            function = call["function"] if isinstance(call.get("function"), dict) else call
            pieces = _leaves([function.get("name"), function.get("arguments")])
            missing += [f"tool_calls ({piece!r})" for piece in pieces if not _holds(part, piece)][:1]
        header = text[: spans[i][0]][-HEADER:] if i in spans else ""  # it may hold how the answer begins
        missing += _missing_content(message, header + part, note)
        for key in sorted(message.keys() - OWN_KEYS & keys):
            if isinstance(message[key], str) and not _holds(text, message[key]):
                note(f"the chat template cuts the key {key} of messages, which {NOT_LEARNT}")
    if chat.tools:
        missing += _missing_tools(chat.tools, text, without_tools, note)
    if missing:
        advice = "Name one that writes them with chat_template or chat_template_jinja, or edit the row"
        raise UserError(f"the chat template leaves out {' and '.join(dict.fromkeys(missing))}. {advice}.")


def _missing_content(message: dict[str, Any], part: str, note: Note) -> Iterator[str]:
    role, content = message["role"], message.get("content")
    for piece in _leaves(content) if isinstance(content, dict) else [plain(content)]:
        if _holds(part, piece):
            continue
        if any(_holds(part, some) for some in _parts(piece)):
            thinks = "</think>" in piece and _holds(part, piece.rpartition("</think>")[2])
            what = "the thinking up to </think>" if thinks else "a part"
            note(f"the chat template cuts {what} of what the {role} says, which {NOT_LEARNT}")
        elif role == "system":
            note(f"the chat template leaves out the system message, which {NOT_LEARNT}")
        else:
            yield f"what the {role} says ({piece.strip()[:40]!r})"


def _missing_tools(tools: list[Any], text: str, without_tools: Callable[[], str | None], note: Note) -> list[str]:
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    if without_tools() == text or any(not _holds(text, function.get("name") or "") for function in functions):
        return ["tools"]
    if not all(_holds(text, piece) for piece in _described(functions)):
        note("the chat template leaves out a part of the tools")
    return []


def _described(value: Any, is_named: bool = False) -> list[str]:
    """Names, descriptions and choices of tools and of their parameters: what every way to write them has."""
    if isinstance(value, dict):
        inner = [_described(item, key == "properties") for key, item in value.items() if key != "type"]
        return [*(value if is_named else ()), *chain.from_iterable(inner)]
    if isinstance(value, list | tuple):
        return [piece for item in value for piece in _described(item)]
    return [value] if isinstance(value, str) else []


def _leaves(value: Any) -> list[Any]:
    """Texts, numbers and keys of a value, however deep."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *_leaves(item))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [value]


def _holds(text: str, piece: Any) -> bool:
    """Whether a text has this in it, as it is, as JSON or as Python writes it; white space may differ."""
    if not isinstance(piece, str):
        return json.dumps(piece, default=str) in text or str(piece) in text
    piece = piece.strip()
    if piece in text:
        return True
    spelled = (json.dumps(piece), json.dumps(piece, ensure_ascii=False), repr(piece))
    return any(some[1:-1] in text for some in spelled) or " ".join(piece.split()) in " ".join(text.split())


def _parts(piece: str) -> list[str]:
    """Stretches of a text that may be left of it."""
    lines = [line for line in re.split(r"\n|<[^<>]*>", piece) if line.strip()]
    stripped = piece.strip()
    return [*lines, stripped[:SHORT], stripped[-SHORT:]]
