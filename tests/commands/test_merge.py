"""merge.py: one rounding away from base and adapter, equal to PEFT's merge, and all or nothing written."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from paths import ROOT
from peft_witness import dequantised_transformers, peft_on_dequantised, save_random_adapter, trained_in_float32
from processes import run_process
from safetensors.torch import load_file, save_file
from small_runs import Ended, alpaca_rows, run_here, save_tiny_model, snapshot, write_rows, write_run
from tiny import CONFIG

import export_gguf
import merge
import nanoqlora as nq
from nanoqlora import chat
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export import gguf_model
from nanoqlora.gguf.names import tensor_shapes
from nanoqlora.model import ModelConfig
from nanoqlora.qlora import inject_lora, lora_layers
from nanoqlora.weights.checkpoint import write_shards

U = 2.0**-8  # unit roundoff of bfloat16, which has 8 significant bits
TOKENS = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's, in a folder that looks like that of a float32 run of ours."""
    folder = save_random_adapter(model, tmp_path_factory.mktemp("run") / "out")
    trained_in_float32(folder)
    (folder / "prompt.json").write_text(PromptFormat(type="alpaca").to_json())
    return folder


def merged(model: Path, adapter: Path, out: Path, *words: object) -> Ended:
    return run_here(merge.main, "--model", model, "--adapter", adapter, "--out", out, *words)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return (found if isinstance(found, torch.Tensor) else found.logits).double()


def in_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> transformers.LlamaForCausalLM:
    """Loaded from the folder; a tensor that is missing or has no place fails the test."""
    theirs, about = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    return theirs.eval()


# ------------------------------------------------------------------------------------------------ what is merged


