"""Half-precision numbers and codes of a few bits, in and out of bytes."""

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
