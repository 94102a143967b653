"""Adapters in PEFT's layout, both ways: PEFT as witness on the same 4-bit base, logits and gradients."""

import io
import json
import time
import zipfile
from pathlib import Path

import peft
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import load_file, save_file
from tiny import save_random_llama
from tiny_qlora import TOKENS, dequantised_copy, randomise

import nanoqlora as nq
from nanoqlora.config.errors import UserError
from nanoqlora.ops.lora import Dropout
from nanoqlora.qlora import ALL_LINEAR, QLoRALinear, block_linears, lora_layers, set_dropout_rows
from nanoqlora.weights import adapter as adapter_module
from nanoqlora.weights.adapter import continue_adapter, read_updates

KINDS = {
    "plain": {"target_modules": list(ALL_LINEAR)},
    "one layer of all": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "two kinds of two blocks": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "rsLoRA": {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
    "own ranks and alphas": {
        "target_modules": list(ALL_LINEAR),
        "rank_pattern": {"k_proj": 2, "layers.1.self_attn.v_proj": 16, r".*\.2\.mlp.*": 3},
        "alpha_pattern": {"q_proj": 5, r"layers\.[02]\.mlp\.up_proj": 32},
    },
    "own ranks, rsLoRA": {"target_modules": ["k_proj"], "rank_pattern": {"0.*k_proj": 2}, "use_rslora": True},
    "DoRA": {"target_modules": list(ALL_LINEAR), "use_dora": True},
    "DoRA and all the rest": {
        **{"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "use_dora": True},
        **{"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 4}, "use_rslora": True},
    },
}


def bitsandbytes_copy(folder: Path) -> transformers.LlamaForCausalLM:
    """transformers' model with the linear layers of its blocks in bitsandbytes' NF4, doubly quantised.

    To be used in training mode: in evaluation mode they round to bfloat16 on some CPUs.
    """
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            model.set_submodule(name, layer)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_load_here_and_ours_there(tmp_path, kind):
    """PEFT over bitsandbytes' 4-bit layers, made at random: 1e-4 in float32 where logits are about 1, both ways."""
    save_random_llama(tmp_path)
    config = peft.LoraConfig(r=8, lora_alpha=12, init_lora_weights=False, **KINDS[kind])
    theirs = peft.get_peft_model(bitsandbytes_copy(tmp_path), config).train()
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:  # not as it starts, or it would do nothing
            parameter.data *= torch.rand(len(parameter), generator=torch.Generator().manual_seed(3)) + 0.5
    theirs.save_pretrained(tmp_path / "adapter")
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    with torch.no_grad():
        base = model(TOKENS)
        expected = theirs(TOKENS).logits
        nq.load_adapter(model, tmp_path / "adapter")
        assert (model(TOKENS) - expected).abs().max() < 1e-4
        assert (expected - base).abs().max() > 0.1, "the adapter must do something"
        nq.save_adapter(model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(bitsandbytes_copy(tmp_path), tmp_path / "ours").train()
        assert torch.equal(again(TOKENS).logits, expected)
    names, files = (
        lora_layers(model),
        [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "ours")],
    )
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert len(files[0]) == len(names) * (3 if "DoRA" in kind else 2)


def test_dora_gradients_equal_peft(tmp_path):
    """Gradients of A, B and the magnitudes, in float32 on the same dequantised base: 1e-4 relative."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    base = dequantised_copy(model, tmp_path)
    nq.inject_lora(model, r=4, alpha=8, use_dora=True)
    for layer in lora_layers(model).values():
        assert torch.allclose(layer.magnitude, layer.rebuild(torch.float32).norm(dim=1)), "starts at the rows' lengths"
    with torch.no_grad():
        assert (model(TOKENS) - base(TOKENS).logits).abs().max() < 1e-4, "and so at the base"
    randomise(model)
    nq.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    model(TOKENS).square().mean().backward()
    theirs(TOKENS).logits.square().mean().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, layer in lora_layers(model).items():
        for ours, part in (("lora_A", "lora_A.weight"), ("lora_B", "lora_B.weight")):
            g, expected = getattr(layer, ours).grad, gradients[f"base_model.model.{name}.{part}"]
            assert (g - expected).norm() < 1e-4 * expected.norm(), name
        expected = gradients[f"base_model.model.{name}.lora_magnitude_vector.weight"]
        assert (layer.magnitude.grad - expected).norm() < 1e-4 * expected.norm(), name
    assert len(gradients) == 3 * 7 * 3


def test_dora_with_dropout_is_the_formula(rng):
    """In float64, term by term: x through W, and what dropout leaves of x through (c - 1) W + c s B A."""
    layer = QLoRALinear(torch.randn(6, 64, generator=rng))
    layer.add_lora(4, 8, 0.5, False, layer_seed=9, use_dora=True)
    layer.lora_B.data = torch.randn(6, 4, generator=rng)
    layer.magnitude.data *= 1.3
    layer.row_seeds = torch.tensor([5, 6])
    x = torch.randn(2, 7, 64, generator=rng)
    y = layer.train()(x)
    mask = Dropout(0.5, layer.row_seeds ^ 9).mask(x).double()
    w, update = layer.weight.double(), 2.0 * (layer.lora_B.double() @ layer.lora_A.double())
    c = (layer.magnitude.double() / (w + update).norm(dim=1)).unsqueeze(1)
    expected = x.double() @ w.T + (x.double() * mask) @ ((c - 1) * w + c * update).T
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (layer.eval()(x) - x.double() @ (c * (w + update)).T).abs().max() < 1e-5 * expected.abs().max()


def test_an_update_merged_is_the_layer(tmp_path):
    """`Update.merged`, which merging uses, against the layer's own forward pass."""
    save_random_llama(tmp_path)
    for use_dora in (False, True):
        model = nq.Llama.from_pretrained(tmp_path)
        nq.inject_lora(model, r=4, alpha=8, use_dora=use_dora)
        randomise(model)
        for layer in lora_layers(model).values():
            if use_dora:
                layer.magnitude.data *= 1.1
        nq.save_adapter(model, tmp_path / "adapter")
        updates = read_updates(tmp_path / "adapter")
        for name, layer in lora_layers(model).items():
            x = torch.eye(layer.in_features).unsqueeze(0)
            merged = updates[name].merged(layer.weight)
            assert (layer(x)[0].T - merged).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ refusals


def saved(folder: Path, **options) -> Path:
    """A small model's folder with an adapter in it."""
    save_random_llama(folder)
    model = nq.Llama.from_pretrained(folder)
    nq.inject_lora(model, **({"r": 4, "alpha": 8} | options))
    nq.save_adapter(model, folder / "adapter")
    return folder / "adapter"


REFUSED = {
    "peft_type": "IA3",
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "pissa",
    "fan_in_fan_out": True,
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "target_parameters": ["mlp.experts.up_proj"],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "a_key_of_tomorrow": 1,
    "r": None,
    "rank_pattern": [8],
    "alpha_pattern": {"q_proj": "8"},
    "lora_alpha": 0,
    "use_dora": "yes",
    "use_rslora": 2,
}
NUMBERS = [-1, 1e300, 10**400, float("nan"), float("inf"), True, "4", [4], {"r": 4}]


@pytest.mark.parametrize("key", REFUSED)
def test_adapters_that_compute_something_else_are_refused_by_name(tmp_path, key):
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: REFUSED[key]}))
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key}[\w.]* is "):
        nq.load_adapter(nq.Llama.from_pretrained(tmp_path), adapter)


