"""The fast twin of `ops/lora.py`: one autograd node for the complete layer.

It saves x and the small x A^T for the backward pass, adds the update to y and dx within the matmul (addmm) instead of
in a second pass over them, casts A and B once, and computes the gradient of x only where it is needed.
"""

import torch
from torch import Tensor

from ..lora import Dropout, Rebuild


class LoRALinear(torch.autograd.Function):
    """The equations are in the docstring of `ops/lora.py`; here each is one matmul."""

    @staticmethod
    def forward(
        ctx, x: Tensor, rebuild: Rebuild, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None
    ) -> Tensor:
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (N, n_in)
        dropped = rows if dropout is None else (x * dropout.mask(x)).to(x.dtype).view_as(rows)
        xa = dropped @ A.t()  # (N, r)
        y = rows @ rebuild(x.dtype).t()  # (N, n_out)
        y.addmm_(xa, B.t(), alpha=scaling)
        ctx.save_for_backward(x, xa, A, B)
        ctx.rebuild, ctx.scaling, ctx.dropout = rebuild, scaling, dropout
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, xa, A, B = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        mask = None if ctx.dropout is None else ctx.dropout.mask(x).view_as(rows)
        dxa = (dy @ B).mul_(ctx.scaling)  # (N, r)
        dB = (dy.t() @ xa).float().mul_(ctx.scaling)
        dA = (dxa.t() @ (rows if mask is None else (rows * mask).to(x.dtype))).float()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ctx.rebuild(dy.dtype)  # (N, n_in)
            dx = dx.addmm_(dxa, A) if mask is None else dx.add_((dxa @ A) * mask)
            dx = dx.view_as(x)
        return dx, None, dA, dB, None, None


def lora_linear(
    x: Tensor, rebuild: Rebuild, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    """As `lora.lora_linear`."""
    return LoRALinear.apply(x, rebuild, lora_A, lora_B, scaling, dropout)
