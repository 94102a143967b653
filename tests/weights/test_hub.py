"""Hub names, against a small hub on this machine: only what is needed, resumed, checked, cached, refused."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from paths import ROOT
from peft_witness import save_random_adapter
from processes import run_interpreter
from safetensors.torch import load_file
from small_runs import run_here

import export_gguf
import merge
import nanoqlora as nq
from nanoqlora import chat
from nanoqlora.config.errors import UserError
from nanoqlora.data.files import find_files
from nanoqlora.data.rows import read_rows
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.weights.hub import hub_files, is_hub_name, local_path


def test_a_model_by_its_name(hub, model_files, tmp_path, monkeypatch):
    """Fetched once, only what is needed; then without a network, without a single request."""
    (tmp_path / "here").mkdir()
    for name, data in model_files.items():
        if "/" not in name and b"must not" not in data:
            (tmp_path / "here" / name).write_bytes(data)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        expected = nq.Llama.from_pretrained(tmp_path / "here")(tokens)
        assert torch.equal(nq.Llama.from_pretrained("someone/tiny-llama")(tokens), expected)
        assert hub.downloaded() == {path.name for path in (tmp_path / "here").iterdir()}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        before = len(hub.log)
        assert torch.equal(nq.Llama.from_pretrained("someone/tiny-llama")(tokens), expected)
        ids = nq.load_tokenizer("someone/tiny-llama").encode("Who sails?")
    assert ids == nq.load_tokenizer(tmp_path / "here").encode("Who sails?")
    assert len(hub.log) == before


def test_an_adapter_by_its_name(hub, tmp_path):
    """Model and adapter from the hub answer as the same files from folders do."""
    for name, data in hub.files["someone/tiny-llama"].items():
        if "/" not in name and b"must not" not in data:
            (tmp_path / "here").mkdir(exist_ok=True)
            (tmp_path / "here" / name).write_bytes(data)
    adapter = save_random_adapter(tmp_path / "here", tmp_path / "adapter")
    hub.files["someone/voice"] = {file.name: file.read_bytes() for file in adapter.iterdir()}
    question = ("--prompt", "Who sails?", "--temperature", 0, "--max_new_tokens", 8, "--bf16", "false")
    named = run_here(chat.main, "--model", "someone/tiny-llama", "--adapter", "someone/voice", *question)
    local = run_here(chat.main, "--model", tmp_path / "here", "--adapter", adapter, *question)
    alone = run_here(chat.main, "--model", tmp_path / "here", *question)
    assert named.code == local.code == 0, named.err
    assert named.out == local.out != alone.out


@pytest.mark.parametrize("pickled", [False, True])
def test_merge_and_export_take_names(hub, tmp_path, pickled):
    """The files that the same commands write of folders; by default into a folder of the name, not into the cache."""
    here, adapter = tmp_path / "here", tmp_path / "adapter"
    here.mkdir()
    for name, data in hub.files["someone/tiny-llama"].items():
        if "/" not in name and b"must not" not in data:
            (here / name).write_bytes(data)
    save_random_adapter(here, adapter)
    if pickled:
        torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
        (adapter / "adapter_model.safetensors").unlink()
    about = json.loads((adapter / "adapter_config.json").read_text())
    about["base_model_name_or_path"] = "someone/tiny-llama"
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    hub.files["someone/voice"] = {file.name: file.read_bytes() for file in adapter.iterdir()}
    named = ("--model", "someone/tiny-llama", "--adapter", "someone/voice")
    assert run_here(merge.main, "--model", here, "--adapter", adapter, "--out", "local").code == 0
    for words in ((), ("--out", "elsewhere")):
        ended = run_here(merge.main, *named, *words)
        assert ended.code == 0 and "note" not in ended.out, ended
        folder = Path(*words[1:]) if words else Path("voice/merged")
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (folder / name).read_bytes() == (Path("local") / name).read_bytes()
        record, local = (json.loads((path / "merge.json").read_text()) for path in (folder, Path("local")))
        assert record["adapter"] == "someone/voice" and record["adapter_sha256"] == local["adapter_sha256"]
    assert run_here(export_gguf.main, "--adapter", adapter, "--model", here, "--out", "local.gguf").code == 0
    ended = run_here(export_gguf.main, "--adapter", "someone/voice")  # which names its base: a hub name
    assert ended.code == 0 and read_gguf("voice/adapter-f32.gguf").tensors == read_gguf("local.gguf").tensors, ended
    command = shlex.split(ended.out.partition("needed too: ")[2].splitlines()[0])
    assert command[0] == "python" and Path(command[1]).name == "export_gguf.py"
    assert run_here(export_gguf.main, *command[2:]).code == 0 and Path("voice/base-bf16.gguf").is_file()
    assert read_gguf("voice/base-bf16.gguf").metadata["general.name"] == "tiny-llama"
    ended = run_here(export_gguf.main, "--model", "someone/tiny-llama", "--type", "q8_0")
    assert ended.code == 0 and Path("tiny-llama/model-q8_0.gguf").is_file(), ended
    assert not Path("someone").exists()


@pytest.mark.parametrize("lacks", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_named_adapter_that_is_not_complete_is_refused_before_anything_is_written(hub, tmp_path, lacks):
    adapter = save_random_adapter(Path(local_path("someone/tiny-llama")), tmp_path / "adapter")
    hub.files["someone/voice"] = {file.name: file.read_bytes() for file in adapter.iterdir() if file.name != lacks}
    before = {path.name for path in tmp_path.iterdir()}
    ended = run_here(merge.main, "--model", "someone/tiny-llama", "--adapter", "someone/voice", "--out", "out")
    assert ended.code == 2 and lacks in ended.err.splitlines()[-1], ended  # before it, the hub's own progress
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_data_set_by_its_name(hub):
    folder = hub_files("someone/rows", ["*train*"], "dataset")
    assert [path.name for path in (folder / "data").iterdir()] == ["train.jsonl"]
    assert (folder / "data/train.jsonl").read_bytes() == b"{}\n" * 9
    hub.log.clear()
    assert hub_files("someone/rows", ["*train*"], "dataset") == folder and not hub.log, "whole in the cache"
    folder = hub_files("someone/rows", ["*.jsonl"], "dataset")
    assert hub.downloaded() == {"data/test.jsonl"}, "the cache has one of the two files, so the other is fetched"
    assert len(list((folder / "data").iterdir())) == 2


def test_rows_of_a_data_set_by_its_name(hub):
    """Only the split that is asked for is fetched, and the card; if no name tells a split, all files are."""
    hub.files["datasets/someone/plain"] = {"one.jsonl": b'{"n": 1}\n', "two.jsonl": b'{"n": 2}\n', "README.md": b"x"}
    assert [row for _, row in read_rows(find_files("someone/rows"))] == [{}] * 9
    assert hub.downloaded() - {"README.md"} == {"data/train.jsonl"}
    assert [row for _, row in read_rows(find_files("someone/rows", split="test"))] == [{}]
    assert [row for _, row in read_rows(find_files("someone/plain"))] == [{"n": 1}, {"n": 2}]
    assert [row for _, row in read_rows(find_files("someone/plain", data_files=("two.jsonl",)))] == [{"n": 2}]
    hub.log.clear()
    assert [row for _, row in read_rows(find_files("someone/rows"))] == [{}] * 9 and not hub.log, "from the cache"
    with pytest.raises(UserError, match="someone/rows: no file found"):
        find_files("someone/rows", split="dev")
    with pytest.raises(UserError, match="someone/absent"):
        find_files("someone/absent")


def test_the_card_of_a_data_set_lists_its_files(hub):
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": f"{name}/*"}]} for name in ("en", "de")]
    configs[1]["data_files"].append({"split": "dev", "path": ["x.jsonl", "y.jsonl"]})
    files = {f"{name}.jsonl": json.dumps({"n": name}).encode() for name in ("en/a", "de/a", "de/b", "x", "y")}
    hub.files["datasets/someone/carded"] = files | {
        "README.md": f"---\n{json.dumps({'configs': configs})}\n---".encode()
    }

    def found(**keys: str) -> list[str]:
        return [row["n"] for _, row in read_rows(find_files("someone/carded", **keys))]

    assert found(name="de") == ["de/a", "de/b"]
    assert hub.downloaded() == {"README.md", "de/a.jsonl", "de/b.jsonl"}
    assert found(name="en") == ["en/a"] and found(name="de", split="dev") == ["x", "y"]
    for keys, said in (
        ({}, "Name one .* en, de"),
        ({"name": "fr"}, "no configuration fr"),
        ({"name": "en", "split": "dev"}, "no split dev"),
    ):
        with pytest.raises(UserError, match=said):
            found(**keys)


def test_a_download_goes_on_where_it_stopped(hub, model_files, monkeypatch):
    """The connection breaks within a file: the rest of it is asked for. A run is broken off: its whole files stay."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.cut = 20_000
    folder = hub_files("someone/tiny-llama", ["model*.safetensors"])
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    assert hub.ranges() == [None, "bytes=20000-"]
    hub.lies = True
    with pytest.raises(UserError):
        hub_files("someone/tiny-llama", ["config.json", "model*.safetensors"])
    hub.lies = False
    hub.log.clear()
    hub_files("someone/tiny-llama", ["config.json", "model*.safetensors"])
    assert hub.downloaded() == {"config.json"}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_other_bytes_than_the_hash_promises_are_refused(hub, file):
    hub.lies = True
    with pytest.raises(UserError, match=f"{file}.*hash"):
        hub_files("someone/tiny-llama", [file])
    hub.lies = False
    assert (hub_files("someone/tiny-llama", [file]) / file).exists(), "and fetched anew"


