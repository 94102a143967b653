"""The parts of a LoRA update, for a block with a hand-written backward pass. The reference, in plain PyTorch.

    around W   [W  s B]                  place_adapter
               [A   . ]
    forward    xa  = x' A^T              lora_down                 x' = dropout(x)
               the same of act           swiglu_lora_down          act = silu(gate) * up, computed in the same pass
    backward   dB  = s * dy^T xa         lora_backward_B
               dA  = dxa^T x'            lora_backward_A           dxa = s * dy B
               dx += dropout'(dxa A)     lora_dx_add_

Everything here is a matmul with one dimension of 8 to 192, so reading the wide operand (x, dy or dx) takes most of the
time: each part reads it once. The matmuls with s B are part of the matmul with W: see `fast/block.py`. Projections that
read the same x are computed together: A is then (R, n_in) with R the sum of their ranks r, xa is (N, R), and one mask
serves them all. Batch and time are flattened to N = B * T rows.

There is no autograd here; x' is recomputed where it is needed and never saved. Any float dtype, float64 included: the
tests compare the kernels of `ops/triton/lora.py` with this file, and a CPU runs it. The two differ in rounding only:
this file rounds each matmul and each sum to the dtype of x.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .block_parts import swiglu
from .lora import mask_of


class RowDropout(NamedTuple):
    """What decides the mask of flattened rows."""

    p: float
    numbers: Tensor  # (N,) int32, one for each token, from `lora.token_numbers`

    def mask(self, x: Tensor) -> Tensor:
        """For x (N, n_in): 0 where dropped and 1 / (1 - p) elsewhere, the same bits as `lora.dropout_mask`."""
        return mask_of(self.numbers, x.shape[-1], self.p, torch.promote_types(x.dtype, torch.float32))


def drop(x: Tensor, dropout: RowDropout | None) -> Tensor:
    """x' (N, n_in), scaled in float32 or more and rounded once; without dropout x itself."""
    return x if dropout is None else dropout.mask(x).mul_(x).to(x.dtype)


def place_adapter(A: Tensor, B: Tensor, scaling: float, A_rows: Tensor, B_columns: Tensor, first: int) -> None:
    """Write A and scaling * B beside a weight, each value rounded once.

    Args:
        A: (r, n_in). B: (n_out, r). Both float32.
        A_rows: (r, n_in), becomes A.
        B_columns: (n_out, at least first + r), becomes scaling * B in columns first to first + r - 1, and 0 in all
            others, which belong to other projections of the same input.
    """
    A_rows.copy_(A)
    B_columns.zero_()[:, first : first + B.shape[1]].copy_(B * scaling)


def lora_down(x: Tensor, A: Tensor, dropout: RowDropout | None = None, out: Tensor | None = None) -> Tensor:
    """xa = dropout(x) A^T.

    Args:
        x: (N, n_in). A: (R, n_in) in the dtype of x.
        out: (N, n_in), becomes a copy of x if given; its rows may be slices of wider ones.
    Returns:
        (N, R) in the dtype of x.
    """
    if out is not None:
        out.copy_(x)
    return drop(x, dropout) @ A.t()


def swiglu_lora_down(gate_up: Tensor, A: Tensor, dropout: RowDropout | None, out: Tensor) -> Tensor:
    """act = silu(gate) * up, written to `out`, and xa = dropout(act) A^T of it.

    Args:
        gate_up: (N, 2 FF), gate first. A: (R, FF). out: (N, FF). Rows of the first and last may be slices.
    Returns:
        (N, R) in the dtype of gate_up.
    """
    return lora_down(swiglu(gate_up, out), A, dropout)


def lora_backward_A(
    dxa: Tensor,
    x: Tensor,
    dropout: RowDropout | None = None,
    out: Tensor | Sequence[Tensor] | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor | Sequence[Tensor]:
    """dA = dxa^T dropout(x), the gradient of A.

    Args:
        dxa: (N, R), with the scaling in it. x: (N, n_in).
        out: (R, n_in) float32 to add to, as gradients are summed over micro-batches; or one such for each projection,
            (r, n_in), in their order: x is still read once. None allocates it.
        norm: rstd (N,) and weight (n_in,), if the projections read the norm of x: h = x rstd weight. It is not
            recomputed, because dxa^T h = (dxa rstd)^T x weight: the factors are applied to the small tensors.
    Returns:
        (R, n_in) float32 (float64 from float64); `out` if it was given.
    """
    dropped, weight = drop(x, dropout), None
    if norm is not None:
        rstd, weight = norm
        dxa = (dxa * rstd[:, None]).to(dxa.dtype)
    if out is None or isinstance(out, Tensor):
        return gradient(dxa.t(), dropped, 1.0, out, weight)
    for part, place in zip(dxa.split([len(place) for place in out], 1), out, strict=True):
        gradient(part.t(), dropped, 1.0, place, weight)
    return out


def lora_dx_add_(dx: Tensor, dxa: Tensor, A: Tensor, dropout: RowDropout | None = None) -> None:
    """dx += mask * (dxa A), in place.

    Args:
        dx: (N, n_in), changed. dxa: (N, R). A: (R, n_in).
    """
    if dropout is None:
        dx.addmm_(dxa, A)
    else:
        dx.add_(dropout.mask(dx).mul_(dxa @ A))


def lora_backward_B(
    dy: Tensor, xa: Tensor, scaling: float, out: Tensor | None = None, row_scale: Tensor | None = None
) -> Tensor:
    """dB = scaling * dy^T xa, the gradient of B.

    Args:
        dy: (N, n_out), rows may be slices of wider ones. xa: (N, r), likewise.
        out: (n_out, r) float32 to add to. None allocates it.
        row_scale: (n_out,) float32, DoRA's c: multiplies the rows of dB.
    Returns:
        (n_out, r) float32 (float64 from float64); `out` if it was given.
    """
    if row_scale is None:
        return gradient(dy.t(), xa, scaling, out)
    dB = gradient(xa.t(), dy, scaling, None if out is None else out.t(), row_scale).t()
    return dB if out is None else out


def column_dot(dy: Tensor, y: Tensor) -> Tensor:
    """The sum over the rows of dy * y, (columns,) float32 (float64 from float64), for DoRA's magnitudes.

    Args:
        dy, y: (N, columns), rows may be slices of wider ones.
    """
    return (dy.to(torch.promote_types(dy.dtype, torch.float32)) * y).sum(0)


def gradient(left: Tensor, right: Tensor, scaling: float, out: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """scaling * left right * weight, in float32 or more, added to `out` if there is one. weight: (columns,)."""
    if weight is None and out is not None and out.dtype == left.dtype:
        return out.addmm_(left, right, alpha=scaling)
    product = left @ right
    product = product.to(torch.promote_types(product.dtype, torch.float32))
    if weight is not None:
        product.mul_(weight)
    return product.mul_(scaling) if out is None else out.add_(product, alpha=scaling)