@pytest.mark.parametrize("key", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
def test_numbers_of_others_are_checked(tmp_path, key):
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    about, model = json.loads(path.read_text()), nq.Llama.from_pretrained(tmp_path)
    for value in NUMBERS:
        path.write_text(json.dumps(about | {key: {"q_proj": value} if "pattern" in key else value}))
        with pytest.raises(UserError, match=rf"adapter_config\.json: {key}[\w.]* is "):
            nq.load_adapter(model, adapter)


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '"x"', "{", '{"a":' * 100_000, "\udcff", "[" * 100_000])
def test_a_configuration_that_is_not_an_object_is_one_line(tmp_path, text):
    adapter = saved(tmp_path)
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        nq.load_adapter(nq.Llama.from_pretrained(tmp_path), adapter)


PATTERNS = {  # each would take for ever, or all memory
    r"((\w|.)+)+\W": "was not found in 0.2 s",
    "((a{1000}){1000}){1000}": "more than 1000",
    "(" * 499 + ")" * 499: "not a regular expression",
    "x" * 5000: "more than 1000",
    "a{99999999999}": "more than 1000",
    "(?i)q_proj": "not a regular expression",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_of_others_end(tmp_path, pattern):
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {pattern: 8}}))
    started = time.process_time()
    with pytest.raises(UserError, match=f"adapter_config.json: alpha_pattern.*{PATTERNS[pattern]}"):
        read_updates(adapter)
    assert time.process_time() - started < 5