def test_what_cannot_be_had_is_told(hub, monkeypatch):
    hub.files["someone/gated"] = {}
    hub.gated.add("someone/gated")
    with pytest.raises(UserError, match="someone/gated.*accept.*HF_TOKEN"):
        nq.Llama.from_pretrained("someone/gated")
    with pytest.raises(UserError, match="someone/absent.*no such folder here.*no public repository"):
        nq.load_tokenizer("someone/absent")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE.*hf download someone/tiny-llama --include 'tokenizer.json'"):
        nq.Llama.from_pretrained("someone/tiny-llama")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(UserError, match="hf download someone/rows --repo-type dataset"):
        hub_files("someone/rows", ["*"], "dataset")


def test_what_is_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_name("NousResearch/Meta-Llama-3-8B")
    for path in ("models/absent", "absent", "/a/b", "./a/b", "a/b/c", "../a", "a/..", tmp_path / "x", "a/b c"):
        assert not is_hub_name(path), path


def test_the_commands_read_the_clients_settings(hub, tmp_path):
    """A process with HF_ENDPOINT and HF_HOME, and its one line when the terms are not accepted."""
    hub.files["someone/gated"] = {}
    hub.gated.add("someone/gated")
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    words = ["-m", "nanoqlora.chat", "--model", "someone/gated", "--prompt", "Who?"]
    ended = run_interpreter(*words, cwd=tmp_path, env=environment)  # the client reads them when it is imported
    assert ended.code == 2 and ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("error: model someone/gated: its owner")
    assert not Path(tmp_path / "home" / "hub" / "models--someone--gated" / "snapshots").exists()
