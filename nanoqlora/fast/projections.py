"""Linear layers that read the same input, as one matmul with the frozen weights and their adapters.

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

With `fp8` W is rounded to fp8 instead (`ops/fp8.py`), for the input gradient alone or for both matmuls. A small update
would be lost in that rounding, so W does not have it, and without dropout A stands below W in the backward pass.

The update is added during the dequantization, in float32 before the one rounding. The equations of a layer are in
`ops/lora.py`.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

from .. import ops
from ..ops import RowDropout
from ..ops.fast.scratch import scratch
from ..ops.fp8 import E4M3, power_of_two
from ..qlora import QLoRALinear

Fp8 = Literal[False, "backward", True]
BALANCE = 32  # B times as much and xa so much less, which lets a B of 1e-6 keep its bits beside W


class Projections:
    """Linear layers that read the same input, computed as one matmul with Wx."""

    def __init__(self, *layers: QLoRALinear) -> None:
        self.layers = layers
        self.n_in, self.widths = layers[0].in_features, [layer.out_features for layer in layers]
        self.ranks = [len(layer.lora_A) if layer.has_lora else 0 for layer in layers]
        self.trained = [layer for layer in layers if layer.has_lora]
        self.has_dora = any(layer.magnitude is not None for layer in layers)
        self.n_out, self.R = sum(self.widths), sum(self.ranks)
        self.side = self.R + -self.R % 16  # R padded, so that rows start at multiples of 16 bytes, in fp8 too
        self.fp8: Fp8 = False
        self.largest: Tensor | None = None  # of all weights, with fp8
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
        self.place(A, B)
        parts = zip(self.layers, w.split(self.widths), A.split(self.ranks), B.split(self.widths), strict=True)
        for layer, w_rows, A_rows, B_rows in parts if dense is None and with_W else ():
            r = len(A_rows)
            update = (A_rows, B_rows[:, first : first + r]) if merged and r else None
            layer.rebuild_into(w_rows, update, layer.row_scale)
            first += r
        return wx

    def place(self, A: Tensor, B: Tensor, with_scale: bool = True) -> None:
        """Write the adapters: A (R, n_in), and s B (n_out, side), block-diagonal; with DoRA c s B if `with_scale`."""
        first = 0
        for layer, A_rows, B_rows in zip(self.layers, A.split(self.ranks), B.split(self.widths), strict=True):
            if layer.has_lora:
                c = layer.row_scale if with_scale else None
                lora_B = layer.lora_B if c is None else layer.lora_B * c[:, None]
                ops.kernels(A).place_adapter(layer.lora_A, lora_B, layer.scaling, A_rows, B_rows, first)
            else:
                B_rows.zero_()
            first += len(A_rows)

    def rows_of_A(self, wx: Tensor) -> Tensor:
        """A of all projections, (R, n_in)."""
        return wx[self.n_out : self.n_out + self.R, : self.n_in]

    def input_buffer(self, like: Tensor, merged: bool) -> Tensor:
        """An empty (N, n_in) tensor for the input; (N, n_in + side) where xa comes beside it."""
        return like.new_empty(len(like), self.n_in + (0 if merged or self.fp8 is True else self.side))

    def is_one_matmul(self, merged: bool) -> bool:
        """Whether the matmul with W is all, and xa comes out of it."""
        return merged or not self.R

    def forward(self, x: Tensor, merged: bool, lora_down: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """y (N, n_out) and xa (N, R). Rows of both may be slices of wider ones.

        Args:
            x: from `input_buffer`; the input in its first n_in columns.
            lora_down: computes xa from A (R, n_in), and may write the input as well; not called if `is_one_matmul`.
        """
        if self.fp8 is True:
            return self.forward_fp8(x, lora_down)
        wx = self.weight(x.dtype, merged)
        if self.is_one_matmul(merged):
            both = x @ wx[: self.n_out + self.side, : self.n_in].t()
            return both[:, : self.n_out], both[:, self.n_out : self.n_out + self.R]
        beside, xa = x[:, self.n_in :], lora_down(self.rows_of_A(wx))
        beside[:, : self.R].copy_(xa)
        beside[:, self.R :].zero_()
        return x @ wx[: self.n_out].t(), xa

    def forward_fp8(self, x: Tensor, lora_down: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As `forward`: y = [x, xa] [W, s B]^T in fp8; xa in 16 bits."""
        kernels, (A, B) = ops.kernels(x), self.adapters(x, with_scale=False)
        xa = lora_down(A[: self.R]) if self.R else x.new_empty(len(x), 0)
        w, scale = self.weight_fp8(BALANCE * B, transposed=False)
        x8, x_scale = kernels.quantize_fp8(x, xa / BALANCE, None, w.shape[1])
        c = self.row_scales(0)
        w_scale = scale.repeat(self.n_out) if c is None else scale * c
        return kernels.matmul_fp8(x8, w, x_scale, w_scale, x.dtype), xa

    def backward_x_fp8(self, dy: Tensor, dropout: RowDropout | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `backward_x_without_update`: dx = [dy, dxa] [W; A] in fp8, or dy W with dropout; dxa in 16 bits."""
        kernels, (A, B) = ops.kernels(dy), self.adapters(dy)
        dxa, side = dy @ B[:, : self.R], self.side if dropout is None else 0
        w, scale = self.weight_fp8(A[:side].t(), transposed=True)
        dy8, dy_scale = kernels.quantize_fp8(dy, dxa if side else None, self.row_scales(side), w.shape[1])
        dx = kernels.matmul_fp8(dy8, w, dy_scale, scale.repeat(self.n_in), dy.dtype)
        return dx, dxa, A[: self.R] if self.R and not side else None

    def adapters(self, like: Tensor, with_scale: bool = True) -> tuple[Tensor, Tensor]:
        """A (side, n_in), zero below row R, and B as `place` writes it, in the dtype of `like`."""
        A, B = like.new_zeros(self.side, self.n_in), like.new_empty(self.n_out, self.side)
        self.place(A[: self.R], B, with_scale)
        return A, B

    def weight_fp8(self, beside: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
        """[W, beside] or, transposed, [W^T, beside] in e4m3, and the scale of all its values, () float32."""
        rows, columns = (self.n_in, self.n_out) if transposed else (self.n_out, self.n_in)
        assert self.largest is not None, "measure_largest comes before the forward pass"
        largest = torch.maximum(self.largest, beside.abs().amax().float()) if beside.shape[1] else self.largest
        scale = power_of_two(largest)
        buffer = fp8_buffer(rows, columns + beside.shape[1], device=beside.device)
        w = buffer[:, :columns].t() if transposed else buffer[:, :columns]
        for layer, part in zip(self.layers, w.split(self.widths), strict=True):
            ops.kernels(beside).dequantize_fp8(*four_bits(layer), part, scale)
        buffer[:, columns:] = (beside / scale).to(buffer.dtype)
        return buffer, scale

    def measure_largest(self) -> None:
        """With fp8 find a bound of all weights, which never change: the largest scale of a group."""
        if self.fp8 and self.largest is None:
            self.largest = torch.stack([p.nested_absmax.amax() + p.nested_offset.abs() for p in self.layers]).amax()

    def row_scales(self, side: int) -> Tensor | None:
        """DoRA's c of all rows, (n_out + side,) float32, ones for layers without it; None without DoRA."""
        if not self.has_dora:
            return None
        ones = self.layers[0].nested_absmax.new_ones
        parts = [ones(p.out_features) if p.row_scale is None else p.row_scale for p in self.layers]
        return torch.cat([*parts, ones(side)])

    def backward_x_without_update(
        self, dy: Tensor, merged: bool, dropout: RowDropout | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dx (N, n_in), dxa (N, R), and A (R, n_in) if dx lacks dxa A. The first two may be slices of one tensor."""
        if self.fp8:
            return self.backward_x_fp8(dy, dropout)
        wx = self.weight(dy.dtype, merged, backward=True)
        both = dy @ wx[: self.n_out]
        A = None if self.is_one_matmul(merged) else self.rows_of_A(wx)
        return both[:, : self.n_in], both[:, self.n_in : self.n_in + self.R], A

    def backward_x(self, dy: Tensor, merged: bool, dropout: RowDropout | None) -> tuple[Tensor, Tensor]:
        """dx (N, n_in), complete, and dxa (N, R)."""
        dx, dxa, A = self.backward_x_without_update(dy, merged, dropout)
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


def fp8_buffer(rows: int, columns: int, device: torch.device) -> Tensor:
    """For a weight in fp8, in the memory that it has in 16 bits otherwise."""
    return scratch(rows, columns // 2, torch.bfloat16, device).view(E4M3)


def four_bits(layer: QLoRALinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W as `ops.dequantize_into` takes it."""
    return layer.packed, layer.absmax, layer.nested_absmax, layer.nested_offset