def test_all_patterns_together_end(tmp_path, monkeypatch):
    """Each alone stays below its limit, and there are many; so may a pattern for each layer of a large model."""
    monkeypatch.setattr(adapter_module, "PATTERNS_S", 0.3)
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    many = {rf"(([a-z._0-9])+)+{i}\W": 8 for i in range(900)}
    path.write_text(json.dumps(config | {"alpha_pattern": many}))
    started = time.process_time()
    with pytest.raises(UserError, match="alpha_pattern.*was not found in"):
        read_updates(adapter)
    assert time.process_time() - started < 20
    path.write_text(json.dumps(config | {"alpha_pattern": {f"x{i}": 8 for i in range(1001)}}))
    with pytest.raises(UserError, match="alpha_pattern .* at most 1000 items"):
        read_updates(adapter)
    monkeypatch.undo()
    path.write_text(json.dumps(config | {"alpha_pattern": {rf"model\.layers\.{i}\.q": 8 for i in range(900)}}))
    assert read_updates(adapter)


def test_a_pickle_that_is_compressed_is_refused(tmp_path):
    """PyTorch compresses nothing, so a small file would be a large one in memory."""
    adapter, raw = saved(tmp_path), io.BytesIO()
    torch.save(load_file(adapter / "adapter_model.safetensors"), raw)
    (adapter / "adapter_model.safetensors").unlink()
    pickled = adapter / "adapter_model.bin"
    pickled.write_bytes(raw.getvalue())
    assert read_updates(adapter)
    with zipfile.ZipFile(raw) as right, zipfile.ZipFile(pickled, "w", zipfile.ZIP_DEFLATED) as wrong:
        for name in right.namelist():
            wrong.writestr(name, bytes(50_000_000) if name.endswith("data/0") else right.read(name))
    assert pickled.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"adapter_model\.bin: .*unpacks to more than it is"):
        read_updates(adapter)


def test_a_pattern_that_is_none_is_told(tmp_path):
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"(q_proj": 8}}))
    with pytest.raises(UserError, match=r"adapter_config\.json: rank_pattern.* is .\(q_proj"):
        nq.load_adapter(nq.Llama.from_pretrained(tmp_path), adapter)


