"""The block formats against llama.cpp's own quantizers (bytes) and the gguf package (values): equal, not close."""

import platform
from types import ModuleType

import numpy as np
import pytest
import torch

from nanoqlora.gguf import ggml_blocks
from nanoqlora.gguf.ggml_blocks import FORMATS, dequantize, quantize
from nanoqlora.ops import ggml


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    return pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def llama_cpp() -> ModuleType:
    return pytest.importorskip("llama_cpp")


def samples() -> dict[str, np.ndarray]:
    """Float32 matrices, ordinary ones and all the odd ones that once made two quantizers differ."""
    g = np.random.default_rng(0)
    normal = g.standard_normal((32, 512)).astype(np.float32)
    heavy_tailed = g.standard_t(2, normal.shape).astype(np.float32)
    outliers = 0.02 * normal
    outliers[:, 5::256] = 30
    zeros = np.where(g.random(normal.shape) < 0.5, np.float32(0), np.float32(-0.0))
    halves = (g.integers(-254, 255, normal.shape) / 2).astype(np.float32)
    halves[:, ::32] = 127  # d of Q8_0 is then exactly 1, and every half is a tie
    upward = g.random(normal.shape) < 0.5
    nearly_halves = np.nextafter(halves, np.where(upward, np.inf, -np.inf).astype(np.float32))
    nearly_halves[:, ::32] = 127
    equal_extremes = np.sign(normal) * 3  # which sign comes first decides the sign of d
    return {
        "normal": 0.02 * normal,
        "bf16": torch.from_numpy(normal).bfloat16().float().numpy(),
        "heavy-tailed": heavy_tailed,
        "f16": heavy_tailed.astype(np.float16).astype(np.float32),
        "outliers": outliers,
        "constant blocks": np.repeat(normal[:, ::32], 32, axis=1),
        "zero": np.zeros_like(normal),
        "-0.0": -np.zeros_like(normal),
        "both zeros": zeros,
        "zeros and positive": np.where(upward, zeros, np.abs(normal)),
        "zeros and negative": np.where(upward, zeros, -np.abs(normal)),
        "equal extremes": equal_extremes,
        "ties": halves,
        "near ties": nearly_halves,
        "large": 1e4 * normal,
        **{f"1e-{e}": (normal * 10.0**-e).astype(np.float32) for e in (10, 20, 30, 36)},
    } | ({f"1e-{e}": (normal * 10.0**-e).astype(np.float32) for e in (37, 38, 39, 41, 44)} if ON_X86 else {})


# Below 1e-37 the reciprocal of the scale is infinite, and what C makes of an infinite code depends on the processor.
ON_X86 = platform.machine() in ("x86_64", "AMD64")


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_bytes_equal_llama_cpp(ggml_type: str, llama_cpp: ModuleType):
    for name, x in samples().items():
        expected = torch.from_numpy(llama_cpp.quantize_chunk(ggml_type, x))
        raw = quantize(torch.from_numpy(x), ggml_type)
        assert raw.dtype == torch.uint8 and raw.shape == expected.shape
        assert torch.equal(raw, expected), f"{name}: {(raw != expected).sum()} of {raw.numel()} bytes differ"


def importances(n_in: int) -> dict[str, np.ndarray]:
    """Rows of importance matrices: what is measured, and odd ones."""
    g = np.random.default_rng(1)
    measured = np.exp(2 * g.standard_normal(n_in)).astype(np.float32)
    some_zero = np.where(g.random(n_in) < 0.3, np.float32(0), measured)
    some_zero[:64] = 0  # complete groups
    return {
        "measured": measured,
        "wide": (10 ** g.uniform(-9, 6, n_in)).astype(np.float32),
        "constant": np.ones(n_in, np.float32),
        "some zero": some_zero,
        "zero": np.zeros(n_in, np.float32),
        "tiny": measured * np.float32(1e-25),
    }


SEARCHING = [name for name in FORMATS if name not in ("F32", "F16", "BF16", "Q8_0")]


