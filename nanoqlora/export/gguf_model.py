"""A whole model as the tensors of a .gguf file: each is read, brought into llama.cpp's row order and quantized in turn.

Names, row order and the file itself: gguf/container.py. Which type a tensor gets: gguf/file_types.py. Its bytes:
gguf/ggml_blocks.py.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config.errors import UserError
from ..gguf.config import rope_divisors
from ..gguf.file_types import tensor_type
from ..gguf.ggml_blocks import quantize, quantize_checked
from ..gguf.names import ROPE_DIVISORS, gguf_name, heads_to_permute, permute_rows, tensor_shapes
from ..gguf.writer import NewTensor
from ..model import ModelConfig
from ..weights.checkpoint import Weights


def plan_tensors(weights: Weights, config: ModelConfig, file_type: str, model: Path) -> list[NewTensor]:
    """Every tensor of the file, with its name, shape and type, in the order of the model; no weights are read yet."""
    shapes = tensor_shapes(config)

    def produce(name: str, ggml_type: str) -> Tensor:
        """The bytes of one tensor, called when its turn to be written has come."""
        w = weights.load(name).to(device)
        if tuple(w.shape) != shapes[name]:
            raise UserError(
                f"{model}: tensor {name} has shape {tuple(w.shape)}, but config.json makes it {shapes[name]}, so they "
                f"are of different models. Get a matching checkpoint."
            )
        heads = heads_to_permute(gguf_name(name), config.num_attention_heads, config.num_key_value_heads)
        w = permute_rows(w, heads) if heads else w
        return quantize_checked(w, ggml_type, f"{model}: tensor {name}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors, is_tied = [], config.tie_word_embeddings
    is_gqa = config.num_key_value_heads < config.num_attention_heads
    for hf_name, shape in shapes.items():
        name = gguf_name(hf_name)
        ggml_type = tensor_type(name, shape, file_type, is_tied, config.num_hidden_layers, is_gqa)
        tensors.append(NewTensor(name, shape, ggml_type, partial(produce, hf_name, ggml_type)))
    if config.rope_scaling.get("rope_type") == "llama3":
        divisors = quantize(rope_divisors(config), "F32")
        tensors.append(NewTensor(ROPE_DIVISORS, (config.head_dim // 2,), "F32", lambda: divisors))
    return tensors
