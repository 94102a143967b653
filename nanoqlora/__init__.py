"""nanoqlora: QLoRA fine-tuning of Llama models, from scratch. Start with model.py, ops/nf4.py, qlora.py, train.py.

A public name is imported when it is first asked for, because PyTorch comes with it and takes two seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.errors import UserError as UserError
    from .export.gguf_model import export_gguf as export_gguf
    from .export.merge import merge as merge
    from .model import ModelConfig as ModelConfig
    from .ops import dequantize_nf4 as dequantize_nf4
    from .ops import quantize_nf4 as quantize_nf4
    from .qlora import inject_lora as inject_lora
    from .run.from_python import evaluate as evaluate
    from .run.from_python import generate as generate
    from .run.from_python import train as train
    from .tokenizer.tokenizer import load_tokenizer as load_tokenizer
    from .weights.adapter import load_adapter as load_adapter
    from .weights.adapter import save_adapter as save_adapter
    from .weights.pretrained import Llama as Llama

PUBLIC = {  # name -> the module that has it
    "Llama": "weights.pretrained",
    "ModelConfig": "model",
    "UserError": "config.errors",
    "dequantize_nf4": "ops",
    "export_gguf": "export.gguf_model",
    "evaluate": "run.from_python",
    "generate": "run.from_python",
    "inject_lora": "qlora",
    "load_adapter": "weights.adapter",
    "load_tokenizer": "tokenizer.tokenizer",
    "merge": "export.merge",
    "quantize_nf4": "ops",
    "save_adapter": "weights.adapter",
    "train": "run.from_python",
}
__all__ = [*PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
