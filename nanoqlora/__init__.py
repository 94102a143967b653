"""nanoqlora: QLoRA fine-tuning of Llama models, from scratch. Start with model.py, ops/nf4.py, qlora.py, train.py."""

from .adapter import load_adapter, save_adapter
from .cli import UserError
from .model import Llama, ModelConfig
from .ops import dequantize_nf4, quantize_nf4
from .qlora import inject_lora
from .tokenizer import load_tokenizer

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
