"""What PyTorch lacks, each operation twice: a reference to read and a fast twin to run.

The two have the same name, arguments and results; tests hold one against the other, forward and backward. This file
is the one switch between them: the fast twins are used unless `use("reference")` says otherwise, and no other file
asks which it is.
"""

from typing import Literal

import torch
from torch import Tensor

from . import attention as attention_reference
from . import attention_cpu, elementwise, elementwise_fast, lora, lora_fast, loss, loss_fast, nf4, nf4_fast
from .attention import Segments, attention_to_past
from .lora import Dropout, Rebuild

__all__ = [
    "Dropout",
    "Rebuild",
    "Segments",
    "apply_rope",
    "attention",
    "attention_to_past",
    "dequantize_absmax",
    "dequantize_nf4",
    "frozen_linear",
    "linear_cross_entropy",
    "lora_linear",
    "quantize_absmax",
    "quantize_nf4",
    "rms_norm",
    "swiglu",
    "token_losses",
    "use",
]

_fast = True


def use(which: Literal["fast", "reference"]) -> None:
    """Choose for the whole process. The fast twins are the default."""
    global _fast
    _fast = which == "fast"


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    by_documents = _fast and q.device.type == "cpu" and q.dtype != torch.float64
    return (attention_cpu if by_documents else attention_reference).attention(q, k, v, segments)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension. x: (..., D), weight: (D,), frozen."""
    return _elementwise(x).rms_norm(x, weight, eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x (B, T, heads, hd) by angles with cosines and sines (B, T, hd / 2)."""
    return _elementwise(x).apply_rope(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (..., FF)."""
    return _elementwise(gate).swiglu(gate, up)


def _elementwise(x: Tensor):
    return elementwise_fast if _fast and x.dtype != torch.float64 else elementwise


def quantize_nf4(w: Tensor, blocksize: int = nf4.BLOCKSIZE) -> tuple[Tensor, Tensor]:
    return (nf4_fast if _fast else nf4).quantize_nf4(w, blocksize)


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return (nf4_fast if _fast else nf4).dequantize_nf4(packed, absmax, dtype)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (nf4_fast if _fast else nf4).quantize_absmax(absmax)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return (nf4_fast if _fast else nf4).dequantize_absmax(codes, nested_absmax, nested_offset)


def frozen_linear(x: Tensor, rebuild: Rebuild) -> Tensor:
    return lora.frozen_linear(x, rebuild)


def lora_linear(
    x: Tensor, rebuild: Rebuild, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    return (lora_fast if _fast else lora).lora_linear(x, rebuild, lora_A, lora_B, scaling, dropout)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (loss_fast if _fast else loss).linear_cross_entropy(hidden, weight, targets)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (loss_fast if _fast else loss).token_losses(hidden, weight, targets)
