"""What PyTorch lacks, each operation twice: a reference to read and a fast twin to run.

The two have the same name, arguments and results; tests hold one against the other, forward and backward. This file
is the one switch between them: the fast twins are used unless `use("reference")` says otherwise, and no other file
asks which it is.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as attention_reference
from . import block_parts, elementwise, lora, lora_parts, loss, mlp_backward, nf4
from .attention import Segments, attention_to_past
from .fast import attention_cpu, attention_cuda
from .fast import elementwise as elementwise_fast
from .fast import lora as lora_fast
from .fast import loss as loss_fast
from .fast import nf4 as nf4_fast
from .lora import Dropout, Rebuild, token_numbers
from .lora_parts import RowDropout

__all__ = [
    "Dropout",
    "Rebuild",
    "RowDropout",
    "Segments",
    "apply_rope",
    "attention",
    "attention_to_past",
    "dequantize_absmax",
    "dequantize_into",
    "dequantize_nf4",
    "embedding_from_host",
    "frozen_linear",
    "kernels",
    "linear_cross_entropy",
    "lora_linear",
    "quantize_absmax",
    "quantize_nf4",
    "rms_norm",
    "swiglu",
    "token_losses",
    "token_numbers",
    "use",
]

_fast = True


def use(which: Literal["fast", "reference"]) -> None:
    """Choose for the whole process. The fast twins are the default."""
    global _fast
    _fast = which == "fast"


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    module = attention_reference
    if _fast and q.device.type == "cpu" and q.dtype != torch.float64:
        module = attention_cpu
    elif _fast and q.is_cuda and attention_cuda.can_run(q, segments):
        module = attention_cuda
    return module.attention(q, k, v, segments)


class Kernels(NamedTuple):
    """What a block with a hand-written backward pass is made of; see `block_parts.py`, `lora_parts.py`."""

    rms_norm: Callable
    add_rms_norm: Callable
    rms_norm_backward: Callable
    rope_: Callable
    rope_backward: Callable
    swiglu: Callable
    add: Callable
    mlp_backward_: Callable
    place_adapter: Callable
    lora_down: Callable
    swiglu_lora_down: Callable
    lora_backward_A: Callable
    lora_backward_B: Callable
    lora_dx_add_: Callable


@lru_cache
def _kernels(is_cuda: bool) -> Kernels:
    names = Kernels._fields
    modules = (block_parts, lora_parts, mlp_backward)
    if is_cuda:
        from .triton import elementwise as elementwise_triton
        from .triton import lora as lora_triton
        from .triton import mlp_backward as mlp_backward_triton

        modules = (elementwise_triton, lora_triton, mlp_backward_triton)
    return Kernels(*(next(getattr(m, name) for m in modules if hasattr(m, name)) for name in names))


def kernels(x: Tensor) -> Kernels:
    """The kernels for the device of `x`."""
    return _kernels(_fast and x.device.type == "cuda")


def embedding_from_host(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of a table (V, D) in pinned memory of the host for tokens (B, T) on a device -> (B, T, D) there."""
    if _fast and tokens.is_cuda:
        from .triton import elementwise as elementwise_triton

        return elementwise_triton.embedding_from_host(tokens, table)
    return F.embedding(tokens.cpu(), table).to(tokens.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension. x: (..., D), weight: (D,), frozen."""
    if not _fast or x.dtype == torch.float64:
        return elementwise.rms_norm(x, weight, eps)
    return elementwise_fast.rms_norm(x, weight, eps, kernels(x))


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


def dequantize_into(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    out: Tensor,
    fold: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """W of a doubly quantised matrix, written to `out` (n_out, n_in), which may be rows of a larger buffer.

    Args:
        fold: lora_A (r, n_in), lora_B (n_out, r), scaling: writes W + scaling * B A, summed in float32.
    """
    if _fast and out.is_cuda:
        from .triton import nf4 as nf4_triton

        if fold is None:
            nf4_triton.dequantize_nf4_double(packed, codes, nested_absmax, nested_offset, out)
        else:
            nf4_triton.dequantize_nf4_folded(packed, codes, nested_absmax, nested_offset, *fold, out)
        return
    absmax = dequantize_absmax(codes, nested_absmax, nested_offset)
    if fold is None:
        out.copy_(dequantize_nf4(packed, absmax, out.dtype))
    else:
        lora_A, lora_B, scaling = fold
        out.copy_(dequantize_nf4(packed, absmax).addmm_(lora_B.float(), lora_A.float(), alpha=scaling))


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