def test_every_key_that_peft_writes_is_known(tmp_path):
    """A configuration with PEFT's defaults loads, so nothing is refused without reason."""
    adapter = saved(tmp_path)
    path = adapter / "adapter_config.json"
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR)).save_pretrained(tmp_path / "theirs")
    path.write_text((tmp_path / "theirs" / "adapter_config.json").read_text())
    nq.load_adapter(nq.Llama.from_pretrained(tmp_path), adapter)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = {
    "half a pair": (lambda state: state.pop(f"{Q}.lora_B.weight"), "layers.0.self_attn.q_proj lacks lora_B.weight"),
    "a head beside": (lambda state: state.update({"base_model.model.lm_head.weight": torch.ones(2)}), "lm_head.weight"),
    "another rank": (
        lambda state: state.update(
            {f"{Q}.lora_A.weight": torch.ones(5, 128), f"{Q}.lora_B.weight": torch.ones(128, 5)}
        ),
        "q_proj.*rank 4",
    ),
    "a magnitude without DoRA": (
        lambda state: state.update({f"{Q}.lora_magnitude_vector": torch.ones(128)}),
        "q_proj has lora_magnitude_vector",
    ),
    "another width": (
        lambda state: state.update({f"{Q}.lora_A.weight": torch.ones(4, 64)}),
        r"q_proj.lora_A.weight has shape \(4, 64\)",
    ),
    "nothing": (lambda state: state.clear(), "no update"),
    "an embedding": (
        lambda state: state.update({"base_model.model.model.embed_tokens.weight": torch.ones(300, 128)}),
        "embed_tokens.weight",
    ),
    "a vector": (lambda state: state.update({f"{Q}.lora_A.weight": torch.ones(4)}), r"q_proj has lora_A.weight of sh"),
    "bytes": (
        lambda state: state.update({f"{Q}.lora_B.weight": torch.ones(128, 4).byte()}),
        "lora_B.weight is of type uint8",
    ),
    "an infinite value": (lambda state: state[f"{Q}.lora_B.weight"].fill_(float("inf")), "NaN or infinite"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path, case):
    change, words = TENSORS[case]
    adapter = saved(tmp_path)
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"adapter_model.safetensors: .*{words}"):
        nq.load_adapter(nq.Llama.from_pretrained(tmp_path), adapter)


def test_adapter_of_another_model_is_refused(tmp_path):
    adapter = saved(tmp_path / "a")
    save_random_llama(tmp_path / "b", num_hidden_layers=2)
    with pytest.raises(UserError, match="layers.2.*another model"):
        nq.load_adapter(nq.Llama.from_pretrained(tmp_path / "b"), adapter)
    with pytest.raises(ValueError, match="c_attn"):
        nq.inject_lora(nq.Llama.from_pretrained(tmp_path / "b"), r=4, alpha=8, target_modules=("c_attn",))


def test_going_on_from_an_adapter_says_what_it_is_and_refuses_what_it_is_not(tmp_path):
    adapter = saved(tmp_path, target_modules=("q_proj", "v_proj"))
    asked = {"lora_r": None, "lora_alpha": None, "lora_target_modules": (), "peft_use_dora": False}
    said = continue_adapter(nq.Llama.from_pretrained(tmp_path), adapter, 0.0, **asked)
    assert "rank 4, alpha 8, on 6 layers (q_proj v_proj)" in said
    same = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ("v_proj", "q_proj")}
    assert continue_adapter(nq.Llama.from_pretrained(tmp_path), adapter, 0.0, **same) == said
    wrong = {"lora_r": 8, "lora_alpha": 4, "lora_target_modules": ("q_proj",), "peft_use_dora": True}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=f"{key} is .*remove {key}"):
            continue_adapter(nq.Llama.from_pretrained(tmp_path), adapter, 0.0, **asked | {key: value})


def test_dropout_of_a_loaded_adapter_is_that_of_the_run(tmp_path):
    adapter = saved(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path)
    nq.load_adapter(model, adapter, dropout=0.5)
    randomise(model)
    set_dropout_rows(model.train(), torch.tensor([1, 2]))
    assert (model(TOKENS) - model.eval()(TOKENS)).abs().max() > 0.01
    assert all(layer.dropout_p == 0.5 for _, layer in block_linears(model))
