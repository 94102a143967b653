"""A whole model as the tensors of a .gguf file: each is read, brought into llama.cpp's row order and quantized in turn.

Names, row order and the file itself: gguf.py. Which type a tensor gets: file_types.py. Its bytes: ggml_blocks.py.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from . import gguf
from .checkpoint import Weights
from .cli import UserError
from .file_types import tensor_type
from .ggml_blocks import quantize, quantize_checked
from .model import ModelConfig


def plan_tensors(weights: Weights, config: ModelConfig, file_type: str, model: Path) -> list[gguf.NewTensor]:
    """Every tensor of the file, with its name, shape and type, in the order of the model; no weights are read yet."""
    shapes = gguf.tensor_shapes(config)

    def produce(name: str, ggml_type: str) -> Tensor:
        """The bytes of one tensor, called when its turn to be written has come."""
        w = weights.load(name).to(device)
        if tuple(w.shape) != shapes[name]:
            raise UserError(
                f"{model}: tensor {name} has shape {tuple(w.shape)}, but config.json makes it {shapes[name]}, so they "
                f"are of different models. Get a matching checkpoint."
            )
        heads = gguf.heads_to_permute(gguf.gguf_name(name), config.num_attention_heads, config.num_key_value_heads)
        w = gguf.permute_rows(w, heads) if heads else w
        return quantize_checked(w, ggml_type, f"{model}: tensor {name}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, is_tied = [], config.tie_word_embeddings
    is_gqa = config.num_key_value_heads < config.num_attention_heads
    for hf_name, shape in shapes.items():
        name = gguf.gguf_name(hf_name)
        ggml_type = tensor_type(name, shape, file_type, is_tied, config.num_hidden_layers, is_gqa)
        tensors.append(gguf.NewTensor(name, shape, ggml_type, partial(produce, hf_name, ggml_type)))
    if config.rope_scaling.get("rope_type") == "llama3":
        divisors = quantize(gguf.rope_divisors(config), "F32")
        tensors.append(gguf.NewTensor(gguf.ROPE_DIVISORS, (config.head_dim // 2,), "F32", lambda: divisors))
    return tensors
