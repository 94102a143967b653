"""Small GGUF files: with any vocabulary and next to no weights, or of random weights and a vocabulary of bytes."""

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


BYTES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]  # a vocabulary without any words
BYTE_VOCABULARY: dict[str, tuple[str, Any]] = {
    "tokenizer.ggml.model": ("string", "llama"),
    "tokenizer.ggml.tokens": ("string[]", BYTES),
    "tokenizer.ggml.scores": ("f32[]", [0.0] * len(BYTES)),
    "tokenizer.ggml.token_type": ("i32[]", [2, 3, 3, *[6] * 256]),
    "tokenizer.ggml.bos_token_id": ("u32", 1),
    "tokenizer.ggml.eos_token_id": ("u32", 2),
    "tokenizer.ggml.add_bos_token": ("bool", True),
    "tokenizer.ggml.add_space_prefix": ("bool", False),
}


def write_random(file: Path, **sizes: int | bool) -> ModelConfig:
    """A model of float32 with random weights; `sizes` as in config.json."""
    config = ModelConfig.from_hf({"vocab_size": len(BYTES), "max_position_embeddings": 512} | sizes)
    g = torch.Generator().manual_seed(0)

    def weights(shape: tuple[int, ...]) -> torch.Tensor:
        w = (
            torch.randn(shape, generator=g) / shape[-1] ** 0.5
            if len(shape) == 2
            else torch.rand(shape, generator=g) + 0.5
        )
        return w.view(torch.uint8)

    tensors = [
        NewTensor(gguf_name(name), shape, "F32", partial(torch.Tensor.clone, weights(shape)))
        for name, shape in tensor_shapes(config).items()
    ]
    write_gguf(file, model_metadata(config, "random", "F32") | BYTE_VOCABULARY, tensors)
    return config
