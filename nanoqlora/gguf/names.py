"""How tensors of a GGUF file differ from those of a Hugging Face folder. Only this file knows.

names        `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`. A tied head is left out.
shapes       are written fastest dimension first, so the reverse of PyTorch's (`reader.py`, `writer.py`).
row order    RoPE turns pairs of dimensions. Hugging Face pairs dimension i of a head with i + hd / 2, llama.cpp pairs
             neighbours. So the rows of q_proj and k_proj are shuffled inside each head: `permute_rows`. Without it the
             file loads and the model talks nonsense.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config.errors import UserError
from ..model import ModelConfig

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_DIVISORS = "rope_freqs.weight"  # not a weight: it stands for config.json's llama3 rope_scaling


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", hf_name)
    if match and match[2] in BLOCK_NAMES:
        return f"blk.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
    return _known(MODEL_NAMES, hf_name)


def hf_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    names = {name: hf for hf, name in BLOCK_NAMES.items()}
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", gguf_name)
    if match and match[2] in names:
        return f"model.layers.{match[1]}.{names[match[2]]}.weight"
    return _known({name: hf for hf, name in MODEL_NAMES.items()}, gguf_name)


def _known(names: dict[str, str], name: str) -> str:
    if name not in names:
        raise UserError(f"tensor {name}: not a part of a plain Llama, and leaving it out would give another model.")
    return names[name]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama is made of, by Hugging Face's names and in the order of the model."""
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    kinds = [(D,), (q_rows, D), (kv_rows, D), (kv_rows, D), (D, q_rows), (D,), (FF, D), (FF, D), (D, FF)]
    block = dict(zip(BLOCK_NAMES, kinds, strict=True))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes["model.norm.weight"] = (D,)
    return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": (V, D)}


def check_tensors(
    where: Path,
    config: ModelConfig,
    found: Mapping[str, Sequence[int] | None],
    rename: Callable[[str], str] = str,
) -> None:
    """Before a weight is read: the tensors have to be those of this Llama.

    Args:
        where: the file that describes the model.
        found: shapes by name; None: not known before it is read.
        rename: from Hugging Face's names to those of `found`.
    Raises:
        UserError: a tensor is missing, left over, or has another shape.
    """
    num_layers = min(config.num_hidden_layers, len(found))  # a damaged count would keep us busy for hours
    shapes = tensor_shapes(replace(config, num_hidden_layers=num_layers))
    expected = {rename(name): shape for name, shape in shapes.items()}
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: describes a Llama of {config.num_hidden_layers} layers, and tensor {missing[0]} of it is "
            f"missing, {len(missing)} in all. Get a complete copy."
        )
    computed = {ROPE_DIVISORS, *(name for name in found if name.endswith("rotary_emb.inv_freq"))}
    if others := sorted(found.keys() - expected.keys() - computed):
        raise UserError(
            f"{where}: tensor {others[0]} has no place in the model that it describes, which computes something else "
            f"without it. Only a Llama without biases and extras is read."
        )
    for name, shape in expected.items():
        if (other := found[name]) is not None and tuple(other) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {tuple(other)} and should have {shape} by the configuration: they "
                f"are of different models. Get a matching copy."
            )


def permute_rows(w: Tensor, num_heads: int) -> Tensor:
    """q_proj or k_proj from Hugging Face's row order to llama.cpp's: row i + hd / 2 of a head goes next to row i.

    Args:
        w: (num_heads * hd, ...).
        num_heads: query heads for q_proj, key/value heads for k_proj.
    """
    return w.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def unpermute_rows(w: Tensor, num_heads: int) -> Tensor:
    """The inverse: `unpermute_rows(permute_rows(w, n), n)` is w."""
    return w.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(w.shape)


def heads_to_permute(gguf_name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """How many heads the rows of this tensor are shuffled in; None for the tensors that stay as they are."""
    if gguf_name.endswith(".attn_q.weight"):
        return num_heads
    if gguf_name.endswith(".attn_k.weight"):
        return num_kv_heads
    return None
