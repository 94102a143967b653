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

MODULES = {  # module -> the public names that it has
    "config.errors": "UserError",
    "export.gguf_model": "export_gguf",
    "export.merge": "merge",
    "model": "ModelConfig",
    "ops": "dequantize_nf4 quantize_nf4",
    "qlora": "inject_lora",
    "run.from_python": "evaluate generate train",
    "tokenizer.tokenizer": "load_tokenizer",
    "weights.adapter": "load_adapter save_adapter",
    "weights.pretrained": "Llama",
}
PUBLIC = {name: module for module, names in MODULES.items() for name in names.split()}
__all__ = [*PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
