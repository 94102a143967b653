"""Numbers with the bits that C gives them: sums, roots, rounding; half precision and codes of a few bits as bytes."""

import numpy as np
import torch
from torch import Tensor


def to_half(x: Tensor) -> Tensor:
    """(n, k) float32 -> (n, 2k) bytes, rounded to the nearest half, ties to even."""
    return x.to(torch.float16).view(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """(..., 2k) codes, of which only the low four bits are kept -> (..., k) bytes."""
    low, high = (codes & 15).chunk(2, dim=-1)
    return low | high << 4


def pack_bits(bits: Tensor) -> Tensor:
    """(n, 32) zeros and ones -> (n, 4) bytes, lowest bit first."""
    # As numbers of 64 bits: multiplying moves bit i of the result, which is the lowest of byte i, to place 56 + i.
    return (bits.contiguous().view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def divide(x: Tensor, divisor: int) -> Tensor:
    """x / divisor. For a plain number CUDA would multiply by its rounded reciprocal, which can be an ulp off."""
    return x / x.new_tensor(divisor)


def sum_in_order(terms: Tensor) -> Tensor:
    """((t0 + t1) + t2) + ... along the first dimension. `torch.sum` adds in an order of its own, and rounds otherwise.

    Args:
        terms: (P, ..., n) float32, contiguous.
    """
    if terms.shape[-1] == 1:  # numpy would see one long row, and add it in pairs
        return sum_in_order(terms.expand(*terms.shape[:-1], 2).contiguous())[..., :1]
    if terms.device.type == "cpu":
        return torch.from_numpy(np.add.reduce(terms.numpy(), axis=0))  # in order along any axis but the last; one call
    first, *rest = terms.unbind(0)
    total = first.clone()
    for row in rest:
        total += row
    return total


def nearest(y: Tensor) -> Tensor:
    """Round to integers, halves to even. Infinite and NaN, of groups with next to no weight, become 0 as in C."""
    return y.nan_to_num(nan=0, posinf=0, neginf=0).round_()


def first_extreme(x: Tensor, dim: int) -> Tensor:
    """The number of largest magnitude along a dimension of a matrix, with its sign; of equals the first. Keeps dim."""
    high, low = x.amax(dim, keepdim=True), x.amin(dim, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    where = (high == -low).flatten().nonzero()[:, 0]
    if len(where):  # only there it matters which stands first
        tied = x.index_select(1 - dim, where)
        extreme.index_copy_(1 - dim, where, tied.gather(dim, tied.abs().max(dim, keepdim=True).indices))
    return extreme


def first_least(x: Tensor, dim: int) -> Tensor:
    """The smallest number along a dimension of a matrix. Of 0.0 and -0.0 the first, as in C; keeps dim."""
    least = x.amin(dim, keepdim=True)
    return torch.where(least == 0, x.min(dim, keepdim=True).values, least) if (least == 0).any() else least


def root(x: Tensor) -> Tensor:
    """The square root. Through float64: torch's float32 one on a CPU may be off in the last bit, and this may not."""
    return x.double().sqrt_().float()
