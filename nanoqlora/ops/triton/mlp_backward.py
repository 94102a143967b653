"""The Triton twin of `ops/mlp_backward.py`: one pass over the widest tensors of a block.

A program owns a block of FF's columns and loops over the rows, as `rows_kernel` of `ops/triton/lora.py` does, with
three accumulators of (r, columns) in its registers. For each tile it loads dact, gate and up, computes SwiGLU and
its gradient, stores dgate and dup, and multiplies act, dgate and dup, which are in registers, by the rows of dxa and
xa. act is not written. The dropout mask of down_proj's input is computed once, for dact and dA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora_parts import RowDropout
from ..mlp_backward import RowScales, one_by_one
from . import elementwise as elementwise_triton
from . import lora as lora_triton
from .lora import Masking, Tile, add_parts, ceil_div, kept, row_strides

# The fastest of twelve shapes on an H100 for 8,192 rows, FF 14,336 and r 64: 469 us, where the separate kernels take
# 760; with dropout, which needs the matmul dxa A here, 552.
TILES = {False: Tile(32, 128, 8, 3, 224), True: Tile(32, 64, 4, 3, 448)}
LARGEST_RANK = 64  # three accumulators of a larger r do not fit the registers


def mlp_backward_(
    dact: Tensor,
    gate_up: Tensor,
    dxa: Tensor,
    A: Tensor | None,
    dropout: RowDropout | None,
    dA: Tensor,
    xa: Tensor,
    scalings: tuple[float, float],
    dBs: tuple[Tensor, Tensor],
    row_scales: RowScales = None,
) -> Tensor | None:
    """As `mlp_backward.mlp_backward_`."""
    N, FF = dact.shape
    ranks = [len(dA), *(dB.shape[1] for dB in dBs)]
    if max(ranks) > LARGEST_RANK or dact.dtype == torch.float32:
        swiglu_backward_ = elementwise_triton.swiglu_backward_
        operands = dact, gate_up, dxa, A, dropout, dA, xa, scalings, dBs, row_scales
        return one_by_one(lora_triton, swiglu_backward_, *operands)
    masking, tile = Masking.of(dropout, N), TILES[dropout is not None]
    blocks, tiles = triton.cdiv(FF, tile.columns), triton.cdiv(N, tile.rows)
    splits = max(1, min(tile.programs // blocks, tiles))
    parts = dact.new_empty(splits, sum(ranks) + (2 if row_scales else 0), FF, dtype=torch.float32)
    mlp_backward_kernel[(blocks, splits)](
        dact, gate_up, dxa, A, xa, parts, *masking, *scalings,
        N, tiles, *row_strides(dact, gate_up, dxa, xa), 0 if A is None else A.stride(0),
        parts.stride(0), FF=FF, R=ranks[0], R_GATE=ranks[1], R_UP=ranks[2],
        DORA=row_scales is not None, BLOCK_T=tile.rows, BLOCK_K=tile.columns,
        BLOCK_R=max(16, triton.next_power_of_2(max(ranks))), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    places = zip((dA, dBs[0].t(), dBs[1].t()), (None, *(row_scales or (None, None))), strict=True)
    for ours, (place, weight) in zip(parts[:, : sum(ranks)].split(ranks, 1), places, strict=True):
        add_parts(ours, place, add=True, weight=weight)
    return parts[:, -2:].sum(0).flatten() if row_scales else None


@triton.jit
def mlp_backward_kernel(
    dact, gate_up, dxa, A, xa, parts, numbers, threshold, scale, scaling_gate, scaling_up,
    N, tiles, stride_dact, stride_gate_up, stride_dxa, stride_xa, stride_A, stride_part,
    FF: tl.constexpr, R: tl.constexpr, R_GATE: tl.constexpr, R_UP: tl.constexpr, DORA: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Program (block of columns, part of the tiles of rows)."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    share = ceil_div(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    sum_A = tl.full((BLOCK_R, BLOCK_K), 0.0, tl.float32)
    sum_gate = tl.full((BLOCK_R, BLOCK_K), 0.0, tl.float32)
    sum_up = tl.full((BLOCK_R, BLOCK_K), 0.0, tl.float32)
    dot_gate = tl.full((BLOCK_T, BLOCK_K), 0.0, tl.float32)  # summed over the rows once, at the end
    dot_up = tl.full((BLOCK_T, BLOCK_K), 0.0, tl.float32)
    if A is not None:
        A_ = tl.load(A + r[:, None] * stride_A + k[None, :], mask=(r < R)[:, None] & (k < FF)[None, :], other=0.0)
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        row = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        rows, real = row.to(tl.int64), (row < N)[:, None]
        inside = real & (k < FF)[None, :]
        gate_place = gate_up + rows[:, None] * stride_gate_up + k[None, :]
        gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_place + FF, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dact + rows[:, None] * stride_dact + k[None, :], mask=inside, other=0.0).to(tl.float32)
        dxa_ = tl.load(dxa + rows[:, None] * stride_dxa + r[None, :], mask=real & (r < R)[None, :], other=0.0)
        xa_place = xa + rows[:, None] * stride_xa + r[None, :]
        xa_gate = tl.load(xa_place, mask=real & (r < R_GATE)[None, :], other=0.0)
        xa_up = tl.load(xa_place + R_GATE, mask=real & (r < R_UP)[None, :], other=0.0)
        if numbers is not None:
            keep = kept(tl.load(numbers + row, mask=row < N, other=0), k, threshold)
        if A is not None:
            update = tl.dot(dxa_, A_, input_precision="ieee") * scale
            if numbers is not None:
                update = tl.where(keep, update, 0.0)
            d += update
        s = tl.fdiv(1.0, 1.0 + tl.exp2(gate * -1.4426950408889634))  # log2(e); a fifth fewer instructions than exp
        silu = gate * s
        act = (silu * up).to(dact.dtype.element_ty)
        if numbers is not None:
            if A is not None:
                # Always true (but for NaN). It makes act depend on the matmul, whose results have another register
                # layout than what was loaded: otherwise the compiler computes SwiGLU twice, once in each layout.
                keep = keep & (update == update)
            act = tl.where(keep, act, 0.0)
        dgate = (d * up * (s + silu * (1 - s))).to(dact.dtype.element_ty)
        dup = (d * silu).to(dact.dtype.element_ty)
        tl.store(gate_place, dgate, mask=inside)
        tl.store(gate_place + FF, dup, mask=inside)
        if DORA:
            dot_gate += dgate.to(tl.float32) * gate
            dot_up += dup.to(tl.float32) * up
        sum_A = tl.dot(tl.trans(dxa_), act, sum_A, input_precision="ieee")
        sum_gate = tl.dot(tl.trans(xa_gate), dgate, sum_gate, input_precision="ieee")
        sum_up = tl.dot(tl.trans(xa_up), dup, sum_up, input_precision="ieee")
    part = parts + tl.program_id(1) * stride_part
    here = part + r[:, None] * FF + k[None, :]
    in_FF = (k < FF)[None, :]
    tl.store(here, sum_A * scale, mask=in_FF & (r < R)[:, None])
    tl.store(here + R * FF, sum_gate * scaling_gate, mask=in_FF & (r < R_GATE)[:, None])
    tl.store(here + (R + R_GATE) * FF, sum_up * scaling_up, mask=in_FF & (r < R_UP)[:, None])
    if DORA:
        tl.store(part + (R + R_GATE + R_UP) * FF + k, tl.sum(dot_gate, axis=0), mask=k < FF)
        tl.store(part + (R + R_GATE + R_UP + 1) * FF + k, tl.sum(dot_up, axis=0), mask=k < FF)
