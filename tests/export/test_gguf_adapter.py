"""Adapters as .gguf files: llama.cpp on the base's file computes what PEFT computes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from modelfiles import read_modelfile
from peft_witness import save_random_adapter
from safetensors.torch import load_file, save_file
from small_runs import run_here, snapshot, write_run
from tiny import save_random_llama

import export_gguf
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export import gguf_model
from nanoqlora.export.go_template import go_template
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.tokenizer.tokenizer import load_tokenizer, save_tokenizer
from nanoqlora.weights.checkpoint import fingerprint, open_weights

LlamaCpp = pytest.importorskip("llama_cpp").LlamaCpp
VOCAB = 49152
TOKENS = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with grouped heads and the real tokenizer, in a folder and, of F32, as base-bf16.gguf beside."""
    folder = tmp_path_factory.mktemp("base") / "model"
    save_random_llama(folder, vocab_size=VOCAB, num_hidden_layers=2, hidden_size=64, tie_word_embeddings=True)
    tok = load_tokenizer(smollm2_path)
    save_tokenizer(tok, folder)
    gguf_model.export_gguf(folder, folder.parent / "base-bf16.gguf", "F32")
    return folder


ADAPTERS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 8},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 3}},
    "some layers": {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1]},
}


def exported(base: Path, adapter: Path, *words: object):
    return run_here(export_gguf.main, "--adapter", adapter, "--model", base, *words)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_in_llama_cpp_are_those_of_peft(kind: str, base: Path, tmp_path: Path):
    """Both compute in float32 from the same numbers. Measured: 2e-5, and 0.3 without the adapter."""
    adapter = save_random_adapter(base, tmp_path / "adapter", **ADAPTERS[kind])
    ended = exported(base, adapter, "--out", base.parent / "adapter.gguf")
    assert ended.code == 0, ended.err
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        alone = model(TOKENS).logits[0].numpy()
        expected = peft.PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits[0].numpy()
    assert np.abs(alone - expected).max() > 0.05
    with LlamaCpp(base.parent / "base-bf16.gguf", n_ctx=64) as llama:
        llama.add_lora(base.parent / "adapter.gguf")
        assert np.abs(llama.logits(TOKENS[0].tolist()) - expected).max() < 1e-4


def test_plain_adapter_is_stored_as_it_is(base: Path, tmp_path: Path):
    """Alpha is PEFT's, and the numbers are; only B's rows of q and k stand in llama.cpp's order."""
    adapter = save_random_adapter(base, tmp_path / "adapter")
    assert exported(base, adapter, "--type", "bf16").code == 0
    file, state = read_gguf(adapter / "adapter-bf16.gguf"), load_file(adapter / "adapter_model.safetensors")
    assert file.metadata["adapter.lora.alpha"] == 8.0 and file.metadata["general.type"] == "adapter"
    assert len(file.tensors) == len(state) == 28
    layer = "base_model.model.model.layers.1.self_attn"
    for name, key in {"attn_v.weight.lora_b": "v_proj.lora_B", "attn_q.weight.lora_a": "q_proj.lora_A"}.items():
        assert torch.equal(file.load(f"blk.1.{name}"), state[f"{layer}.{key}.weight"].bfloat16().float())
    b, stored = state[f"{layer}.k_proj.lora_B.weight"].bfloat16().float(), file.load("blk.1.attn_k.weight.lora_b")
    assert torch.equal(stored[:4], b[[0, 16, 1, 17]]) and torch.equal(stored[32:34], b[[32, 48]])


def test_modelfile_puts_the_adapter_on_the_base(base: Path, smollm2_path: Path, tmp_path: Path):
    adapter = save_random_adapter(base, tmp_path / "adapter")
    fmt, tok = PromptFormat(type="alpaca"), load_tokenizer(smollm2_path)
    (adapter / "prompt.json").write_text(fmt.to_json())
    ended = exported(base, adapter)
    recipe = read_modelfile(adapter / "Modelfile-adapter-f32")
    assert recipe["FROM"] == ["./base-bf16.gguf"] and recipe["ADAPTER"] == ["./adapter-f32.gguf"]
    assert f"export_gguf.py --model {base} --type bf16 --out {adapter / 'base-bf16.gguf'}" in ended.out
    assert recipe["TEMPLATE"] == [go_template(fmt, tok).template]  # of training, as test_prompts.py proves
    shutil.copy(base.parent / "base-bf16.gguf", tmp_path / "base.gguf")
    assert exported(tmp_path / "base.gguf", adapter).code == 0
    assert read_modelfile(adapter / "Modelfile-adapter-f32")["FROM"] == ["../base.gguf"]


def test_base_is_the_one_that_the_user_names(base: Path, tmp_path: Path):
    """The YAML of the run, or --model; of a path in the adapter, which may come from anybody, nothing is read."""
    adapter = save_random_adapter(base, tmp_path / "adapter")
    run = write_run(tmp_path / "run.yml", base, tmp_path / "data.jsonl", output_dir=str(adapter))
    assert run_here(export_gguf.main, run, "--adapter", adapter).code == 0
    about = json.loads((adapter / "adapter_config.json").read_text())
    os.mkfifo(tmp_path / "fifo")  # whoever opened it would wait for ever
    for name in (str(base), str(tmp_path / "fifo"), "/etc/passwd", "a/" + "b" * 5000, "a\0b/c", None, 5, ["a/b"]):
        (adapter / "adapter_config.json").write_text(json.dumps(about | {"base_model_name_or_path": name}))
        ended = run_here(export_gguf.main, "--adapter", adapter)
        assert ended.code == 2 and "Give the base with --model" in ended.err and ended.err.count("\n") == 1, ended


def test_the_base_of_an_own_run_needs_no_name(base: Path, tmp_path: Path):
    """Its path is in the adapter; it is taken where the fingerprint in the adapter's file is that of its weights."""
    adapter = save_random_adapter(base, tmp_path / "adapter")
    file, other = adapter / "adapter_model.safetensors", tmp_path / "other"
    save_random_llama(other, vocab_size=VOCAB)
    for found, code in ((fingerprint(open_weights(base)), 0), (fingerprint(open_weights(other)), 2)):
        save_file(load_file(file), file, metadata={"format": "pt", "base_fingerprint": found})
        ended = run_here(export_gguf.main, "--adapter", adapter)
        assert ended.code == code and ("Give the base with --model" in ended.err) == bool(code), ended


def test_what_such_a_file_cannot_express_is_refused(base: Path, tmp_path: Path):
    plain = save_random_adapter(base, tmp_path / "plain")
    dora = save_random_adapter(base, tmp_path / "dora", use_dora=True)
    other = tmp_path / "other"
    save_random_llama(other, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=96)
    save_tokenizer(load_tokenizer(base), other)
    half = shutil.copytree(plain, tmp_path / "half")
    state = load_file(half / "adapter_model.safetensors")
    state.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight")
    save_file(state, half / "adapter_model.safetensors")
    before = snapshot(tmp_path)
    for folder, model, words, message in (
        (dora, base, [], "DoRA"),
        (plain, other, [], "adapter of another model"),
        (half, base, [], "q_proj lacks lora_B"),
        (plain, base, ["--type", "q4_k_m"], "--type q4_k_m"),
        (plain, base, ["--type", "q9"], '--type is "q9"'),
        (plain, base, ["--prove"], "is no .gguf file, which llama.cpp needs"),
        (plain, tmp_path / "nowhere", [], "nowhere"),
    ):
        ended = exported(model, folder, *words)
        assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended
    assert snapshot(tmp_path) == before
