"""Errors that the user can cause, and text that is safe to print."""

import os
import re
from typing import Any

# What a terminal would obey instead of showing: control characters, except tab and line break, and what changes the
# order or the lines of text.
HIDDEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def visible(text: str, but: str = "(?!)") -> str:
    """A text of others, for a terminal: characters that it would obey are shown as escapes, such as \\x1b.

    Args:
        but: what stays as it is, as a regular expression.
    """
    hidden = re.compile(f"({but})|{HIDDEN}")
    return hidden.sub(lambda found: found[1] or found[0].encode("unicode_escape").decode(), text)


KEY = "(?:api_?key|password|secret|auth_token)"
# A password in an address; the value of a key such as comet_api_key, in YAML or on a command line.
SECRET = re.compile(rf"(//[^/\s:@]*:)[^/\s@]+(?=@)|(--\w*{KEY}\s+|{KEY}[\"']?\s*[=:]\s*)[^\s,]+", re.I)


def printable(text: str, but: str = "(?!)") -> str:
    """A text for a terminal or a report: `visible`, and without tokens, keys and passwords of services."""
    for name, value in os.environ.items():
        if name.endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")) and len(value) >= 12:
            text = text.replace(value, "***")
    return visible(SECRET.sub(lambda found: f"{found[1] or found[2]}***", text), but)


class UserError(ValueError):
    """Something the user gave is wrong. The message says where, what was found, why it matters, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(visible(str(message)))


class Failed(Exception):
    """The run cannot continue, though the input was right: a rank is dead, a loss is NaN. The message names what to do.

    everywhere: all ranks fail so, with the same message.
    """

    def __init__(self, message: object, everywhere: bool = False) -> None:
        super().__init__(visible(str(message)))
        self.everywhere = everywhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, of a GPU or of a CPU, where PyTorch and numpy name it in words only."""
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))


class Stopped(Exception):
    """The user asked to stop (Ctrl-C, SIGTERM) and what was done so far is saved."""


KINDS = {str: "text", dict: "a map", list: "a list", int: "a whole number", float: "a number", bool: "true or false"}


def short(value: Any) -> str:
    """A value from a file, in a message."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def expect(where: str, value: Any, *kinds: type | None, each: tuple[type, ...] = ()) -> Any:
    """A value from a file, if it is what the rest of the program takes it for.

    Args:
        where: file and key, for the message.
        kinds: types that it may have, exactly; None allows null.
        each: types of the items of a list, or of the values of a map.
    Raises:
        UserError: it, or an item of it, is of another type.
    """
    wrong = [value] if type(value) not in kinds and (value is not None or None not in kinds) else []
    if each and value and not wrong:
        items = value.values() if isinstance(value, dict) else value
        kinds, wrong = each, [item for item in items if type(item) not in each]
    if wrong:
        found, wanted = short(wrong[0]), " or ".join(KINDS[kind] if kind else "null" for kind in kinds)
        raise UserError(f"{where} is or holds {found}, where {wanted} is expected. Correct it, or copy the file again.")
    return value


_noted: set[str] = set()


def note(text: str) -> None:
    """Print a line that the user should know of, once, however often the same file is opened."""
    if text not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")
    _noted.add(text)
