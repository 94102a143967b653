"""Matmuls in fp8: roundings against the format's own bounds in float64, and the kernels against the reference."""

import pytest
import torch
from torch import Tensor
from triton_kernels import CUDA, DEVICE

from nanoqlora.ops import fp8, nf4
from nanoqlora.ops.triton import fp8 as fp8_triton

pytestmark = [pytest.mark.usefixtures("triton_kernels"), *([pytest.mark.gpu] if CUDA else [])]
MODULES = [fp8, fp8_triton]
HALF_STEP = 2.0**-4  # of 4 significant bits, relative
SMALLEST = 2.0**-10  # half of the step of e4m3's smallest values


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def four_bits(n_out: int, n_in: int) -> tuple[tuple[Tensor, ...], Tensor]:
    packed, absmax = nf4.quantize_nf4(randn(n_out, n_in, seed=1) * randn(n_out, 1, seed=2).exp())
    scales = nf4.quantize_absmax(absmax)
    return (packed, *scales), nf4.dequantize_nf4(packed, nf4.dequantize_absmax(*scales)).double()


def assert_rounded(eight: Tensor, scale: Tensor, true: Tensor) -> None:
    """Each value is the nearest of e4m3, the scale is a power of two, and the largest value uses the range."""
    assert (scale.log2() == scale.log2().round()).all()
    error = (eight.double() * scale - true).abs()
    assert (error <= torch.maximum(HALF_STEP * true.abs(), SMALLEST * scale.double())).all()
    largest = (true / scale).abs().amax(1)
    assert ((largest > 224) & (largest <= 448) | (largest == 0)).all()


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [32, fp8_triton.CHUNK])
def test_rows_are_rounded_to_the_nearest_value(monkeypatch, module, dtype, chunk):
    """Also where the kernel reads a row in several chunks, the last one incomplete."""
    monkeypatch.setattr(fp8_triton, "CHUNK", chunk)
    x = (randn(37, 200) * randn(37, 1, seed=3).exp() ** 3).to(dtype)
    x[4] = 0
    x[5, 7] = 2.0**-130 if dtype == torch.float32 else 0
    beside, factor = randn(37, 24, seed=4).to(dtype), randn(256, seed=5).exp()
    wide = torch.cat([x, x], 1)[:, :200]  # rows of a wider tensor
    eight, scale = module.quantize_fp8(wide, beside, factor, 256)
    true = torch.nn.functional.pad(torch.cat([x, beside], 1), (0, 32)).double() * factor.double()
    assert eight.shape == (37, 256) and eight.dtype == torch.float8_e4m3fn
    assert_rounded(eight, scale, true)
    plain, scale = module.quantize_fp8(x)
    assert_rounded(plain, scale, x.double())


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("transposed", [False, True])
def test_four_bits_become_eight(module, transposed):
    n_out, n_in = 150, 320
    bits, w = four_bits(n_out, n_in)
    buffer = torch.full((n_out + 2, n_in + 48), 3.0, device=DEVICE).to(fp8.E4M3)
    out = buffer.t().contiguous().t() if transposed else buffer
    scale = fp8.power_of_two(w.abs().amax().float())
    module.dequantize_fp8(*bits, out[1:-1, :n_in], scale)
    error = (out[1:-1, :n_in].double() * scale - w).abs()
    assert (error <= torch.maximum(HALF_STEP * w.abs(), SMALLEST * scale.double())).all()
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[1:-1, :n_in] = False
    assert (out.float()[untouched] == 3).all()


def test_kernels_give_the_reference_s_bits():
    """Up to one value of e4m3 where W lies between two within float32's rounding, in less than one of 10,000."""
    bits, w = four_bits(192, 256)
    ours, expected = (torch.empty(192, 256, device=DEVICE, dtype=fp8.E4M3) for _ in MODULES)
    for module, out in zip((fp8_triton, fp8), (ours, expected), strict=True):
        module.dequantize_fp8(*bits, out, fp8.power_of_two(w.abs().amax().float()))
    assert (ours.view(torch.uint8) != expected.view(torch.uint8)).sum() <= 192 * 256 / 10_000
    x, factor = randn(20, 128).bfloat16(), randn(128, seed=8).exp()
    for a, b in zip(fp8_triton.quantize_fp8(x, None, factor), fp8.quantize_fp8(x, None, factor), strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.skipif(not CUDA, reason="the kernel is PyTorch's own")
@pytest.mark.parametrize("n_out", [256, 6144])
def test_the_gpu_s_matmul_is_the_reference_s(n_out):
    """Against float64. 32 products are added at a time, to a sum that keeps 13 bits; the result is rounded to bfloat16.

    On an H200 the largest error was 1.7 / 2^13 of the sum of absolute values, with 512 products.
    """
    x, w = fp8.quantize_fp8(randn(300, 512)), fp8.quantize_fp8(randn(n_out, 512, seed=1))
    operands = x[0], w[0], x[1], w[1].flatten()
    ours = fp8_triton.matmul_fp8(*operands, torch.bfloat16).double()
    x, w = x[0].double() * x[1], w[0].double() * w[1]
    expected, size = x @ w.t(), x.abs() @ w.abs().t()
    summed = 512 / 32 * 2.0**-13 * size
    assert ((ours - expected).abs() <= summed + 2.0**-8 * (expected.abs() + summed)).all()


def test_a_result_is_3_75_percent_off():
    """The figure of the documentation, on N(0, 1) inputs and weights that NF4 has rounded."""
    bits, w = four_bits(256, 1024)
    w8, scale = torch.empty(256, 1024, device=DEVICE, dtype=fp8.E4M3), fp8.power_of_two(w.abs().amax().float())
    fp8.dequantize_fp8(*bits, w8, scale)
    x = randn(256, 1024, seed=9)
    x8, x_scale = fp8.quantize_fp8(x)
    y, true = fp8.matmul_fp8(x8, w8, x_scale, scale.repeat(256), torch.float32).double(), x.double() @ w.t()
    assert ((y - true).norm() / true.norm()).item() == pytest.approx(0.0375, abs=0.002)
