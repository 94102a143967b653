"""export_gguf.py --prove: a good file passes, here and in llama.cpp, and every kind of wrong one is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import run_here
from test_certificate import merged, run

import export_gguf
from nanoqlora import gguf_model, proof
from nanoqlora.prompts import PromptFormat
from nanoqlora.tokenizer import load_tokenizer

assert run  # the fixture: a run's base, adapter and held-out rows


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A merged folder with its certificate; the YAML of the run beside it."""
    ended = merged(run, tmp_path / "merged", "--max_tokens", 0)
    assert ended.code == 0, ended.err
    shutil.copy(run / "run.yml", tmp_path / "run.yml")
    return tmp_path / "merged"


def proved(model: Path, *words: object):
    more = (model.parent / "run.yml", "--out", model / f"model-{words[1]}.gguf")
    return run_here(export_gguf.main, *more, "--model", model, "--prove", "--max_tokens", 2000, *words)


def test_good_file_passes_and_the_certificate_says_so(model: Path):
    pytest.importorskip("llama_cpp")
    ended = proved(model, "--type", "f32")
    assert ended.code == 0, ended.err
    found = json.loads((model / "merge.json").read_text())["gguf"]["model-f32.gguf"]
    assert found["tensors"] == 21 and found["largest_relative_error"] == 0 and found["type"] == "f32"
    trained, folder, file = found["forms"]
    assert file["mean_kl"] < 1e-6 and file["top1_agreement"] == 1.0 and folder["mean_kl"] < 1e-6
    assert trained["perplexity"] == pytest.approx(file["perplexity"], rel=1e-4)
    theirs = found["llama_cpp"]
    assert theirs["texts"] == len(proof.WORDS) and theirs["conversations"] == len(proof.PROBES)
    assert "llama.cpp" in ended.out
    assert proved(model, "--type", "q4_0").code == 0
    after = json.loads((model / "merge.json").read_text())
    assert after["gguf"].keys() == {"model-f32.gguf", "model-q4_0.gguf"}
    assert after["gguf"]["model-q4_0.gguf"]["largest_relative_error"] > 0.05


def test_llama_cpp_finds_the_perplexity_that_we_find(run: Path, model: Path):
    """Of float32, on the same tokens; both sum in float32 in another order."""
    pytest.importorskip("llama_cpp")
    export_gguf.export(model, model / "model.gguf", "F32")
    tok, fmt = load_tokenizer(model), PromptFormat(type="alpaca")
    _, texts = proof_texts(run, tok, fmt)
    theirs = proof.ask_llama_cpp(model / "model.gguf", tok, fmt, texts)
    assert theirs["tokens"] == len(texts.targets)
    weights = proof.GGUFWeights(model / "model.gguf")
    form = proof.Form("file", weights, 0)
    ours = proof.score_file(model / "model.gguf", form, form, texts, torch.device("cpu"))[-1]
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-5)


def proof_texts(run: Path, tok, fmt):
    from nanoqlora.held_out import held_out_texts

    return held_out_texts(None, tok, fmt, str(run / "held.jsonl"), 400)


def test_folder_without_certificate_gets_a_file_of_its_own(run: Path, tmp_path: Path):
    model = shutil.copytree(run / "model", tmp_path / "model")
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "q8_0")
    assert ended.code == 0, ended.err
    assert json.loads((model / "model-q8_0.proof.json").read_text())["tensors"] == 21


def change_metadata(monkeypatch: pytest.MonkeyPatch, **changes: tuple[str, object]) -> None:
    good = export_gguf.tokenizer_metadata
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    monkeypatch.setattr(export_gguf, "tokenizer_metadata", lambda *args: good(*args) | changes)


WRONG = {
    "rows in another order": (lambda m: m.setattr(export_gguf.gguf, "permute_rows", lambda w, n: w), "q_proj"),
    "another rounding": (lambda m: m.setattr(gguf_model, "quantize", worse), "is not the merged model's"),
    "another template": (
        lambda m: change_metadata(m, tokenizer__chat_template=("string", "{{ messages[0]['content'] }}")),
        "its chat template gives",
    ),
    "a BOS too many": (lambda m: change_metadata(m, tokenizer__ggml__add_bos_token=("bool", False)), "gives"),
    "another split of words": (
        lambda m: change_metadata(m, tokenizer__ggml__pre=("string", "llama-bpe")),
        "vocabulary",
    ),
}


def worse(w: torch.Tensor, ggml_type: str, good=gguf_model.quantize) -> torch.Tensor:
    return good(w * 1.0001 if w.ndim == 2 else w, ggml_type)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(case: str, model: Path, monkeypatch: pytest.MonkeyPatch):
    change, message = WRONG[case]
    change(monkeypatch)
    before = (model / "merge.json").read_bytes()
    ended = proved(model, "--type", "f16")
    assert ended.code == 2 and message in ended.err and "Do not serve it" in ended.err, ended
    assert (model / "merge.json").read_bytes() == before


def test_llama_cpp_that_refuses_or_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("llama_cpp")
    tok, fmt = load_tokenizer(model), PromptFormat(type="alpaca")
    (model / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(proof.UserError, match="llama.cpp cannot use it"):
        proof.ask_llama_cpp(model / "broken.gguf", tok, fmt, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert proof.ask_llama_cpp(model / "broken.gguf", tok, fmt, None) is None
    assert "not installed" in capsys.readouterr().out
