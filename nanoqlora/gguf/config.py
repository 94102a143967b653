"""config.json from the metadata of a GGUF file, and back.

All numbers of a config.json are there as `llama.*`, except the llama3 kind of RoPE scaling, which is a tensor of
divisors, `rope_freqs.weight`. What is not a Llama that we compute is refused.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.errors import UserError
from ..model import ModelConfig, rope_frequencies
from .container import Metadata
from .file_types import FILE_TYPES
from .names import ROPE_DIVISORS, gguf_name, hf_name, tensor_shapes
from .reader import GGUFFile, _short


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """What config.json would say of this model, with the older RoPE keys that every reader knows.

    Raises:
        UserError: not a plain Llama, or numbers or tensors of it are missing.
    """
    meta = gguf.metadata
    _refuse_other_models(gguf)
    num_layers, num_heads = gguf.number("llama.block_count", int), gguf.number("llama.attention.head_count", int)
    hidden_size = gguf.number("llama.embedding_length", int)
    head_dim = gguf.number("llama.attention.key_length", int, hidden_size // num_heads)
    is_tied = "output.weight" not in gguf.tensors

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.number("llama.feed_forward_length", int),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.number("llama.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in gguf.tensors else 1,
        "max_position_embeddings": gguf.number("llama.context_length", int),
        "rms_norm_eps": gguf.number("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": gguf.number("llama.rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": is_tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    ends = dict.fromkeys(meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    if len(ends := [id for id in ends if id is not None]) > 1:
        config["eos_token_id"] = ends
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if gguf.number(key, int, head_dim) != head_dim:
            raise UserError(
                f"{gguf.path}: metadata {key} is {meta[key]} where a head has {head_dim} dimensions, and in a Llama "
                f"these are equal. Use another model."
            )
    _check_tensors(gguf, config)
    kind = meta.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in meta else "none")
    if kind == "linear":
        factor = gguf.number("llama.rope.scaling.factor", float, meta.get("llama.rope.scale_linear"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise UserError(f"{gguf.path}: RoPE scaling {_short(kind)} is not supported; known are linear and llama3.")
    if ROPE_DIVISORS in gguf.tensors:
        config["rope_scaling"] = _llama3_scaling(gguf, config)
    return config


def _refuse_other_models(gguf: GGUFFile) -> None:
    meta = gguf.metadata
    if meta.get("general.architecture") != "llama":
        raise UserError(
            f"{gguf.path}: metadata general.architecture is {_short(meta.get('general.architecture'))}; only llama can "
            f"be read here, because other architectures compute something else. Use a Llama, Mistral or SmolLM file."
        )
    if meta.get("general.type", "model") != "model":
        raise UserError(f"{gguf.path}: holds a {_short(meta['general.type'])}, not a model. Give the model's file.")
    if meta.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{gguf.path}: is one of {meta['split.count']} parts of a model, and only whole files can be read here. "
            f"Join them with llama.cpp's gguf-split --merge."
        )
    if meta.get("llama.expert_count", 0):
        raise UserError(f"{gguf.path}: a mixture of {meta['llama.expert_count']} experts; only dense Llamas are read.")


def _check_tensors(gguf: GGUFFile, config: dict[str, Any]) -> None:
    """The tensors have to be those of this Llama: none missing, none left over, each of the right shape."""
    num_layers = min(config["num_hidden_layers"], len(gguf.tensors))  # a damaged count would keep us busy for hours
    try:
        shapes = tensor_shapes(ModelConfig.from_hf(config | {"num_hidden_layers": num_layers}))
    except ValueError as error:
        raise UserError(f"{gguf.path}: by its metadata {error}.") from error
    expected = {gguf_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in expected if name not in gguf.tensors]
    if missing:
        raise UserError(
            f"{gguf.path}: {len(missing)} tensors of a Llama with {config['num_hidden_layers']} layers are missing, "
            f"{missing[0]} first, and the model cannot be built without them. Get a whole file."
        )
    for name, info in gguf.tensors.items():
        if name == ROPE_DIVISORS:
            continue
        hf_name(name)  # raises for a tensor that no Llama has
        if info.shape != expected.get(name):
            raise UserError(
                f"{gguf.path}: tensor {name} has shape {info.shape}, and by the metadata it should have "
                f"{expected.get(name, 'no place in the model')}. The file contradicts itself: get another one."
            )


def _llama3_scaling(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Find the llama3 rope_scaling whose divisors are those in the file.

    The divisor of a pair goes from 1 to `factor` as its turns within the original context go from `high_freq_factor`
    down to `low_freq_factor`, on a straight line in 1 / divisor. Only the ratios of the context and of these two
    factors can be seen, so low_freq_factor is taken to be 1, as in every published model.
    """
    divisors = gguf.load(ROPE_DIVISORS).double()
    plain = ModelConfig.from_hf(config | {"rope_scaling": None})
    factor = float(str(np.float32(divisors.max())))
    if divisors.shape == (plain.head_dim // 2,) and torch.equal(divisors, torch.ones_like(divisors)):
        return None
    candidates = [(4.0, 8192)]  # Llama 3.1 to 3.3: tried first, since small heads may have no pair on the line
    frequencies = rope_frequencies(plain).double()
    on_line = (divisors > 1) & (divisors < factor)
    if divisors.shape == frequencies.shape and on_line.sum() >= 2:
        height = (1 / divisors[on_line] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(frequencies[on_line] / (2 * math.pi), height, deg=1)
        if start < -1e-6:  # the line is (context * frequency / 2 pi - 1) / (high - 1)
            candidates.append((round(float(1 - 1 / start), 4), round(float(slope * -1 / start))))
    for high, context in candidates:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        rebuilt = rope_divisors(replace(plain, rope_scaling=scaling)).double()
        if rebuilt.shape == divisors.shape and torch.allclose(rebuilt, divisors, rtol=1e-4, atol=0):
            return scaling
    raise UserError(
        f"{gguf.path}: {ROPE_DIVISORS} is not what the llama3 kind of RoPE scaling gives for any original context, and "
        f"config.json knows no other that fits. Take the model from its Hugging Face folder instead."
    )


def rope_divisors(config: ModelConfig) -> Tensor:
    """By what llama3 scaling slows the rotation of each pair, (hd / 2,) float32: between 1 and the factor."""
    return rope_frequencies(replace(config, rope_scaling={})) / rope_frequencies(config)


def model_metadata(config: ModelConfig, name: str, file_type: str) -> Metadata:
    """The way back: what a GGUF file says of a model, without its tokenizer.

    Args:
        file_type: a key of `FILE_TYPES`.
    """
    metadata: Metadata = {
        "general.architecture": ("string", "llama"),
        "general.type": ("string", "model"),
        "general.name": ("string", name),
        "general.file_type": ("u32", FILE_TYPES[file_type]),
        "general.quantization_version": ("u32", 2),
        "llama.block_count": ("u32", config.num_hidden_layers),
        "llama.context_length": ("u32", config.max_position_embeddings),
        "llama.embedding_length": ("u32", config.hidden_size),
        "llama.feed_forward_length": ("u32", config.intermediate_size),
        "llama.vocab_size": ("u32", config.vocab_size),
        "llama.attention.head_count": ("u32", config.num_attention_heads),
        "llama.attention.head_count_kv": ("u32", config.num_key_value_heads),
        "llama.attention.key_length": ("u32", config.head_dim),
        "llama.attention.value_length": ("u32", config.head_dim),
        "llama.attention.layer_norm_rms_epsilon": ("f32", config.rms_norm_eps),
        "llama.rope.dimension_count": ("u32", config.head_dim),
        "llama.rope.freq_base": ("f32", config.rope_theta),  # without it readers take 10000
    }
    if config.rope_scaling.get("rope_type") == "linear":
        metadata["llama.rope.scaling.type"] = ("string", "linear")
        metadata["llama.rope.scaling.factor"] = ("f32", config.rope_scaling["factor"])
    return metadata
