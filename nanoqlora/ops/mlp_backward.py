"""SwiGLU's backward together with every LoRA gradient that reads its tensors. The reference, in plain PyTorch.

Between the backward matmuls of down_proj and of gate_proj and up_proj, four steps have the width FF:

    dact += dropout'(dxa A)                         down_proj's update, where it is not merged into the weight
    dgate, dup = swiglu'(dact; gate, up)
    dA    = dxa^T dropout(act)                      of down_proj; act = silu(gate) * up is recomputed
    dB    = s * dgate^T xa, s * dup^T xa            of gate_proj and of up_proj

One after the other they read and write the widest tensors of a block nine times. `ops/triton/mlp_backward.py` needs
five: it reads dact, gate and up, and writes dgate and dup.
"""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from . import lora_parts
from .block_parts import swiglu_backward_
from .lora_parts import RowDropout

RowScales = tuple[Tensor, Tensor] | None


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
    """Overwrite gate_up with its gradient and add to three LoRA gradients. dact is overwritten too.

    Args:
        dact: (N, FF), the gradient of act, rows may be slices of wider ones. gate_up: (N, 2 FF), likewise.
        dxa: (N, r) of down_proj. A: (r, FF) of down_proj, whose part of dact is added here; None if dact has it.
        dropout: down_proj's. dA: (r, FF) float32.
        xa: (N, r_gate + r_up). scalings: of gate_proj and up_proj. dBs: (FF, r_gate) and (FF, r_up) float32.
        row_scales: of gate_proj and up_proj with DoRA, which multiply the rows of their dB.
    Returns:
        With DoRA (2 FF,) float32, the sum over the rows of gate_up times its gradient, else None.
    """
    return one_by_one(lora_parts, swiglu_backward_, dact, gate_up, dxa, A, dropout, dA, xa, scalings, dBs, row_scales)


def one_by_one(
    lora: ModuleType,
    swiglu_backward_: Callable[[Tensor, Tensor], None],
    dact: Tensor,
    gate_up: Tensor,
    dxa: Tensor,
    A: Tensor | None,
    dropout: RowDropout | None,
    dA: Tensor,
    xa: Tensor,
    scalings: tuple[float, float],
    dBs: tuple[Tensor, Tensor],
    row_scales: RowScales,
) -> Tensor | None:
    """`mlp_backward_` step by step, with the functions of `lora_parts` or with their twins of the same names."""
    if A is not None:
        lora.lora_dx_add_(dact, dxa, A, dropout)
    values = gate_up.clone() if row_scales else None
    swiglu_backward_(dact, gate_up)
    lora.lora_backward_A(dxa, dact, dropout, dA)
    xas = xa.split([dB.shape[1] for dB in dBs], 1)
    parts = zip(gate_up.chunk(2, 1), xas, scalings, dBs, row_scales or (None, None), strict=True)
    for dy, xa_, scaling, dB, row_scale in parts:
        lora.lora_backward_B(dy, xa_, scaling, dB, row_scale)
    return None if values is None else lora.column_dot(gate_up, values)
