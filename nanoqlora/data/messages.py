"""From a row of data to the messages and tools of a chat, with the names that templates use, checked.

Files use other names, hold objects as JSON texts, and have faults. What a template should not get is an error here, in
terms of the row; the caller adds the place of the row. What is not read is noted. Read next: prompts.py, which encodes
the messages, and completeness.py, which looks for all of them in the text.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from ..config.errors import UserError
from ..config.files import unique_keys
from ..tokenizer.chat_template import Messages, Tools
from .row_format import TEMPLATES, USUAL_ROLES, RowFormat

Row = dict[str, Any]
Note = Callable[[str], object]

ROLE_SEEN = "role: "  # a note that begins so names the role of a message
UNKNOWN_ROLE = "the role"  # an error that begins so is of a role
# Read by us, or a number that means nothing outside of its row.
OWN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "weight", "train"}
FLAGS = {None: None, 0: False, 1: True, "0": False, "1": True, "false": False, "true": True}  # of a message, as written
CALLS = {"tool_calls", "function_call"}
SCHEMAS = ("parameters", "input_schema")  # of a tool: where its parameters are described
# Common names of columns, keys and roles, for the advice in an error.
LIKELY = json.loads((TEMPLATES / "likely_names.json").read_text("utf-8"))


@dataclass
class Chat:
    """A conversation as templates take it, and which of its messages are supervised."""

    messages: Messages
    trained: list[bool]
    tools: Tools = None


def chat_of(row: Row, form: RowFormat, note: Note, read_by_template: Iterable[str] = ()) -> Chat:
    """The conversation of a row.

    Args:
        form: names of columns, keys and roles.
        note: called with what the user should know of this row; see `PromptFormat.encode_row`.
        read_by_template: keys of messages that the template reads beside the usual ones.
    Raises:
        UserError: it is not a conversation.
    """
    given, num_prompt, columns = _given(row, form)
    _check_roles(given, form, note)
    tool_column, tools = form.field_tools, _parsed(row.get(form.field_tools))
    functions = _parsed(row.get("functions"))  # in OpenAI's older files
    if not tools and isinstance(functions, list) and all(isinstance(f, dict) and "name" in f for f in functions):
        tool_column, tools = "functions", [{"type": "function", "function": function} for function in functions]
    tools = _listed([tools] if isinstance(tools, dict) else tools, tool_column, SCHEMAS)
    chat = Chat([], [], tools or None)
    for number, message in enumerate(given, start=1):
        if not isinstance(message, dict):
            raise UserError(f"message {number} is {show(message)}, without role and content. Make it an object.")
        message, is_trained = _message(message, form, f"message {number}: ", note, {*OWN_KEYS, *read_by_template})
        chat.messages.append(message)
        chat.trained.append(is_trained and number > num_prompt)
    system = row.get(form.field_system) if form.field_system else None
    if isinstance(system, str) and system and chat.messages[0]["role"] != "system":
        chat.messages.insert(0, {"role": "system", "content": text_of(row, form.field_system)})
        chat.trained.insert(0, "system" in form.roles_to_train)
        columns = {*columns, form.field_system}
    note_unread(row, {*columns, form.field_tools, tool_column}, note)
    return chat


def _check_roles(given: list[Any], form: RowFormat, note: Note) -> None:
    found = [message.get(form.names["role"]) for message in given if isinstance(message, dict)]
    roles = [role for role in found if isinstance(role, str) and role.strip()]  # `_message` refuses the others
    for role in roles:
        note(ROLE_SEEN + role)
    if unknown := [role for role in dict.fromkeys(roles) if role not in form.role_of]:
        likely = USUAL_ROLES | {theirs: ours for ours, names in LIKELY["roles"].items() for theirs in names}
        meant: dict[str, list[str]] = {}
        for role in unknown:
            alike = get_close_matches(role.lower(), likely, 1)
            meant.setdefault(likely[alike[0]] if alike else "assistant", []).append(role)
        advice = ", ".join(f"{ours}: [{', '.join(theirs)}]" for ours, theirs in meant.items())
        subject = f"s {' and '.join(unknown)} are" if len(unknown) > 1 else f" {unknown[0]} is"
        what = f"{UNKNOWN_ROLE}{subject} unknown; known are {', '.join(form.role_of)}. Write what is meant, as in"
        or_own = f"or {{{unknown[0]}: [{unknown[0]}]}} where the chat template knows that name."
        raise UserError(f"{what} roles: {{{advice}}}, {or_own}")


def _given(row: Row, form: RowFormat) -> tuple[list[Any], int, set[str]]:
    """The messages of a row as they are, how many of the first are only a prompt, and their columns."""
    if form.field_instruction:
        require((form.field_instruction, form.field_output), row, form)
        question = text_of(row, form.field_instruction)
        answer = text_of(row, form.field_output, empty=True)
        names = form.names["role"], form.names["content"]
        messages = [dict(zip(names, turn, strict=True)) for turn in (("user", question), ("assistant", answer))]
        return messages, 0, {form.field_instruction, form.field_output}
    if form.field_messages not in row:  # trl's pairs of messages
        prompt, completion = _parsed(row.get("prompt")), _parsed(row.get("completion"))
        if isinstance(prompt, list) and isinstance(completion, list) and completion:
            return [*map(_parsed, (*prompt, *completion))], len(prompt), {"prompt", "completion"}
    require((form.field_messages,), row, form)
    given = _parsed(row[form.field_messages])
    if not isinstance(given, list) or not given:
        found = f"{form.field_messages} is {show(given)}, not a list of messages"
        raise UserError(f"{found}. Correct the row, or name the right column with field_messages.")
    return [*map(_parsed, given)], 0, {form.field_messages}


def _message(given: Row, form: RowFormat, where: str, note: Note, known: set[str]) -> tuple[Row, bool]:
    """A message as templates take it, and whether it is supervised, by its keys and its role."""
    names, theirs = form.names, set(form.names.values())
    message = {key: value for key, value in given.items() if key not in theirs}
    message |= {ours: given[name] for ours, name in names.items() if given.get(name) is not None}
    others = [] if given.keys() & CALLS else [key for key in given if key not in ("role", "content")]
    for part in ("role", "content"):
        if part not in message and (other := _like(others, part)):
            raise UserError(f"{where}{names[part]} is missing, and there is {other}. {_mapping(given)}")
    named = text_of(message, "role", where, called=names["role"])
    role = message["role"] = form.role_of[named]
    if message.get("function_call") and not message.get("tool_calls"):  # OpenAI's older way to call one
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    # Many files have the arguments as texts, which templates would quote once more.
    calls = _parsed(message.get("tool_calls") or [])
    message["tool_calls"] = calls = _listed(calls, f"{where}tool_calls", ("arguments",))
    if not calls:
        del message["tool_calls"]  # an empty list calls nothing, and some templates ask only whether there is one
    message["content"] = _content(message, role, where, names["content"])
    known = known | theirs | {form.message_field_training}
    for key in [key for key, value in message.items() if key not in known and value not in NOTHING]:
        note(f"the key {key} of messages was not read")
    wanted = named in form.roles_to_train or role in form.roles_to_train
    if form.message_field_training:
        flag = _flag(message, form.message_field_training, where)
        return message, wanted if flag is None else flag
    return message, wanted and False not in [_flag(message, key, where) for key in ("weight", "train")]


def _content(message: Row, role: str, where: str, called: str) -> Any:
    """The content of a message: a text, its text parts, or the object that a tool answered with."""
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None and (calls or role == "tool"):
        return None if calls else ""
    if role == "tool" and isinstance(content, dict):
        return content
    if isinstance(content, list) and content and all(isinstance(part, dict) and "type" in part for part in content):
        for part in content:
            if part["type"] != "text":
                raise UserError(f"{where}{called} has a part of type {part['type']}, and only text can be trained.")
            text_of(part, "text", f"{where}{called}: ", empty=True)
        return content
    # An empty system message switches off a template's own one, and an empty answer is one.
    return text_of(message, "content", where, called=called, empty=bool(calls) or role != "user")


def plain(content: Any) -> str:
    """The text of a content, its parts joined."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")


