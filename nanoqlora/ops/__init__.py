"""The operations of the model, each twice: a reference to read and a fast twin to run.

The two have the same name, arguments and results; tests compare them, forward and backward. This file is the only
switch between them: the fast twins run unless `use("reference")` is called, and no other file asks which it is.

    attention.py     causal attention over packed rows     block_parts.py    norm, RoPE and SwiGLU with their backward
    elementwise.py   RMSNorm, RoPE, SwiGLU                 lora_parts.py     LoRA's small matmuls with their backward
    nf4.py           four bits per weight                  mlp_backward.py   SwiGLU's backward with LoRA's gradients
    lora.py          linear layer with LoRA and dropout    fast/, triton/    the twins: PyTorch's own, and GPU kernels
    loss.py          head and cross-entropy                fp8.py            matmuls over four bits in fp8
    ggml.py          the blocks of GGUF files

Not here: autograd over a complete block (`fast/block.py`). Read first: `nf4.py`, `lora.py`.
"""

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as attention_reference
from . import block_parts, elementwise, fp8, ggml, lora, lora_parts, loss, mlp_backward, nf4
from .attention import Segments as Segments
from .attention import attention_to_past as attention_to_past
from .fast import attention_cpu, attention_cuda
from .fast import elementwise as elementwise_fast
from .fast import lora as lora_fast
from .fast import loss as loss_fast
from .fast import nf4 as nf4_fast
from .lora import Dropout as Dropout
from .lora import Rebuild as Rebuild
from .lora import frozen_linear as frozen_linear
from .lora import token_numbers as token_numbers
from .lora_parts import RowDropout as RowDropout

_fast = True


