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

What remains are the gradients of A and B, which read x and dy once each. Merging needs p = 0, because dropout changes
the update's input only. The update is added during the dequantization, in float32 before the one rounding. The
equations of a layer are in `ops/lora.py`; those of the norm, RoPE and SwiGLU in `ops/block_parts.py`.

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
from ..qlora import QLoRALinear, lora_layers

Keep = Literal["all", "mlp_host", "no_mlp", "input", "offload"]
ON_HOST = ("mlp_host", "offload")


class Projections:
    """Linear layers that read the same input, computed as one matmul with Wx."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = [layer for layer in layers if isinstance(layer, QLoRALinear)]
        assert len(self.layers) == len(layers), "can_fuse tells whether all have LoRA"
        self.n_in, self.widths = self.layers[0].in_features, [layer.out_features for layer in self.layers]
        self.ranks = [layer.lora_A.shape[0] for layer in self.layers]
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
        shape, device = (self.n_out + self.side, self.n_in + self.side), self.layers[0].lora_A.device
        wx = scratch(*shape, dtype, device) if dense is None else dense
        w, B = wx[: self.n_out].split([self.n_in, self.side], dim=1)
        A, first = self.rows_of_A(wx), 0
        parts = zip(self.layers, w.split(self.widths), A.split(self.ranks), B.split(self.widths), strict=True)
        for layer, w_rows, A_rows, B_rows in parts:
            r = len(A_rows)
            ops.kernels(wx).place_adapter(layer.lora_A, layer.lora_B, layer.scaling, A_rows, B_rows, first)
            if dense is None and with_W:
                layer.rebuild_into(w_rows, (A_rows, B_rows[:, first : first + r]) if merged else None)
            first += r
        return wx

    def rows_of_A(self, wx: Tensor) -> Tensor:
        """A of all projections, (R, n_in)."""
        return wx[self.n_out : self.n_out + self.R, : self.n_in]

    def input_buffer(self, like: Tensor, merged: bool) -> Tensor:
        """An empty (N, n_in) tensor for the input; (N, n_in + side) where xa comes beside it."""
        return like.new_empty(len(like), self.n_in + (0 if merged else self.side))

    def forward(self, x: Tensor, merged: bool, lora_down: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """y (N, n_out) and xa (N, R). Rows of both may be slices of wider ones.

        Args:
            x: from `input_buffer`; the input in its first n_in columns.
            lora_down: computes xa from A (R, n_in), and may write the input as well; not called if `merged`.
        """
        wx = self.weight(x.dtype, merged)
        if merged:
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
        A = None if merged else self.rows_of_A(wx)
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
            ops.kernels(dy).lora_backward_B(dy_, xa_, layer.scaling, gradient_of(layer.lora_B))

    def backward_A(
        self, dxa: Tensor, x: Tensor, dropout: RowDropout | None, norm: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Add to the gradient of every A. x: (N, n_in), the input, or with `norm` the input before that norm."""
        ops.kernels(x).lora_backward_A(dxa, x, dropout, [gradient_of(layer.lora_A) for layer in self.layers], norm)


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
        seeds = [[projections.layers[0].layer_seed for projections in block.projections] for block in blocks]
        self.layer_seeds = torch.tensor(seeds, device=blocks[0].input_layernorm.weight.device)
        self.numbers = torch.empty(0)  # (blocks, 4, N) int32

    def of(self, block: "FusedBlock", T: int) -> Tensor:
        """(4, N) int32, for the rows that `set_dropout_rows` named."""
        if block.index == 0:
            row_seeds = block.projections[0].layers[0].row_seeds
            assert row_seeds is not None, "set_dropout_rows comes before the forward pass"
            self.numbers = ops.token_numbers(row_seeds ^ self.layer_seeds[..., None], T).flatten(2)
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


@dataclass
class Saved:
    """What a block saves for its backward pass. None: recomputed, or offloaded to host memory."""

    x: Tensor | None  # (N, D), the block's input
    attended: Attended | None = None
    gate_up: Tensor | None = None  # (N, 2 FF)
    xa_gate_up: Tensor | None = None  # (N, R); merged, it is a slice of the same tensor as gate_up
    xa_down: Tensor | None = None  # (N, R)

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
        ctx.saved = saved = Saved(x.reshape(-1, D))
        run_to_gate_up(ctx, saved)
        y = run_down(ctx, saved)
        release(block, saved)
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
    buffer = attended if merged else o.input_buffer(x, merged)
    lora_down = partial(kernels.lora_down, attended, dropout=ctx.dropouts[1], out=buffer[:, : o.n_in])
    delta, xa = o.forward(buffer, merged, lora_down)
    xa_o, norm = xa.clone(), block.post_attention_layernorm
    middle, _, rstd_middle = kernels.add_rms_norm(x, delta, norm.weight, norm.eps, out=h)
    return Attended(q, k, v, y, middle, rstd_x, rstd_middle, xa_qkv, xa_o)


