"""Matmuls over a frozen 4-bit weight in fp8, which a GPU multiplies twice as fast as bfloat16. The reference.

e4m3 has 4 significant bits, values up to 448, and the smallest with all its bits is 2^-6. So an operand is divided by a
scale first: each row of x or dy by its own, a weight by one. All scales are powers of two, which round nothing, so it
does not matter for the bits of a value how far it is from the largest, as long as that is less than 2^14.

    y  = x W^T       the matmul sums along rows of both operands:     x (N, n_in), W (n_out, n_in)
    dx = dy W                                                         dy (N, n_out), W^T (n_in, n_out)

W is rounded to the same fp8 values in both. LoRA's part is in the same matmul: x is [x, xa] and W is [W, s B], or dy is
[dy, dxa] and W^T is [W^T, A^T]: `fast/projections.py`. Sums are in float32.

On N(0, 1) inputs and weights each rounding is 2.6 % off, and a result 3.75 % (Frobenius norm); NF4 itself is 9 % off.
"""

import torch
from torch import Tensor

from . import nf4

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def power_of_two(largest: Tensor) -> Tensor:
    """The smallest power of two by which values up to `largest` (float32) are divided to be values of e4m3."""
    bits = (largest.clamp(min=1e-30) / LARGEST).view(torch.int32)
    return (bits + 0x7FFFFF & 0x7F800000).view(torch.float32)  # the exponent, one higher if the mantissa is not zero


def quantize_fp8(
    x: Tensor, beside: Tensor | None = None, factor: Tensor | None = None, width: int = 0
) -> tuple[Tensor, Tensor]:
    """[x, beside, 0] * factor, each row divided by its scale and rounded.

    Args:
        x: (N, K), any float dtype, rows may be slices of wider ones. beside: (N, R), likewise.
        factor: (width,), multiplies the columns. width: columns of the result, at least K + R; 0: K + R.
    Returns:
        (N, width) e4m3, and the scales (N, 1) float32.
    """
    both = x.float() if beside is None else torch.cat([x, beside], 1).float()
    both = torch.nn.functional.pad(both, (0, max(width, both.shape[1]) - both.shape[1]))
    both = both if factor is None else both * factor
    scale = power_of_two(both.abs().amax(1, keepdim=True))
    return (both / scale).to(E4M3), scale


def dequantize_fp8(
    packed: Tensor, codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, out: Tensor, scale: Tensor
) -> None:
    """From four bits to eight: W / scale, rounded.

    Args:
        packed, codes, nested_absmax, nested_offset: W as in `dequantize_into`.
        out: (n_out, n_in) e4m3, is written; its rows or its columns are contiguous.
        scale: () float32, a power of two.
    """
    w = nf4.dequantize_nf4(packed, nf4.dequantize_absmax(codes, nested_absmax, nested_offset))
    out.copy_((w / scale).to(E4M3))


def matmul_fp8(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(x x_scale) (w w_scale)^T, summed in float32.

    Args:
        x: (N, K) e4m3, x_scale: (N, 1) float32. w: (n_out, K) e4m3, w_scale: (n_out,) float32.
    Returns:
        (N, n_out) of `dtype`.
    """
    return ((x.float() @ w.float().t()) * x_scale * w_scale).to(dtype)