def use(which: Literal["fast", "reference"]) -> None:
    """Choose for this process. The fast twins are the default."""
    global _fast
    _fast = which == "fast"


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Causal attention within documents. q: (B, T, H, hd), k, v: (B, T, KV, hd) -> (B, T, H, hd)."""
    module: ModuleType = attention_reference
    if _fast and q.device.type == "cpu" and q.dtype != torch.float64:
        module = attention_cpu
    elif _fast and q.is_cuda and q.dtype != torch.float64:
        module = attention_cuda
    return module.attention(q, k, v, segments)


class Kernels(NamedTuple):
    """The operations of a block with a hand-written backward pass; see `block_parts.py`, `lora_parts.py`, `fp8.py`."""

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
    swiglu_backward_: Callable
    column_dot: Callable
    quantize_fp8: Callable
    dequantize_fp8: Callable
    matmul_fp8: Callable


@lru_cache
def _kernels(is_cuda: bool) -> Kernels:
    names = Kernels._fields
    modules = (block_parts, lora_parts, mlp_backward, fp8)
    if is_cuda:
        from .triton import elementwise as elementwise_triton
        from .triton import fp8 as fp8_triton
        from .triton import lora as lora_triton
        from .triton import mlp_backward as mlp_backward_triton

        modules = (elementwise_triton, lora_triton, mlp_backward_triton, fp8_triton)
    return Kernels(*(next(getattr(m, name) for m in modules if hasattr(m, name)) for name in names))


def kernels(x: Tensor) -> Kernels:
    """The kernels for the device of `x`."""
    return _kernels(_fast and x.device.type == "cuda")


def embedding_from_host(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of a table (V, D) in pinned host memory, for tokens (B, T) on a device -> (B, T, D) on that device."""
    if _fast and tokens.is_cuda:
        from .triton import elementwise as elementwise_triton

        return elementwise_triton.embedding_from_host(tokens, table)
    return F.embedding(tokens.cpu(), table).to(tokens.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension. x: (..., D), weight: (D,), frozen."""
    if not _fast or x.dtype == torch.float64:
        return elementwise.rms_norm(x, weight, eps)
    twins = kernels(x)
    return elementwise_fast.rms_norm(x, weight, eps, twins.rms_norm, twins.rms_norm_backward)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x (B, T, heads, hd) by the angles of cos and sin, (B, T, hd / 2)."""
    return _elementwise(x).apply_rope(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all (..., FF)."""
    return _elementwise(gate).swiglu(gate, up)


def _elementwise(x: Tensor) -> ModuleType:
    return elementwise_fast if _fast and x.dtype != torch.float64 else elementwise


def quantize_nf4(w: Tensor, blocksize: int = nf4.BLOCKSIZE) -> tuple[Tensor, Tensor]:
    """w (n_out, n_in) -> packed (n_out, n_in // 2) uint8, absmax (n_out, n_in // blocksize) float32."""
    return (nf4_fast if _fast else nf4).quantize_nf4(w, blocksize)


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The results of `quantize_nf4` -> (n_out, n_in) of `dtype`."""
    return (nf4_fast if _fast else nf4).dequantize_nf4(packed, absmax, dtype)


def dequantize_into(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    out: Tensor,
    update: tuple[Tensor, Tensor, float] | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Dequantize W, scales included, into `out` (n_out, n_in), which may be rows of a larger buffer.

    Args:
        update: lora_A (r, n_in), lora_B (n_out, r), scaling: writes W + scaling * B A, summed in float32.
        row_scale: (n_out,) float32, with an update only: W's rows are multiplied by it.
    """
    if _fast and out.is_cuda:
        from .triton import nf4 as nf4_triton

        if update is None:
            nf4_triton.dequantize_nf4_double(packed, codes, nested_absmax, nested_offset, out)
        else:
            nf4_triton.dequantize_nf4_merged(packed, codes, nested_absmax, nested_offset, *update, out, row_scale)
        return
    absmax = dequantize_absmax(codes, nested_absmax, nested_offset)
    write_weight(dequantize_nf4(packed, absmax, torch.float32 if update else out.dtype), out, update, row_scale)


def dequantize_ggml_into(
    packed: Tensor,
    ggml_type: str,
    out: Tensor,
    update: tuple[Tensor, Tensor, float] | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """As `dequantize_into`, of W in the blocks of a GGUF file: packed (n_out, bytes of a row) uint8."""
    if _fast and out.is_cuda and out.dtype != torch.float64:
        from .triton import ggml as ggml_triton

        if ggml_type in ggml_triton.TYPES:
            return ggml_triton.dequantize_ggml(packed, ggml_type, out, update, row_scale)
    write_weight(ggml.dequantize(packed, ggml_type, (*out.shape,)), out, update, row_scale)


def write_weight(w: Tensor, out: Tensor, update: tuple[Tensor, Tensor, float] | None, row_scale: Tensor | None) -> None:
    """Write W into `out`, with the update added if there is one; W is float32 then, and overwritten."""
    if update:
        lora_A, lora_B, scaling = update
        w = w if row_scale is None else w * row_scale[:, None]
        w = w.addmm_(lora_B.float(), lora_A.float(), alpha=scaling)
    out.copy_(w)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: absmax float32 -> codes uint8, nested_absmax and nested_offset float32."""
    return (nf4_fast if _fast else nf4).quantize_absmax(absmax)


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The results of `quantize_absmax` -> absmax float32."""
    return (nf4_fast if _fast else nf4).dequantize_absmax(codes, nested_absmax, nested_offset)


def nf4_linear(x: Tensor, packed: Tensor, codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """x W^T for W in four bits, (..., n_in) -> (..., n_out), without gradients."""
    if _fast and x.dtype != torch.float64:
        return nf4_fast.nf4_linear(x, packed, codes, nested_absmax, nested_offset)
    absmax = dequantize_absmax(codes, nested_absmax, nested_offset)
    return F.linear(x, dequantize_nf4(packed, absmax, x.dtype))


def lora_linear(
    x: Tensor, rebuild: Rebuild, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    """y = x W^T + scaling * dropout(x) A^T B^T for a frozen W. x: (B, T, n_in) -> (B, T, n_out)."""
    return (lora_fast if _fast else lora).lora_linear(x, rebuild, lora_A, lora_B, scaling, dropout)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of `token_losses`, (), with a gradient for `hidden`."""
    return (loss_fast if _fast else loss).linear_cross_entropy(hidden, weight, targets)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, (N,), from hidden (N, D), the head (V, D) and targets (N,)."""
    return (loss_fast if _fast else loss).token_losses(hidden, weight, targets)
