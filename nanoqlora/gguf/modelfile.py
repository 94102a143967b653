"""The Modelfile, by which `ollama create` makes a model out of a .gguf file.

Ollama's parser has no escapes. It drops what neither Go's `strconv.IsPrint` nor its own list of white space has, such
as the zero-width joiner and the no-break space, and a value in three quotes ends where a line does that ends with three
quotes. So a text goes into a value only if it comes out of it unchanged (`quoted`). TEMPLATE alone can hold any text,
because the language of Go's templates has escapes (`go_text`).

A Modelfile of the user's own is never written over. Ours begin with a line that holds a hash of the rest, so one that
was edited is the user's. Read next: export/go_template.py, for the template.
"""

import hashlib
import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from ..config.errors import UserError
from ..config.files import write_text


def is_kept(char: str) -> bool:
    """Whether Ollama's parser keeps a character, whichever version of Unicode its Go has (3.2 is older than Go)."""
    return char in "\t\n" or (char.isprintable() and unicodedata.ucd_3_2_0.category(char) != "Cn")


def quoted(text: str) -> str | None:
    """A text as a value in a Modelfile, None if the parser would change it."""
    if '"""' in text or not all(map(is_kept, text)):
        return None
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'


def go_text(text: str) -> str:
    """A text in a Go template: as it is, and as an action with an escaped string what ends a value or is not kept."""

    def in_action(run: str) -> str:
        escaped = (json.dumps(char)[1:-1] if char <= "\uffff" else f"\\U{ord(char):08x}" for char in run)
        return f'{{{{ "{"".join(escaped)}" }}}}'

    runs = groupby(text, lambda char: char in '"{' or not is_kept(char))  # "{" could begin an action
    return "".join(in_action("".join(run)) if is_special else "".join(run) for is_special, run in runs)


NO_GUESS = "~^;$" * 30  # 120 characters that no template that Ollama knows has, at which it takes none for this one


def no_guess(jinja: str) -> str:
    """A Jinja template that Ollama runs where no TEMPLATE is given.

    Else it would take the Go template of a known model whose Jinja is within 100 changes of this one.
    """
    return f"{{# Ollama guesses no other template for this one: {NO_GUESS} #}}\n{jinja}"


def jinja_wins(jinja: str) -> bool:
    """Whether Ollama since 0.30 runs a file's Jinja though TEMPLATE is given: it can more, tools or thinking."""
    thinks = "<think>" in jinja and "</think>" in jinja
    splits = "content.split('</think>')" in jinja or 'content.split("</think>")' in jinja
    splits = splits and "reasoning_content" not in jinja and "<SPECIAL_12>" not in jinja
    return "tools" in jinja or "tool_call" in jinja or thinks or splits


class Recipe(NamedTuple):
    """What a Modelfile holds. Texts that a value cannot hold are not in it."""

    files: list[str]  # FROM, ADAPTER
    template: str | None = None
    system: str | None = None
    stops: Sequence[str] = ()
    parameters: Sequence[tuple[str, int | float]] = ()
    note: str = ""

    def text(self) -> str:
        """The Modelfile's text, without the line that says that it is ours."""
        assert '"""' not in (self.template or "") and all(map(is_kept, self.template or ""))
        lines = [*self.files, *([f"# {self.note}"] if self.note else [])]
        texts = {"TEMPLATE": self.template, "SYSTEM": self.system}
        lines += [f'{name} """{text}"""' for name, text in texts.items() if text is not None]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters]
        lines += [f"PARAMETER stop {value}" for value in map(quoted, self.stops) if value is not None]
        return "\n".join(lines) + "\n"


def file_value(path: str) -> str:
    """A path for FROM or ADAPTER. Raises UserError if the parser would look for another file."""
    if "\n" in path or (value := quoted(path)) is None:
        raise UserError(f"{path!r}: a Modelfile cannot hold this name. Use plain characters, in one line.")
    return path if re.fullmatch(r"[\w./-]+", path, re.ASCII) else value


# ---------------------------------------------------------------------------------------------------------------------
# Where it is written

MARK = "# Written by export_gguf.py, which replaces it only as long as nobody has changed it: "


def own_name(gguf: Path) -> Path:
    """The Modelfile of this one file; `Modelfile` is that of the last model."""
    return gguf.with_name(f"Modelfile-{gguf.name.removesuffix('.gguf')}")


def is_ours(path: Path, text: str | None = None) -> bool:
    """Whether we may replace a Modelfile or template: it is not there, ours and unchanged, or the very `text`."""
    if not path.is_file():
        return not path.exists()
    first, newline, rest = path.read_bytes().partition(b"\n")
    mark = first.removeprefix(b"{").removesuffix(b" #}") + newline  # of Jinja it is a comment
    return first + newline + rest == (text or "\0").encode() or mark == _mark(rest).encode()


def _mark(text: bytes) -> str:
    return f"{MARK}{hashlib.sha256(text).hexdigest()[:16]}\n"


def write_modelfiles(gguf: Path, text: str, is_model: bool) -> None:
    """Write the Modelfile of a file, and of a model `Modelfile` too, and print what became of those that were there."""
    own, last, before = own_name(gguf), gguf.with_name("Modelfile"), None
    write_text(own, _mark(text.encode()) + text)
    shown = own
    if is_model and not is_ours(last, text):
        print(f"{last}: is not one that export_gguf.py wrote, or was changed since, so it stays as it is.")
    elif is_model:
        before = re.search("^FROM (.*)$", last.read_text("utf-8") if last.exists() else "", re.M)
        write_text(last, _mark(text.encode()) + text)
        shown = last
    print(f"{shown}: {shlex.join(['ollama', 'create', 'NAME', '-f', str(shown)])}")
    if before and before[0] not in text.splitlines():
        theirs = own_name(gguf.with_name(Path(before[1].strip('"')).name))
        print(f"{last}: was that of {before[1]}" + (f", which still has {theirs}" if theirs.exists() else ""))


def write_template(path: Path, jinja: str) -> None:
    """Write a chat template, with our mark."""
    write_text(path, f"{{{_mark(jinja.encode()).strip()} #}}\n{jinja}")
