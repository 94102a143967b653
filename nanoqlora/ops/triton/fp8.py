"""The Triton twins of `ops/fp8.py`; the matmul is PyTorch's own, with a scale per row of both operands.

For 8B and 8,192 tokens on an H200, forward and backward of a block: dequantization takes 0.36 ms where bfloat16 takes
0.82, quantizing x and dy 0.5 ms, and the matmuls 6.0 ms where bfloat16 takes 11.0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import fp8, nf4
from .nf4 import look_up, nf4_levels

TILE = 128, 64, 4  # outputs, inputs, warps of a program of `dequantize_fp8`
CHUNK, WARPS = 4096, 8  # columns that a program of `quantize_fp8` reads at a time, and its warps; twice for wide rows


@triton.jit
def power_of_two(largest):
    """As `fp8.power_of_two`."""
    bits = (tl.maximum(largest, 1e-30) / 448.0).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


def quantize_fp8(
    x: Tensor, beside: Tensor | None = None, factor: Tensor | None = None, width: int = 0
) -> tuple[Tensor, Tensor]:
    """As `fp8.quantize_fp8`."""
    (N, K), R = x.shape, 0 if beside is None else beside.shape[1]
    width = max(width, K + R)
    wide = 1 + (K > 2 * CHUNK)  # fewer rows at a time, which the cache can hold until they are read again
    out, scale = x.new_empty(N, width, dtype=fp8.E4M3), x.new_empty(N, 1, dtype=torch.float32)
    quantize_kernel[(N,)](
        *(x, beside, factor, out, scale),
        *(x.stride(0), 0 if beside is None else beside.stride(0), R, width),
        K=K,
        CHUNK=wide * CHUNK,
        SIDE=triton.next_power_of_2(max(width - K, 1)),
        num_warps=wide * WARPS,
    )
    return out, scale


@triton.jit
def quantize_kernel(
    x_ptr, beside_ptr, factor_ptr, out_ptr, scale_ptr, x_stride, beside_stride, R, width,
    K: tl.constexpr, CHUNK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """A row is read twice, for its largest value and to be rounded; the second time it comes from the cache."""
    row, column, side = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK), tl.arange(0, SIDE)
    x_ptr, out_ptr = x_ptr + row * x_stride, out_ptr + row * width
    largest = tl.full((CHUNK,), 0.0, tl.float32)
    for first in range(0, K, CHUNK):
        largest = tl.maximum(largest, tl.abs(scaled(x_ptr, factor_ptr, first + column, K)))
    amax = tl.max(largest)
    if beside_ptr is not None:
        beside = tl.load(beside_ptr + row * beside_stride + side, mask=side < R, other=0.0).to(tl.float32)
        if factor_ptr is not None:
            beside *= tl.load(factor_ptr + K + side, mask=side < R, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(beside)))
    scale = power_of_two(amax)
    tl.store(scale_ptr + row, scale)
    inverse = 1 / scale  # a power of two as well
    for first in range(0, K, CHUNK):
        x = scaled(x_ptr, factor_ptr, first + column, K)
        tl.store(out_ptr + first + column, (x * inverse).to(tl.float8e4nv), mask=first + column < K)
    if beside_ptr is None:
        beside = tl.full((SIDE,), 0.0, tl.float32)
    tl.store(out_ptr + K + side, (beside * inverse).to(tl.float8e4nv), mask=K + side < width)


@triton.jit
def scaled(x_ptr, factor_ptr, column, K: tl.constexpr):
    x = tl.load(x_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        x *= tl.load(factor_ptr + column, mask=column < K, other=0.0).to(tl.float32)
    return x


def dequantize_fp8(
    packed: Tensor, codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, out: Tensor, scale: Tensor
) -> None:
    """As `fp8.dequantize_fp8`."""
    n_out, n_in = out.shape
    rows, columns, num_warps = TILE
    dequantize_kernel[(n_in // columns, triton.cdiv(n_out, rows))](
        *(packed.view(torch.int32), codes, nested_absmax, nested_offset, nf4.dynamic_levels(packed.device)),
        *(nf4_levels(packed.device), scale, out, n_out, *out.stride()),
        N_IN=n_in,
        ROWS=rows,
        COLUMNS=columns,
        TRANSPOSED=out.stride(0) == 1,
        num_warps=num_warps,
    )


@triton.jit
def dequantize_kernel(
    words_ptr, codes_ptr, nested_absmax_ptr, nested_offset_ptr, dynamic_levels_ptr, nf4_levels_ptr, scale_ptr, out_ptr,
    n_out, row_stride, column_stride,
    N_IN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    real = (row < n_out)[:, None]
    words = tl.load(words_ptr + row[:, None] * (N_IN // 8) + word[None, :], mask=real, other=0)
    group = row[:, None] * (N_IN // 64) + tl.program_id(0) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)[None, :]
    code = tl.load(codes_ptr + group, mask=real, other=0).to(tl.int32)
    nested_absmax = tl.load(nested_absmax_ptr + group // 256, mask=real, other=0.0)
    absmax = tl.load(dynamic_levels_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)
    absmax /= tl.load(scale_ptr)
    absmax = tl.broadcast_to(absmax[:, :, None], (ROWS, COLUMNS // 64, 64)).reshape(ROWS, COLUMNS)
    levels = tl.load(nf4_levels_ptr + tl.arange(0, 16))
    w = (look_up(words, levels, ROWS, COLUMNS) * absmax).to(tl.float8e4nv)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        tl.store(out_ptr + column[:, None] * column_stride + row[None, :], tl.trans(w), mask=(row < n_out)[None, :])
    else:
        tl.store(out_ptr + row[:, None] * row_stride + column[None, :], w, mask=real)


def matmul_fp8(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `fp8.matmul_fp8`. Its fast accumulation keeps 14 bits of a sum, which is 0.4 % off over 28,672 products."""
    return torch._scaled_mm(x, w.t(), scale_a=x_scale, scale_b=w_scale[None], out_dtype=dtype, use_fast_accum=True)
