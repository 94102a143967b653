"""SwiGLU's backward pass with its LoRA gradients in one kernel, against float64 and against the parts one by one."""

import pytest
import torch
from triton_kernels import CUDA, STEP, Case, U, rms

from nanoqlora.ops import mlp_backward
from nanoqlora.ops.triton import mlp_backward as mlp_backward_triton

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_kernels"), *([pytest.mark.gpu] if CUDA else [])]


def operands(N_T: tuple[int, int], FF: int, r: int, r_gate: int, r_up: int, p: float) -> tuple[Case, dict]:
    """Arguments of `mlp_backward_`, in bfloat16 and as slices of wider rows, with gradients that hold something."""
    c = Case(*N_T, FF, r, p)
    wide_dact, wide_gate_up = c.random(c.N, FF + 16), 2 * c.random(c.N, 2 * FF + 8)
    return c, {
        "dact": wide_dact[:, :FF],
        "gate_up": wide_gate_up[:, : 2 * FF],
        "dxa": c.dxa,
        "A": c.A,
        "dropout": c.dropout,
        "dA": c.random(r, FF).float(),
        "xa": c.random(c.N, r_gate + r_up),
        "scalings": (0.5, 0.3),
        "dBs": (c.random(FF, r_gate).float(), c.random(FF, r_up).float()),
    }


def copied(kwargs: dict, dtype: torch.dtype | None = None) -> dict:
    """A copy of all tensors; in float64 if asked, with the dropout's mask unchanged."""

    def copy(x):
        if isinstance(x, torch.Tensor):
            return x.clone() if dtype is None else x.to(dtype)
        return tuple(copy(y) for y in x) if type(x) is tuple else x

    return {name: copy(x) for name, x in kwargs.items()}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(
    "shape", [((1, 1), 64, 16, 16, 16), ((2, 33), 96, 8, 8, 24), ((4, 70), 160, 64, 64, 64)], ids=str
)
def test_mlp_backward(shape, p, folded):
    """Twice as far from float64 as the parts one by one at most: they round dact and act once more."""
    c, kwargs = operands(*shape, p)
    if folded:
        kwargs["A"] = None
        kwargs["row_scales"] = tuple(c.random(shape[1]).float().abs() + 0.5 for _ in range(2))  # DoRA is merged
    exact, plain, ours = copied(kwargs, torch.float64), copied(kwargs), copied(kwargs)
    dots = [
        module.mlp_backward_(**values)
        for module, values in ((mlp_backward, exact), (mlp_backward, plain), (mlp_backward_triton, ours))
    ]
    if folded:
        true, reference, got = dots
        assert got.shape == (2 * shape[1],) and got.dtype == torch.float32
        own = max(rms(reference.double() - true), STEP * rms(true))
        assert rms(got.double() - true) <= 2 * own, "sums of gate and up times their gradients"
    else:
        assert dots == [None] * 3
    for name in ("gate_up", "dA"):
        own = max(rms(plain[name].double() - exact[name]), STEP * rms(exact[name]))
        assert rms(ours[name].double() - exact[name]) <= 2 * own, name
    for i in range(2):
        own = max(rms(plain["dBs"][i].double() - exact["dBs"][i]), STEP * rms(exact["dBs"][i]))
        assert rms(ours["dBs"][i].double() - exact["dBs"][i]) <= 2 * own, f"dB {i}"
    # Nothing but roundings to bfloat16 of what is summed: an element is off by no more than all of its terms' together.
    terms = c.dxa.double().abs().t() @ exact["dact"].abs() + kwargs["dA"].double().abs()
    assert ((ours["dA"].double() - exact["dA"]).abs() <= 4 * U * terms).all()
    again = copied(kwargs)
    mlp_backward_triton.mlp_backward_(**again)
    assert torch.equal(again["dA"], ours["dA"]) and torch.equal(again["gate_up"], ours["gate_up"])


def test_large_ranks_take_the_parts():
    c, kwargs = operands((1, 40), 64, 96, 96, 96, 0.05)
    exact, ours = copied(kwargs, torch.float64), copied(kwargs)
    mlp_backward.mlp_backward_(**exact)
    mlp_backward_triton.mlp_backward_(**ours)
    for got, want in (
        (ours["dA"], exact["dA"]),
        (ours["gate_up"], exact["gate_up"]),
        (ours["dBs"][1], exact["dBs"][1]),
    ):
        assert rms(got.double() - want) <= 2 * U * rms(want)
