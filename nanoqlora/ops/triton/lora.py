"""The fast twin of `ops/lora_parts.py` for GPUs: the same functions as Triton kernels, in bfloat16.

A matmul of (8192, 4096) with (4096, 64) is 4.3 GFLOP over 68 MB: 6 us of an H100's arithmetic and 23 us of its memory
bandwidth. So the wide operand is read once, with several loads in flight. PyTorch's matmul does that well without
addition and dropout, and is used there. To add a matmul to dx it takes 1.5 times as long as the kernel here; and with
dropout it would write the mask, read it, write dropout(x) and read that. Here the hash of `ops/lora.py` is computed
where a value has just been loaded, and no mask is written to memory.

    down_kernel    (N, K) (K, R) -> (N, R)     sums over K     xa with dropout; also computes x by SwiGLU, or copies it
    rows_kernel    (R, N) (N, K) -> (R, K)     sums over N     dA and dB
    add_kernel     (N, K) += (N, R) (R, K)     sums over R     dx

One H100, N = 8192, R = 64, in us (reading and writing the wide operand's bytes at 3.0 TB/s; the kernel; the best of
PyTorch, without the time for the mask):

    K                              4096                  14336
    xa, dropout 0.05            23 / 44 / 94         236 / 278 / 552, with SwiGLU, which computes x
    dA                          23 / 34 / 32 + add    80 /  89 /  85 + add
    dA, dropout 0.05            23 / 46 / 99
    dx                          45 / 51 / 73         158 / 164 / 247
    dx, dropout 0.05            45 / 56 / 121

Split-K: 8192 rows are 128 tiles of 64, and R x K is fewer tiles still, not enough for 132 multiprocessors. So several
programs share one sum, each writes its part in float32, and `sum_kernel` adds the parts in a fixed order. Atomic
additions would need no second kernel, but their order, and so the last bits, would change from run to run.

The cost of dropout is the hash: each multiprocessor does 64 integer instructions per cycle, and ten for a value take
longer than reading its 2 bytes. So the number of a token is computed once, before the kernel, the number of a pair of
features once per tile, and what is left for a pair of values is one multiplication and one XOR.

Block sizes must be powers of two, so R = 192 is computed as three chunks of 64, each with its own accumulator.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora import threshold_and_scale
from ..lora_parts import RowDropout
from . import elementwise as elementwise_triton


class Tile(NamedTuple):
    """How a kernel is split: a program's tile of the wide matrix, two compiler settings, and the split of the sum."""

    rows: int
    columns: int
    warps: int
    stages: int  # tiles that are loaded ahead (software pipelining)
    programs: int = 0  # the sum is split until there are so many; an H100 has 132 multiprocessors


# By kernel, by dropout and by chunks of R: the fastest of about ten shapes on an H100 for the layers of Llama-3-8B.
TILES = {
    ("down", True, 1): Tile(32, 128, 4, 3, 264),
    ("down", True, 2): Tile(32, 128, 4, 3, 264),
    ("down", True, 3): Tile(64, 64, 4, 3, 264),
    ("swiglu", True, 1): Tile(32, 128, 4, 2, 1024),
    ("swiglu", True, 2): Tile(32, 128, 4, 2, 1024),
    ("swiglu", True, 3): Tile(64, 64, 4, 3, 264),
    ("rows", False, 1): Tile(64, 64, 4, 4, 264),
    ("rows", False, 2): Tile(64, 64, 4, 3, 264),
    ("rows", False, 3): Tile(64, 64, 4, 3, 264),
    ("rows", True, 1): Tile(64, 128, 8, 3, 264),
    ("rows", True, 2): Tile(64, 128, 4, 3, 264),
    ("rows", True, 3): Tile(64, 64, 4, 4, 264),
    ("add", False, 1): Tile(64, 128, 8, 3),
    ("add", False, 2): Tile(64, 128, 4, 3),
    ("add", False, 3): Tile(64, 128, 4, 3),
    ("add", True, 1): Tile(64, 64, 4, 3),
    ("add", True, 2): Tile(64, 128, 4, 3),
    ("add", True, 3): Tile(64, 128, 4, 3),
}


