"""From a row of data to the messages and tools of a chat, with the names that templates use, checked.

Files call things by other names, keep objects as JSON texts, and have faults. What no template should get is an error
here, in words about the row; the caller adds where the row stands. Read next: prompts.py, which encodes the messages.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .chat_template import Messages
from .cli import UserError

SAME_ROLE = {"human": "user", "gpt": "assistant"}  # names in data files -> names in templates
DEFAULT_NAMES = {"role": "role", "content": "content"}


def messages_of(
    row: dict[str, Any], field: str, names: Mapping[str, str], roles: Mapping[str, Sequence[str]]
) -> Messages:
    """The messages of a row.

    Args:
        field: the column that has them.
        names: what templates call a field of a message -> what the file calls it.
        roles: the same for roles, with all the names that the file has for one; empty: the usual ones.
    """
    given = row.get(field)
    if not isinstance(given, list) or not given:
        raise UserError(
            f"{field} is {show(given)}, not a list of messages. A chat template needs role and content of each. "
            "Correct the row, or name the right column with field_messages."
        )
    names = DEFAULT_NAMES | names
    role_of = {theirs: ours for ours, all_theirs in roles.items() for theirs in all_theirs} or SAME_ROLE
    messages = []
    for number, message in enumerate(given, start=1):
        where = f"message {number}: "
        if not isinstance(message, dict):
            raise UserError(f"message {number} is {show(message)}, without role and content. Make it an object.")
        message = {**message, **{ours: message.get(theirs) for ours, theirs in names.items()}}
        role = text_of(message, "role", where, called=names["role"])
        message["role"] = role_of.get(role, role)
        calls = message.get("tool_calls")
        if calls:
            message["tool_calls"] = _calls(calls, where)
        if not (calls and message["content"] is None):
            may_be_empty = calls or message["role"] == "system"  # an empty one switches off a template's default one
            text_of(message, "content", where, called=names["content"], empty=bool(may_be_empty))
        messages.append(message)
    return messages


def tools_of(row: dict[str, Any], field: str) -> list[Any] | None:
    """The tools of a row; a text is taken for JSON, as tables cannot hold objects of many shapes."""
    tools = row.get(field)
    if isinstance(tools, str):
        tools = _parsed(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{field} is {show(tools)}, not a list of tools. Correct the row.")
    return tools or None


def check_order(roles: list[str]) -> None:
    """System first, question and answer in turn, tools after who called them; other roles as they like."""
    for number, (before, role) in enumerate(pairwise(roles), start=2):
        what = ""
        if role == "system":
            what = "a system message stands at the beginning"
        elif role == before and role in ("user", "assistant"):
            what = "questions and answers take turns"
        elif role == "tool" and before not in ("assistant", "tool"):
            what = "a tool answers the assistant that called it"
        if what:
            raise UserError(
                f"message {number}: the role {role} behind {before}, but {what}. A model trained on another order "
                "learns to talk out of turn. Correct the row, join the two messages, or map the names with roles."
            )


def _parsed(text: str) -> Any:
    """What a text says as JSON; the text itself if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls whose arguments are objects; many files have them as texts, which templates would quote once more."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}tool_calls is {show(calls)}, not a list of calls. Correct the row.")
    parsed = []
    for call in calls:
        inner = call.get("function") if isinstance(call.get("function"), dict) else call
        if isinstance(inner.get("arguments"), str):
            inner = {**inner, "arguments": _parsed(inner["arguments"])}
        parsed.append({**call, "function": inner} if "function" in call else inner)
    return parsed


def say(*turns: str) -> Messages:
    """Messages from role, content, role, content, ..."""
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


def text_of(row: dict[str, Any], key: str, where: str = "", called: str = "", empty: bool = False) -> str:
    """A text of a row, checked."""
    text = row.get(key)
    if not isinstance(text, str) or not (text.strip() or empty):
        raise UserError(
            f"{where}{called or key} is {show(text)}, and it must be a text that is not empty: it becomes tokens. "
            "Correct the row or take it out."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}{called or key} holds half of a surrogate pair, which is no character and has no UTF-8 bytes. "
            "Correct the row or take it out."
        ) from error
    return text


def show(value: Any) -> str:
    """A value in a message: its type and its beginning."""
    return "missing" if value is None else f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"
