"""Measure an importance matrix with our own model: the mean squares of each linear layer's inputs on texts.

    output = W x, with x from some thousand tokens of the texts that the model will be used on

Equal to llama-imatrix's on the same tokens, but for the rounding of sums. The head and the embedding are not measured,
as there. What the numbers are for: `gguf/imatrix.py`.
"""

from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..gguf.imatrix import Imatrix
from ..gguf.names import gguf_name
from ..weights.checkpoint import Tensors
from .certificate import Texts, hidden_states

CHUNK = 512  # tokens that are called a chunk in the file, llama-imatrix's default
SAME_INPUT = {  # one layer, and all that read what it reads
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def measure(weights: Tensors, texts: Texts, device: torch.device, name: str) -> Imatrix:
    """Run the model over the texts, all tokens of them, supervised or not.

    Args:
        name: of the texts, for the file.
    """
    sums = dict[str, Tensor]()

    def add(names: list[str], layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0].flatten(0, 1).double().square().sum(0)
        sums.update({name: sums[name] + squares if name in sums else squares for name in names})

    def watch(number: int, block: nn.Module) -> None:
        for first, same in SAME_INPUT.items():
            names = [gguf_name(f"model.layers.{number}.{layer}.weight") for layer in same]
            block.get_submodule(first).register_forward_pre_hook(partial(add, names))

    hidden_states(weights, texts, device, watch)
    num_tokens = sum(row.tokens.numel() for row in texts.rows)  # each text has a row of its own: no padding
    counts = dict.fromkeys(sums, num_tokens)
    found = {name: total.float().cpu() for name, total in sums.items()}
    return Imatrix(found, counts, [name], max(num_tokens // CHUNK, 1), CHUNK)
