"""Every command that a program prints can be pasted into a shell in the folder in which the program ran."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft_witness import save_random_adapter
from processes import run_process
from small_runs import run_here, save_tiny_model

import export_gguf
import nanoqlora as nq
from nanoqlora.config.errors import UserError
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.weights.hub import hub_files

NAME = "someone/tiny-llama"


def in_shell(command: str, **environment: str) -> None:
    """Run it as a shell would, with the programs of this environment."""
    words = shlex.split(command)
    program = sys.executable if words[0] == "python" else str(Path(sys.executable).with_name(words[0]))
    done = subprocess.run([program, *words[1:]], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def ours(command: str) -> None:
    """Run one of our commands in this process, which has the settings of the small hub."""
    program, script, *words = shlex.split(command)
    assert program == "python" and Path(script).resolve() == Path(export_gguf.__file__)
    ended = run_here(export_gguf.main, *words)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("base_is_named", [True, False])
def test_the_base_of_an_adapter(base_is_named, hub, tmp_path, monkeypatch):
    """A hub name, or a folder whose name needs quotes."""
    base = save_tiny_model(tmp_path / "the base's")
    folder = "my $run"
    save_random_adapter(base, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    ended = run_here(export_gguf.main, "--adapter", folder, "--model", NAME if base_is_named else base.name)
    assert ended.code == 0, ended.err
    (command,) = re.findall("The base is needed too: (.*)", ended.out)
    ours(command)
    own = next(line.partition(": ")[2] for line in ended.out.splitlines() if "ollama create" in line)
    assert shlex.split(own)[:4] == ["ollama", "create", "NAME", "-f"]
    recipe = Path(shlex.split(own)[4])
    files = re.findall("^(?:FROM|ADAPTER) (.*)$", recipe.read_text(), re.M)
    kinds = [read_gguf(recipe.parent / name).metadata["general.type"] for name in files]
    assert kinds == ["model", "adapter"]


def test_our_commands_outside_of_the_project(tmp_path):
    """In a process of its own, in another folder."""
    base = save_tiny_model(tmp_path / "base")
    save_random_adapter(base, tmp_path / "run")
    done = run_process(export_gguf.__file__, "--adapter", "run", "--model", "base", cwd=tmp_path)
    (command,) = re.findall("The base is needed too: (.*)", done.out)
    done = run_process(*shlex.split(command)[1:], cwd=tmp_path)
    assert done.code == 0 and (tmp_path / "run" / "base-bf16.gguf").exists(), done.err


def test_a_download(hub, tmp_path, monkeypatch):
    """What an error says to run where there is a network: afterwards model and data set load without one."""
    with_network = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (
        lambda: nq.load_tokenizer(NAME),
        lambda: hub_files("someone/rows", ["data/train.jsonl", "it's absent", "data/te*"], "dataset", "main"),
    ):
        with pytest.raises(UserError, match="hf download") as refused:
            load()
        in_shell(re.search("run: (hf download .*)$", str(refused.value))[1], **with_network)
        assert load()
    assert {"tokenizer.json", "data/train.jsonl", "data/test.jsonl"} <= hub.downloaded()


def test_a_model_by_its_hub_name(hub, tmp_path):
    """Its folder is the cache, where nothing may be written, so the file is not there; and it has the model's name."""
    ended = run_here(export_gguf.main, "--model", NAME)
    out = Path(ended.out.partition(": ")[0])
    assert ended.code == 0 and not list((tmp_path / "cache").rglob("*.gguf"))
    assert read_gguf(out).metadata["general.name"] == "tiny-llama"
