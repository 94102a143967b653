"""The fast twins of `ops/elementwise.py`: hand-written backward passes, so that autograd saves and reads less.

Norm and RoPE compute in float32 as the references do. SwiGLU computes in the dtype of its input; PyTorch's own SiLU
computes in float32 inside, so the difference from the reference is one more rounding of its result.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """The norm by `forward` and `backward` of `ops/block_parts.py` or `ops/triton/elementwise.py`. Saves x and rstd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, forward: Callable, backward: Callable) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.norm_backward = backward
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):
        rows, weight, rstd = ctx.saved_tensors
        dx = ctx.norm_backward(dy.reshape(rows.shape).contiguous(), rows, weight, rstd, None)
        return dx.view(dy.shape), None, None, None, None


class Rotation(torch.autograd.Function):
    """RoPE; its backward pass rotates by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`elementwise.apply_rope` with both halves written directly to the result."""
    y = torch.empty_like(x)
    first, second = x.float().chunk(2, dim=-1)
    left, right = y.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    left.copy_((first * cos).addcmul_(second, sin, value=-1))
    right.copy_((second * cos).addcmul_(first, sin))
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, forward: Callable, backward: Callable) -> Tensor:
    """As `elementwise.rms_norm`, with a gradient for x only.

    Args:
        forward, backward: `rms_norm` and `rms_norm_backward` of `ops/block_parts.py`, or their twins.
    """
    return RMSNorm.apply(x, weight, eps, forward, backward)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `elementwise.apply_rope`."""
    return Rotation.apply(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `elementwise.swiglu`."""
    return F.silu(gate) * up
