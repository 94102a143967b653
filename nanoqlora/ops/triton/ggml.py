"""The Triton twin of `ops/ggml.py`: from the blocks of a GGUF file to weights in one launch, the update added.

As for NF4 (`nf4.py`), a frozen weight is rebuilt before every matmul and dropped after it. One kernel serves all
formats, because they differ in two things only:

- Where the bits of a code are. The first WIDTH codes of a block are the lowest bits of WIDTH bytes, the next WIDTH are
  the bits above in the same bytes, and so on; then come other bytes. A format has one or two such PARTs: low bits, and
  bits that are put above them.
- How a group of 16 or 32 weights gets its scale, and in some formats its minimum: `scales_of`.

A tile of weights loads one byte for each, of which neighbours need neighbouring ones; what it reads twice comes from
the L1 cache. All arithmetic is in float32 and without fused multiply-adds, so the weights equal the reference's bit for
bit.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ggml
from .nf4 import MERGED

PLAIN = 16, 256, 4  # rows and columns of a tile, warps: four 16-byte stores per thread


class Format(NamedTuple):
    """What the kernel knows of a type, as it names it."""

    GROUP: int  # weights that share a scale
    LOW: tuple[int, int, int]  # first byte, WIDTH, bits of a code
    HIGH: tuple[int, int, int] = (0, 1, 0)
    MIDDLE: int = 0  # the code that stands for 0


TYPES = {
    "Q4_0": Format(32, (2, 16, 4), MIDDLE=8),
    "Q4_1": Format(32, (4, 16, 4)),
    "Q5_0": Format(32, (6, 16, 4), (2, 1, 1), MIDDLE=16),
    "Q5_1": Format(32, (8, 16, 4), (4, 1, 1)),
    "Q8_0": Format(32, (2, 32, 8)),
    "Q2_K": Format(16, (16, 32, 2)),
    "Q3_K": Format(16, (32, 32, 2), (0, 32, 1), MIDDLE=4),
    "Q4_K": Format(32, (16, 32, 4)),
    "Q5_K": Format(32, (48, 32, 4), (16, 32, 1)),
    "Q6_K": Format(16, (0, 64, 4), (128, 32, 2), MIDDLE=32),
    "IQ4_NL": Format(32, (2, 16, 4)),
    "IQ4_XS": Format(32, (8, 16, 4)),
}


def dequantize_ggml(
    packed: Tensor,
    ggml_type: str,
    out: Tensor,
    update: tuple[Tensor, Tensor, float] | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Write W, or with an update W + scaling * B A: added in float32, rounded once.

    Args:
        packed: (n_out, bytes of a row) uint8, contiguous.
        out: (n_out, n_in) in bfloat16 or float32; it may be a part of a larger buffer, with contiguous columns.
        update, row_scale: as in `nf4.dequantize_nf4_merged`.
    """
    (n_out, n_in), (size, num_bytes, _), r = out.shape, ggml.layout(ggml_type), len(update[0]) if update else 0
    assert packed.shape == (n_out, n_in // size * num_bytes) and n_in % size == 0 and packed.is_contiguous()
    assert out.stride(1) == 1 and max(n_out * out.stride(0), packed.numel()) < 2**31  # offsets have 32 bits
    A, B, scaling = update or (out[:0], out[:, :0], 0.0)
    assert A.shape == (r, n_in) and B.shape == (n_out, r) and A.dtype == B.dtype and A.stride(1) == B.stride(1) == 1
    rows, columns, num_warps = MERGED[A.dtype] if update else PLAIN
    sizes = {"N_IN": n_in, "SIZE": size, "BYTES": num_bytes, "ROWS": rows, "COLUMNS": columns}
    dequantize_kernel[(triton.cdiv(n_in, columns), triton.cdiv(n_out, rows))](
        *(packed, packed.view(torch.float16), values(packed.device), A, B, scaling, out, row_scale),
        *(n_out, out.stride(0), A.stride(0), B.stride(0), r),
        TYPE=ggml_type,
        RANK=max(16, triton.next_power_of_2(r)) if r else 0,  # tensor cores need at least 16
        num_warps=num_warps,
        enable_fp_fusion=False,
        **sizes,
        **TYPES[ggml_type]._asdict(),
    )


@lru_cache
def values(device: torch.device) -> Tensor:
    return torch.tensor(ggml.VALUES, dtype=torch.float32, device=device)


@triton.jit
def load_byte(bytes_ptr, place, inside):
    return tl.load(bytes_ptr + place, mask=inside, other=0).to(tl.int32)


@triton.jit
def load_half(halves_ptr, place, inside):
    return tl.load(halves_ptr + place // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def bits_of(bytes_ptr, start, j, inside, PART: tl.constexpr):
    """The bits of code j of the block whose bytes begin at `start`, as PART has them."""
    OFFSET: tl.constexpr = PART[0]
    WIDTH: tl.constexpr = PART[1]
    BITS: tl.constexpr = PART[2]
    PIECE: tl.constexpr = WIDTH * 8 // BITS
    byte = load_byte(bytes_ptr, start + (OFFSET + j // PIECE * WIDTH + j % WIDTH)[None, :, :], inside)
    return byte >> (j % PIECE // WIDTH * BITS)[None, :, :] & ((1 << BITS) - 1)


@triton.jit
def scales_of(bytes_ptr, halves_ptr, start, g, inside, TYPE: tl.constexpr):
    """The scale and the minimum of group g of the block whose bytes begin at `start`. 0: the format has none."""
    minimum = tl.zeros_like(start).to(tl.float32)
    if TYPE == "Q2_K":
        byte = load_byte(bytes_ptr, start + g, inside)
        scale = load_half(halves_ptr, start + 80, inside) * (byte & 15)
        minimum = load_half(halves_ptr, start + 82, inside) * (byte >> 4)
    elif TYPE == "Q3_K":
        low = load_byte(bytes_ptr, start + 96 + g % 8, inside) >> g // 8 * 4 & 15
        top = load_byte(bytes_ptr, start + 104 + g % 4, inside) >> g // 4 * 2 & 3
        scale = load_half(halves_ptr, start + 108, inside) * ((low | top << 4) - 32)
    elif TYPE == "Q4_K" or TYPE == "Q5_K":
        s = load_byte(bytes_ptr, start + 4 + g % 4, inside)
        m = load_byte(bytes_ptr, start + 8 + g % 4, inside)
        rest = load_byte(bytes_ptr, start + 12 + g % 4, inside)
        scale = load_half(halves_ptr, start, inside) * tl.where(g < 4, s & 63, rest & 15 | s >> 6 << 4)
        minimum = load_half(halves_ptr, start + 2, inside) * tl.where(g < 4, m & 63, rest >> 4 | m >> 6 << 4)
    elif TYPE == "Q6_K":
        code = load_byte(bytes_ptr, start + 192 + g, inside)
        scale = load_half(halves_ptr, start + 208, inside) * ((code ^ 128) - 128)  # a signed byte
    elif TYPE == "IQ4_XS":
        top = load_byte(bytes_ptr, start + 2 + g // 4, inside) >> g % 4 * 2 & 3
        low = load_byte(bytes_ptr, start + 4 + g // 2, inside) >> g % 2 * 4 & 15
        scale = load_half(halves_ptr, start, inside) * ((low | top << 4) - 32)
    else:
        scale = load_half(halves_ptr, start, inside)
        if TYPE == "Q4_1" or TYPE == "Q5_1":
            minimum = -load_half(halves_ptr, start + 2, inside)
    return scale, minimum


@triton.jit
def dequantize_kernel(
    bytes_ptr,
    halves_ptr,
    values_ptr,
    A_ptr,
    B_ptr,
    scaling,
    out_ptr,
    row_scale_ptr,
    n_out,
    row_stride,
    A_stride,
    B_stride,
    r,
    TYPE: tl.constexpr,
    N_IN: tl.constexpr,
    SIZE: tl.constexpr,
    BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    MIDDLE: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < n_out)[:, None] & (column < N_IN)[None, :]

    group = tl.program_id(0) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)
    has_group = (row < n_out)[:, None] & (group < N_IN // GROUP)[None, :]
    start = (row * (N_IN // SIZE * BYTES))[:, None] + (group // (SIZE // GROUP) * BYTES)[None, :]
    scale, minimum = scales_of(bytes_ptr, halves_ptr, start, (group % (SIZE // GROUP))[None, :], has_group, TYPE)

    j = (group % (SIZE // GROUP) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    code = bits_of(bytes_ptr, start[:, :, None], j, has_group[:, :, None], LOW)
    if HIGH[2] > 0:
        code |= bits_of(bytes_ptr, start[:, :, None], j, has_group[:, :, None], HIGH) << LOW[2]
    if TYPE == "IQ4_NL" or TYPE == "IQ4_XS":
        code = tl.gather(tl.load(values_ptr + tl.arange(0, 16)), code.reshape(ROWS * COLUMNS), 0)
        code = code.reshape(ROWS, COLUMNS // GROUP, GROUP)
    elif TYPE == "Q8_0":
        code = (code ^ 128) - 128  # a signed byte
    w = scale[:, :, None] * (code - MIDDLE).to(tl.float32) - minimum[:, :, None]
    w = w.reshape(ROWS, COLUMNS)

    if row_scale_ptr is not None:
        w *= tl.load(row_scale_ptr + row, mask=row < n_out, other=0.0)[:, None]
    if RANK > 0:
        rank = tl.arange(0, RANK)
        A_place, B_place = rank[:, None] * A_stride + column[None, :], row[:, None] * B_stride + rank[None, :]
        A = tl.load(A_ptr + A_place, mask=(rank < r)[:, None] & (column < N_IN)[None, :], other=0.0)
        B = tl.load(B_ptr + B_place, mask=(row < n_out)[:, None] & (rank < r)[None, :], other=0.0)
        w += scaling * tl.dot(B, A, input_precision="ieee")
    tl.store(out_ptr + row[:, None] * row_stride + column[None, :], w, mask=inside)
