"""The fast twins of `ops/nf4.py`: bitsandbytes' kernels, same names, same shapes, same bits.

The codes of the second quantization differ from the reference by one level in about one scale of a thousand, because
bitsandbytes searches the nearest level in a coarser way. Dequantization gives the same bits.
"""

import logging
from functools import cache
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from .. import nf4


@cache
def kernels() -> ModuleType:
    """bitsandbytes' operations. Imported at the first use, without the compiler, whose import takes 2.5 s.

    It is for functions of bitsandbytes that have no kernel of their own on a device; they then run as they are.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional parts that are not used here
    with patch.object(torch, "compile", lambda function=None, **_: function or (lambda inner: inner)):
        import bitsandbytes  # noqa: F401  (the import registers the operations)

    return torch.ops.bitsandbytes


def quantize_nf4(w: Tensor, blocksize: int = nf4.BLOCKSIZE) -> tuple[Tensor, Tensor]:
    """As `nf4.quantize_nf4`."""
    if w.shape[1] % blocksize or w.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return nf4.quantize_nf4(w, blocksize)
    if w.is_meta:  # the operations below would import the compiler
        n_out, n_in = w.shape
        absmax = w.new_empty(n_out, n_in // blocksize, dtype=torch.float32)
        return w.new_empty(n_out, n_in // 2, dtype=torch.uint8), absmax
    packed, absmax = kernels().quantize_4bit(w.contiguous(), blocksize, "nf4", torch.uint8)
    return packed.view(w.shape[0], -1), absmax.view(w.shape[0], -1)


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `nf4.dequantize_nf4`."""
    n_out, n_in = packed.shape[0], packed.shape[1] * 2
    blocksize = n_in // absmax.shape[1]
    if dtype == torch.float64:
        return nf4.dequantize_nf4(packed, absmax, dtype)
    return kernels().dequantize_4bit(packed.view(-1, 1), absmax.view(-1), blocksize, "nf4", [n_out, n_in], dtype)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `nf4.quantize_absmax`."""
    if absmax.is_meta:
        num_nested = -(-absmax.numel() // nf4.NESTED_BLOCKSIZE)
        return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty(num_nested), absmax.new_empty(())
    offset = absmax.mean()
    levels = nf4.dynamic_levels(absmax.device)
    codes, nested_absmax = kernels().quantize_blockwise(absmax.flatten() - offset, levels, nf4.NESTED_BLOCKSIZE)
    return codes.view_as(absmax), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """As `nf4.dequantize_absmax`."""
    levels = nf4.dynamic_levels(codes.device)
    scales = kernels().dequantize_blockwise(codes.flatten(), nested_absmax, levels, nf4.NESTED_BLOCKSIZE, torch.float32)
    return (scales + nested_offset).view_as(codes)


def nf4_linear(x: Tensor, packed: Tensor, codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """As `ops.nf4_linear`. A GPU multiplies a few rows without writing W to memory, and dequantizes it for more."""
    scales = codes.flatten(), nf4.dynamic_levels(codes.device), nested_offset
    shape, blocksize = [packed.shape[0], packed.shape[1] * 2], packed.shape[1] * 2 // codes.shape[1]
    return kernels().gemm_4bit(x, packed.view(-1, 1), shape, nested_absmax, blocksize, "nf4", None, *scales)
