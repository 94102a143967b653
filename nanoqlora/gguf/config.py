"""config.json from the metadata of a GGUF file, and the inverse.

All numbers of a config.json are there as `llama.*`, except the llama3 kind of RoPE scaling, which is a tensor of
divisors, `rope_freqs.weight`. What is not a Llama that we compute is refused.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.errors import UserError, short
from ..config.files import expect
from ..model import ModelConfig, rope_frequencies
from .container import Metadata
from .file_types import FILE_TYPES
from .names import ROPE_DIVISORS, TABLES, check_tensors, gguf_name
from .reader import GGUFFile


def model_config(config: dict[str, Any], where: str | Path) -> ModelConfig:
    """config.json as ModelConfig; an error names the checkpoint."""
    try:
        return ModelConfig.from_hf(config)
    except ValueError as error:
        raise UserError(f"{where}: {error}. Use a plain Llama or Mistral, and a complete copy of its files.") from error


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """config.json of this model, with the older RoPE keys that every reader knows.

    Raises:
        UserError: not a plain Llama, or numbers or tensors of it are missing.
    """
    _refuse_other_models(gguf)
    meta, embedding = gguf.metadata, gguf.tensors.get("token_embd.weight")
    found: dict[str, Any] = {"rope_theta": 10000.0}  # as llama.cpp takes what is not there
    for field, key, kind in TABLES["numbers"]:
        if field == "vocab_size":  # some files lack the number
            found[field] = embedding.shape[0] if embedding else 1
            continue
        value = gguf.number(f"llama.{key}", float if kind == "f32" else int, found.get(field))
        if field == "head_dim" and value != found[field] and key != "attention.key_length":
            raise UserError(f"{gguf.path}: llama.{key} is {value}, where a head has {found[field]} dimensions.")
        found[field] = value
        if field == "num_attention_heads":
            found |= {"num_key_value_heads": value, "head_dim": found["hidden_size"] // value}
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom", "bos", "padding")}
    ids = {name: expect(f"{gguf.path}: {key}", meta.get(key), int | None) for name, key in keys.items()}
    ends = [id for id in dict.fromkeys(ids[name] for name in ("eos", "eot", "eom")) if id is not None]
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    config |= {field: found[field] for field in TABLES["config"]}
    config |= {"rope_scaling": None, "tie_word_embeddings": "output.weight" not in gguf.tensors}
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    config |= {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}
    config |= {"eos_token_id": ends if len(ends) > 1 else ids["eos"]}
    shapes = {name: info.shape for name, info in gguf.tensors.items()}
    check_tensors(gguf.path, model_config(config, gguf.path), shapes, gguf_name)
    kind = meta.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in meta else "none")
    if kind == "linear":
        factor = gguf.number("llama.rope.scaling.factor", float, meta.get("llama.rope.scale_linear"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise UserError(f"{gguf.path}: RoPE scaling {short(kind)} is not supported; known are linear and llama3.")
    if ROPE_DIVISORS in gguf.tensors:
        config["rope_scaling"] = _llama3_scaling(gguf, config)
    return config


def _refuse_other_models(gguf: GGUFFile) -> None:
    meta = gguf.metadata
    architecture, kind = meta.get("general.architecture"), meta.get("general.type", "model")
    if architecture != "llama":
        raise UserError(f"{gguf.path}: general.architecture is {short(architecture)}; only llama is read.")
    if kind != "model":
        raise UserError(f"{gguf.path}: holds a {short(kind)}, not a model. Give the model's file.")
    if (parts := meta.get("split.count", 1)) not in (0, 1):
        raise UserError(f"{gguf.path}: is one of {parts} parts of a model. Join them with gguf-split --merge.")
    if experts := meta.get("llama.expert_count", 0):
        raise UserError(f"{gguf.path}: a mixture of {experts} experts; only dense Llamas are read.")


def _llama3_scaling(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Find the llama3 rope_scaling whose divisors are those in the file.

    The divisor of a pair goes from 1 to `factor` as its turns within the original context go from `high_freq_factor`
    down to `low_freq_factor`, on a straight line in 1 / divisor. Only the ratios of the context and of these two
    factors can be seen, so low_freq_factor is taken to be 1, as in every published model.
    """
    divisors = gguf.load(ROPE_DIVISORS).double()
    plain = ModelConfig.from_hf(config | {"rope_scaling": None})
    frequencies, factor = rope_frequencies(plain).double(), float(str(np.float32(divisors.max())))
    has_shape = divisors.shape == frequencies.shape
    if has_shape and torch.equal(divisors, torch.ones_like(divisors)):
        return None
    candidates = [(4.0, 8192)]  # Llama 3.1 to 3.3: tried first, since small heads may have no pair on the line
    on_line = (divisors > 1) & (divisors < factor)
    if has_shape and on_line.sum() >= 2:
        height = (1 / divisors[on_line] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(frequencies[on_line] / (2 * np.pi), height, deg=1)
        if start < -1e-6:  # the line is (context * frequency / 2 pi - 1) / (high - 1)
            candidates.append((round(float(1 - 1 / start), 4), round(float(slope * -1 / start))))
    for high, context in candidates:
        scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high}
        scaling |= {"original_max_position_embeddings": context}
        rebuilt = rope_divisors(replace(plain, rope_scaling=scaling)).double()
        if has_shape and torch.allclose(rebuilt, divisors, rtol=1e-4, atol=0):
            return scaling
    raise UserError(f"{gguf.path}: {ROPE_DIVISORS} is not what the llama3 kind gives. Use the original folder.")


def rope_divisors(config: ModelConfig) -> Tensor:
    """By what llama3 scaling slows the rotation of each pair, (hd / 2,) float32: between 1 and the factor."""
    return rope_frequencies(replace(config, rope_scaling={})) / rope_frequencies(config)


def model_metadata(config: ModelConfig, name: str, file_type: str) -> Metadata:
    """The inverse: the metadata of a model in a GGUF file, without its tokenizer.

    Args:
        file_type: a key of `FILE_TYPES`.
    """
    metadata = general_metadata("model", name, file_type) | {"general.quantization_version": ("u32", 2)}
    metadata |= {f"llama.{key}": (kind, getattr(config, field)) for field, key, kind in TABLES["numbers"]}
    if config.rope_scaling.get("rope_type") == "linear":
        metadata["llama.rope.scaling.type"] = ("string", "linear")
        metadata["llama.rope.scaling.factor"] = ("f32", config.rope_scaling["factor"])
    return metadata


def general_metadata(kind: str, name: str, file_type: str) -> Metadata:
    """How a file of ours begins; `kind`: model or adapter."""
    found: Metadata = {"general.architecture": ("string", "llama"), "general.type": ("string", kind)}
    return found | {"general.name": ("string", name), "general.file_type": ("u32", FILE_TYPES[file_type])}