class Chunks(NamedTuple):
    """How the kernels split R: `groups` programs with `num` chunks of `size` each, the last one padded."""

    size: int
    num: int
    groups: int

    @classmethod
    def of(cls, R: int) -> "Chunks":
        size = min(64, max(16, triton.next_power_of_2(R)))  # tensor cores need at least 16
        chunks = triton.cdiv(R, size)
        groups = triton.cdiv(chunks, 3)  # more than three accumulators do not fit the registers
        return cls(size, triton.cdiv(chunks, groups), groups)


class Masking(NamedTuple):
    """The arguments of a kernel for dropout. Without dropout `numbers` is None."""

    numbers: Tensor | None
    threshold: int  # a value is kept where its 16 random bits are at least this
    scale: float

    @classmethod
    def of(cls, dropout: RowDropout | None, N: int) -> "Masking":
        if dropout is None:
            return cls(None, 0, 1.0)
        numbers = dropout.numbers
        assert numbers.shape == (N,) and numbers.dtype == torch.int32 and numbers.is_contiguous()
        return cls(numbers, *threshold_and_scale(dropout.p))


def lora_down(x: Tensor, A: Tensor, dropout: RowDropout | None = None, out: Tensor | None = None) -> Tensor:
    """As `lora_parts.lora_down`."""
    if dropout is not None:
        return down(x, A, dropout, out)
    if out is not None:
        out.copy_(x)
    return x @ A.t()


def swiglu_lora_down(gate_up: Tensor, A: Tensor, dropout: RowDropout | None, out: Tensor) -> Tensor:
    """As `lora_parts.swiglu_lora_down`."""
    if dropout is not None:
        return down(gate_up, A, dropout, out, swiglu=True)
    return elementwise_triton.swiglu(gate_up, out) @ A.t()


