"""A GGUF file with any vocabulary and next to no weights, for questions to llama.cpp's tokenizer and templates."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanoqlora.gguf.config import model_metadata
from nanoqlora.gguf.names import gguf_name, tensor_shapes
from nanoqlora.gguf.writer import NewTensor, write_gguf
from nanoqlora.model import ModelConfig


def write_small(file: Path, vocabulary: dict[str, tuple[str, Any]]) -> Path:
    """A model of one block of zeros, with this vocabulary."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ModelConfig.from_hf(sizes | {"vocab_size": len(vocabulary["tokenizer.ggml.tokens"][1])})
    tensors = [
        NewTensor(gguf_name(name), shape, "F32", partial(torch.zeros, 4 * math.prod(shape), dtype=torch.uint8))
        for name, shape in tensor_shapes(config).items()
    ]
    write_gguf(file, model_metadata(config, "small", "F32") | vocabulary, tensors)
    return file
