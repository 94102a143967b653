"""A whole block with its backward pass written by hand: the fast twin of `model.Block` for QLoRA training.

Autograd keeps every input of every operation and rebuilds nothing. Here we choose. What one block needs for its
backward pass, in units of N x D numbers (N tokens, D width, Llama-3-8B's ratios):

    kept        x 1, q k v 1.5, attention's result 1, x after attention 1, gate and up 7          11.5 D
    made again  both norms, SwiGLU's result, dropout masks, W from its four bits                  elementwise work only

`keep` trades memory for time, block by block:

    "all"       as above
    "no_mlp"    gate and up are multiplied again in the backward pass                             4.5 D
    "input"     everything is, from x, except down_proj, whose result no gradient needs             1 D

Projections that read the same input are one product: q, k and v; gate and up. Their weights are rebuilt side by side
in a buffer that all blocks share. The update's products touch the wide tensors once each, `ops/lora_parts.py` says how,
and the gradients of A and B are added straight into the flat buffer's views.

Folding: without dropout, x W^T + s x A^T B^T = x (W + s B A)^T. The update is then added while W is rebuilt, in float32
before the one rounding, and y and dx are touched by no second product. Dropout acts on the update's input alone and
leaves no such W. The equations of a layer stand in
`ops/lora.py`; those of the norm, the rotation and SwiGLU in `ops/block_parts.py`.

The parameters and their names are those of the plain block, whose modules this one takes over.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from . import ops
from .model import Block, KVCache, Llama
from .ops import RowDropout, Segments
from .qlora import QLoRALinear, lora_layers

Keep = Literal["all", "no_mlp", "input"]
_scratch: dict[tuple, Tensor] = {}


def scratch(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for rebuilt weights that every block uses in turn: on one stream, the next use waits for this one."""
    key = (*shape, dtype, device)
    if key not in _scratch:
        _scratch[key] = torch.empty(*shape, dtype=dtype, device=device)
    return _scratch[key]


