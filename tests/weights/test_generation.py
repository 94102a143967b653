"""Where answers end and how they are drawn: from the base through merge and export, as transformers has it."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from modelfiles import parse
from peft_witness import save_random_adapter
from small_runs import assert_refused, run_here, save_tiny_model, snapshot

import export_gguf
import merge
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export import gguf_model
from nanoqlora.gguf.config import hf_config
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.tokenizer.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}


def base_with(folder: Path, generation: dict[str, Any] | None, **config: Any) -> Path:
    """A model whose trained end token is 2, <|im_end|>; 0 is <|endoftext|>, the tokenizer's BOS."""
    model = save_tiny_model(folder / "model")
    (model / "generation_config.json").unlink()
    if generation is not None:
        (model / "generation_config.json").write_text(json.dumps(generation))
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return model


def merged(model: Path) -> Path:
    adapter = save_random_adapter(model, model.parent / "adapter")
    (adapter / "prompt.json").write_text(PromptFormat(type="chat_template").to_json())
    out = model.parent / "merged"
    ended = run_here(merge.main, "--model", model, "--adapter", adapter, "--out", out, "--base", "original")
    assert ended.code == 0, ended.err
    return out


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [0, 2], "pad_token_id": 0, **SAMPLING}, {}, [2, 0]),
        ({"eos_token_id": [7, 0]}, {"eos_token_id": 5}, [2, 7, 0]),  # generation_config.json wins
        ({"eos_token_id": 0}, {}, [2, 0]),
        ({"eos_token_id": [2]}, {}, 2),
        (dict(SAMPLING), {"eos_token_id": [2, 0]}, [2, 0]),
        (None, {"eos_token_id": [0, 9]}, [2, 0, 9]),
        (None, {"eos_token_id": None}, 2),
    ],
)
def test_merge_keeps_end_tokens_and_sampling(generation, config, ends, tmp_path):
    """As transformers reads both folders: the trained end first, then the base's, and every setting of the base."""
    model = base_with(tmp_path, generation, **config)
    theirs = transformers.GenerationConfig.from_pretrained(merged(model))
    assert theirs.eos_token_id == ends
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["eos_token_id"] == ends
    if generation is None:
        return
    base = transformers.GenerationConfig.from_pretrained(model)
    for name, value in base.to_diff_dict().items():
        if name not in ("eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"):
            assert getattr(theirs, name) == value, name
    if "temperature" in generation:
        assert (theirs.temperature, theirs.top_p, theirs.top_k, theirs.do_sample) == (0.6, 0.95, 20, True)


def exported(model: Path) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The Modelfile without FROM and TEMPLATE, and the metadata of the file."""
    gguf_model.export_gguf(model, model.parent / "model.gguf", "F32")
    found = parse((model.parent / "Modelfile").read_text())
    metadata = read_gguf(model.parent / "model.gguf").metadata
    return [pair for pair in found if pair[0] not in ("from", "template")], metadata


def test_export_writes_them_all(tmp_path):
    LlamaCpp = pytest.importorskip("llama_cpp").LlamaCpp
    tok = load_tokenizer(save_tiny_model(tmp_path / "other"))
    model = merged(base_with(tmp_path, {"eos_token_id": [0, 1, 2, 100], **SAMPLING}))
    parameters, metadata = exported(model)
    assert parameters == [
        *(("repeat_penalty", "1.1"), ("temperature", "0.6"), ("top_k", "20"), ("top_p", "0.95")),
        ("repeat_last_n", "-1"),
        *(("stop", "<|im_end|>"), ("stop", "<|endoftext|>"), ("stop", "<|im_start|>")),  # not the text of token 100
    ]
    assert metadata["tokenizer.ggml.eos_token_id"] == 2
    assert hf_config(read_gguf(model.parent / "model.gguf"))["eos_token_id"] == [2, 100, 1]
    with LlamaCpp(model.parent / "model.gguf", vocab_only=True) as llama:
        assert [id for id in range(tok.vocab_size) if llama.is_eog(id)] == [0, 1, 2, 100]


def test_more_ends_than_a_file_can_name(tmp_path, capsys):
    _, metadata = exported(base_with(tmp_path, {"eos_token_id": [2, 100, 101, 102]}))
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eom", "eot")] == [2, 100, 101]
    text = load_tokenizer(tmp_path / "model").vocab[102]
    assert f"llama.cpp goes on after {text!a}: a file can name three" in capsys.readouterr().out


def test_an_adapter_is_served_with_the_settings_of_its_base(tmp_path):
    model = base_with(tmp_path, {"eos_token_id": [0, 2], **SAMPLING})
    adapter = save_random_adapter(model, tmp_path / "adapter")
    (adapter / "prompt.json").write_text(PromptFormat(type="chat_template").to_json())
    assert run_here(export_gguf.main, "--adapter", adapter, "--model", model).code == 0
    found = parse((adapter / "Modelfile-adapter-f32").read_text())
    assert [text for name, text in found if name == "stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert ("temperature", "0.6") in found and ("repeat_penalty", "1.1") in found


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"temperature": 0.5}, [("temperature", "0.5")]),
        ({"do_sample": False, "temperature": 0.5, "top_k": 5}, [("temperature", "0")]),
        ({"min_p": 0.05, "typical_p": 0.9, "top_p": None}, [("min_p", "0.05"), ("typical_p", "0.9")]),
        ({"top_k": 50.0, "max_new_tokens": 5}, [("top_k", "50")]),
        ({}, []),
    ],
)
def test_parameters_of_the_modelfile(generation, expected, tmp_path):
    parameters, _ = exported(base_with(tmp_path, {"eos_token_id": 2} | generation))
    assert parameters == [*expected, ("stop", "<|im_end|>")]


@pytest.mark.parametrize(
    ("generation", "config", "words"),
    [
        ({"eos_token_id": [2, 300]}, {}, ["generation_config.json", "eos_token_id holds 300", "0 to 299"]),
        ({"eos_token_id": "</s>"}, {}, ["generation_config.json", 'eos_token_id holds "</s>"']),
        ({"eos_token_id": [[2]]}, {}, ["eos_token_id holds"]),
        (None, {"eos_token_id": -1}, ["config.json", "eos_token_id holds -1"]),
        ({"temperature": "hot"}, {}, ["temperature is", "not a number"]),
        ({"top_p": 1e400}, {}, ["top_p is Infinity"]),
        ({"top_k": True}, {}, ["top_k is true"]),
    ],
)
def test_what_cannot_be_meant_is_refused(generation, config, words, tmp_path):
    model = base_with(tmp_path, generation, **config)
    adapter = save_random_adapter(save_tiny_model(tmp_path / "other"), tmp_path / "adapter")
    before = snapshot(tmp_path)
    assert_refused(run_here(export_gguf.main, "--model", model), *words)
    assert_refused(run_here(merge.main, "--model", model, "--adapter", adapter, "--out", tmp_path / "out"), *words)
    assert snapshot(tmp_path) == before
