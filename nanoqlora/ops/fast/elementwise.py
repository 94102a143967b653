"""The fast twins of `ops/elementwise.py`: backward passes written out, so that autograd keeps and reads less.

Norm and rotation compute in float32 as the references do. SwiGLU works in the dtype it is given; PyTorch's own SiLU is
exact inside, so what is lost against the reference is one rounding of its result.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """The norm and its way back by the kernels of `ops/block_parts.py` or `ops/triton/elementwise.py`; keeps x and
    rstd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, kernels: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = kernels.rms_norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        ctx.kernels = kernels
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor):
        rows, weight, rstd = ctx.saved_tensors
        dx = ctx.kernels.rms_norm_backward(dy.reshape(rows.shape).contiguous(), rows, weight, rstd, None)
        return dx.view(dy.shape), None, None, None


class Rotation(torch.autograd.Function):
    """A rotation; its backward pass turns the other way."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, dy: Tensor):
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`elementwise.apply_rope` with its two halves written straight into the result."""
    y = torch.empty_like(x)
    first, second = x.float().chunk(2, dim=-1)
    left, right = y.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    left.copy_((first * cos).addcmul_(second, sin, value=-1))
    right.copy_((second * cos).addcmul_(first, sin))
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Any) -> Tensor:
    """As `elementwise.rms_norm`, with a gradient for x only. kernels: of the device of x."""
    return RMSNorm.apply(x, weight, eps, kernels)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `elementwise.apply_rope`."""
    return Rotation.apply(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `elementwise.swiglu`."""
    return F.silu(gate) * up