def _flag(message: Row, key: str, where: str) -> bool | None:
    value = message.get(key)
    try:
        return FLAGS[value.lower() if isinstance(value, str) else value]
    except (KeyError, TypeError):
        advice = "It decides whether the message is supervised: write true or false"
        raise UserError(f"{where}{key} is {show(value)}. {advice}.") from None


# ------------------------------------------------------------------------------------------------ tools


def _listed(given: Any, called: str, fields: tuple[str, ...]) -> list[Row]:
    """Tools or calls with objects in place of JSON texts, as tables cannot hold objects of many shapes.

    Args:
        fields: those that have to be objects.
    """
    if given is None or isinstance(given, str) and not given.strip():
        return []
    items = [_parsed(item) for item in given] if isinstance(given, list) else [given]
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f"{called} is {show(given)}, not a list of objects. Correct the row.")
    return [with_fields(item, fields, lambda text: _parsed(text or "{}")) for item in items]


def with_fields(tool: Row, fields: tuple[str, ...], change: Callable[[Any], Any]) -> Row:
    """A tool or a call in which those fields, or those of its function, are changed."""
    function = _parsed(tool.get("function"))
    if isinstance(function, dict):
        return {**tool, "function": with_fields({k: v for k, v in function.items() if k != "function"}, fields, change)}
    return {key: change(value) if key in fields else value for key, value in tool.items()}