def test_merge_is_what_was_trained(model, adapter, tmp_path):
    """On the NF4 base, in float32: the same logits from transformers, from us, and from the adapter over four bits.

    In float32 every sum is rounded by 6e-8 of itself; the logits, of size 1, differ by 3e-6 as those of any two ways
    to compute them. Merged onto the original weights they differ by 1.
    """
    assert merged(model, adapter, tmp_path / "out").code == 0
    trained = nq.Llama.from_pretrained(model, load_in_4bit=True)
    nq.load_adapter(trained, adapter)
    expected = logits(peft_on_dequantised(model, adapter))
    assert (logits(trained) - expected).abs().max() < 1e-4
    assert (logits(in_transformers(tmp_path / "out")) - expected).abs().max() < 1e-4
    assert (logits(nq.Llama.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-4

    assert merged(model, adapter, tmp_path / "original", "--base", "original").code == 0
    assert (logits(in_transformers(tmp_path / "original")) - expected).abs().max() > 0.1


def test_merge_in_bfloat16_is_rounded_once(model, tmp_path):
    """W as training in bfloat16 saw it, plus s B A in float64; what is written is that sum, rounded once.

    Bound: U of the sum, and for the float32 product and sum below it 6 roundings of 2^-24 of their terms. A second
    rounding on the way would break it somewhere among 100,000 weights. The logits are off by no more than twice what
    one rounding of the exact sum gives.
    """
    adapter = save_random_adapter(model, tmp_path / "adapter")  # without metadata: bfloat16
    assert merged(model, adapter, tmp_path / "out").code == 0
    written, state = load_file(tmp_path / "out" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    exact, once = dequantised_transformers(model), dequantised_transformers(model)
    count = 0
    for name, parameter in exact.named_parameters():
        assert written[name].dtype == torch.bfloat16
        seen = parameter.data.bfloat16().double()
        if ".layers." not in name or parameter.ndim < 2:
            assert torch.equal(written[name].double(), seen), name
            parameter.data = seen
        else:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            a, b = (state[f"{key}{side}.weight"].double() for side in "AB")
            parameter.data = seen + 2 * (b @ a)
            terms = seen.abs() + 2 * (b.abs() @ a.abs())
            bound = U * parameter.data.abs() + 6 * 2.0**-24 * terms
            assert ((written[name].double() - parameter.data).abs() <= bound).all(), name
            count += 1
        once.get_parameter(name).data = parameter.data.bfloat16().double()
    assert count == 14
    one_rounding = (logits(once) - logits(exact)).abs().max()
    assert 0 < (logits(in_transformers(tmp_path / "out").double()) - logits(exact)).abs().max() < 2 * one_rounding


@pytest.mark.parametrize("trained_in", ["float32", "unknown"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "r": 8}, {"target_modules": ["q_proj", "down_proj"]}])
def test_merge_onto_the_original_is_that_of_peft(model, tmp_path, changes, trained_in):
    """`--base original --dtype float32` on a float32 base: the weights of merge_and_unload.

    Six float32 roundings of 2^-24, for product and sum, of numbers below 1 are 4e-7. Measured: the same bits.
    """
    adapter = save_random_adapter(model, tmp_path / "adapter", **changes)
    if trained_in == "float32":
        trained_in_float32(adapter)
    ended = merged(model, adapter, tmp_path / "out", "--base", "original", "--dtype", "float32")
    assert ended.code == 0, ended.err
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    ours = in_transformers(tmp_path / "out")
    for name, parameter in theirs.named_parameters():
        assert (ours.get_parameter(name) - parameter).abs().max() < 4e-7, name
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4
    assert (logits(ours) - logits(transformers.LlamaForCausalLM.from_pretrained(model))).abs().max() > 0.01


def test_tied_stays_tied(tmp_path):
    """One tensor for embedding and head in the file and in transformers, and untouched by the merge."""
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    adapter = save_random_adapter(model, tmp_path / "adapter")
    assert merged(model, adapter, tmp_path / "out", "--dtype", "float32", "--base", "original").code == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in written
    theirs = in_transformers(tmp_path / "out")
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    assert torch.equal(theirs.lm_head.weight, load_file(model / "model.safetensors")["model.embed_tokens.weight"])
    assert theirs.config.tie_word_embeddings and nq.Llama.from_pretrained(tmp_path / "out").config.tie_word_embeddings


@pytest.mark.parametrize("rope", ["old", "new"])
def test_rope_scaling_survives(tmp_path, rope):
    """llama3 scaling from either form of config.json, read by transformers and by us; without it logits are others."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    model = save_tiny_model(tmp_path / "model", rope=scaling, rope_theta=500.0)
    path = model / "config.json"
    config = json.loads(path.read_text())
    if rope == "old":
        new = config.pop("rope_parameters")
        config |= {"rope_theta": new.pop("rope_theta"), "rope_scaling": new}
        path.write_text(json.dumps(config))
    adapter = save_random_adapter(model, tmp_path / "adapter")
    assert merged(model, adapter, tmp_path / "out", "--dtype", "float32", "--base", "original").code == 0
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    expected = logits(peft.PeftModel.from_pretrained(base, adapter).eval())
    for ours in (in_transformers(tmp_path / "out"), nq.Llama.from_pretrained(tmp_path / "out")):
        assert (logits(ours) - expected).abs().max() < 1e-4
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(written | {"rope_scaling": None, "rope_parameters": None}))
    assert (logits(nq.Llama.from_pretrained(tmp_path / "out")) - expected).abs().max() > 0.01


def test_shards_have_an_index_that_transformers_reads(model, adapter, tmp_path):
    """Files of at most 60 kB, but for a tensor that is larger alone, hold together what one file holds."""
    assert merged(model, adapter, tmp_path / "one").code == 0
    assert merged(model, adapter, tmp_path / "many", "--max_shard_size", "0.00006").code == 0
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.numel() * 4 for w in whole.values())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    parts = {}
    for file in files:
        part = load_file(tmp_path / "many" / file)
        assert len(part) == 1 or sum(w.numel() * 4 for w in part.values()) <= 60_000
        assert {name: index["weight_map"][name] for name in part} == dict.fromkeys(part, file)
        parts |= part
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    assert torch.equal(logits(in_transformers(tmp_path / "many")), logits(in_transformers(tmp_path / "one")))
    assert torch.equal(
        logits(nq.Llama.from_pretrained(tmp_path / "many")), logits(nq.Llama.from_pretrained(tmp_path / "one"))
    )


def test_memory_is_that_of_the_largest_tensor(tmp_path):
    """Of a model of 176 MB in one file whose largest tensor takes 17 MB, and with what stands beside it in float32."""
    config = CONFIG | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 3, "head_dim": 64}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "architectures": ["LlamaForCausalLM"]}
    shapes = tensor_shapes(ModelConfig.from_hf(config))
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    load = lambda name: torch.empty(shapes[name], dtype=torch.bfloat16).uniform_(-0.05, 0.05)  # noqa: E731
    tensors = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    write_shards(model, SimpleNamespace(load=load), tensors, 10**9)
    total_bytes = (model / "model.safetensors").stat().st_size
    layers = [name.removesuffix(".weight") for name in shapes if name.endswith("_proj.weight")]
    state = {}
    for layer in layers:
        n_out, n_in = shapes[f"{layer}.weight"]
        state |= {f"base_model.model.{layer}.lora_A.weight": torch.randn(4, n_in) / 9}
        state |= {f"base_model.model.{layer}.lora_B.weight": torch.randn(n_out, 4) / 9}
    save_file(state, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": sorted({x.split(".")[-1] for x in layers})}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    line = [sys.executable, "-m", "tests.memory_of_merge", model, adapter, tmp_path / "out", "original"]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert int(ended.stdout) < 1.5 * 17e6 + 80e6 < 0.7 * total_bytes, ended.stderr
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == shapes.keys()


def test_merge_of_a_run_has_all_that_is_needed_to_use_it(model, adapter, tmp_path):
    """`python merge.py train.yml`: into output_dir/merged, with tokenizer, prompt format, end token and certificate."""
    shutil.copytree(adapter, tmp_path / "out")
    path = write_run(tmp_path / "train.yml", model, Path("data.jsonl"))
    ended = run_process("merge.py", path)
    assert ended.code == 0 and "14 layers" in ended.out, ended.err
    out = tmp_path / "out" / "merged"
    tok = transformers.AutoTokenizer.from_pretrained(out)
    base = transformers.AutoTokenizer.from_pretrained(model)
    assert tok("Arr, 42!")["input_ids"] == base("Arr, 42!")["input_ids"]
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == base.eos_token_id and generation.bos_token_id == base.bos_token_id
    assert (out / "prompt.json").read_bytes() == (adapter / "prompt.json").read_bytes()

    certificate = json.loads((out / "merge.json").read_text())
    file = adapter / "adapter_model.safetensors"
    assert certificate["adapter_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert certificate["base"] == "nf4" and certificate["dtype"] == "float32" and certificate["merged_layers"] == 14
    before, after = dequantised_transformers(model), in_transformers(out).double()
    changes = [
        ((after.get_parameter(name) - w).norm() / w.norm()).item()
        for name, w in before.named_parameters()
        if ".layers." in name and w.ndim == 2
    ]
    assert certificate["mean_relative_change"] == pytest.approx(sum(changes) / 14, rel=1e-5)
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_earlier_merge_is_replaced_whole(model, adapter, tmp_path):
    out = tmp_path / "out"
    assert merged(model, adapter, out, "--max_shard_size", "0.00006").code == 0
    assert merged(model, adapter, out, "--dtype", "bfloat16").code == 0
    assert merged(model, adapter, tmp_path / "fresh", "--dtype", "bfloat16").code == 0
    fresh = snapshot(tmp_path / "fresh")
    fresh["merge.json"] = fresh["merge.json"].replace(b"/fresh was", b"/out was")  # its verdict names the folder
    assert snapshot(out) == fresh
    assert {path.name for path in tmp_path.iterdir()} == {"out", "fresh"}, "nothing of the earlier one is left"


def test_merge_onto_a_gguf_file(model, adapter, tmp_path):
    """The same weights from a GGUF file, whose rows of q and k stand in another order, give the same merge.

    Its config.json is made from the file's metadata; transformers loads it.
    """
    gguf_model.export_gguf(model, tmp_path / "base.gguf", "F32")
    assert merged(model, adapter, tmp_path / "of folder").code == 0
    ended = merged(tmp_path / "base.gguf", adapter, tmp_path / "of file")
    assert ended.code == 0, ended.err
    assert torch.equal(logits(in_transformers(tmp_path / "of file")), logits(in_transformers(tmp_path / "of folder")))
    ids = [
        transformers.AutoTokenizer.from_pretrained(folder)("Arr, 42!", add_special_tokens=False)["input_ids"]
        for folder in (model, tmp_path / "of file")
    ]
    assert ids[0] == ids[1]


# ------------------------------------------------------------------------------------------------ what is refused


def change_tensors(adapter: Path, folder: Path, change: Any) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, folder)
    state = load_file(folder / "adapter_model.safetensors")
    change(state)
    save_file(state, folder / "adapter_model.safetensors")
    return folder


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert all(word in ended.err for word in words), ended.err


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
CHANGES = {
    "half a pair": (lambda state: state.pop(f"{Q}B.weight"), ["q_proj lacks lora_B.weight"]),
    "a vector": (lambda state: state.update({f"{Q}A.weight": torch.ones(64)}), ["layers.1.self_attn.q_proj", "(64,)"]),
    "a number": (lambda state: state.update({f"{Q}B.weight": torch.ones(())}), ["layers.1.self_attn.q_proj", "()"]),
    "whole numbers": (lambda state: state.update({f"{Q}A.weight": torch.ones(4, 64).int()}), ["q_proj", "int32"]),
    "complex": (lambda state: state.update({f"{Q}A.weight": torch.ones(4, 64) * 1j}), ["q_proj", "complex64"]),
    "not a number": (lambda state: state[f"{Q}A.weight"].fill_(float("nan")), ["layers.1.self_attn.q_proj"]),
    "other width": (
        lambda state: state.update({f"{Q}A.weight": torch.ones(4, 96)}),
        ["layers.1.self_attn.q_proj", "96", "64"],
    ),
    "more layers": (
        lambda state: state.update({f"{Q.replace('1', '2')}{x}.weight": state[f"{Q}{x}.weight"].clone() for x in "AB"}),
        ["layers.2.self_attn.q_proj"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_adapter_that_does_not_fit_is_refused(model, adapter, tmp_path, case):
    change, words = CHANGES[case]
    other = change_tensors(adapter, tmp_path / "adapter", change)
    before = snapshot(tmp_path)
    refused(merged(model, other, tmp_path / "out"), *words)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("base", ["nf4", "original"])
def test_zero_update_merges_to_equality(model, tmp_path, base, use_dora):
    """As training starts, B is zero: the merged weights are the base's, to the bit, and the certificate counts them.

    DoRA divides and multiplies by the length of each row: a rounding or two of float32.
    """
    fresh = nq.Llama.from_pretrained(model, load_in_4bit=base == "nf4")
    inject_lora(fresh, 4, 8, use_dora=use_dora)
    nq.save_adapter(fresh, tmp_path / "adapter", str(model))
    assert len(lora_layers(fresh)) == 14
    words = ("--base", base, "--dtype", "float32")
    trained_in_float32(tmp_path / "adapter")  # NF4 in float32, as `dequantised_transformers` has it
    ended = merged(model, tmp_path / "adapter", tmp_path / "out", *words)
    assert ended.code == 0, ended.err
    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = dequantised_transformers(model).state_dict() if base == "nf4" else load_file(model / "model.safetensors")
    for name, w in written.items():
        assert torch.allclose(w, expected[name].float(), rtol=2.0**-22 * use_dora, atol=0), name
    if not use_dora:
        assert json.loads((tmp_path / "out" / "merge.json").read_text())["unchanged_layers"] == 14
        assert "14 of them have an update of zero" in ended.out
    assert merged(model, tmp_path / "adapter", tmp_path / "out", "--dtype", "bf16").code == 0


def test_an_update_that_vanishes_is_refused(model, adapter, tmp_path):
    """It is not zero, and too small for the dtype of the output."""
    small = change_tensors(adapter, tmp_path / "adapter", lambda state: state[f"{Q}B.weight"].mul_(1e-12))
    before = snapshot(tmp_path)
    words = ("--base", "original", "--dtype", "bf16")
    refused(merged(model, small, tmp_path / "out", *words), "layers.1.self_attn.q_proj", "does not change", "--dtype")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("data", [False, True])
def test_options_that_nothing_is_scored_for_are_named(model, adapter, tmp_path, data):
    """Types to score, texts and a limit, without texts or with --max_tokens 0."""
    words = ("--data", write_rows(tmp_path / "held.jsonl", alpaca_rows(3)), "--max_tokens", 0) if data else ()
    ended = merged(model, adapter, tmp_path / "out", "--types", "q8_0,q4_k_m", *words)
    assert ended.code == 0 and "--types q8_0,q4_k_m: without effect" in ended.out and "--data FILE" in ended.out
    assert data == ("held.jsonl: without effect" in ended.out) == ("--max_tokens 0." in ended.out), ended.out
    before = snapshot(tmp_path)
    refused(merged(model, adapter, tmp_path / "out", "--max_kl", 0.1, *words), "--max_kl 0.1 cannot be checked")
    assert snapshot(tmp_path) == before
    ended = (
        merged(model, adapter, tmp_path / "out", "--data", tmp_path / "held.jsonl", "--types", "q8_0")
        if data
        else ended
    )
    assert ("GGUF q8_0" in ended.out) == data == ("without effect" not in ended.out)


def test_files_of_the_user_beside_an_earlier_merge_stay(model, adapter, tmp_path):
    """A merge replaces what a merge wrote, in one file or in shards, and nothing else."""
    out = tmp_path / "out"
    for words in (("--max_shard_size", 1e-4), ()):
        assert merged(model, adapter, out, *words).code == 0
    (out / "model-q8_0.gguf").write_text("exported")
    before = snapshot(tmp_path)
    refused(merged(model, adapter, out), f"{out}: an earlier merge", "model-q8_0.gguf", "name another --out")
    assert snapshot(tmp_path) == before


def test_folder_of_something_else_is_not_written_over(model, adapter, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("years of work")
    before = snapshot(tmp_path)
    for out in (tmp_path / "out", tmp_path / "file"):
        refused(merged(model, adapter, out), str(out), "--out")
    assert snapshot(tmp_path) == before
    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:  # where a disk is mounted no folder can be exchanged
        patch.setattr(Path, "is_mount", lambda path: path.name == "empty")
        refused(merged(model, adapter, tmp_path / "empty"), "is a disk")
    assert merged(model, adapter, tmp_path / "empty").code == 0


def test_damaged_base_is_refused(model, adapter, tmp_path):
    """A tensor too few would be random in transformers, and one that is not finite would be in every answer."""
    for name, change in {
        "few": lambda state: state.pop("model.layers.0.input_layernorm.weight"),
        "nan": lambda state: state["model.norm.weight"][3:4].fill_(float("nan")),
        "inf": lambda state: state["model.layers.0.mlp.up_proj.weight"][0, 0:1].fill_(float("inf")),
    }.items():
        base = shutil.copytree(model, tmp_path / name)
        state = load_file(base / "model.safetensors")
        change(state)
        save_file(state, base / "model.safetensors", metadata={"format": "pt"})
        before = snapshot(tmp_path)
        for mode in ("nf4", "original"):
            refused(
                merged(base, adapter, tmp_path / "out", "--base", mode), {"few": "input_layernorm"}.get(name, "NaN")
            )
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "words", [["--base", "nf8"], ["--dtype", "int8"], ["--max_shard_size", "big"], ["--bse", "nf4"], ["--types", "q9"]]
)
def test_unknown_options_are_refused(model, adapter, tmp_path, words):
    refused(merged(model, adapter, tmp_path / "out", *words), words[0].lstrip("-"))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ folders of others

TEXTS = {  # what a configuration in such a folder may name
    "val_set_size": {"val_set_size": 2},
    "test_datasets": {"test_datasets": [{"path": "SECRET", "ds_type": "text", "type": "completion"}]},
}


@pytest.mark.parametrize("case", TEXTS)
def test_train_yml_of_an_adapter_is_no_configuration(model, adapter, tmp_path, case):
    """It names a private file, and a folder to write to: the file is not read, and nothing appears but --out."""
    theirs, secret = shutil.copytree(adapter, tmp_path / "adapter"), tmp_path / "secret.txt"
    secret.write_text("a secret\nof some\nlines\nand more\n")
    data = [{"path": str(secret), "ds_type": "text", "type": "completion"}]
    keys = json.loads(json.dumps(TEXTS[case]).replace("SECRET", str(secret)))
    keys |= {"dataset_prepared_path": str(tmp_path / "home" / ".config"), "output_dir": str(tmp_path / "home")}
    write_run(theirs / "train.yml", model, secret, datasets=data, **keys)
    before = {path.name for path in tmp_path.iterdir()}
    ended = merged(model, theirs, tmp_path / "out")
    assert ended.code == 0 and "Nothing is scored" in ended.out, ended
    assert {path.name for path in tmp_path.iterdir()} == before | {"out"}


@pytest.mark.parametrize("name", ["chat_template.jinja", "prompt.json", "train.yml", "adapter_model.safetensors"])
def test_links_out_of_an_adapter_are_refused(model, adapter, tmp_path, name):
    theirs = shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "secret").write_text("a secret")
    (theirs / name).unlink(missing_ok=True)
    (theirs / name).symlink_to(tmp_path / "secret")
    refused(merged(model, theirs, tmp_path / "out"), name, "is a link to", "secret")
    words = ("--model", model, "--adapter", theirs, "--prompt", "x", "--max_new_tokens", 1)
    refused(run_here(chat.main, *words), name, "is a link to")
    refused(run_here(export_gguf.main, *words[:4]), name, "is a link to")
    assert not (tmp_path / "out").exists()


def test_links_in_the_folder_of_a_model(model, adapter, tmp_path):
    """Weights may lie elsewhere, other files under the same name, and the hub's cache is made of links."""
    cache = tmp_path / "models--a--b"
    base = cache / "snapshots" / "c0ffee"
    base.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for i, file in enumerate(model.iterdir()):
        shutil.copy(file, cache / "blobs" / str(i))
        (base / file.name).symlink_to(f"../../blobs/{i}")
    assert merged(base, adapter, tmp_path / "out").code == 0
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).symlink_to(file)
    assert merged(other, adapter, tmp_path / "out").code == 0
    (tmp_path / "secret").write_text("a secret")
    (other / "chat_template.jinja").symlink_to(tmp_path / "secret")
    refused(merged(other, adapter, tmp_path / "out"), "chat_template.jinja", "is a link to")


def test_merge_json_of_others_names_no_files_to_read(model, adapter, tmp_path):
    """The proof of a merged folder reads base, adapter and texts of the YAML that the user names, and nothing else."""
    assert merged(model, adapter, tmp_path / "merged").code == 0
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    theirs = shutil.copytree(adapter, tmp_path / "adapter")
    os.mkfifo(tmp_path / "fifo")
    for file in ("adapter_config.json", "train.yml"):
        (theirs / file).unlink(missing_ok=True)
        os.mkfifo(theirs / file)
    record |= {"base_model": str(tmp_path / "fifo"), "adapter": str(theirs)}
    (tmp_path / "merged" / "merge.json").write_text(json.dumps(record))
    ended = run_here(export_gguf.main, "--model", tmp_path / "merged", "--prove")
    assert ended.code == 0 and "give the YAML file of its run" in ended.out, ended
