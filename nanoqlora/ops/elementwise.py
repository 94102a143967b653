"""What is computed between the matmuls: RMSNorm, RoPE, SwiGLU. The reference, in plain PyTorch.

Each computes in float32 (float64 for float64) and rounds once, at the end: in bfloat16 a sum of squares over
thousands of dimensions would have two correct digits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: (..., D), weight: (D,)."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of dimensions (i, i + hd/2) of every head by its token's angle.

    Args:
        x: (B, T, heads, hd). cos, sin: (B, T, hd / 2) of the angles.
    """
    first, second = wide(x).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)  # the same for every head
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)). All (..., FF)."""
    return (F.silu(wide(gate)) * wide(up)).to(gate.dtype)
