"""Errors that the user can cause, and text that is safe to print."""

import os
import re

# What a terminal would obey instead of showing: control characters, except tab and line break, and what changes the
# order or the lines of text.
HIDDEN = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def visible(text: str, but: str = "(?!)") -> str:
    """A text of others, for a terminal: characters that it would obey are shown as escapes, such as \\x1b.

    Args:
        but: what stays as it is, as a regular expression.
    """
    return re.sub(f"({but})|{HIDDEN}", lambda found: found[1] or found[0].encode("unicode_escape").decode(), text)


KEY = "(?:api_?key|password|secret|auth_token)"
# A password in an address; the value of a key such as comet_api_key, in YAML or on a command line.
SECRET = re.compile(rf"(//[^/\s:@]*:)[^/\s@]+(?=@)|(--\w*{KEY}\s+|{KEY}[\"']?\s*[=:]\s*)[^\s,]+", re.I)


def printable(text: str, but: str = "(?!)") -> str:
    """A text for a terminal or a report: `visible`, and without tokens, keys and passwords of services."""
    for name, value in os.environ.items():
        if name.endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")) and len(value) >= 12:
            text = text.replace(value, "***")
    return visible(SECRET.sub(lambda found: f"{found[1] or found[2]}***", text), but)


LONGEST = 2000  # characters of an error: of a huge value in it, the middle is left out


def _shown(message: object) -> str:
    text = visible(str(message))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 500]} ... {text[-500:]}"


class UserError(ValueError):
    """Something the user gave is wrong. The message says where, what was found, why it matters, and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(_shown(message))


def check_regular(p: str | os.PathLike[str]) -> None:
    """Raises UserError for a device or a pipe, which may have no end. Those that a shell makes of <(...) are read."""
    if os.path.exists(p) and not (os.path.isfile(p) or os.path.isdir(p) or re.match("/dev/(fd|stdin)", str(p))):
        raise UserError(f"{p}: is a device or a pipe, and a file is needed. Name one.")


class Failed(Exception):
    """The run cannot continue, though the input was right: a rank is dead, a loss is NaN. The message names what to do.

    everywhere: all ranks fail so, with the same message.
    """

    def __init__(self, message: object, everywhere: bool = False) -> None:
        super().__init__(_shown(message))
        self.everywhere = everywhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, of a GPU or of a CPU, where PyTorch and numpy name it in words only."""
    kinds = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kinds or any(words in str(error) for words in ("can't allocate memory", "Cannot allocate memory"))


def asked(error: BaseException) -> str:
    """PyTorch's own first sentences: what was asked for, and how much there is."""
    return ". ".join(str(error).split(". ")[:2]).strip() or "no memory is left"


class Stopped(Exception):
    """The user asked to stop (Ctrl-C, SIGTERM) and what was done so far is saved."""


def short(value: object) -> str:
    """A value of a file, in a message."""
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_noted: set[str] = set()


def note(text: str) -> None:
    """Print a line that the user should know of, once, however often the same file is opened."""
    if text not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")
    _noted.add(text)