@pytest.mark.parametrize("ggml_type", SEARCHING)
def test_bytes_with_importance_equal_llama_cpp(ggml_type: str, llama_cpp: ModuleType):
    for kind, importance in importances(512).items():
        some = samples()
        if kind not in ("measured", "some zero"):
            some = {name: some[name] for name in ("heavy-tailed", "both zeros", "1e-20")}
        if FORMATS[ggml_type].block_size == 32:  # whose means are over a row
            some |= {f"rows of {n}": some["heavy-tailed"][:rows, :n] for rows, n in ((32, 96), (1, 160), (1, 32))}
        for name, x in some.items():
            measured = importance[: x.shape[1]]
            expected = torch.from_numpy(llama_cpp.quantize_chunk(ggml_type, x, measured))
            raw = quantize(torch.from_numpy(x), ggml_type, torch.from_numpy(measured))
            differ = f"{name}, {kind} importance: {(raw != expected).sum()} of {raw.numel()} bytes differ"
            assert torch.equal(raw, expected), differ


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_importance_in_chunks_makes_no_difference(ggml_type: str, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(9, 768, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(768, generator=torch.Generator().manual_seed(1))
    raw = quantize(x, ggml_type, importance)
    monkeypatch.setattr(ggml_blocks, "CHUNK_WEIGHTS", 2000)
    assert torch.equal(quantize(x, ggml_type, importance), raw)
    assert (not torch.equal(quantize(x, ggml_type), raw)) == (ggml_type in SEARCHING)


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_values_equal_gguf_package(ggml_type: str, gguf: ModuleType, llama_cpp: ModuleType):
    for name, x in samples().items():
        raw = llama_cpp.quantize_chunk(ggml_type, x)
        expected = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType[ggml_type]))
        w = dequantize(torch.from_numpy(raw), ggml_type, x.shape)
        # As bit patterns, so that 0.0 and -0.0 are two things and NaN equals itself.
        assert torch.equal(w.view(torch.int32), expected.view(torch.int32)), f"{name}: values differ"


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_values_are_near_the_weights(ggml_type: str):
    """No witness needed: a code is off by half a step at most, plus what half precision does to d and m."""
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    limits = {"Q2_K": 0.35, "Q3_K": 0.18, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.025, "IQ4_NL": 0.08, "IQ4_XS": 0.08}
    if limit := limits.get(ggml_type):  # its search weighs errors: the mean counts
        assert (dequantize(quantize(x, ggml_type), ggml_type, x.shape) - x).square().mean().sqrt() < limit
        return
    error = (dequantize(quantize(x, ggml_type), ggml_type, x.shape) - x).abs().view(-1, 32).amax(-1)
    blocks = x.view(-1, 32)
    largest = blocks.abs().amax(-1)
    step = {
        **{"F32": torch.zeros(64), "F16": largest * 2**-10, "BF16": largest * 2**-7, "Q8_0": largest / 127},
        # Codes go from -8 to 7: on the far side the largest weight may miss a whole step, so count two.
        **{"Q4_0": largest / 8 * 2, "Q5_0": largest / 16 * 2},
        **{f"Q{b}_1": (blocks.amax(-1) - blocks.amin(-1)) / (2**b - 1) for b in (4, 5)},
    }[ggml_type]
    rounding = 0 if ggml_type in ("F32", "F16", "BF16") else 2 * 2**-11 * 2 * largest
    assert (error <= step / 2 + rounding).all()


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_shapes_dtypes_and_chunks_make_no_difference(ggml_type: str, monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    raw = quantize(x, ggml_type)
    assert raw.shape == (3, 5, FORMATS[ggml_type].num_bytes(512))
    assert torch.equal(raw.flatten(), quantize(x.float().flatten(), ggml_type))
    w = dequantize(raw.flatten(), ggml_type, (3, 5, 512))
    for module in (ggml_blocks, ggml):  # some blocks at a time, and a rest
        monkeypatch.setattr(module, "CHUNK_WEIGHTS", 1536)
    assert torch.equal(quantize(x, ggml_type), raw)
    assert torch.equal(dequantize(raw, ggml_type, (3, 5, 512)), w)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="unknown here.*Q8_0"):
        quantize(torch.zeros(2, 256), "IQ3_S")
    with pytest.raises(ValueError, match="rows of 48 weights.*blocks of 32"):
        quantize(torch.zeros(2, 48), "Q8_0")
    with pytest.raises(ValueError, match="unknown"):
        dequantize(torch.zeros(2, 34, dtype=torch.uint8), "MXFP4", (2, 32))
    with pytest.raises(ValueError, match="68 bytes cannot hold.*takes 34 bytes"):
        dequantize(torch.zeros(2, 34, dtype=torch.uint8), "Q8_0", (1, 32))
    with pytest.raises(ValueError, match="complete blocks"):  # as many weights, but a block would span two rows
        dequantize(torch.zeros(34, dtype=torch.uint8), "Q8_0", (2, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", FORMATS)
def test_gpu_gives_the_same_bytes_and_values(ggml_type: str):
    for name, x in samples().items():
        x = torch.from_numpy(x)
        raw = quantize(x, ggml_type)
        assert torch.equal(quantize(x.cuda(), ggml_type).cpu(), raw), name
        importance = torch.from_numpy(importances(512)["measured"])
        expected = quantize(x, ggml_type, importance)
        assert torch.equal(quantize(x.cuda(), ggml_type, importance.cuda()).cpu(), expected), name
        w = dequantize(raw, ggml_type, x.shape)
        assert torch.equal(dequantize(raw.cuda(), ggml_type, x.shape).cpu().view(torch.int32), w.view(torch.int32)), (
            name
        )


@pytest.mark.gpu
@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"])
def test_gpu_reads_big_blocks_alike(ggml_type: str):
    raw = torch.randint(0, 256, (1000, FORMATS[ggml_type].block_bytes), generator=torch.Generator().manual_seed(0))
    raw = raw.to(torch.uint8)
    raw[:, slice(*FORMATS[ggml_type].halves)] = 0x2A  # some d and dmin, rather than NaN
    w = dequantize(raw, ggml_type, (1000, 256))
    assert w.isfinite().all() and torch.equal(dequantize(raw.cuda(), ggml_type, (1000, 256)).cpu(), w)