def _parsed(text: Any) -> Any:
    """The object or list that a text holds as JSON; else the value itself."""
    if isinstance(text, str) and text.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(text, object_pairs_hook=unique_keys)
        except UserError:
            raise
        except ValueError:
            return text
    return text


# ------------------------------------------------------------------------------------------------ parts of a row

NOTHING: tuple[Any, ...] = (None, "", [], {})  # empty values of columns and keys


def say(*turns: str) -> Messages:
    """Messages from role, content, role, content, ..."""
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


def note_unread(row: Row, read: set[str], note: Note) -> None:
    """Note the columns of a row that have a value and are not read."""
    for column in row:
        if (column not in read or not column) and row[column] not in NOTHING:
            note(f"the column {column or 'without a name'} was not read")


def text_of(row: Row, key: str, where: str = "", called: str = "", empty: bool = False) -> str:
    """A text of a row, checked."""
    text = row.get(key)
    advice = "Correct the row or remove it."
    if not isinstance(text, str) or not (text.strip() or empty):
        raise UserError(f"{where}{called or key} is {show(text)}, and it must be a text that is not empty. {advice}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = "holds half of a surrogate pair, which is not a character"
        raise UserError(f"{where}{called or key} {found}. {advice}") from error
    return text


def require(columns: Iterable[str], row: Row, form: RowFormat) -> None:
    """Raise a UserError for a column that is missing; it names those that are there, and what to write."""
    column = next((column for column in columns if column not in row), None)
    if column is None:
        return
    lists = {name: found for name, value in row.items() if isinstance(found := _parsed(value), list) and found}
    chats = {name: found[0] for name, found in lists.items() if isinstance(found[0], dict)}
    chats = {name: message for name, message in chats.items() if _like(message, "role") or _like(message, "content")}
    texts = [name for name, value in row.items() if isinstance(value, str) and name not in chats]
    question, answer = _like(texts, "instruction"), _like(texts, "output")
    fields = f"field_instruction: {question}, field_output: {answer}"
    there = ", ".join(repr(name) if name != name.strip() else name for name in row)
    advice = "Name the column in the data set's entry, or correct the row."
    if chats and not (form.type == "chat_template" and "messages" in chats):
        name, message = next(iter(chats.items()))
        advice = f"Write type: chat_template and field_messages: {name}."
        advice += f" {_mapping(message)}" if not {"role", "content"} <= message.keys() else ""
    elif question and answer:
        own = "" if form.type == "chat_template" else f"type: {{{fields}}} with a format of your own, or "
        advice = f"Write {own}{fields} beside type: chat_template."
    elif texts and form.type == "completion":
        advice = f"Write field: {texts[0]}."
    elif len(texts) > 1:
        advice = "Write type: {field_instruction: COLUMN, field_output: COLUMN} with two of them."
    raise UserError(f"{column} is missing: the row has the columns {there or 'none'}. {advice}")


def _mapping(message: Row) -> str:
    """Which keys a message has, and the mapping to write for them."""
    role, content = (_like(message, part) for part in ("role", "content"))
    mapping = f"{{role: {role or 'KEY'}, content: {content or 'KEY'}}}"
    return f"Messages have the keys {', '.join(map(str, message))}: write message_property_mappings: {mapping}."


def _like(names: Iterable[str], part: str) -> str | None:
    """The name that is most likely meant for a part of a row, if one is."""
    by_lower = {str(name).lower(): name for name in reversed([*names])}
    return next((by_lower[name] for name in LIKELY[part] if name in by_lower), None)


def show(value: Any) -> str:
    """A value in a message: its type and its beginning."""
    if isinstance(value, Exception):  # of a cell that Python cannot have
        return f"unreadable ({value})"
    return "missing" if value is None else f"{type(value).__name__} {json.dumps(value, default=str)[:60]}"


@lru_cache
def names_in(template: str) -> frozenset[str]:
    """Every name that a template may read something by."""
    return frozenset(re.findall(r"\w+", template))
