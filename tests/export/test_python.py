"""nq.merge and nq.export_gguf: the same files as the scripts write, and the same errors."""

import hashlib
from pathlib import Path

import pytest
from peft_witness import save_random_adapter
from small_runs import run_here, save_tiny_model

import export_gguf
import merge
import nanoqlora as nq
from nanoqlora.config.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_random_adapter(save_tiny_model(folder / "model"), folder / "adapter")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith("Modelfile")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_merge_writes_what_the_script_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    options = {"base": "original", "dtype": "fp16", "max_shard_size": 0.0001}
    record = nq.merge("model", Path("adapter"), tmp_path / "ours", **options)
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    ended = run_here(merge.main, "--model", "model", "--adapter", "adapter", "--out", tmp_path / "script", *words)
    assert ended.code == 0 and record["verdict"].startswith("verdict: not proven: ")
    ours, script = hashes(tmp_path / "ours"), hashes(tmp_path / "script")
    assert ours.pop("merge.json") != script.pop("merge.json")  # whose verdict names the folder
    assert ours == script and "model.safetensors.index.json" in ours


def test_export_writes_what_the_script_writes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    nq.export_gguf("model", tmp_path / "ours" / "x.gguf", "Q4_0")
    words = ("--model", "model", "--out", tmp_path / "script" / "x.gguf", "--type", "q4_0")
    assert run_here(export_gguf.main, *words).code == 0
    assert hashes(tmp_path / "ours") == hashes(tmp_path / "script") and hashes(tmp_path / "ours")
    for name in ("Modelfile", "Modelfile-x"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "script" / name).read_bytes()


@pytest.mark.parametrize(
    ("call", "main", "words"),
    [
        (lambda f: nq.merge("model", "adapter", "out", base="nf5"), merge.main, ("--base", "nf5")),
        (lambda f: nq.merge("model", "adapter", "out", max_kl=0.1), merge.main, ("--max_kl", "0.1")),
        (lambda f: nq.merge("model", "adapter", "model"), merge.main, ("--out", "model")),
        (lambda f: nq.merge("absent", "adapter", "out"), merge.main, ("--model", "absent")),
        (lambda f: nq.export_gguf("model", "x.gguf", "q9"), export_gguf.main, ("--type", "q9")),
        (lambda f: nq.export_gguf("absent", "x.gguf", "f16"), None, ()),
    ],
)
def test_errors_are_those_of_the_command_line(call, main, words, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        call(folder)
    if main:
        given = {"--model": "model", "--out": "out"} | ({"--adapter": "adapter"} if main is merge.main else {})
        given |= dict([words])
        ended = run_here(main, *(word for pair in given.items() for word in pair))
        assert ended.code == 2 and ended.err == f"error: {error.value}\n"
    else:
        assert "absent" in str(error.value)
    assert sorted(folder.rglob("*")) == before
