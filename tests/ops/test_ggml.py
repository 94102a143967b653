"""The blocks of GGUF files, read by the reference and by its Triton twin, of any bytes: equal, not close.

The witness is the gguf package. Without a GPU Triton's interpreter runs the twin: see helpers/triton_kernels.py.
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton_kernels import CUDA, DEVICE

from nanoqlora import ops
from nanoqlora.gguf.ggml_blocks import FORMATS
from nanoqlora.ops import ggml
from nanoqlora.ops.triton import ggml as ggml_triton

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_kernels"), *([pytest.mark.gpu] if CUDA else [])]
BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block_size > 1]
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (19, 3), (70, 5)]  # rows, and blocks of a row


def random_blocks(ggml_type: str, n_out: int, in_row: int, seed: int = 0) -> Tensor:
    """Any bytes, but finite scales: (n_out, bytes of a row)."""
    g, fmt = torch.Generator().manual_seed(seed), FORMATS[ggml_type]
    raw = torch.randint(256, (n_out * in_row, fmt.block_bytes), generator=g, dtype=torch.uint8)
    first, end = fmt.halves
    scales = torch.randn(len(raw), (end - first) // 2, generator=g) * 0.01
    raw[:, first:end] = scales.half().view(torch.uint8)
    return raw.view(n_out, -1)


def framed(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A place to write to, inside a larger buffer of NaN."""
    buffer = torch.full((shape[0] + 2, shape[1] + 16), float("nan"), dtype=dtype, device=DEVICE)
    return buffer[1:-1, : shape[1]], buffer


def frame_is_whole(buffer: Tensor, n_in: int) -> bool:
    return bool(
        buffer[[0, -1]].isnan().all() and buffer[:, n_in:].isnan().all() and not buffer[1:-1, :n_in].isnan().any()
    )


@pytest.fixture(scope="module")
def gguf() -> ModuleType:
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ggml_type", BLOCKS)
def test_weights_are_ggml_s_bit_for_bit(ggml_type, shape, gguf):
    n_out, n_in = shape[0], shape[1] * FORMATS[ggml_type].block_size
    raw = random_blocks(ggml_type, *shape)
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType[ggml_type]))
    ours = ggml.dequantize(raw.to(DEVICE), ggml_type, (n_out, n_in)).cpu()
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))
    for dtype in DTYPES:
        out, buffer = framed((n_out, n_in), dtype)
        ggml_triton.dequantize_ggml(raw.to(DEVICE), ggml_type, out)
        assert torch.equal(out.cpu(), expected.to(dtype)) and frame_is_whole(buffer, n_in)


@pytest.mark.parametrize("dtype, lora_dtype", [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shape, r", [((1, 1), 4), ((65, 2), 40)], ids=str)
@pytest.mark.parametrize("ggml_type", BLOCKS)
def test_with_an_update(ggml_type, shape, r, dtype, lora_dtype):
    """W + s B A against float64, also with DoRA's scale of each row; the reference has the same bounds."""
    g = torch.Generator().manual_seed(1)
    n_out, n_in = shape[0], shape[1] * FORMATS[ggml_type].block_size
    packed = random_blocks(ggml_type, *shape).to(DEVICE)
    A, B = ((torch.randn(s, generator=g) / 8).to(DEVICE, lora_dtype) for s in ((r, n_in), (n_out, r)))
    w, c = ggml.dequantize(packed, ggml_type, (n_out, n_in)).double(), 1 + torch.rand(n_out, generator=g).to(DEVICE)
    for scale in (None, c):
        scaled = w if scale is None else w * c.double()[:, None]
        true = scaled + 0.3 * B.double() @ A.double()
        # c W is rounded; then a sum of r products, times s, and the sum; then out's dtype
        terms = scaled.abs() + 0.3 * B.double().abs() @ A.double().abs()
        bound = 2.0 ** (-8 if dtype == torch.bfloat16 else -24) * true.abs() + (r + 4) * 2.0**-24 * terms
        for write in (ggml_triton.dequantize_ggml, ops.dequantize_ggml_into):
            out, buffer = framed((n_out, n_in), dtype)
            write(packed, ggml_type, out, (A, B, 0.3), scale)
            assert ((out.double() - true).abs() <= bound).all() and frame_is_whole(buffer, n_in)


def test_the_twin_knows_every_format():
    """A type that it lacked would be read by the reference on a GPU, which is many times slower."""
    assert [*ggml_triton.TYPES] == BLOCKS


def test_scales_at_the_edges_of_half_precision(gguf):
    for value in (6e-8, 6.1e-5, 65504.0):
        raw = random_blocks("Q4_0", 4, 2)
        raw.view(-1, 18)[:, :2] = torch.tensor([value]).half().view(torch.uint8)
        expected = torch.from_numpy(gguf.dequantize(raw.numpy(), gguf.GGMLQuantizationType.Q4_0))
        out = torch.empty(4, 64, device=DEVICE)
        ggml_triton.dequantize_ggml(raw.to(DEVICE), "Q4_0", out)
        assert torch.equal(out.cpu(), expected)
