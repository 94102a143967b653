"""The Triton twin of `ops/nf4.py`'s dequantization: from four bits to weights in one launch, scales included.

A frozen weight is dequantized before every matmul and dropped after it, so this must take no longer than its memory
traffic: half a byte read and two written per weight. Both quantizations are inverted in registers,

    absmax = dynamic_level[code] * nested_absmax + nested_offset        w = nf4_level[nibble] * absmax

and only the weights are written. Three choices keep the arithmetic below the time of the memory traffic:

- Eight nibbles are loaded as one 32-bit word and become eight neighbouring bfloat16 numbers, which are 16 bytes: the
  widest store of a thread, and no thread needs another thread's result.
- The 16 levels are looked up in shared memory (`tl.gather`): one shift, one mask and one load per weight. The 16 words
  are in 16 different banks, so threads that need different levels do not wait for each other. A tree of comparisons
  would take 15 instructions per weight, at half the rate of a multiplication: longer than the memory traffic.
- A program starts at a multiple of its number of groups, which divides 256: all its scales share one nested scale.

**Bits.** The result equals the reference's bit for bit. Only absmax could differ: compilers fuse the multiplication and
the addition into one instruction with one rounding, while the reference rounds twice. `enable_fp_fusion=False` forbids
that (in the PTX `mul.rn` and `add.rn`, which the assembler must not fuse).

A group is 64 weights that share a scale; the kernels call it block, as `blocksize` does.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import nf4
from .elementwise import Launch

DEQUANTIZE = Launch(4096, 4)  # for the weights of an 8B model on an H100: four 16-byte stores per thread
MERGED = {torch.bfloat16: (64, 128, 4), torch.float32: (16, 64, 4)}  # rows and columns of a tile, warps


def dequantize_nf4_double(
    packed: Tensor, codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, out: Tensor
) -> None:
    """Dequantize a matrix and its scales: `dequantize_nf4(packed, dequantize_absmax(...), out.dtype)`.

    Args:
        packed: (n_out, n_in // 2) uint8, contiguous; n_in is a multiple of 64.
        codes: (n_out, n_in // 64) uint8, contiguous. nested_absmax: (ceil(n_out n_in / 64 / 256),) float32.
        nested_offset: () float32.
        out: (n_out, n_in) in bfloat16 or float32, is written. It may be a part of a larger buffer, with contiguous
            columns; stores have their full width if its row stride is a multiple of 16.
    """
    n_out, n_in = check_shapes(packed, codes, out)
    blocks = DEQUANTIZE.tile // nf4.BLOCKSIZE
    assert nf4.NESTED_BLOCKSIZE % blocks == 0, "a program loads one nested scale"
    dequantize_kernel[(triton.cdiv(codes.numel(), blocks),)](
        *(packed.view(torch.int32), codes, nested_absmax, nested_offset),
        *(nf4_levels(packed.device), nf4.dynamic_levels(packed.device), out),
        *(codes.numel(), out.stride(0)),
        BLOCKS_PER_ROW=n_in // nf4.BLOCKSIZE,
        BLOCKS=blocks,
        num_warps=DEQUANTIZE.num_warps,
        enable_fp_fusion=False,  # see "Bits" above
    )


def dequantize_nf4_merged(
    packed: Tensor,
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    out: Tensor,
    row_scale: Tensor | None = None,
) -> None:
    """W + scaling * B A: added in float32, rounded once. Without dropout this matrix is the complete layer.

    Args:
        lora_A: (r, n_in). lora_B: (n_out, r), of the same dtype, rows may be slices. bfloat16 uses the tensor cores and
            adds 2 r operations per weight, which overlap with the memory traffic; float32 is exact and slow.
        row_scale: (n_out,) float32, DoRA's: W's rows are multiplied by it.
        the others: as in `dequantize_nf4_double`.
    """
    n_out, n_in = check_shapes(packed, codes, out)
    r = lora_A.shape[0]
    assert lora_A.shape == (r, n_in) and lora_B.shape == (n_out, r) and lora_A.dtype == lora_B.dtype
    assert lora_A.stride(1) == lora_B.stride(1) == 1
    rows, columns, num_warps = MERGED[lora_A.dtype]
    dequantize_merged_kernel[(triton.cdiv(n_in, columns), triton.cdiv(n_out, rows))](
        *(packed.view(torch.int32), codes, nested_absmax, nested_offset),
        *(nf4_levels(packed.device), nf4.dynamic_levels(packed.device), lora_A, lora_B, scaling, out, row_scale),
        *(n_out, out.stride(0), lora_A.stride(0), lora_B.stride(0), r),
        N_IN=n_in,
        RANK=max(16, triton.next_power_of_2(r)),  # tensor cores need at least 16
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def check_shapes(packed: Tensor, codes: Tensor, out: Tensor) -> tuple[int, int]:
    """n_out and n_in, after a check of the shapes. Kernels compute offsets in 32 bits."""
    n_out, n_in = out.shape
    assert packed.shape == (n_out, n_in // 2) and codes.shape == (n_out, n_in // nf4.BLOCKSIZE)
    assert n_in % nf4.BLOCKSIZE == 0 and out.stride(1) == 1 and n_out * out.stride(0) < 2**31
    assert packed.is_contiguous() and codes.is_contiguous()
    return n_out, n_in


@lru_cache
def nf4_levels(device: torch.device) -> Tensor:
    return nf4.NF4_LEVELS.to(device)


@triton.jit
def look_up(words, levels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """words (ROWS, COLUMNS / 8) int32 -> their `levels` (16,), as (ROWS, COLUMNS) in the order of the weights."""
    # The lowest byte comes first, and in each byte the upper nibble: bits 4, 0, 12, 8, 20, 16, 28, 24.
    shift = (tl.arange(0, 8) * 4) ^ 4
    nibbles = (words[:, :, None] >> shift[None, None, :]) & 15  # & also removes the copies of the sign bit
    return tl.gather(levels, nibbles.reshape(ROWS * COLUMNS), 0).reshape(ROWS, COLUMNS)


@triton.jit
def dequantize_kernel(
    words_ptr,
    codes_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nf4_levels_ptr,
    dynamic_levels_ptr,
    out_ptr,
    num_blocks,
    row_stride,
    BLOCKS_PER_ROW: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    start = tl.program_id(0) * BLOCKS
    block = start + tl.arange(0, BLOCKS)  # a group of 64 weights, counted over the complete matrix
    inside = block < num_blocks
    words = tl.load(words_ptr + block[:, None] * 8 + tl.arange(0, 8)[None, :], mask=inside[:, None], other=0)
    code = tl.load(codes_ptr + block, mask=inside, other=0).to(tl.int32)
    nested_absmax = tl.load(nested_absmax_ptr + start // 256)
    absmax = tl.load(dynamic_levels_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)
    levels = tl.load(nf4_levels_ptr + tl.arange(0, 16))
    w = look_up(words, levels, BLOCKS, 64) * absmax[:, None]  # (BLOCKS, 64)
    row = block // BLOCKS_PER_ROW
    place = row * row_stride + (block - row * BLOCKS_PER_ROW) * 64
    tl.store(out_ptr + place[:, None] + tl.arange(0, 64)[None, :], w, mask=inside[:, None])


@triton.jit
def dequantize_merged_kernel(
    words_ptr,
    codes_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nf4_levels_ptr,
    dynamic_levels_ptr,
    lora_A_ptr,
    lora_B_ptr,
    scaling,
    out_ptr,
    row_scale_ptr,
    n_out,
    row_stride,
    A_stride,
    B_stride,
    r,
    N_IN: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    real_row, real_column, real_rank = row < n_out, column < N_IN, rank < r

    A = tl.load(
        lora_A_ptr + rank[:, None] * A_stride + column[None, :], mask=real_rank[:, None] & real_column, other=0.0
    )
    B = tl.load(lora_B_ptr + row[:, None] * B_stride + rank[None, :], mask=real_row[:, None] & real_rank, other=0.0)
    update = tl.dot(B, A, input_precision="ieee")  # (ROWS, COLUMNS) float32

    word = tl.program_id(0) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    words = tl.load(
        words_ptr + row[:, None] * (N_IN // 8) + word[None, :],
        mask=real_row[:, None] & (word < N_IN // 8)[None, :],
        other=0,
    )
    block_column = tl.program_id(0) * (COLUMNS // 64) + tl.arange(0, COLUMNS // 64)
    block = row[:, None] * (N_IN // 64) + block_column[None, :]  # (ROWS, COLUMNS / 64)
    inside = real_row[:, None] & (block_column < N_IN // 64)[None, :]
    code = tl.load(codes_ptr + block, mask=inside, other=0).to(tl.int32)
    nested_absmax = tl.load(nested_absmax_ptr + block // 256, mask=inside, other=0.0)
    absmax = tl.load(dynamic_levels_ptr + code) * nested_absmax + tl.load(nested_offset_ptr)
    absmax = tl.broadcast_to(absmax[:, :, None], (ROWS, COLUMNS // 64, 64)).reshape(ROWS, COLUMNS)

    levels = tl.load(nf4_levels_ptr + tl.arange(0, 16))
    w = look_up(words, levels, ROWS, COLUMNS) * absmax
    if row_scale_ptr is not None:
        w *= tl.load(row_scale_ptr + row, mask=real_row, other=0.0)[:, None]
    place = row[:, None] * row_stride + column[None, :]
    tl.store(out_ptr + place, w + scaling * update, mask=real_row[:, None] & real_column[None, :])
