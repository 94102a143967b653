"""How tensors of a GGUF file, and of Meta's folder, differ from those of a Hugging Face folder. Only this file knows.

names        `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`. A tied head is left out.
shapes       are written fastest dimension first, so the reverse of PyTorch's (`reader.py`, `writer.py`).
row order    RoPE turns pairs of dimensions. Hugging Face pairs dimension i of a head with i + hd / 2, llama.cpp and
             Meta pair neighbours. So the rows of q_proj and k_proj are shuffled inside each head: `permute_rows`.
             Without it the file loads and the model talks nonsense.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config.errors import UserError
from ..model import ModelConfig

# names.json: "tensors" has Hugging Face's name -> [of a GGUF file, of Meta's folder], in the order of the model;
# "numbers" has [field of config.json, its key as `llama.*`, its type there], and "config" the fields in their order.
TABLES = json.loads(Path(__file__).with_name("names.json").read_text("utf-8"))
NAMES: dict[str, list[str]] = TABLES["tensors"]
ROPE_DIVISORS = "rope_freqs.weight"  # not a weight: it stands for config.json's llama3 rope_scaling


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    return _renamed(hf_name, 0)


def meta_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `layers.3.feed_forward.w3.weight`."""
    return _renamed(hf_name, 1)


def _renamed(name: str, column: int) -> str:
    layer = re.search(r"(?<=\.layers\.)\d+", name)
    number = layer[0] if layer else ""
    names = NAMES.get(name.replace(f".layers.{number}.", ".layers.N.").removesuffix(".weight"))
    if names is None or not name.endswith(".weight"):
        raise UserError(f"tensor {name}: not a part of a plain Llama, and leaving it out would give another model.")
    return names[column].replace(".N.", f".{number}.", 1) + ".weight"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama is made of, by Hugging Face's names and in the order of the model."""
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = [(D,), (q_rows, D), (kv_rows, D), (kv_rows, D), (D, q_rows), (D,), (FF, D), (FF, D), (D, FF)]
    embedding, *parts, norm, head = (f"{name}.weight" for name in NAMES)
    shapes: dict[str, tuple[int, ...]] = {embedding: (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= zip((part.replace(".N.", f".{layer}.") for part in parts), block, strict=True)
    shapes[norm] = (D,)
    return shapes if config.tie_word_embeddings else shapes | {head: (V, D)}


def check_tensors(
    where: Path, config: ModelConfig, found: Mapping[str, Sequence[int] | None], rename: Callable[[str], str] = str
) -> None:
    """Before a weight is read: the tensors have to be those of this Llama.

    Args:
        where: the file that describes the model.
        found: shapes by name; None: not known before it is read.
        rename: from Hugging Face's names to those of `found`.
    Raises:
        UserError: a tensor is missing, left over, or has another shape.
    """
    # A damaged count of layers would keep us busy for hours.
    at_most = replace(config, num_hidden_layers=min(config.num_hidden_layers, len(found)))
    expected = {rename(name): shape for name, shape in tensor_shapes(at_most).items()}
    if missing := [name for name in expected if name not in found]:
        what = f"describes a Llama of {config.num_hidden_layers} layers, and tensor {missing[0]} of it is missing"
        raise UserError(f"{where}: {what}, {len(missing)} in all. Get a complete copy.")
    computed = {ROPE_DIVISORS, *(name for name in found if name.endswith("rotary_emb.inv_freq"))}
    if others := sorted(found.keys() - expected.keys() - computed):
        raise UserError(f"{where}: tensor {others[0]} has no place in the model. Only plain Llamas are read.")
    for name, shape in expected.items():
        if (other := found[name]) is not None and tuple(other) != shape:
            raise UserError(f"{where}: tensor {name} has shape {tuple(other)} and should have {shape}. Copy it again.")


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


def heads_to_permute(name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """How many heads the rows of this tensor are shuffled in; None for the tensors that stay as they are."""
    return {"attn_q": num_heads, "attn_k": num_kv_heads}.get(name.split(".")[-2])
