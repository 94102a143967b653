"""Checkpoints of every kind, read into the same model: Hugging Face folders, Meta's folder, GGUF.

Witnesses: transformers for the logits of folders, Meta's formulas written out for Meta's folder, the gguf package for
the values of every GGUF type.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tiny import save_random_llama

import nanoqlora as nq
from nanoqlora.config.errors import UserError

TOKENS = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(1))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}

# ------------------------------------------------------------------------------------------------ families

FAMILIES = {
    "Llama 1": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "Llama 2 70B": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    "Llama 3": {"rope_theta": 500000.0},
    "Llama 3.1": {"rope_theta": 500000.0, "rope": LLAMA3},
    "Llama 3.2": {"rope_theta": 500000.0, "rope": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "TinyLlama": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "SmolLM": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "head_dim": 16},
    "SmolLM 2": {"rope_theta": 100000.0, "tie_word_embeddings": True},
    "Mistral": {"model": "mistral", "rope_theta": 1000000.0},
    "Mistral Nemo": {"model": "mistral", "head_dim": 48, "rope_theta": 1000000.0},
    "linear RoPE": {"rope": {"rope_type": "linear", "factor": 4.0}},
}


def drawn(seed: int) -> dict[str, Any]:
    """A random small configuration, and a random way to store it."""
    draw = random.Random(seed)
    kv = draw.choice([1, 2, 3])
    heads = kv * draw.choice([1, 2, 5])
    rope = draw.choice([{}, {"rope_type": "linear", "factor": draw.choice([2.0, 3.5])}, LLAMA3])
    return {
        "num_key_value_heads": kv,
        "num_attention_heads": heads,
        "head_dim": draw.choice([8, 16, 34]),
        "hidden_size": heads * draw.choice([13, 24, 40]),
        "intermediate_size": draw.choice([65, 192]),
        "num_hidden_layers": draw.choice([1, 2, 4]),
        "vocab_size": draw.choice([300, 301]),
        "rope_theta": draw.choice([1e4, 12345.6, 5e5]),
        "rms_norm_eps": draw.choice([1e-6, 1e-5, 1e-2]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope": rope,
        "dtype": draw.choice([torch.float32, torch.float16, torch.bfloat16]),
        "shards": draw.random() < 0.5,
        "old_keys": draw.random() < 0.5,
    }


def save(folder: Path, *, dtype=torch.float32, shards=False, old_keys=False, model="llama", **changes: Any) -> None:
    """A random checkpoint as transformers writes it; with `old_keys` config.json as its older versions wrote it."""
    llama = save_random_llama(folder, **changes).to(dtype)
    if model == "mistral":
        config = llama.config.to_dict() | {"sliding_window": None}
        config = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
        mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).to(dtype)
        mistral.load_state_dict(llama.state_dict())
        llama = mistral
    (folder / "model.safetensors").unlink()
    llama.save_pretrained(folder, max_shard_size="10KB" if shards else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    if old_keys:
        config = json.loads((folder / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = (
            None if kind == "default" else rope | {"type" if kind == "linear" else "rope_type": kind}
        )
        config["torch_dtype"] = config.pop("dtype", None)
        (folder / "config.json").write_text(json.dumps(config))


def assert_same_logits(folder: Path) -> None:
    """1e-4 in float32, where logits have a standard deviation of about 1."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, expected = nq.Llama.from_pretrained(folder)(TOKENS), theirs(TOKENS).logits
    assert expected.std() > 0.03 and (logits - expected).abs().max() < 1e-4


