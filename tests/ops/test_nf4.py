"""NF4 against bitsandbytes, bit for bit, and its linear layer against float64."""

import subprocess
import sys

import bitsandbytes.functional as bnb
import pytest
import torch
from paths import ROOT

from nanoqlora.ops import lora, nf4
from nanoqlora.ops.fast import nf4 as nf4_fast

U = 2.0**-8  # unit roundoff of bfloat16: 8 significant bits
MODULES = {"reference": nf4, "fast": nf4_fast}


def weights(kind: str, dtype: torch.dtype) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(48, 320, generator=g)
    if kind == "zeros":
        w[3, 64:128] = 0
    elif kind == "ties":  # values exactly between two levels
        levels = nf4.NF4_LEVELS
        w[:, :15] = (levels[1:] + levels[:-1]) / 2
        w[:, 15] = 1.0
    elif kind == "wide":
        w = w * torch.logspace(-30, 30, 48)[:, None]
    return w.to(dtype)


@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "zeros", "ties", "wide"])
def test_codes_scales_and_values_equal_bitsandbytes(module, dtype, kind):
    if kind == "wide" and dtype == torch.float16:
        kind = "normal"  # float16 cannot hold the wide values
    outs = (torch.float32, torch.bfloat16, torch.float16)[: 2 if kind == "wide" else 3]
    w = weights(kind, dtype)
    packed, absmax = module.quantize_nf4(w)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(packed.flatten(), theirs.flatten())
    assert torch.equal(absmax.flatten(), state.absmax)
    for out in outs:
        state.dtype = out
        ours, expected = module.dequantize_nf4(packed, absmax, out), bnb.dequantize_4bit(theirs, state)
        assert torch.equal(ours, expected.view_as(ours))


def test_double_quantisation_equals_bitsandbytes():
    """The fast twin bit for bit; the reference takes the nearest level, so a few codes may be a step away."""
    _, absmax = nf4.quantize_nf4(torch.randn(256, 640, generator=torch.Generator().manual_seed(1)))
    _, state = bnb.quantize_4bit(
        torch.randn(256, 640, generator=torch.Generator().manual_seed(1)), quant_type="nf4", compress_statistics=True
    )
    codes, nested_absmax, offset = nf4_fast.quantize_absmax(absmax)
    assert torch.equal(codes.flatten(), state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax) and torch.equal(offset, state.offset)
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    for module in MODULES.values():
        assert torch.equal(module.dequantize_absmax(codes, nested_absmax, offset).flatten(), expected)

    nearest, nearest_absmax, nearest_offset = nf4.quantize_absmax(absmax)
    assert torch.equal(nearest_absmax, nested_absmax) and torch.equal(nearest_offset, offset)
    steps = (nearest.int() - codes.int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.005
    # Nearest means nearest: no other of the 256 levels is closer, for any scale.
    scaled = (absmax.flatten() - offset) / nested_absmax.repeat_interleave(256)[: absmax.numel()]
    levels = nf4.dynamic_levels()
    found = (levels[nearest.flatten().int()] - scaled).abs()
    assert (found <= (levels[None] - scaled[:, None]).abs().amin(1) + 1e-7).all()
    assert torch.equal(levels, bnb.create_dynamic_map())


def test_shapes_on_the_meta_device_are_those_of_values():
    """Where a model has no memory yet, nothing is computed, and the compiler of PyTorch is not imported for it."""
    code = """
import sys, torch
from nanoqlora.qlora import QLoRALinear
layers = [QLoRALinear(torch.empty(48, 320, device=device, dtype=torch.bfloat16)) for device in ("meta", "cpu")]
layers[1].weight.data.normal_()
layers[0].quantize()
assert "torch._dynamo" not in sys.modules and "sympy" not in sys.modules
layers[1].quantize()
assert "torch._inductor.compile_fx" not in sys.modules
shapes = [[(name, b.shape, b.dtype) for name, b in layer.named_buffers()] for layer in layers]
assert shapes[0] == shapes[1] and len(shapes[0]) == 4, shapes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_bits_per_weight():
    """4.127: the figure that makes double quantisation worth its code."""
    packed, absmax = nf4.quantize_nf4(torch.randn(1024, 4096))
    codes, nested, offset = nf4.quantize_absmax(absmax)
    num_bytes = sum(x.numel() * x.element_size() for x in (packed, codes, nested, offset))
    assert num_bytes * 8 / (1024 * 4096) == pytest.approx(4.127, abs=0.001)


def test_block_must_divide_the_row():
    with pytest.raises(ValueError, match="n_in=100"):
        nf4.quantize_nf4(torch.zeros(4, 100))


@pytest.mark.parametrize("T", [1, 33, 64])
@pytest.mark.parametrize("module", MODULES.values(), ids=list(MODULES))
def test_nf4_linear_matches_float64_oracle(module, T):
    """Against float64, the bfloat16 path loses two roundings and nothing else, forward and backward."""
    n_out, n_in = 96, 256
    g = torch.Generator().manual_seed(T)
    packed, absmax = nf4.quantize_nf4(torch.randn(n_out, n_in, generator=g))
    x = torch.randn(T, n_in, generator=g).bfloat16().requires_grad_()
    dy = torch.randn(T, n_out, generator=g).bfloat16()
    y = lora.frozen_linear(x, lambda dtype: module.dequantize_nf4(packed, absmax, dtype))
    y.backward(dy)
    w64 = nf4.dequantize_nf4(packed, absmax, torch.float64)
    check_two_roundings(y.detach(), x.detach(), w64.T)
    check_two_roundings(x.grad, dy, w64)


def check_two_roundings(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`result` is left @ right in bfloat16, with `right` rounded to bfloat16 before."""
    left = left.double()
    error = result.double() - left @ right
    # Proof: rounding w and rounding y cost at most U each per unit of sum|x||w|; the fp32 sum adds K * 2^-24.
    bound = (2 * U + right.shape[0] * 2.0**-24) * (left.abs() @ right.abs())
    assert (error.abs() <= bound).all(), f"error is {(error.abs() / bound).max():.1f} x the rounding bound"
    # Statistics: one bf16 rounding has rms 0.425 U, two independent ones 0.60 U (0.58 to 0.62 over 200 seeds at
    # T = 64). 0.65 catches absmax kept in bf16 (0.69 and up), which the worst-case bound above cannot see.
    if len(left) >= 33:
        rms = (error / (U * (left.square() @ right.square()).sqrt())).square().mean().sqrt()
        assert rms < 0.65, f"rms error is {rms:.2f} U, two roundings give 0.60 U"


def test_swapped_nibbles_break_the_bound():
    """The bound above can fail: the wrong nibble first is more than 50 times outside it."""
    g = torch.Generator().manual_seed(0)
    packed, absmax = nf4.quantize_nf4(torch.randn(96, 256, generator=g))
    x = torch.randn(64, 256, generator=g).bfloat16()
    swapped = packed << 4 | packed >> 4
    y = x @ nf4.dequantize_nf4(swapped, absmax, torch.bfloat16).T
    w64 = nf4.dequantize_nf4(packed, absmax, torch.float64)
    bound = (2 * U + 256 * 2.0**-24) * (x.double().abs() @ w64.abs().T)
    assert ((y.double() - x.double() @ w64.T).abs() / bound).max() > 50
