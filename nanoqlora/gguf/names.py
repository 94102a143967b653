"""How tensors of a GGUF file differ from those of a Hugging Face folder. Only this file knows.

names        `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`. A tied head is left out.
shapes       are written fastest dimension first, so the reverse of PyTorch's (`reader.py`, `writer.py`).
row order    RoPE turns pairs of dimensions. Hugging Face pairs dimension i of a head with i + hd / 2, llama.cpp pairs
             neighbours. So the rows of q_proj and k_proj are shuffled inside each head: `permute_rows`. Without it the
             file loads and the model talks nonsense.
"""

import re

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
    if hf_name in MODEL_NAMES:
        return MODEL_NAMES[hf_name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", hf_name)
    if match and match[2] in BLOCK_NAMES:
        return f"blk.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
    raise UserError(
        f"tensor {hf_name}: not a part of a plain Llama, so a GGUF file of architecture llama has no place for it and "
        f"the model would be wrong without it. Export a LlamaForCausalLM without biases and extra layers."
    )


def hf_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    for hf, name in MODEL_NAMES.items():
        if name == gguf_name:
            return hf
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", gguf_name)
    for hf, name in BLOCK_NAMES.items():
        if match and name == match[2]:
            return f"model.layers.{match[1]}.{hf}.weight"
    raise UserError(
        f"tensor {gguf_name}: not a part of a plain Llama, and leaving it out would give another model. "
        f"Use a GGUF file of a Llama without biases, experts or other extras."
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama is made of, by Hugging Face's names and in the order of the model."""
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (q_rows, D),
        "self_attn.k_proj": (kv_rows, D),
        "self_attn.v_proj": (kv_rows, D),
        "self_attn.o_proj": (D, q_rows),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (FF, D),
        "mlp.up_proj": (FF, D),
        "mlp.down_proj": (D, FF),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def permute_rows(w: Tensor, num_heads: int) -> Tensor:
    """q_proj or k_proj from Hugging Face's row order to llama.cpp's: row i + hd / 2 of a head goes next to row i.

    Args:
        w: (num_heads * hd, ...).
        num_heads: query heads for q_proj, key/value heads for k_proj.
    """
    return w.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def unpermute_rows(w: Tensor, num_heads: int) -> Tensor:
    """The way back: `unpermute_rows(permute_rows(w, n), n)` is w."""
    return w.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(w.shape)


def heads_to_permute(gguf_name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """How many heads the rows of this tensor are shuffled in; None for the tensors that stay as they are."""
    if gguf_name.endswith(".attn_q.weight"):
        return num_heads
    if gguf_name.endswith(".attn_k.weight"):
        return num_kv_heads
    return None