def run_down(ctx, saved: Saved) -> Tensor:
    """The block's output, middle + down(swiglu(gate_up)), (N, D).

    Its xa is saved in every case: down_proj is not computed again in the backward pass.
    """
    attended, gate_up, down = saved.attended, saved.gate_up, ctx.block.projections[3]
    assert attended is not None and gate_up is not None
    kernels = ops.kernels(gate_up)
    buffer = down.input_buffer(attended.middle, ctx.merged)
    if ctx.merged:
        kernels.swiglu(gate_up, out=buffer)
    act = buffer[:, : down.n_in]
    lora_down = partial(kernels.swiglu_lora_down, gate_up, dropout=ctx.dropouts[3], out=act)
    y, xa = down.forward(buffer, ctx.merged, lora_down)
    del buffer, act, lora_down
    saved.xa_down = xa.clone()
    return kernels.add(attended.middle, y)


def release(block: "FusedBlock", saved: Saved) -> None:
    """Drop from `saved` what `block.keep` does not keep on the device."""
    x, gate_up, xa_gate_up = saved.x, saved.gate_up, saved.xa_gate_up
    assert x is not None and gate_up is not None and xa_gate_up is not None
    if block.keep != "all":
        saved.gate_up = saved.xa_gate_up = None
    if block.keep in ("input", "offload"):
        saved.attended = None
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
    dact, dxa, A = down.backward_x_without_update(dy, merged)
    (gate, up), (down_,) = gate_up.layers, down.layers
    dBs = gradient_of(gate.lora_B), gradient_of(up.lora_B)
    scalings, dA = (gate.scaling, up.scaling), gradient_of(down_.lora_A)
    kernels.mlp_backward_(dact, gate_up_, dxa, A, ctx.dropouts[3], dA, xa_gate_up, scalings, dBs)
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
    dattended, dxa = o.backward_x(dmiddle, merged, ctx.dropouts[1])
    o.backward_A(dxa, y.detach().reshape(B * T, -1), ctx.dropouts[1])
    dy = dattended.unflatten(0, (B, T)).unflatten(2, y.shape[2:])
    grads = torch.autograd.grad(y, (attended.q, attended.k, attended.v), dy)
    dqkv = kernels.rope_backward(*grads, *ctx.rope)
    del attended, y, grads, dattended, dy
    qkv.backward_B(dqkv, xa_qkv)
    weight, dx = block.input_layernorm.weight, None
    if ctx.wants_dx:
        dh, dxa = qkv.backward_x(dqkv, merged, ctx.dropouts[0])
        dx = kernels.rms_norm_backward(dh, x, weight, rstd, dmiddle)
    else:
        dxa = qkv.backward_xa(dqkv)
    qkv.backward_A(dxa, x, ctx.dropouts[0], (rstd, weight))
    return dx


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
        self.index, self.keep, self.merge, self.host = index, keep, merge, host
        self.unshard_weights: Callable[[], None] = not_sharded  # where the base is sharded: gathers them
        attn, mlp = block.self_attn, block.mlp
        self.projections = [
            Projections(attn.q_proj, attn.k_proj, attn.v_proj),
            Projections(attn.o_proj),
            Projections(mlp.gate_proj, mlp.up_proj),
            Projections(mlp.down_proj),
        ]
        self.head_counts = [width // attn.head_dim for width in self.projections[0].widths]

    def dropouts(self, T: int) -> list[RowDropout | None]:
        """What decides the dropout masks of the four inputs, for this batch."""
        layer = self.projections[0].layers[0]
        if not (layer.training and layer.dropout_p):
            return [None] * len(self.projections)
        return [RowDropout(layer.dropout_p, numbers) for numbers in self.tokens.of(self, T)]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None) -> Tensor:
        self.unshard_weights()
        if cache is not None or not torch.is_grad_enabled():
            return super().forward(x, rope, segments, cache)
        wants_dx = x.requires_grad
        if not wants_dx:  # the first block: nothing below it is trained, but its own backward pass has to run
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
        for projections in block.projections:
            projections.keep_dense(model.model.embed_tokens.weight.dtype)


def can_fuse(model: Llama) -> bool:
    """Whether all seven linear layers of every block have LoRA without DoRA, as the fused block requires."""
    layers = lora_layers(model).values()
    return len(layers) == 7 * model.config.num_hidden_layers and all(layer.magnitude is None for layer in layers)
