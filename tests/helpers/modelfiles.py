"""Modelfiles as Ollama reads them: the rules of its parser, restated, and Ollama itself where it is installed."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

needs_ollama = [
    pytest.mark.ollama,
    pytest.mark.skipif(not shutil.which("ollama"), reason="no ollama on the PATH: see https://ollama.com/download"),
]
INSTRUCTIONS = "from license template system adapter draft renderer parser parameter message requires".split()


def is_print(char: str) -> bool:
    """Go's strconv.IsPrint: letters, marks, numbers, punctuation, symbols, and of all spaces the ASCII one."""
    return char == " " or unicodedata.category(char)[0] in "LMNPS"


def unquote(text: str) -> str | None:
    """The value in its quotes, None if they are not closed."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def parse(text: str) -> list[tuple[str, str]]:
    """What Ollama's parser makes of a Modelfile: instructions in lower case, a PARAMETER's name, and their values.

    It goes character by character. A value ends at a line break at which its quotes are closed. White space in a value
    is kept, of all else only what can be printed.

    Raises:
        ValueError: Ollama refuses the file.
    """
    found: list[tuple[str, str]] = []
    state, name, role, held = "none", "", "", ""
    for char in text.removeprefix("\ufeff") + "\n":
        is_space, is_newline = char in " \t", char in "\r\n"
        if state == "none":
            if char == "#":
                state = "comment"
            elif not (is_space or is_newline):
                state, held = "name", char if is_print(char) else ""
        elif state == "comment":
            state = "none" if is_newline else "comment"
        elif state == "name":
            if char.isascii() and char.isalpha():
                held += char
            elif is_space and held.lower() in INSTRUCTIONS:
                name, held = held.lower(), ""
                state = name if name in ("parameter", "message") else "value"
            else:
                raise ValueError(f"no instruction: {held}")
        elif state in ("parameter", "message"):
            if is_space and state == "message" and held not in ("system", "user", "assistant"):
                raise ValueError(f"no role: {held}")
            if is_space:
                name, role = (held, "") if state == "parameter" else (name, f"{held}: ")
                state, held = "value", ""
            elif char.isascii() and (char.isalnum() or char == "_" and state == "parameter"):
                held += char
            else:
                raise ValueError("unexpected end")
        elif is_space or is_newline:
            value = unquote(held.strip())
            if value is None or is_space:
                held += char
            else:
                found.append((name, role + value))
                state, role, held = "none", "", ""
        elif is_print(char):
            held += char
    if state != "none":
        raise ValueError("unexpected end")
    if "from" not in dict(found):
        raise ValueError("no FROM line")
    return found


def read_modelfile(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for command, long, short in re.findall(
        r'^([A-Z]+(?: stop)?) (?:"""(.*?)"""|(.*?))$', path.read_text(), re.S | re.M
    ):
        found.setdefault(command, []).append(long or short.strip('"'))
    return found


class Ollama:
    """A server of its own on loopback, with its own models, for a `with` block."""

    def __enter__(self) -> "Ollama":
        self.folder = tempfile.mkdtemp(prefix="ollama-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            host = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{host}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
        ours = {"OLLAMA_HOST": host, "OLLAMA_MODELS": f"{self.folder}/models", "HOME": self.folder}
        self.environment = kept | ours | {"OLLAMA_MAX_LOADED_MODELS": "1", "OLLAMA_CONTEXT_LENGTH": "512"}
        log = open(f"{self.folder}/log", "wb")
        self.process = subprocess.Popen(["ollama", "serve"], env=self.environment, stdout=log, stderr=log)
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{self.url}/api/version", timeout=1)
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise RuntimeError("ollama serve does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        given = json.dumps({"stream": False, **body}).encode()
        request = urllib.request.Request(self.url + path, given, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def create(self, name: str, modelfile: Path) -> None:
        self.command("ollama", "create", name, "-f", str(modelfile))

    def command(self, *words: str, cwd: Path | None = None) -> str:
        """A command of Ollama's, which has to end well."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def prompt(self, name: str, messages: list[dict[str, Any]], **body: Any) -> str:
        """The text that the model would get."""
        answer = self.post("/api/chat", model=name, messages=messages, _debug_render_only=True, **body)
        return answer["_debug_info"]["rendered_template"]