class Group:
    """Projections that read the same input: their weights, and their updates, as one product.

    A stands as (R, n_in), R the sum of the ranks; each B apart, because each adds to its own columns of y.
    """

    def __init__(self, *layers: QLoRALinear) -> None:
        self.layers = layers
        self.n_in = layers[0].in_features
        self.widths = [layer.out_features for layer in layers]
        self.ranks = [layer.lora_A.shape[0] for layer in layers]
        self.dense: Tensor | None = None  # (sum of n_out, n_in) where the rebuilt weight is kept for good

    def keep_dense(self, dtype: torch.dtype) -> None:
        """Rebuild the weights once and keep them, n_out * n_in * itemsize bytes; evaluation and chat use them too."""
        self.dense = torch.cat([layer.rebuild(dtype) for layer in self.layers])
        for layer, rows in zip(self.layers, self.dense.split(self.widths), strict=True):
            layer.dense = rows

    def weight(self, adapters: tuple, dtype: torch.dtype, fold: bool) -> Tensor:
        """(sum of n_out, n_in), rebuilt in the shared buffer, with the update in it if `fold`. Read it at once."""
        A, Bs = adapters
        if self.dense is not None and not fold:
            return self.dense
        w = scratch(sum(self.widths), self.n_in, dtype=dtype, device=A.device)
        parts = zip(self.layers, w.split(self.widths), A.split(self.ranks), Bs, strict=True)
        for layer, rows, a, b in parts:
            layer.rebuild_into(rows, (a, b) if fold else None)
        return w

    def adapters(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """A (R, n_in) and every B (n_out, r) in the dtype of the products."""
        A = torch.cat([layer.lora_A.detach() for layer in self.layers]).to(dtype)
        return A, [layer.lora_B.detach().to(dtype) for layer in self.layers]

    def dropout(self, T: int) -> RowDropout | None:
        layer = self.layers[0]
        if not (layer.training and layer.dropout_p):
            return None
        return RowDropout(layer.dropout_p, ops.fold(layer.row_seeds ^ layer.layer_seed), T)

    def forward(
        self, x: Tensor, adapters: tuple, dropout: RowDropout | None, fold: bool, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """y (N, sum of n_out) of x (N, n_in), plus `residual`; and xa (N, R), which a folded product has not."""
        w = self.weight(adapters, x.dtype, fold)
        y = x @ w.t() if residual is None else torch.addmm(residual, x, w.t())
        if fold:
            return y, None
        A, Bs = adapters
        xa = ops.kernels(x).lora_down(x, A, dropout)
        for columns, part, layer, B in zip(*self.split(y, xa), self.layers, Bs, strict=True):
            ops.kernels(x).lora_up_add_(columns, part, B, layer.scaling)
        return y, xa

    def split(self, wide: Tensor, low: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each projection's columns of (N, sum of n_out) and of (N, R)."""
        return wide.split(self.widths, 1), low.split(self.ranks, 1)

    def backward_B(self, dy: Tensor, xa: Tensor, adapters: tuple) -> Tensor:
        """Add the gradients of every B; returns dxa (N, R), the gradient of xa."""
        dxa = torch.empty_like(xa)
        parts = zip(*self.split(dy, xa), dxa.split(self.ranks, 1), self.layers, adapters[1], strict=True)
        for columns, part, dpart, layer, B in parts:
            ops.kernels(dy).lora_up_backward(columns, part, B, layer.scaling, dpart, gradient_of(layer.lora_B))
        return dxa

    def backward_A(self, dxa: Tensor, x: Tensor, dropout: RowDropout | None) -> None:
        """Add the gradients of every A, from the input x (N, n_in) that the projections read."""
        gradients = [gradient_of(layer.lora_A) for layer in self.layers]
        ops.kernels(x).lora_down_backward_A(dxa, x, dropout, gradients)

    def backward_x(self, dy: Tensor, dxa: Tensor | None, adapters: tuple, dropout: RowDropout | None) -> Tensor:
        """dx (N, n_in); without dxa, through the folded weight."""
        dx = dy @ self.weight(adapters, dy.dtype, fold=dxa is None)
        if dxa is not None:
            ops.kernels(dy).lora_dx_add_(dx, dxa, adapters[0], dropout)
        return dx

    def backward(self, dy: Tensor, x: Tensor, xa: Tensor | None, adapters: tuple, dropout: RowDropout | None) -> Tensor:
        """All of it: dx (N, n_in), and the gradients of every A and B. xa None: the forward pass was folded."""
        low = ops.kernels(x).lora_down(x, adapters[0]) if xa is None else xa
        dxa = self.backward_B(dy, low, adapters)
        self.backward_A(dxa, x, dropout)
        return self.backward_x(dy, None if xa is None else dxa, adapters, dropout)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The float32 tensor that gradients of `parameter` are added to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


@dataclass
class Kept:
    """What a block keeps from forward to backward. None: made again."""

    x: Tensor  # (N, D), the block's input
    attention: tuple | None = None  # q, k, v as leaves and y = attention(q, k, v) with its graph
    middle: Tensor | None = None  # (N, D), the residual stream after attention
    gate_up: Tensor | None = None  # (N, 2 FF)
    low_rank: tuple | None = None  # every group's xa, (N, R)


class BlockFunction(torch.autograd.Function):
    """Forward and backward of a block. x: (B, T, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, block: "FusedBlock", rope: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        B, T, D = x.shape
        ctx.block, ctx.rope, ctx.segments, ctx.shape = block, [c.flatten(0, 1) for c in rope], segments, (B, T, D)
        ctx.dropouts = [group.dropout(T) for group in block.groups]
        ctx.fold = block.fold and not any(ctx.dropouts)
        kept = Kept(x.reshape(-1, D))
        ctx.adapters = [group.adapters(x.dtype) for group in block.groups]
        y = run_forward(ctx, kept, with_down=True)
        if block.keep == "input":
            kept = Kept(kept.x)
        elif block.keep == "no_mlp":
            kept.gate_up = None
        ctx.kept = kept
        return y.view(B, T, D)

    @staticmethod
    def backward(ctx, dy: Tensor):
        block, kept, fold = ctx.block, ctx.kept, ctx.fold
        block.bring_weights(backward=True)
        qkv, o, gate_up, down = block.groups
        drop_qkv, drop_o, drop_gate_up, drop_down = ctx.dropouts
        ad_qkv, ad_o, ad_gate_up, ad_down = ctx.adapters
        B, T, D = ctx.shape
        run_forward(ctx, kept, with_down=False)  # makes what was not kept
        xa_qkv, xa_o, xa_gate_up, xa_down = kept.low_rank
        dy = dy.reshape(-1, D)

        # MLP: y = middle + down(swiglu(gate_up(norm(middle)))). act is made again while SwiGLU goes back, over dact.
        dxa = None if fold else down.backward_B(dy, xa_down, ad_down)
        act = dact = down.backward_x(dy, dxa, ad_down, drop_down)
        ops.kernels(dact).swiglu_backward_(dact, kept.gate_up)  # gate_up is now its gradient, dact is act
        if fold:
            dxa = down.backward_B(dy, ops.kernels(act).lora_down(act, ad_down[0]), ad_down)
        down.backward_A(dxa, act, drop_down)
        del act, dact
        h, rstd = block.norm2(kept.middle)
        dh = gate_up.backward(kept.gate_up, h, xa_gate_up, ad_gate_up, drop_gate_up)
        kept.gate_up = h = None
        weight = block.post_attention_layernorm.weight
        dmiddle = ops.kernels(dh).rms_norm_backward(dh, kept.middle, weight, rstd, dy)

        # Attention: middle = x + o(attention(rope(qkv(norm(x)))))
        q, k, v, y = kept.attention
        attended = y.detach().reshape(B * T, -1)
        dattended = o.backward(dmiddle, attended, xa_o, ad_o, drop_o)
        grads = torch.autograd.grad(y, (q, k, v), dattended.view(y.shape))
        dqkv = torch.cat([g.flatten(2) for g in grads], dim=2).view(B * T, -1)
        kept.attention = q = k = v = y = grads = attended = dattended = None
        block.rotate(dqkv, ctx.rope, backward=True)
        h, rstd = block.norm1(kept.x)
        dh = qkv.backward(dqkv, h, xa_qkv, ad_qkv, drop_qkv)
        dx = ops.kernels(dh).rms_norm_backward(dh, kept.x, block.input_layernorm.weight, rstd, dmiddle)
        ctx.kept = ctx.adapters = None
        return dx.view(B, T, D), None, None, None


def run_forward(ctx, kept: Kept, with_down: bool) -> Tensor | None:
    """The forward pass from whatever `kept` holds, filling in the rest of it. Returns y (N, D) if `with_down`."""
    block, segments, fold = ctx.block, ctx.segments, ctx.fold
    qkv, o, gate_up, down = block.groups
    drop_qkv, drop_o, drop_gate_up, drop_down = ctx.dropouts
    ad_qkv, ad_o, ad_gate_up, ad_down = ctx.adapters
    B, T, D = ctx.shape
    if kept.attention is None:
        h, _ = block.norm1(kept.x)
        projected, xa_qkv = qkv.forward(h, ad_qkv, drop_qkv, fold)
        del h
        block.rotate(projected, ctx.rope, backward=False)
        with torch.enable_grad():  # attention's own graph, which its backward pass is asked from
            parts = projected.view(B, T, -1, block.self_attn.head_dim).split(block.head_counts, dim=2)
            q, k, v = (part.detach().requires_grad_() for part in parts)
            y = ops.attention(q, k, v, segments)
        kept.attention = q, k, v, y
        kept.middle, xa_o = o.forward(y.detach().reshape(B * T, -1), ad_o, drop_o, fold, residual=kept.x)
        kept.low_rank = xa_qkv, xa_o, None, None
    if kept.gate_up is not None:
        return None
    h, _ = block.norm2(kept.middle)
    kept.gate_up, xa_gate_up = gate_up.forward(h, ad_gate_up, drop_gate_up, fold)
    del h
    y, xa_down = None, kept.low_rank[3]
    if with_down:
        act = ops.kernels(kept.gate_up).swiglu(kept.gate_up)
        y, xa_down = down.forward(act, ad_down, drop_down, fold, residual=kept.middle)
    elif xa_down is None and not fold:
        act = ops.kernels(kept.gate_up).swiglu(kept.gate_up)
        xa_down = ops.kernels(act).lora_down(act, ad_down[0], drop_down)
    kept.low_rank = *kept.low_rank[:2], xa_gate_up, xa_down
    return y


class FusedBlock(Block):
    """`model.Block` with the same modules under the same names, and `BlockFunction` for training."""

    def __init__(self, block: Block, keep: Keep = "all", fold: bool = False) -> None:
        nn.Module.__init__(self)
        self.input_layernorm, self.post_attention_layernorm = block.input_layernorm, block.post_attention_layernorm
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.keep, self.fold = keep, fold
        self.bring_weights: Callable[..., None] = lambda backward: None  # where the base is spread over ranks
        attn, mlp = block.self_attn, block.mlp
        self.groups = [
            Group(attn.q_proj, attn.k_proj, attn.v_proj),
            Group(attn.o_proj),
            Group(mlp.gate_proj, mlp.up_proj),
            Group(mlp.down_proj),
        ]
        self.head_counts = [width // attn.head_dim for width in self.groups[0].widths]

    def norm1(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.kernels(x).rms_norm(x, self.input_layernorm.weight, self.input_layernorm.eps)

    def norm2(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.post_attention_layernorm
        return ops.kernels(x).rms_norm(x, norm.weight, norm.eps)

    def rotate(self, qkv: Tensor, rope: list[Tensor], backward: bool) -> None:
        heads = self.head_counts[0] + self.head_counts[1]
        ops.kernels(qkv).rope_(qkv, heads, self.self_attn.head_dim, *rope, backward)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None) -> Tensor:
        self.bring_weights(backward=False)
        if cache is not None or not torch.is_grad_enabled():
            return super().forward(x, rope, segments, cache)
        if not x.requires_grad:  # the first block: nothing below it learns, but its own backward pass has to run
            x = x.detach().requires_grad_()
        return BlockFunction.apply(x, self, rope, segments)


def fuse_blocks(model: Llama, keeps: Sequence[Keep], fold: bool = False) -> None:
    """Replace every block by its fused twin, which keeps what `keeps` says, one entry a block."""
    for i, keep in enumerate(keeps):
        model.model.layers[i] = FusedBlock(model.model.layers[i], keep, fold)


def keep_dense_weights(model: Llama) -> None:
    """Keep every rebuilt weight of fused blocks. On a CPU a step of SmolLM2 then takes 1.23 s in place of 1.46."""
    for block in model.model.layers:
        for group in block.groups:
            group.keep_dense(model.model.embed_tokens.weight.dtype)


def can_fuse(model: Llama) -> bool:
    """Whether all seven linear layers of every block learn, which the fused block takes for granted."""
    return len(lora_layers(model)) == 7 * model.config.num_hidden_layers
