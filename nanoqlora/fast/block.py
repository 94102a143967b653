"""A transformer block with a hand-written backward pass: the fast twin of `model.Block` for QLoRA training.

Autograd saves the inputs of every operation. Here we choose what is saved. For its backward pass a block needs, in
units of N x D numbers (N tokens, D model width, with the proportions of Llama-3-8B):

    saved        x 1, q k v 1.5, attention's output 1, x after attention 1, gate and up 7         11.5 D
    recomputed   SwiGLU's output, dropout masks, W from its four bits                             elementwise work only

`keep` trades memory for time, block by block:

    "all"       as above
    "mlp_host"  gate and up are offloaded to host memory                                          4.5 D
    "no_mlp"    gate and up are recomputed in the backward pass                                   4.5 D
    "input"     everything is recomputed from x, except down_proj, whose output no gradient needs   1 D
    "offload"   as "input", with x offloaded to host memory                                         0

Projections that read the same input are one matmul: q, k and v; gate and up. Their weights are dequantized side by
side into a buffer that all blocks share, with the adapters around them:

    Wx = [ W   s B ]    (n_out + R, n_in + R), R the sum of the ranks r. B is block-diagonal: each projection has its
         [ A    .  ]    own rows and columns, and zeros elsewhere.

A matmul with Wx instead of W costs 1 to 5 % more arithmetic, and it computes LoRA's part in the same pass over the
wide tensor. With xa = x A^T and dxa = s dy B:

    merged    forward   [y, xa]   = x [W + s B A; A]^T     y includes the update
              backward  [dx, dxa] = dy [W + s B A, s B]    dx is complete
    separate  forward   y         = [x, xa] [W, s B]^T     xa of dropout(x) is computed before; x is part of [x, xa]
              backward  [dx, dxa] = dy [W, s B]            then dx += dropout'(dxa A)

What remains are the gradients of A and B, which read x and dy once each. A layer without an update has r = 0 in all of
this. Merging needs p = 0, because dropout changes the update's input only.

DoRA multiplies row j of W + s B A by c_j = m_j / norm of that row: it is computed as `merged` with c W and c s B. The
norm is a constant in the backward pass and is measured once a step. The gradient of m_j is sum(dy_j y_j) / m_j over
the tokens, so a block also saves the outputs of o_proj and down_proj, 2 D; the others it has.

The update is added during the dequantization, in float32 before the one rounding. The equations of a layer are in
`ops/lora.py`; those of the norm, RoPE and SwiGLU in `ops/block_parts.py`.

Modules, parameters and their names are those of the plain block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from .. import ops
from ..model import Block, KVCache, Llama, RMSNorm
from ..ops import RowDropout, Segments
from ..ops.fast.loss import ROWS_ON_GPU
from ..ops.fast.scratch import scratch
from ..parallel.host_memory import HostMemory
from ..qlora import QLoRALinear, lora_layers, qlora_linear

Keep = Literal["all", "mlp_host", "no_mlp", "input", "offload"]
ON_HOST = ("mlp_host", "offload")


class Projections:
    """Linear layers that read the same input, computed as one matmul with Wx."""

    def __init__(self, *layers: QLoRALinear) -> None:
        self.layers = layers
        self.n_in, self.widths = layers[0].in_features, [layer.out_features for layer in layers]
        self.ranks = [len(layer.lora_A) if layer.has_lora else 0 for layer in layers]
        self.trained = [layer for layer in layers if layer.has_lora]
        self.has_dora = any(layer.magnitude is not None for layer in layers)
        self.n_out, self.R = sum(self.widths), sum(self.ranks)
        self.side = self.R + -self.R % 8  # R padded, so that rows start at multiples of 16 bytes
        self.dense: Tensor | None = None  # Wx, where it is dequantized once for the complete run

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Dequantize once, n_out * n_in * itemsize bytes; evaluation and chat use these weights too."""
        self.dense = torch.zeros(self.n_out + self.side, self.n_in + self.side, dtype=dtype)
        for layer, rows in zip(self.layers, self.dense[: self.n_out, : self.n_in].split(self.widths), strict=True):
            layer.rebuild_into(rows)
            layer.dense = rows

    def weight(self, dtype: torch.dtype, merged: bool, backward: bool = False, with_W: bool = True) -> Tensor:
        """Wx (n_out + side, n_in + side), with W + s B A in place of W if `merged`. The next call overwrites it.

        with_W: False writes the adapters alone.
        """
        dense = None if merged else self.dense
        if dense is not None and backward:
            return dense  # the forward pass has written the adapters
        shape, device = (self.n_out + self.side, self.n_in + self.side), self.layers[0].device
        wx = scratch(*shape, dtype, device) if dense is None else dense
        w, B = wx[: self.n_out].split([self.n_in, self.side], dim=1)
        A, first = self.rows_of_A(wx), 0
        parts = zip(self.layers, w.split(self.widths), A.split(self.ranks), B.split(self.widths), strict=True)
        for layer, w_rows, A_rows, B_rows in parts:
            r, c = len(A_rows), layer.row_scale
            if r:
                lora_B = layer.lora_B if c is None else layer.lora_B * c[:, None]
                ops.kernels(wx).place_adapter(layer.lora_A, lora_B, layer.scaling, A_rows, B_rows, first)
            else:
                B_rows.zero_()
            if dense is None and with_W:
                layer.rebuild_into(w_rows, (A_rows, B_rows[:, first : first + r]) if merged and r else None, c)
            first += r
        return wx

    def rows_of_A(self, wx: Tensor) -> Tensor:
        """A of all projections, (R, n_in)."""
        return wx[self.n_out : self.n_out + self.R, : self.n_in]

    def input_buffer(self, like: Tensor, merged: bool) -> Tensor:
        """An empty (N, n_in) tensor for the input; (N, n_in + side) where xa comes beside it."""
        return like.new_empty(len(like), self.n_in + (0 if merged else self.side))

    def is_one_matmul(self, merged: bool) -> bool:
        """Whether the matmul with W is all, and xa comes out of it."""
        return merged or not self.R

    def forward(self, x: Tensor, merged: bool, lora_down: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """y (N, n_out) and xa (N, R). Rows of both may be slices of wider ones.

        Args:
            x: from `input_buffer`; the input in its first n_in columns.
            lora_down: computes xa from A (R, n_in), and may write the input as well; not called if `is_one_matmul`.
        """
        wx = self.weight(x.dtype, merged)
        if self.is_one_matmul(merged):
            both = x @ wx[: self.n_out + self.side, : self.n_in].t()
            return both[:, : self.n_out], both[:, self.n_out : self.n_out + self.R]
        beside, xa = x[:, self.n_in :], lora_down(self.rows_of_A(wx))
        beside[:, : self.R].copy_(xa)
        beside[:, self.R :].zero_()
        return x @ wx[: self.n_out].t(), xa

    def backward_x_without_update(self, dy: Tensor, merged: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """dx (N, n_in) and dxa (N, R), slices of one tensor; and A (R, n_in) unless merged: dx then lacks dxa A."""
        wx = self.weight(dy.dtype, merged, backward=True)
        both = dy @ wx[: self.n_out]
        A = None if self.is_one_matmul(merged) else self.rows_of_A(wx)
        return both[:, : self.n_in], both[:, self.n_in : self.n_in + self.R], A

    def backward_x(self, dy: Tensor, merged: bool, dropout: RowDropout | None) -> tuple[Tensor, Tensor]:
        """dx (N, n_in), complete, and dxa (N, R)."""
        dx, dxa, A = self.backward_x_without_update(dy, merged)
        if A is not None:
            ops.kernels(dy).lora_dx_add_(dx, dxa, A, dropout)
        return dx, dxa

    def backward_xa(self, dy: Tensor) -> Tensor:
        """dxa (N, R) alone, where dx is not needed."""
        return dy @ self.weight(dy.dtype, False, backward=True, with_W=False)[: self.n_out, self.n_in :][:, : self.R]

    def backward_B(self, dy: Tensor, xa: Tensor) -> None:
        """Add to the gradient of every B."""
        for layer, dy_, xa_ in zip(self.layers, dy.split(self.widths, 1), xa.split(self.ranks, 1), strict=True):
            if layer.has_lora:
                out = gradient_of(layer.lora_B)
                ops.kernels(dy).lora_backward_B(dy_, xa_, layer.scaling, out, layer.row_scale)

    def backward_magnitude(self, dots: Tensor | None) -> None:
        """Add to the gradient of DoRA's magnitudes. dots: (n_out,), the sum over the tokens of dy times y."""
        for layer, part in zip(self.layers, () if dots is None else dots.split(self.widths), strict=dots is not None):
            if layer.magnitude is not None:
                gradient_of(layer.magnitude).addcdiv_(part, layer.magnitude.detach())

    def backward_A(
        self, dxa: Tensor, x: Tensor, dropout: RowDropout | None, norm: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add to the gradient of every A. x: (N, n_in), the input, or with `norm` the input before that norm."""
        if self.R:
            ops.kernels(x).lora_backward_A(dxa, x, dropout, [gradient_of(layer.lora_A) for layer in self.trained], norm)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The float32 tensor that gradients of `parameter` are added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class TokenNumbers:
    """What decides the dropout masks of all blocks for a batch: a number for every token and every projections' input.

    The first block computes them for all blocks, because many small launches per block would take longer.
    """

    def __init__(self, blocks: Sequence["FusedBlock"]) -> None:
        # Layers that read the same input have the same seed; those without an update have none.
        seeds = [[max(layer.layer_seed for layer in p.layers) for p in block.projections] for block in blocks]
        self.layer_seeds = torch.tensor(seeds, device=blocks[0].input_layernorm.weight.device)
        self.first = next((block.index for block in blocks if block.trained), 0)
        self.numbers = torch.empty(0)  # (blocks, 4, N) int32

    def of(self, block: "FusedBlock", T: int) -> Tensor:
        """(4, N) int32, for the rows that `set_dropout_rows` named."""
        if block.index == self.first:
            row_seeds, places = block.trained[0].row_seeds, block.trained[0].places
            assert row_seeds is not None, "set_dropout_rows comes before the forward pass"
            layer_seeds = self.layer_seeds.view(*self.layer_seeds.shape, *[1] * row_seeds.dim())
            self.numbers = ops.token_numbers(row_seeds ^ layer_seeds, T, places).flatten(2)
        return self.numbers[block.index]


@dataclass
class Attended:
    """What the attention half of a block leaves for its backward pass."""

    q: Tensor  # (B, T, H, hd); k, v: (B, T, KV, hd); leaves of attention's own autograd graph
    k: Tensor
    v: Tensor
    y: Tensor  # (B, T, H, hd), attention(q, k, v), the root of that graph
    middle: Tensor  # (N, D), the residual stream after attention
    rstd_x: Tensor  # (N,) float32, 1 / rms of the rows of x, and of `middle`
    rstd_middle: Tensor
    xa_qkv: Tensor  # (N, R); merged, it is a slice of q, k and v's tensor
    xa_o: Tensor
    y_o: Tensor | None  # (N, D), o_proj's output, with DoRA


@dataclass
class Saved:
    """What a block saves for its backward pass. None: recomputed, or offloaded to host memory."""

    x: Tensor | None  # (N, D), the block's input
    attended: Attended | None = None
    gate_up: Tensor | None = None  # (N, 2 FF)
    xa_gate_up: Tensor | None = None  # (N, R); merged, it is a slice of the same tensor as gate_up
    xa_down: Tensor | None = None  # (N, R)
    y_down: Tensor | None = None  # (N, D), down_proj's output, with DoRA

    def take_mlp(self) -> tuple[Tensor, Tensor, Tensor]:
        """gate_up, xa_gate_up and xa_down, which then live as long as the caller needs them."""
        gate_up, xa_gate_up, xa_down = self.gate_up, self.xa_gate_up, self.xa_down
        assert gate_up is not None and xa_gate_up is not None and xa_down is not None
        self.gate_up = self.xa_gate_up = self.xa_down = None
        return gate_up, xa_gate_up, xa_down

    def take_attended(self) -> tuple[Tensor, Attended]:
        """x and `attended`, likewise."""
        x, attended = self.x, self.attended
        assert x is not None and attended is not None
        self.x = self.attended = None
        return x, attended


class BlockFunction(torch.autograd.Function):
    """Forward and backward of a block. x: (B, T, D). wants_dx: whether anything below the block has gradients."""

    @staticmethod
    def forward(
        ctx, x: Tensor, block: "FusedBlock", rope: tuple[Tensor, Tensor], segments: Segments, wants_dx: bool
    ) -> Tensor:
        B, T, D = x.shape
        ctx.block, ctx.rope, ctx.segments, ctx.shape = block, [c.flatten(0, 1) for c in rope], segments, (B, T, D)
        ctx.dropouts, ctx.wants_dx = block.dropouts(T), wants_dx
        ctx.merged = block.merge and not any(ctx.dropouts)
        saved = Saved(x.reshape(-1, D))
        run_to_gate_up(ctx, saved)
        y = run_down(ctx, saved)
        if ctx.needs_input_grad[0]:
            release(block, saved)
            ctx.saved = saved
        return y.view(B, T, D)

    @staticmethod
    def backward(ctx, dy: Tensor):
        block, saved, (B, T, D) = ctx.block, ctx.saved, ctx.shape
        block.unshard_weights()
        dy = dy.reshape(-1, D)
        if block.keep == "offload":
            saved.x = block.host.get(dy.device)
        elif block.keep == "mlp_host":
            saved.gate_up = block.host.get(dy.device)[:, : block.projections[2].n_out]
        run_to_gate_up(ctx, saved)  # recomputes what was not saved
        if block.projections[3].has_dora and saved.y_down is None:
            run_down(ctx, saved)
        dx = attention_backward(ctx, saved, mlp_backward(ctx, saved, dy))
        ctx.saved = None
        return None if dx is None else dx.view(B, T, D), None, None, None, None


def run_to_gate_up(ctx, saved: Saved) -> None:
    """The forward pass up to gate and up, as far as `saved` does not hold it already."""
    if saved.gate_up is not None:
        return
    x, gate_up = saved.x, ctx.block.projections[2]
    assert x is not None
    buffer = gate_up.input_buffer(x, ctx.merged)
    h = buffer[:, : x.shape[1]]
    if saved.attended is None:
        saved.attended = run_attention(ctx, x, h)
    else:
        rms_norm(ctx.block.post_attention_layernorm, saved.attended.middle, h)
    lora_down = partial(ops.kernels(x).lora_down, h, dropout=ctx.dropouts[2])
    saved.gate_up, saved.xa_gate_up = gate_up.forward(buffer, ctx.merged, lora_down)


def run_attention(ctx, x: Tensor, h: Tensor) -> Attended:
    """middle = x + o(attention(rope(qkv(norm(x))))). The norm of `middle` is written to h (N, D)."""
    block, merged, (B, T, D), kernels = ctx.block, ctx.merged, ctx.shape, ops.kernels(x)
    qkv, o = block.projections[:2]
    buffer = qkv.input_buffer(x, merged)
    rstd_x = rms_norm(block.input_layernorm, x, buffer[:, :D])
    lora_down = partial(kernels.lora_down, buffer[:, :D], dropout=ctx.dropouts[0])
    projected, xa_qkv = qkv.forward(buffer, merged, lora_down)
    del buffer, lora_down
    kernels.rope_(projected, sum(block.head_counts[:2]), block.self_attn.head_dim, *ctx.rope, False)
    with torch.enable_grad():  # a graph of its own, which `attention_backward` runs
        heads = projected.unflatten(0, (B, T)).unflatten(2, (-1, block.self_attn.head_dim))
        q, k, v = (part.detach().requires_grad_() for part in heads.split(block.head_counts, dim=2))
        y = ops.attention(q, k, v, ctx.segments)
    attended = y.detach().reshape(B * T, -1)
    buffer = attended if o.is_one_matmul(merged) else o.input_buffer(x, merged)
    lora_down = partial(kernels.lora_down, attended, dropout=ctx.dropouts[1], out=buffer[:, : o.n_in])
    delta, xa = o.forward(buffer, merged, lora_down)
    xa_o, norm, y_o = xa.clone(), block.post_attention_layernorm, delta if o.has_dora else None
    middle, _, rstd_middle = kernels.add_rms_norm(x, delta, norm.weight, norm.eps, out=h)
    return Attended(q, k, v, y, middle, rstd_x, rstd_middle, xa_qkv, xa_o, y_o)


def run_down(ctx, saved: Saved) -> Tensor:
    """The block's output, middle + down(swiglu(gate_up)), (N, D).

    Its xa is saved in every case: down_proj is not computed again in the backward pass.
    """
    attended, gate_up, down = saved.attended, saved.gate_up, ctx.block.projections[3]
    assert attended is not None and gate_up is not None
    kernels = ops.kernels(gate_up)
    buffer = down.input_buffer(attended.middle, ctx.merged)
    if down.is_one_matmul(ctx.merged):
        kernels.swiglu(gate_up, out=buffer)
    act = buffer[:, : down.n_in]
    lora_down = partial(kernels.swiglu_lora_down, gate_up, dropout=ctx.dropouts[3], out=act)
    y, xa = down.forward(buffer, ctx.merged, lora_down)
    del buffer, act, lora_down
    saved.xa_down, saved.y_down = xa.clone(), y if down.has_dora else None
    return kernels.add(attended.middle, y)


def release(block: "FusedBlock", saved: Saved) -> None:
    """Drop from `saved` what `block.keep` does not keep on the device."""
    x, gate_up, xa_gate_up = saved.x, saved.gate_up, saved.xa_gate_up
    assert x is not None and gate_up is not None and xa_gate_up is not None
    if block.keep != "all":
        saved.gate_up = saved.xa_gate_up = None
    if block.keep in ("input", "offload"):
        saved.attended = saved.y_down = None
    if block.keep == "mlp_host":
        saved.xa_gate_up = xa_gate_up.clone()  # a slice would keep all of gate and up in memory
        block.host.put(gate_up if gate_up._base is None else gate_up._base)
    elif block.keep == "offload":
        block.host.put(x)
        saved.x = None


def mlp_backward(ctx, saved: Saved, dy: Tensor) -> Tensor:
    """The gradient of middle (N, D), from that of y = middle + down(swiglu(gate_up(norm(middle)))).

    Adds to the gradients of the adapters. The tensor of gate and up becomes its own gradient.
    """
    block, merged, kernels, attended = ctx.block, ctx.merged, ops.kernels(dy), saved.attended
    gate_up, down = block.projections[2:]
    assert attended is not None
    gate_up_, xa_gate_up, xa_down = saved.take_mlp()
    down.backward_B(dy, xa_down)
    if saved.y_down is not None:
        down.backward_magnitude(kernels.column_dot(dy, saved.y_down))
    dact, dxa, A = down.backward_x_without_update(dy, merged)
    (gate, up), (down_,) = gate_up.layers, down.layers
    if gate.has_lora and up.has_lora and down_.has_lora:
        dBs = gradient_of(gate.lora_B), gradient_of(up.lora_B)
        scalings, dA = (gate.scaling, up.scaling), gradient_of(down_.lora_A)
        row_scales = (gate.row_scale, up.row_scale) if gate_up.has_dora else None
        operands = dact, gate_up_, dxa, A, ctx.dropouts[3], dA, xa_gate_up, scalings, dBs, row_scales
        gate_up.backward_magnitude(kernels.mlp_backward_(*operands))
    else:
        values = gate_up_.clone() if gate_up.has_dora else None
        if A is not None:
            kernels.lora_dx_add_(dact, dxa, A, ctx.dropouts[3])
        kernels.swiglu_backward_(dact, gate_up_)  # dact is act now
        down.backward_A(dxa, dact, ctx.dropouts[3])
        gate_up.backward_B(gate_up_, xa_gate_up)
        if values is not None:
            gate_up.backward_magnitude(kernels.column_dot(gate_up_, values))
        del values
    del dact, dxa, A
    dh, dxa = gate_up.backward_x(gate_up_, merged, ctx.dropouts[2])
    del gate_up_, xa_gate_up
    weight = block.post_attention_layernorm.weight
    gate_up.backward_A(dxa, attended.middle, ctx.dropouts[2], (attended.rstd_middle, weight))
    return kernels.rms_norm_backward(dh, attended.middle, weight, attended.rstd_middle, dy)


def attention_backward(ctx, saved: Saved, dmiddle: Tensor) -> Tensor | None:
    """The gradient of x (N, D), from that of middle = x + o(attention(rope(qkv(norm(x))))); None if not wanted.

    Adds to the gradients of the adapters.
    """
    block, merged, (B, T, _), kernels = ctx.block, ctx.merged, ctx.shape, ops.kernels(dmiddle)
    qkv, o = block.projections[:2]
    x, attended = saved.take_attended()
    rstd, xa_qkv, y = attended.rstd_x, attended.xa_qkv, attended.y
    o.backward_B(dmiddle, attended.xa_o)
    if attended.y_o is not None:
        o.backward_magnitude(kernels.column_dot(dmiddle, attended.y_o))
    dattended, dxa = o.backward_x(dmiddle, merged, ctx.dropouts[1])
    o.backward_A(dxa, y.detach().reshape(B * T, -1), ctx.dropouts[1])
    dy = dattended.unflatten(0, (B, T)).unflatten(2, y.shape[2:])
    grads = torch.autograd.grad(y, (attended.q, attended.k, attended.v), dy)
    dqkv = kernels.rope_backward(*grads, *ctx.rope)
    if qkv.has_dora:  # q and k as they were before RoPE
        before = (part.detach() for part in (attended.q, attended.k, attended.v))
        qkv.backward_magnitude(kernels.column_dot(dqkv, kernels.rope_backward(*before, *ctx.rope)))
    del attended, y, grads, dattended, dy
    qkv.backward_B(dqkv, xa_qkv)
    weight = block.input_layernorm.weight
    if not ctx.wants_dx:
        if qkv.R:
            qkv.backward_A(qkv.backward_xa(dqkv), x, ctx.dropouts[0], (rstd, weight))
        return None
    dh, dxa = qkv.backward_x(dqkv, merged, ctx.dropouts[0])
    qkv.backward_A(dxa, x, ctx.dropouts[0], (rstd, weight))
    return kernels.rms_norm_backward(dh, x, weight, rstd, dmiddle)


def rms_norm(norm: RMSNorm, x: Tensor, out: Tensor) -> Tensor:
    """Write the norm of x (N, D) to `out` and return the factor of every row, (N,) float32."""
    return ops.kernels(x).rms_norm(x, norm.weight, norm.eps, out)[1]


def not_sharded() -> None:
    """In place of `FusedBlock.unshard_weights` where every rank holds all weights."""


class FusedBlock(Block):
    """`model.Block` with the same modules under the same names, and `BlockFunction` for training."""

    tokens: TokenNumbers  # of all blocks, set by `fuse_blocks`

    def __init__(self, block: Block, index: int, keep: Keep, merge: bool, host: HostMemory) -> None:
        """merge: compute with W + s B A where there is no dropout. host: of all blocks that offload."""
        nn.Module.__init__(self)
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.index, self.keep, self.host = index, keep, host
        self.unshard_weights: Callable[[], None] = not_sharded  # where the base is sharded: gathers them
        attn, mlp = block.self_attn, block.mlp
        groups = ((attn, "q_proj k_proj v_proj"), (attn, "o_proj"), (mlp, "gate_proj up_proj"), (mlp, "down_proj"))
        self.projections = [Projections(*(qlora_linear(m, name) for name in names.split())) for m, names in groups]
        self.trained = [layer for projections in self.projections for layer in projections.trained]
        self.dora = [layer for layer in self.trained if layer.magnitude is not None]
        self.merge = merge or bool(self.dora)
        self.scales_are_old = bool(self.dora)  # DoRA's row scales are to be measured before the next forward pass
        self.head_counts = [width // attn.head_dim for width in self.projections[0].widths]

    def measure_rows(self) -> None:
        """Measure DoRA's row scales if the adapter may have changed."""
        if self.scales_are_old:
            for layer in self.dora:
                layer.measure_rows(self.input_layernorm.weight.dtype)
            self.scales_are_old = False

    def dropouts(self, T: int) -> list[RowDropout | None]:
        """What decides the dropout masks of the four inputs, for this batch."""
        if not (self.trained and self.training and self.trained[0].dropout_p):
            return [None] * len(self.projections)
        return [RowDropout(self.trained[0].dropout_p, numbers) for numbers in self.tokens.of(self, T)]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None) -> Tensor:
        self.unshard_weights()
        self.measure_rows()
        if cache is not None or not torch.is_grad_enabled():
            return super().forward(x, rope, segments, cache)
        wants_dx = x.requires_grad
        if (
            self.trained and not wants_dx
        ):  # the first block: nothing below it is trained, but its own backward pass has to run
            x = x.detach().requires_grad_()
        return BlockFunction.apply(x, self, rope, segments, wants_dx)


def fuse_blocks(model: Llama, keeps: Sequence[Keep], merge: bool = False) -> None:
    """Replace every block by its fused twin.

    Args:
        keeps: what each block saves for its backward pass.
        merge: compute with W + s B A where there is no dropout.
    """
    host, blocks = HostMemory(), []
    for i, (block, keep) in enumerate(zip(model.model.layers, keeps, strict=True)):
        assert isinstance(block, Block)
        blocks.append(FusedBlock(block, i, keep, merge, host))
        model.model.layers[i] = blocks[i]
    tokens = TokenNumbers(blocks)
    for fused in blocks:
        fused.tokens = tokens
    head = model.lm_head.weight
    if head.is_cuda:  # the largest scratch of a step, before any CUDA graph records the address of a smaller one
        scratch(ROWS_ON_GPU, len(head), head.dtype, head.device)


def keep_dense_weights(model: Llama) -> None:
    """Dequantize the weights of fused blocks once. On a CPU a step of SmolLM2 then takes 1.23 s instead of 1.46."""
    for block in model.model.layers:
        assert isinstance(block, FusedBlock)
        for projections in block.projections if not block.dora else ():
            projections.keep_dense(model.model.embed_tokens.weight.dtype)


def can_fuse(model: Llama) -> bool:
    """Whether the fused block can run: not DoRA with dropout, where W has to be multiplied by two inputs."""
    return not any(layer.magnitude is not None and layer.dropout_p for layer in lora_layers(model).values())


def adapter_changed(model: Llama) -> None:
    """Have DoRA's row scales measured before the next forward pass: they hold for one step."""
    for block in model.model.layers:
        if isinstance(block, FusedBlock):
            block.scales_are_old = bool(block.dora)
