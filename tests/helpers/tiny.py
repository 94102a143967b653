"""Tiny random Llamas, ours and transformers', with the same weights."""

from pathlib import Path
from typing import Any

import torch
import transformers

from nanoqlora.model import ModelConfig

CONFIG = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def tiny_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**(CONFIG | changes))


def save_random_llama(folder: Path, seed: int = 0, **changes: Any) -> transformers.LlamaForCausalLM:
    """A random transformers Llama, saved to `folder` in float32. Norm weights are random too, not all ones."""
    torch.manual_seed(seed)
    config = CONFIG | changes
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default", **config.pop("rope", {})}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, rope_parameters=rope)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" not in name:
                parameter.normal_(0, 0.08)  # well above transformers' 0.02, so that every part matters for the logits
    model.save_pretrained(folder)
    return model
