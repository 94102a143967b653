"""What a block with a hand-written backward pass computes between its matmuls. The reference, in plain PyTorch.

The mathematics is that of `ops/elementwise.py`, without autograd: a forward function also returns what its backward
needs, and backward functions overwrite tensors that are not used afterwards. Batch and time are flattened to N rows.
`ops/triton/elementwise.py` has the twins that a GPU runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .elementwise import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, and the factor 1 / sqrt(...) of every row.

    Args:
        x: (N, D). weight: (D,).
        out: (N, D) to write the first result to, its rows may be slices of wider ones. None allocates it.
    Returns:
        h (N, D) in the dtype of x, rstd (N,) in float32 (float64 from float64).
    """
    y = wide(x)
    rstd = torch.rsqrt(y.square().mean(-1) + eps)
    h = (y * rstd[:, None]).mul_(weight)
    return h.to(x.dtype) if out is None else out.copy_(h), rstd


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta, rounded, and `rms_norm` of it. delta: (N, D), its rows may be slices of wider ones."""
    total = x + delta
    return total, *rms_norm(total, weight, eps, out)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, (N, D). delta: rows may be slices of wider ones."""
    return x + delta


def rms_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of x through the norm, (N, D), and residual if there is one, summed wide and rounded once.

    With xhat = x * rstd and g = dh * weight: dx = rstd * (g - xhat * mean(g * xhat)).
    """
    xhat, g = wide(x) * rstd[:, None], wide(dh) * weight
    mean = (g * xhat).mean(-1, keepdim=True)
    dx = g.sub_(xhat.mul_(mean)).mul_(rstd[:, None])
    return (dx if residual is None else dx.add_(residual)).to(dh.dtype)


def rope_(qkv: Tensor, num_heads: int, head_dim: int, cos: Tensor, sin: Tensor, backward: bool) -> None:
    """Rotate the first `num_heads` heads of every row in place; the columns behind them stay.

    Args:
        qkv: (N, at least num_heads * head_dim), rows may be slices. cos, sin: (N, head_dim / 2).
        backward: rotate by the negative angles.
    """
    heads = qkv[:, : num_heads * head_dim].unflatten(1, (num_heads, head_dim))
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), (-sin if backward else sin).unsqueeze(1)
    a, b = wide(first), wide(second)
    rotated = a * cos - b * sin
    second.copy_(b * cos + a * sin)
    first.copy_(rotated)


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of q, k and v before `rope_`, side by side.

    Args:
        dq, dk, dv: (B, T, heads, hd), in any memory order.
    Returns:
        (B * T, heads of all three * hd).
    """
    dqkv = torch.cat([d.flatten(2) for d in (dq, dk, dv)], dim=2).flatten(0, 1)
    rope_(dqkv, dq.shape[2] + dk.shape[2], dq.shape[3], cos, sin, backward=True)
    return dqkv


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) * up. gate_up: (N, 2 FF), gate first -> (N, FF), written to `out` if given; rows may be slices."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.mul(F.silu(gate), up, out=out)


def swiglu_backward_(dact: Tensor, gate_up: Tensor) -> None:
    """Backward of `swiglu` in place: gate_up becomes its gradient, dact becomes act, recomputed.

    Args:
        dact: (N, FF). gate_up: (N, 2 FF). Rows may be slices of wider ones.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    dsilu = dact * up
    up_now = up * silu  # act
    up.copy_(dact.mul_(silu))
    dact.copy_(up_now)
    gate.copy_(torch.ops.aten.silu_backward(dsilu, gate))
