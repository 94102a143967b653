"""nanoqlora: QLoRA fine-tuning of Llama models, from scratch. Start with model.py, ops/nf4.py, qlora.py, train.py."""

from .config.errors import UserError
from .model import ModelConfig
from .ops import dequantize_nf4, quantize_nf4
from .qlora import inject_lora
from .tokenizer.tokenizer import load_tokenizer
from .weights.adapter import load_adapter, save_adapter
from .weights.pretrained import Llama

__all__ = [
    "Llama",
    "ModelConfig",
    "UserError",
    "dequantize_nf4",
    "inject_lora",
    "load_adapter",
    "load_tokenizer",
    "quantize_nf4",
    "save_adapter",
]
