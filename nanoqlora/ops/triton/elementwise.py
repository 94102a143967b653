"""The Triton twins of `ops/block_parts.py`: each kernel reads its tensors once, writes once, and allocates almost
nothing.

These operations are limited by memory bandwidth: a norm takes five operations per number, and a GPU does hundreds in
the time that it needs to load one. So every kernel makes a single pass over its tensors: load 16 bytes per thread,
convert to float32 in registers, compute, round once, store. As in the reference no sum or product is in bfloat16.

These are plain functions on tensors, forward and backward separately, without autograd: the block that calls them
knows when a buffer can be overwritten. A trailing underscore marks the functions that overwrite their input.

A kernel is written for one program (a few warps that share a tile); the grid runs thousands of them. `tl.load` and
`tl.store` take a tile of addresses and a mask for those outside of the tensor. Offsets of rows have 64 bits, because
rows times columns can be larger than 2^31. `Launch` holds the size of a tile and its number of warps; it changes the
speed and the order of a sum, nothing else. Tensors are bfloat16, float16 or float32; float64 is for the reference.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """How a kernel is split into programs."""

    tile: int  # numbers that one program handles, at least
    num_warps: int  # of 32 threads each; tile / (32 * num_warps) numbers per thread


# For 8,192 rows of an 8B model on an H100 in bfloat16: one or two 16-byte loads of each tensor per thread.
RMS_NORM = Launch(4096, 8)
RMS_NORM_BACKWARD = Launch(4096, 8)
ROPE = Launch(1024, 2)
SWIGLU = Launch(2048, 4)
SWIGLU_BACKWARD = Launch(2048, 8)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `block_parts.rms_norm`. x contiguous, D up to 16,384; rstd is float32."""
    h = torch.empty_like(x) if out is None else out
    return h, launch_norm(x, None, weight, eps, total=x, h=h)


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `block_parts.add_rms_norm`: the norm uses the sum while it is still in registers."""
    h, total = torch.empty_like(x) if out is None else out, torch.empty_like(x)
    return total, h, launch_norm(x, delta, weight, eps, total=total, h=h)


def add(x: Tensor, delta: Tensor) -> Tensor:
    """As `block_parts.add`. Where rows are slices of wider ones, PyTorch takes 1.5 times as long."""
    N, D = x.shape
    assert x.is_contiguous()
    total = torch.empty_like(x)
    tile, num_warps = SWIGLU
    parts = triton.cdiv(D, tile)
    add_rows_kernel[(N * parts,)](x, delta, total, D, row_stride(delta), PARTS=parts, TILE=tile, num_warps=num_warps)
    return total


def launch_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, total: Tensor, h: Tensor) -> Tensor:
    """Write x + delta to `total`, if there is a delta, and its norm to h. Returns rstd (N,)."""
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grid, rows, columns, num_warps = whole_rows(x, RMS_NORM)
    rms_norm_kernel[grid](
        *(x, delta, weight, total, h, rstd, *x.shape, 0 if delta is None else row_stride(delta), row_stride(h), eps),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return rstd


def rms_norm_backward(dh: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None) -> Tensor:
    """The gradient of x through the norm, plus that of the residual stream.

    With n = x rstd and g = dh weight, all in float32 and rounded once:

        dx = residual + rstd (g - n mean(g n))

    Args:
        dh: (N, D), the gradient of the norm's result, rows may be slices of wider ones.
        x, weight, rstd: as in the forward pass; the weight is frozen.
        residual: (N, D), the gradient that reaches x along the residual stream, or None.
    Returns:
        dx: (N, D).
    """
    assert residual is None or residual.is_contiguous()
    dx = torch.empty_like(x)
    grid, rows, columns, num_warps = whole_rows(x, RMS_NORM_BACKWARD)
    rms_norm_backward_kernel[grid](
        *(dh, x, weight, rstd, residual, dx, *x.shape, row_stride(dh)),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=num_warps,
    )
    return dx


def rope_(qkv: Tensor, num_heads: int, head_dim: int, cos: Tensor, sin: Tensor, backward: bool = False) -> None:
    """Rotate each pair (i, i + hd/2) of the first `num_heads` heads of every row by its token's angle, in place.

    One matmul for q, k and v gives rows (q heads, k heads, v heads); q and k are rotated in one launch. The gradient
    of a rotation is the inverse rotation, so the backward pass is the same kernel with the angles negated.

    Args:
        qkv: (N, width), num_heads * head_dim <= width; rows may be slices of wider ones.
        cos, sin: (N, head_dim / 2) float32, contiguous.
    """
    N, width = qkv.shape
    half = head_dim // 2
    assert qkv.stride(1) == 1 and num_heads * head_dim <= width
    assert cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (N, half)
    pairs = triton.next_power_of_2(half)
    heads = max(1, min(ROPE.tile // (2 * pairs), triton.next_power_of_2(num_heads)))
    parts = triton.cdiv(num_heads, heads)
    rope_kernel[(N * parts,)](
        *(qkv, cos, sin, qkv.stride(0), num_heads),
        HALF=half,
        BACKWARD=backward,
        PARTS=parts,
        HEADS=heads,
        PAIRS=pairs,
        num_warps=ROPE.num_warps,
        enable_fp_fusion=False,  # one rounding per operation, whichever product the compiler would fuse with the sum
    )


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `block_parts.rope_backward`: one launch each for dq, dk and dv, which rotates and copies."""
    B, T, _, head_dim = dq.shape
    heads = [d.shape[2] for d in (dq, dk, dv)]
    dqkv = torch.empty((B * T, sum(heads) * head_dim), dtype=dq.dtype, device=dq.device)
    places = dqkv.split([count * head_dim for count in heads], dim=1)
    half = head_dim // 2
    pairs = triton.next_power_of_2(half)
    for d, place, count, turned in zip((dq, dk, dv), places, heads, (True, True, False), strict=True):
        assert d.stride(3) == 1
        tile = max(1, min(ROPE.tile // (2 * pairs), triton.next_power_of_2(count)))
        parts = triton.cdiv(count, tile)
        rope_backward_kernel[(B * T * parts,)](
            *(d, place, cos, sin, T, *d.stride()[:3], dqkv.stride(0), count),
            HALF=half,
            TURNED=turned,
            PARTS=parts,
            HEADS=tile,
            PAIRS=pairs,
            num_warps=ROPE.num_warps,
            enable_fp_fusion=False,
        )
    return dqkv


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """As `block_parts.swiglu`, with silu(z) = z / (1 + exp(-z))."""
    N, width = gate_up.shape
    act = torch.empty((N, width // 2), dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    tile, num_warps = SWIGLU
    parts = triton.cdiv(width // 2, tile)
    swiglu_kernel[(N * parts,)](
        *(gate_up, act, width // 2, row_stride(gate_up), row_stride(act)), PARTS=parts, TILE=tile, num_warps=num_warps
    )
    return act


def swiglu_backward_(dact: Tensor, gate_up: Tensor) -> None:
    """The gradients of gate and up, and the activation recomputed, all in place.

    With s = 1 / (1 + exp(-gate)):

        dgate = dact up s (1 + gate (1 - s))        dup = dact gate s        act = gate s up

    Args:
        dact: (N, FF), becomes act, which was not saved: down_proj's LoRA gradients need it.
        gate_up: (N, 2 FF), the gate first, becomes (dgate, dup). Rows of both may be slices of wider ones.
    """
    N, FF = dact.shape
    assert gate_up.shape == (N, 2 * FF)
    tile, num_warps = SWIGLU_BACKWARD
    parts = triton.cdiv(FF, tile)
    swiglu_backward_kernel[(N * parts,)](
        *(dact, gate_up, FF, row_stride(dact), row_stride(gate_up)), PARTS=parts, TILE=tile, num_warps=num_warps
    )


def embedding_from_host(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows of `table` (V, D), contiguous, for `tokens` of any shape: (..., D) beside the tokens.

    The table may be in pinned host memory: a GPU reads it like its own memory, only slower.
    """
    D = table.shape[1]
    rows = torch.empty((*tokens.shape, D), dtype=table.dtype, device=tokens.device)
    embedding_kernel[(tokens.numel(),)](tokens.contiguous(), table, rows, D, COLUMNS=triton.next_power_of_2(D))
    return rows


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next; columns must be contiguous."""
    assert x.stride(1) == 1 or x.shape[1] == 1
    return x.stride(0)


def whole_rows(x: Tensor, launch: Launch) -> tuple[tuple[int], int, int, int]:
    """Grid, rows per program, columns of its tile and warps, for a kernel that needs complete rows.

    The sides of a tile are powers of two. Short rows share a program; a row longer than the tile gets more warps, so
    that the values of a thread still fit its registers.
    """
    assert x.is_contiguous()
    N, D = x.shape
    columns = triton.next_power_of_2(D)
    rows = max(1, launch.tile // columns)
    num_warps = min(32, launch.num_warps * max(1, columns // launch.tile))
    return (triton.cdiv(N, rows),), rows, columns, num_warps


@triton.jit
def embedding_kernel(tokens_ptr, table_ptr, rows_ptr, D, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    token = tl.load(tokens_ptr + row)
    values = tl.load(table_ptr + token * D + column, mask=column < D, other=0.0)
    tl.store(rows_ptr + row * D + column, values, mask=column < D)


@triton.jit
def rms_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    h_ptr,
    rstd_ptr,
    N,
    D,
    delta_stride,
    h_stride,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide_row * D + column[None, :], mask=inside, other=0.0)  # (ROWS, COLUMNS)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + wide_row * delta_stride + column[None, :], mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x.dtype)  # rounded, as the next block will read it
        tl.store(total_ptr + wide_row * D + column[None, :], x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(h_ptr + wide_row * h_stride + column[None, :], x * rstd[:, None] * weight[None, :], mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < N)


@triton.jit
def rms_norm_backward_kernel(
    dh_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    residual_ptr,
    dx_ptr,
    N,
    D,
    dh_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < D)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    place = wide_row * D + column[None, :]
    dh = tl.load(dh_ptr + wide_row * dh_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)  # (ROWS, COLUMNS)
    # The residual is loaded before the sum, which waits for all warps, so that the load overlaps with it.
    residual = 0.0 if residual_ptr is None else tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < N, other=0.0)[:, None]
    g = dh * weight[None, :]
    n = x * rstd
    mean = tl.sum(g * n, axis=1)[:, None] / D
    tl.store(dx_ptr + place, residual + rstd * (g - n * mean), mask=inside)


@triton.jit
def rope_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    row_stride,
    num_heads,
    HALF: tl.constexpr,
    BACKWARD: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    head = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    inside = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
    if BACKWARD:
        sin = -sin
    first_ptr = qkv_ptr + row * row_stride + head[:, None] * (2 * HALF) + pair[None, :]
    first = tl.load(first_ptr, mask=inside, other=0.0).to(tl.float32)  # (HEADS, PAIRS)
    second = tl.load(first_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_ptr, first * cos - second * sin, mask=inside)
    tl.store(first_ptr + HALF, second * cos + first * sin, mask=inside)


@triton.jit
def rope_backward_kernel(
    d_ptr,
    place_ptr,
    cos_ptr,
    sin_ptr,
    T,
    batch_stride,
    token_stride,
    head_stride,
    place_stride,
    num_heads,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    head = tl.program_id(0) % PARTS * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    inside = (head < num_heads)[:, None] & (pair < HALF)[None, :]
    d_ptr += row // T * batch_stride + row % T * token_stride
    from_ptr = d_ptr + head[:, None] * head_stride + pair[None, :]
    first = tl.load(from_ptr, mask=inside, other=0.0).to(tl.float32)  # (HEADS, PAIRS)
    second = tl.load(from_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
    if TURNED:
        cos = tl.load(cos_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + row * HALF + pair, mask=pair < HALF, other=0.0)[None, :]
        turned = first * cos + second * sin
        second = second * cos - first * sin
        first = turned
    to_ptr = place_ptr + row * place_stride + head[:, None] * (2 * HALF) + pair[None, :]
    tl.store(to_ptr, first, mask=inside)
    tl.store(to_ptr + HALF, second, mask=inside)


@triton.jit
def add_rows_kernel(x_ptr, delta_ptr, total_ptr, D, delta_stride, PARTS: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    column = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    inside = column < D
    x = tl.load(x_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(total_ptr + row * D + column, x + delta, mask=inside)


@triton.jit
def swiglu_kernel(gate_up_ptr, act_ptr, FF, gate_up_stride, act_stride, PARTS: tl.constexpr, TILE: tl.constexpr):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    column = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    inside = column < FF
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + FF, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    tl.store(act_ptr + row * act_stride + column, gate * s * up, mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dact_ptr, gate_up_ptr, FF, dact_stride, gate_up_stride, PARTS: tl.constexpr, TILE: tl.constexpr
):
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    column = tl.program_id(0) % PARTS * TILE + tl.arange(0, TILE)
    inside = column < FF
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    dact_ptr += row * dact_stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + FF, mask=inside, other=0.0).to(tl.float32)
    dact = tl.load(dact_ptr, mask=inside, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    silu = gate * s
    tl.store(gate_ptr, dact * up * (s + silu * (1 - s)), mask=inside)
    tl.store(gate_ptr + FF, dact * silu, mask=inside)
    tl.store(dact_ptr, silu * up, mask=inside)