@pytest.mark.parametrize("old_keys", [False, True], ids=["new keys", "old keys"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers(tmp_path, family, old_keys):
    save(tmp_path, dtype=torch.bfloat16, shards=old_keys, old_keys=old_keys, **FAMILIES[family])
    assert_same_logits(tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_random_configurations_equal_transformers(tmp_path, seed):
    save(tmp_path, **drawn(seed))
    assert_same_logits(tmp_path)


def test_angles_of_an_old_checkpoint_are_no_weights(tmp_path):
    """Older files carry rotary_emb.inv_freq in every layer; they are computed here."""
    save(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(16)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same_logits(tmp_path)


# ------------------------------------------------------------------------------------------------ Meta's folder


def meta_params(config: dict[str, Any]) -> dict[str, Any]:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300, "multiple_of": 32}
    return params | {"norm_eps": 1e-5, "rope_theta": 500000.0} | config


def meta_state(params: dict[str, Any], FF: int = 128) -> dict[str, torch.Tensor]:
    """Random weights under Meta's names, whole."""
    g, D, hd = torch.Generator().manual_seed(3), params["dim"], params["dim"] // params["n_heads"]
    kv = (params.get("n_kv_heads") or params["n_heads"]) * hd
    shapes = {"tok_embeddings": (300, D), "norm": (D,), "output": (300, D)}
    for i in range(params["n_layers"]):
        block = {"attention.wq": (D, D), "attention.wk": (kv, D), "attention.wv": (kv, D), "attention.wo": (D, D)}
        block |= {"feed_forward.w1": (FF, D), "feed_forward.w2": (D, FF), "feed_forward.w3": (FF, D)}
        block |= {"attention_norm": (D,), "ffn_norm": (D,)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    state = {f"{name}.weight": 0.15 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {name: w + 1 if w.ndim == 1 else w for name, w in state.items()} | {"rope.freqs": torch.rand(hd // 2)}


def meta_forward(params: dict[str, Any], state: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Meta's model in float64, after the paper and Meta's own description: neighbours of a head as complex numbers."""
    w = {name: tensor.double() for name, tensor in state.items()}
    H, T = params["n_heads"], tokens.shape[1]
    KV, hd = params.get("n_kv_heads") or H, params["dim"] // H

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weight

    frequencies = (params.get("rope_theta") or 10000.0) ** (-torch.arange(0, hd, 2).double() / hd)
    if params.get("use_scaled_rope"):
        slow = []
        for f in frequencies.tolist():
            turns = 8192 * f / (2 * np.pi)  # within the text of the first training
            smooth = min(max((turns - 1) / (4 - 1), 0), 1)
            slow.append((1 - smooth) * f / 8 + smooth * f)
        frequencies = torch.tensor(slow, dtype=torch.float64)
    turn = torch.polar(torch.ones(T, hd // 2).double(), torch.outer(torch.arange(T).double(), frequencies))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, T, heads, hd / 2)
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        layer = {name.removeprefix(f"layers.{i}."): v for name, v in w.items() if name.startswith(f"layers.{i}.")}
        h = norm(x, layer["attention_norm.weight"])
        q, k, v = (h @ layer[f"attention.w{n}.weight"].T for n in "qkv")
        q, k, v = rotate(q.unflatten(-1, (H, hd))), rotate(k.unflatten(-1, (KV, hd))), v.unflatten(-1, (KV, hd))
        k, v = (t.repeat_interleave(H // KV, dim=2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / hd**0.5
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", scores, v).flatten(2) @ layer["attention.wo.weight"].T
        h = norm(x, layer["ffn_norm.weight"])
        gate, up = (h @ layer[f"feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ layer["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


def save_meta(folder: Path, params: dict[str, Any], state: dict[str, torch.Tensor], parts: int, embedding: int) -> None:
    """Split as Meta's GPUs held it: rows; columns of wo and w2; the embedding along `embedding`; the rest whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(parts):
        part = {}
        for name, w in state.items():
            dim = embedding if name == "tok_embeddings.weight" else int("wo." in name or "w2." in name)
            part[name] = w if w.ndim == 1 else w.chunk(parts, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02d}.pth")


META = {
    "Llama 2 in one part": ({"n_kv_heads": None, "rope_theta": None}, 1, 1),
    "Llama 2 in two parts": ({"vocab_size": -1, "rope_theta": None}, 2, 1),
    "Llama 3 in two parts": ({"ffn_dim_multiplier": 1.3}, 2, 0),
    "Llama 3.1 in two parts": ({"use_scaled_rope": True}, 2, 0),
}


@pytest.mark.parametrize("case", META)
def test_metas_folder_equals_metas_formulas(tmp_path, case):
    change, parts, embedding = META[case]
    params = meta_params(change)
    state = meta_state(params)
    save_meta(tmp_path, params, state, parts, embedding)
    model = nq.Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        logits, expected = model(TOKENS), meta_forward(params, state, TOKENS)
    assert expected.std() > 0.3 and (logits - expected).abs().max() < 1e-4
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("how", ["left out", "the same tensor", "a copy"])
def test_metas_tied_head(tmp_path, how):
    params = meta_params({})
    state = meta_state(params)
    if how == "left out":
        del state["output.weight"]
    else:
        state["output.weight"] = (
            state["tok_embeddings.weight"].clone() if how == "a copy" else state["tok_embeddings.weight"]
        )
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save(state, tmp_path / "consolidated.00.pth")
    model = nq.Llama.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert (model(TOKENS) - meta_forward(params, state, TOKENS)).abs().max() < 1e-4


class Bomb:
    """What a pickle can hide: calling something while it is read."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


META_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "first part missing": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        r"consolidated\.00\.pth: this part is missing",
    ),
    "last part missing": (lambda f: (f / "consolidated.01.pth").unlink(), "wq of 32 rows where n_heads .* 64"),
    "half a part": (
        lambda f: (f / "consolidated.01.pth").write_bytes((f / "consolidated.01.pth").read_bytes()[:9000]),
        r"consolidated\.01\.pth: not a complete file",
    ),
    "a program": (
        lambda f: torch.save({"x": Bomb()}, f / "consolidated.00.pth"),
        r"consolidated\.00\.pth: not a complete",
    ),
    "a list": (
        lambda f: torch.save([torch.ones(2)], f / "consolidated.00.pth"),
        r"consolidated\.00\.pth: holds something",
    ),
    "no params": (lambda f: (f / "params.json").write_text("{}"), r"params\.json: dim is missing"),
    "experts": (
        lambda f: (f / "params.json").write_text(json.dumps(meta_params({"moe": {"n": 8}}))),
        r"params\.json: moe",
    ),
    "wrong width": (
        lambda f: (f / "params.json").write_text(json.dumps(meta_params({"n_heads": 2}))),
        "k_proj.*params",
    ),
}


@pytest.mark.parametrize("case", META_FAULTS)
def test_faults_of_metas_folder_are_told(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    change, words = META_FAULTS[case]
    save_meta(tmp_path / "meta", meta_params({}), meta_state(meta_params({})), 2, 0)
    change(tmp_path / "meta")
    with pytest.raises(UserError, match=words):
        nq.Llama.from_pretrained(tmp_path / "meta")
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------------------ GGUF

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
HALVES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where the scales of a block of 256 stand


def stored(w: np.ndarray, kind: gguf.GGMLQuantizationType, rng: np.random.Generator) -> np.ndarray:
    """The bytes of a matrix in a type: by the gguf package, or any bytes with small scales where it cannot."""
    if kind.name not in HALVES:
        return gguf.quantize(w, kind)
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (w.shape[0], w.shape[1] // block, num_bytes), dtype=np.uint8)
    for place in HALVES[kind.name]:
        scale = np.float16([2e-5 if kind.name == "Q6_K" else 1e-4]).view(np.uint8)
        raw[:, :, place : place + 2] = scale
    return raw.reshape(w.shape[0], -1)


def test_every_gguf_type_loads_with_the_values_of_the_gguf_package(tmp_path):
    """A Llama whose 23 matrices take all types in turn, written by the gguf package; equal, not close."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 300}
    theirs = save_random_llama(tmp_path, **shape)
    writer, rng, expected = gguf.GGUFWriter(tmp_path / "model.gguf", "llama"), np.random.default_rng(0), {}
    writer.add_block_count(3)
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    used = []
    for name, parameter in theirs.named_parameters():
        w, kind = parameter.detach().numpy(), gguf.GGMLQuantizationType.F32
        if w.ndim == 2:
            kind = gguf.GGMLQuantizationType[TYPES[len(used) % len(TYPES)]]
            used.append(kind.name)
        raw = stored(w, kind, rng)
        values = torch.from_numpy(gguf.dequantize(raw, kind).copy())
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if heads:  # rows 2i and 2i + 1 of a head in the file are rows i and i + hd / 2
            rows = torch.arange(64 * heads).view(heads, 32, 2).transpose(1, 2).flatten()
            values = values[rows]
        expected[name] = values
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert set(used) == set(TYPES)
    model = nq.Llama.from_pretrained(tmp_path / "model.gguf")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    theirs.load_state_dict(expected, strict=False)
    with torch.no_grad():
        assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------ bad input


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors") | {name.replace("__", "."): w for name, w in changes.items()}
    state = {name: w for name, w in state.items() if w is not None}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path, weight_map: Any = None, remove: str | None = None, lie: bool = False) -> None:
    """Turn the folder into a sharded one; then spoil its index or take a shard away."""
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="200KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    if lie:
        weight_map = {"model.norm.weight": next(folder.glob("model-00001-of-*")).name}
    if weight_map is not None:
        found = json.loads(index.read_text())
        found["weight_map"] = found["weight_map"] | weight_map if isinstance(weight_map, dict) else weight_map
        index.write_text(json.dumps(found))
    if remove:
        next(folder.glob(remove)).unlink()


def rope(**changes: Any) -> Callable[[Path], None]:
    return lambda f: change_config(f, rope_parameters={"rope_theta": 1e4, "rope_type": "default"} | changes)


DOWN = "model__layers__1__mlp__down_proj__weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "architecture": (lambda f: change_config(f, architectures=["Qwen3ForCausalLM"]), r"architectures is \['Qwen3"),
    "biases": (lambda f: change_config(f, attention_bias=True), "attention_bias is True"),
    "activation": (lambda f: change_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "sliding window": (lambda f: change_config(f, sliding_window=4096), "sliding_window is 4096"),
    "partial RoPE": (lambda f: change_config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "RoPE type": (rope(rope_type="yarn", factor=2.0), r"rope_parameters\.rope_type is 'yarn'"),
    "old RoPE type": (
        lambda f: change_config(f, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2.0}),
        r"rope_scaling\.rope_type is 'dynamic'",
    ),
    "half a RoPE": (rope(rope_type="llama3", factor=8.0), r"rope_parameters\.low_freq_factor is missing"),
    "RoPE of words": (rope(rope_type="linear", factor="two"), r"rope_parameters\.factor is 'two'"),
    "quantisation": (
        lambda f: change_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config\.quant_method is 'gptq'",
    ),
    "no width": (lambda f: change_config(f, hidden_size=None), "hidden_size is missing"),
    "half a head": (lambda f: change_config(f, num_key_value_heads=3), "num_key_value_heads 3"),
    "a count in words": (lambda f: change_config(f, num_hidden_layers="3"), "num_hidden_layers is '3'"),
    "another width": (lambda f: change_config(f, intermediate_size=64), r"gate_proj.weight has shape \(192, 128\)"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=4), r"model\.layers\.3\..*missing"),
    "fewer layers": (lambda f: change_config(f, num_hidden_layers=2), r"model\.layers\.2\..*no place"),
    "vocabulary": (lambda f: change_config(f, vocab_size=320), r"embed_tokens.weight has shape \(300, 128\).*320"),
    "a bias in the file": (
        lambda f: change_tensors(f, model__layers__0__self_attn__q_proj__bias=torch.ones(128)),
        "q_proj.bias.*no place",
    ),
    "a tensor missing": (lambda f: change_tensors(f, **{DOWN: None}), "layers.1.mlp.down_proj.weight.*missing"),
    "NaN": (lambda f: change_tensors(f, **{DOWN: torch.full((128, 192), torch.nan)}), "layers.1.mlp.down_proj.* NaN"),
    "infinity": (lambda f: change_tensors(f, **{DOWN: torch.full((128, 192), torch.inf)}), "down_proj.* infinite"),
    "whole numbers": (
        lambda f: change_tensors(f, **{DOWN: torch.ones(128, 192, dtype=torch.int8)}),
        r"model\.safetensors: tensor model\.layers\.1\.mlp\.down_proj\.weight is of type int8",
    ),
    "shard missing": (
        lambda f: shard(f, remove="model-00002-of-*.safetensors"),
        r"model-00002-of-.*\.safetensors: .*index\.json names this file",
    ),
    "index leads out": (
        lambda f: shard(f, {"model.norm.weight": "../other/model.safetensors"}),
        r"index\.json: weight_map names \.\./other/model\.safetensors, which is outside",
    ),
    "index of numbers": (
        lambda f: shard(f, {"model.norm.weight": 7}),
        r"index\.json: weight_map: model.norm.weight is 7",
    ),
    "index without a map": (lambda f: shard(f, [1, 2]), r"index\.json: weight_map is \[1, 2\]"),
    "index lies": (
        lambda f: shard(f, lie=True),
        r"model-00001-of-.*\.safetensors: tensor model\.norm\.weight cannot be read",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_a_folder_name_file_and_key(tmp_path, case):
    change, words = FAULTS[case]
    save_random_llama(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(UserError, match=words) as error:
        nq.Llama.from_pretrained(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value) and "\n" not in str(error.value)


def test_any_value_of_any_key_loads_or_is_told(tmp_path):
    """Each key of config.json with each of many wrong values: nothing worse than a line that names file and key."""
    save_random_llama(tmp_path, num_hidden_layers=1)
    whole = json.loads((tmp_path / "config.json").read_text())
    values = [None, True, "x", "4", [], [1], {}, {"rope_type": []}, {"a": 1}, 0, -1, 7, 0.5, float("nan")]
    keys = [*whole, "rope_scaling", "sliding_window", "quantization_config", "partial_rotary_factor", "mlp_bias"]
    told = 0
    for key in keys:
        for value in values:
            (tmp_path / "config.json").write_text(json.dumps(whole | {key: value}))
            try:
                nq.Llama.from_pretrained(tmp_path)
            except UserError as error:
                told += 1
                assert "config.json" in str(error), (key, value, error)
    assert told > 150


def test_a_width_that_four_bits_cannot_split_names_the_tensor(tmp_path):
    save_random_llama(tmp_path, hidden_size=96)
    nq.Llama.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.self_attn\.q_proj\.weight .*96.*64"):
        nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
