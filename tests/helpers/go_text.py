"""Go's own text/template as a witness: a program of a few lines, compiled once."""

import atexit
import json
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

needs_go = pytest.mark.skipif(not shutil.which("go"), reason="no Go here to run the templates: apt install golang-go")
PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var in struct { Template string; Chats [][]Message }
    if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }
    t := template.Must(template.New("").Parse(in.Template))
    for _, chat := range in.Chats {
        if err := t.Execute(os.Stdout, map[string]any{"Messages": chat}); err != nil { panic(err) }
        os.Stdout.WriteString("\\x00")
    }
}
"""


@lru_cache
def _build() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="go-text-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "main.go").write_text(PROGRAM)
    subprocess.run(["go", "build", "-o", "write", "main.go"], cwd=folder, check=True)
    return folder / "write"


def go_write(template: str, chats: list[list[dict[str, str]]]) -> list[str]:
    """What a Modelfile's TEMPLATE makes of some conversations."""
    given = json.dumps({"Template": template, "Chats": chats})
    run = subprocess.run([_build()], input=given.encode(), capture_output=True, check=True)
    return run.stdout.decode().split("\x00")[:-1]
