"""What a block with a hand-written backward pass computes between its matrix products. The reference, in plain PyTorch.

The mathematics is that of `elementwise.py`, cut differently: a forward function also gives what its backward needs,
and backward functions write over tensors that nobody needs afterwards. Nothing here knows autograd. Batch and time
are flattened to N rows. `elementwise_triton.py` has the twins that a GPU runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, and the factor 1 / sqrt(...) of every row.

    Args:
        x: (N, D). weight: (D,).
    Returns:
        h (N, D) in the dtype of x, rstd (N,) in float32 (float64 from float64).
    """
    y = wide(x)
    rstd = torch.rsqrt(y.square().mean(-1) + eps)
    return (y * rstd[:, None]).mul_(weight).to(x.dtype), rstd


def rms_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor) -> Tensor:
    """residual + the gradient of x through the norm, (N, D), summed wide and rounded once; written over `dh`.

    With xhat = x * rstd and g = dh * weight: dx = rstd * (g - xhat * mean(g * xhat)).
    """
    xhat, g = wide(x) * rstd[:, None], wide(dh) * weight
    mean = (g * xhat).mean(-1, keepdim=True)
    return dh.copy_(g.sub_(xhat.mul_(mean)).mul_(rstd[:, None]).add_(residual))


def rope_(qkv: Tensor, num_heads: int, head_dim: int, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """Rotate the first `num_heads` heads of every row in place; the columns behind them stay.

    Args:
        qkv: (N, at least num_heads * head_dim), rows may be slices. cos, sin: (N, head_dim / 2).
        backward: turn the other way.
    """
    heads = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), (-sin if backward else sin).unsqueeze(1)
    a, b = wide(first), wide(second)
    turned = a * cos - b * sin
    second.copy_(b * cos + a * sin)
    first.copy_(turned)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up. gate_up: (N, 2 FF), gate first -> (N, FF)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_backward_(dact: Tensor, gate_up: Tensor) -> None:
    """Backward of `swiglu` in place: gate_up becomes its gradient, dact becomes act, made again.

    Args:
        dact: (N, FF). gate_up: (N, 2 FF).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    dsilu = dact * up
    up_now = up * silu  # act
    up.copy_(dact.mul_(silu))
    dact.copy_(up_now)
    gate.copy_(torch.ops.aten.silu_backward(dsilu, gate))