def down(source: Tensor, A: Tensor, dropout: RowDropout, out: Tensor | None, swiglu: bool = False) -> Tensor:
    """xa = dropout(x) A^T, and x in `out`; x is `source`, or with `swiglu` its SwiGLU."""
    N, (R, K) = len(source), A.shape
    chunks, masking = Chunks.of(R), Masking.of(dropout, N)
    tile = TILES["swiglu" if swiglu else "down", True, chunks.num]
    tiles = triton.cdiv(N, tile.rows)
    splits = max(1, min(tile.programs // max(1, tiles * chunks.groups), K // (8 * tile.columns)))
    xa = source.new_empty(N, R)
    parts = xa if splits == 1 else source.new_empty(splits, N, R, dtype=torch.float32)
    down_kernel[(tiles, chunks.groups, splits)](
        source, A, parts, out, *masking, N, *row_strides(source, A, source if out is None else out),
        K=K, R=R, BLOCK_T=tile.rows, BLOCK_K=tile.columns, BLOCK_R=chunks.size, CHUNKS=chunks.num,
        SWIGLU=swiglu, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if splits > 1:
        add_parts(parts, xa, add=False)
    return xa


def lora_backward_A(
    dxa: Tensor,
    x: Tensor,
    dropout: RowDropout | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Sequence[Tensor]:
    """As `lora_parts.lora_backward_A`."""
    rstd, weight = (None, None) if norm is None else norm
    parts = sums_over_rows(dxa, x, 1.0, dropout, rstd)
    if out is None:
        return add_parts(parts, x.new_empty(parts.shape[1:], dtype=torch.float32), add=False, weight=weight)
    places = [out] if isinstance(out, Tensor) else out
    for ours, place in zip(parts.split([len(place) for place in places], 1), places, strict=True):
        add_parts(ours, place, add=True, weight=weight)
    return out


def lora_dx_add_(dx: Tensor, dxa: Tensor, A: Tensor, dropout: RowDropout | None = None) -> None:
    """As `lora_parts.lora_dx_add_`."""
    (N, K), R = dx.shape, len(A)
    chunks, masking = Chunks.of(R), Masking.of(dropout, N)
    tile = TILES["add", dropout is not None, chunks.num]
    add_kernel[(triton.cdiv(K, tile.columns), triton.cdiv(N, tile.rows))](
        dx, dxa, A, *masking, N, *row_strides(dx, dxa), *A.stride(),
        K=K, R=R, BLOCK_T=tile.rows, BLOCK_K=tile.columns, BLOCK_R=chunks.size,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def lora_backward_B(
    dy: Tensor, xa: Tensor, scaling: float, out: Tensor | None = None, row_scale: Tensor | None = None
) -> Tensor:
    """As `lora_parts.lora_backward_B`."""
    dB = dy.new_empty(dy.shape[1], xa.shape[1], dtype=torch.float32) if out is None else out
    add_parts(sums_over_rows(xa, dy, scaling, None), dB.t(), add=out is not None, weight=row_scale)
    return dB


def column_dot(dy: Tensor, y: Tensor) -> Tensor:
    """As `lora_parts.column_dot`."""
    (N, K), tile = dy.shape, Tile(32, 128, 4, 3, 1056)
    blocks, tiles = triton.cdiv(K, tile.columns), triton.cdiv(N, tile.rows)
    splits = max(1, min(tile.programs // blocks, tiles))
    parts = dy.new_empty(splits, K, dtype=torch.float32)
    column_dot_kernel[(blocks, splits)](
        dy, y, parts, N, tiles, *row_strides(dy, y),
        K=K, BLOCK_T=tile.rows, BLOCK_K=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts.sum(0)


def place_adapter(A: Tensor, B: Tensor, scaling: float, A_rows: Tensor, B_columns: Tensor, first: int) -> None:
    """As `lora_parts.place_adapter`, in one launch."""
    (r, n_in), (n_out, width) = A.shape, B_columns.shape
    tiles_of_A, tiles_of_B = triton.cdiv(r * n_in, 2048), triton.cdiv(n_out * width, 2048)
    place_kernel[(tiles_of_A + tiles_of_B,)](
        A, B, scaling, A_rows, B_columns, *row_strides(A, B, A_rows, B_columns),
        n_in, r, n_out, width, first, tiles_of_A, TILE=2048, num_warps=4,
    )  # fmt: skip


def sums_over_rows(
    u: Tensor, x: Tensor, scale: float, dropout: RowDropout | None, rstd: Tensor | None = None
) -> Tensor:
    """scale * (u rstd)^T dropout(x) for u (N, R), x (N, K): (parts, R, K) float32, which `add_parts` adds."""
    (N, K), R = x.shape, u.shape[1]
    chunks, masking = Chunks.of(R), Masking.of(dropout, N)
    tile = TILES["rows", dropout is not None, chunks.num]
    blocks, tiles = triton.cdiv(K, tile.columns), triton.cdiv(N, tile.rows)
    splits = max(1, min(tile.programs // (blocks * chunks.groups), tiles))
    parts = x.new_empty(splits, R, K, dtype=torch.float32)
    rows_kernel[(blocks, splits, chunks.groups)](
        u, x, parts, rstd, masking.numbers, masking.threshold, scale * masking.scale, N, tiles, *row_strides(u, x),
        K=K, R=R, BLOCK_T=tile.rows, BLOCK_K=tile.columns, BLOCK_R=chunks.size, CHUNKS=chunks.num,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return parts


def add_parts(parts: Tensor, out: Tensor, add: bool, weight: Tensor | None = None) -> Tensor:
    """out (+)= weight * the sum of parts (count, height, width) float32; out in any memory order. Returns out."""
    count, height, width = parts.shape
    sum_kernel[(triton.cdiv(height, 16), triton.cdiv(width, 64))](
        parts, out, weight, count, height, width, parts.stride(0), *out.stride(),
        ADD=add, BLOCK_I=16, BLOCK_J=64, num_warps=4,
    )  # fmt: skip
    return out


def row_strides(*matrices: Tensor) -> list[int]:
    """Elements from one row to the next of each; columns must be contiguous."""
    for matrix in matrices:
        assert matrix.stride(1) == 1 or matrix.shape[1] == 1, f"columns of {tuple(matrix.shape)} are not contiguous"
    return [matrix.stride(0) for matrix in matrices]


@triton.jit
def mix(x):
    """As `lora.mix`, on unsigned numbers, whose right shift fills with zeros."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def kept(numbers, k, threshold):
    """As `lora.mask_of`, True where kept, for the numbers of tokens (BLOCK_T,) and features k (BLOCK_K,).

    Two neighbours share a multiplication. It is written for each of them; the compiler gives both to one thread, finds
    that k // 2 is the same, and computes it once.
    """
    of_pairs = (mix((k // 2).to(tl.uint32) + 0x9E3779B9) | 1).to(tl.uint64)
    product = numbers.to(tl.uint32).to(tl.uint64)[:, None] * of_pairs[None, :]
    both = (product ^ (product >> 32)).to(tl.uint32)
    upper = both << ((k % 2) * 16).to(tl.uint32)[None, :]  # 16 bits of each feature, with others below them
    return upper >= (threshold.to(tl.uint32) << 16)


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def down_kernel(
    source, A, xa, out, numbers, threshold, scale, N, stride_source, stride_A, stride_out,
    K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr, SWIGLU: tl.constexpr,
):  # fmt: skip
    """A tile of rows loops over K. Program (tile of rows, group of R, part of K)."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows, real = row.to(tl.int64), (row < N)[:, None]
    r = tl.program_id(1) * (CHUNKS * BLOCK_R) + tl.arange(0, BLOCK_R)
    number = tl.load(numbers + row, mask=row < N, other=0)
    share = ceil_div(ceil_div(K, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    begin = tl.program_id(2) * share
    sums = ()  # type: tuple[Tensor, ...]
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.full((BLOCK_T, BLOCK_R), 0.0, tl.float32),)
    for start in range(begin, tl.minimum(begin + share, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = real & (k < K)[None, :]
        here = source + rows[:, None] * stride_source + k[None, :]
        x_ = tl.load(here, mask=inside, other=0.0)
        if SWIGLU:
            gate, up = x_.to(tl.float32), tl.load(here + K, mask=inside, other=0.0).to(tl.float32)
            x_ = (gate * (1 / (1 + tl.exp(-gate))) * up).to(x_.dtype)
        if out is not None:
            tl.store(out + rows[:, None] * stride_out + k[None, :], x_, mask=inside & (tl.program_id(1) == 0))
        x_ = tl.where(kept(number, k, threshold), x_, 0.0)
        longer = ()  # type: tuple[Tensor, ...]
        for c in tl.static_range(CHUNKS):
            rc = r + c * BLOCK_R
            in_A = (k < K)[:, None] & (rc < R)[None, :]
            A_ = tl.load(A + rc[None, :] * stride_A + k[:, None], mask=in_A, other=0.0)  # already transposed
            longer = longer + (tl.dot(x_, A_, sums[c], input_precision="ieee"),)
        sums = longer
    part = xa + tl.program_id(2).to(tl.int64) * N * R  # the parts lie one after the other
    for c in tl.static_range(CHUNKS):
        rc = r + c * BLOCK_R
        # The scale is applied here and not to x: one rounding fewer, and 1 / (1 - p) has all of its 24 bits.
        summed = (sums[c] * scale).to(xa.dtype.element_ty)
        tl.store(part + rows[:, None] * R + rc[None, :], summed, mask=real & (rc < R)[None, :])


@triton.jit
def rows_kernel(
    u, x, parts, rstd, numbers, threshold, scale, N, tiles, stride_u, stride_x,
    K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """A block of columns loops over N. Program (block of columns, part of the tiles of rows, group of R)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * (CHUNKS * BLOCK_R) + tl.arange(0, BLOCK_R)
    share = ceil_div(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    sums = ()  # type: tuple[Tensor, ...]
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.full((BLOCK_R, BLOCK_K), 0.0, tl.float32),)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        rows, real = row.to(tl.int64), row < N
        x_ = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        if numbers is not None:
            x_ = tl.where(kept(tl.load(numbers + row, mask=real, other=0), k, threshold), x_, 0.0)
        longer = ()  # type: tuple[Tensor, ...]
        for c in tl.static_range(CHUNKS):
            rc = r + c * BLOCK_R
            inside = (rc < R)[:, None] & real[None, :]
            u_ = tl.load(u + rows[None, :] * stride_u + rc[:, None], mask=inside, other=0.0)  # already transposed
            if rstd is not None:
                u_ = (u_.to(tl.float32) * tl.load(rstd + row, mask=real, other=0.0)[None, :]).to(x_.dtype)
            longer = longer + (tl.dot(u_, x_, sums[c], input_precision="ieee"),)
        sums = longer
    for c in tl.static_range(CHUNKS):
        rc = r + c * BLOCK_R
        here = parts + (tl.program_id(1) * R + rc)[:, None] * K + k[None, :]
        tl.store(here, sums[c] * scale, mask=(rc < R)[:, None] & (k < K)[None, :])


@triton.jit
def column_dot_kernel(
    dy, y, parts, N, tiles, stride_dy, stride_y, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Program (block of columns, part of the tiles of rows)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    share = ceil_div(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    total = tl.full((BLOCK_K,), 0.0, tl.float32)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        rows, inside = row.to(tl.int64), (row < N)[:, None] & (k < K)[None, :]
        dy_ = tl.load(dy + rows[:, None] * stride_dy + k[None, :], mask=inside, other=0.0).to(tl.float32)
        y_ = tl.load(y + rows[:, None] * stride_y + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(dy_ * y_, axis=0)
    tl.store(parts + tl.program_id(1) * K + k, total, mask=k < K)


@triton.jit
def add_kernel(
    y, u, w, numbers, threshold, scale, N, stride_y, stride_u, stride_wr, stride_wk,
    K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += scale * mask * (u w), one tile. Program (block of columns, tile of rows): w stays in the L2 cache."""
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows, real = row.to(tl.int64), (row < N)[:, None]
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = real & (k < K)[None, :]
    here = y + rows[:, None] * stride_y + k[None, :]
    old = tl.load(here, mask=inside, other=0.0)  # first, so that the load overlaps with the matmul
    product = tl.full((BLOCK_T, BLOCK_K), 0.0, tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        u_ = tl.load(u + rows[:, None] * stride_u + r[None, :], mask=real & (r < R)[None, :], other=0.0)
        w_ = tl.load(
            w + r[:, None] * stride_wr + k[None, :] * stride_wk, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0
        )
        product = tl.dot(u_, w_, product, input_precision="ieee")
    product *= scale
    if numbers is not None:
        product = tl.where(kept(tl.load(numbers + row, mask=row < N, other=0), k, threshold), product, 0.0)
    tl.store(here, (old + product).to(y.dtype.element_ty), mask=inside)


@triton.jit
def place_kernel(
    A, B, scaling, A_rows, B_columns, stride_A, stride_B, stride_A_rows, stride_B_columns,
    n_in, r, n_out, width, first, tiles_of_A, TILE: tl.constexpr,
):  # fmt: skip
    """The first programs copy A, the others write scaling * B and the zeros beside it."""
    tile = tl.program_id(0)
    if tile < tiles_of_A:
        place = tile * TILE + tl.arange(0, TILE)
        i, j = place // n_in, place % n_in
        a = tl.load(A + i * stride_A + j, mask=i < r, other=0.0)
        tl.store(A_rows + i * stride_A_rows + j, a.to(A_rows.dtype.element_ty), mask=i < r)
    else:
        place = (tile - tiles_of_A) * TILE + tl.arange(0, TILE)
        i, j = place // width, place % width
        ours = (i < n_out) & (j >= first) & (j < first + r)
        b = tl.load(B + i * stride_B + j - first, mask=ours, other=0.0) * scaling
        tl.store(B_columns + i * stride_B_columns + j, b.to(B_columns.dtype.element_ty), mask=i < n_out)


@triton.jit
def sum_kernel(
    parts, out, weight, count, height, width, stride_part, stride_i, stride_j,
    ADD: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a split sum, one after the other. Program (block of rows, block of columns)."""
    i = (tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    inside = (i < height)[:, None] & (j < width)[None, :]
    here = parts + i[:, None] * width + j[None, :]
    place = out + i[:, None] * stride_i + j[None, :] * stride_j
    total = tl.full((BLOCK_I, BLOCK_J), 0.0, tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=4):  # four loads in flight
        total += tl.load(here, mask=inside, other=0.0)
        here += stride_part
    if weight is not None:
        total *= tl.load(weight + j, mask=j < width, other=0.0).to(tl.float32)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
