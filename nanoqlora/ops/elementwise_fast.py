"""The fast twins of `elementwise.py`: backward passes written out, so that autograd keeps and reads less.

Norm and rotation compute in float32 as the references do. SwiGLU works in the dtype it is given; PyTorch's own SiLU is
exact inside, so what is lost against the reference is one rounding of its result.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """y = xhat * w with xhat = x / sqrt(mean(x^2) + eps); dx = (g - xhat * mean(g * xhat)) / sqrt(...), g = dy * w."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight, rstd = ctx.saved_tensors
        xhat, g = x.float() * rstd, dy.float() * weight
        mean = (g * xhat).mean(-1, keepdim=True)
        return g.sub_(xhat.mul_(mean)).mul_(rstd).to(x.dtype), None, None


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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `elementwise.rms_norm`, with a gradient for x only."""
    return RMSNorm.apply(x, weight, eps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `elementwise.apply_rope`."""
    return Rotation.apply(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As `elementwise.swiglu`."""
    return F.silu(gate) * up
