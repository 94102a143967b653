"""The Triton kernels against float64, against their references, and against their promise to write nowhere else.

Without a GPU Triton's interpreter runs them: see helpers/triton_kernels.py.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from triton_kernels import CUDA, DEVICE

from nanoqlora.ops import block_parts, elementwise, nf4
from nanoqlora.ops.triton import elementwise as elementwise_triton
from nanoqlora.ops.triton import loss as loss_triton
from nanoqlora.ops.triton import nf4 as nf4_triton
from nanoqlora.ops.triton.elementwise import Launch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("triton_kernels"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
    *([pytest.mark.gpu] if CUDA else []),
]
DTYPES = [torch.float32, torch.bfloat16]
U = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # unit roundoff
E = 2.0**-24  # of the float32 that the kernels compute in
FAST = 2.0**-21  # relative error of a GPU's exp, 1/x and 1/sqrt(x) in float32, their last steps included: at most 8 E


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the functions allocate is infinite, inside and around: a missing write shows, and one too many."""
    buffers = []

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(torch.full((int(np.prod(shape)) + 128,), float("inf"), dtype=dtype, device=device))
        return buffers[-1][64:-64].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    # Not NaN as in `framed`: an overrun reads from such a frame, and its NaN would not show here.
    assert all((buffer[[*range(64), *range(-64, 0)]] == float("inf")).all() for buffer in buffers)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def framed(x: Tensor, right: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of x (N, D) inside a larger buffer of NaN, a row above and below it and `right` columns beside it."""
    buffer = x.new_full((len(x) + 2, x.shape[1] + right), float("nan"))
    inside = buffer[1:-1, : x.shape[1]]
    inside.copy_(x)
    return inside, buffer


def frame_is_whole(inside: Tensor, buffer: Tensor) -> bool:
    width = inside.shape[1]
    return bool(buffer[[0, -1]].isnan().all() and buffer[:, width:].isnan().all() and not inside.isnan().any())


def check(got: Tensor, reference: Tensor, true: Tensor, inner: Tensor) -> None:
    """The error against float64: everywhere below a proven bound, and in the mean at most twice the reference's.

    inner: what float32 arithmetic may lose before the result is rounded once; (1 + U) inner + U |true| then bounds
    the whole, since what is rounded is at most |true| + inner.
    """
    assert got.dtype == reference.dtype and got.shape == reference.shape
    error = got.double() - true
    bound = U[got.dtype] * true.abs() + 2 * inner
    assert (error.abs() <= bound).all(), f"{(error.abs() / bound).max():.2f} times the bound"
    own = (reference.double() - true).square().mean().sqrt()
    own = max(own, 1e-7 * true.square().mean().sqrt())  # one rounding in float32: nobody should have to beat it
    assert error.square().mean().sqrt() <= 2 * own, f"rms {error.square().mean().sqrt():.2e}, the reference's {own:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96), (33, 96), (33, 576), (3, 4096), (1, 5000)], ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_rms_norm(shape, dtype, weight_dtype):
    N, D = shape
    x, buffer = framed(3 * randn(*shape, seed=0, dtype=dtype))
    weight = 1 + randn(D, seed=1).to(weight_dtype) / 4
    before = x.clone()
    h, rstd = elementwise_triton.rms_norm(x, weight, 1e-5)
    true = elementwise.rms_norm(x.double(), weight.double(), 1e-5)
    # A sum of D squares loses at most D E of itself, its root half of that; then 1/sqrt(x) and two products.
    inner = (D / 2 * E + FAST + 2 * E) * true.abs()
    check(h, elementwise.rms_norm(x, weight, 1e-5), true, inner)
    true_rstd = (x.double().square().mean(1) + 1e-5).rsqrt()
    assert rstd.dtype == torch.float32 and ((rstd - true_rstd).abs() <= (D / 2 * E + FAST) * true_rstd).all()
    assert torch.equal(x, before) and frame_is_whole(x, buffer)

    # Added to something and written to a part of wider rows: the bits of the sum's own norm.
    delta, delta_buffer = framed(randn(*shape, seed=2, dtype=dtype), right=8)
    out, out_buffer = framed(torch.empty_like(x), right=16)
    total, again, rstd = elementwise_triton.add_rms_norm(x, delta, weight, 1e-5, out)
    expected, expected_rstd = elementwise_triton.rms_norm(x + delta, weight, 1e-5)
    assert torch.equal(total, x + delta) and torch.equal(out, expected) and torch.equal(rstd, expected_rstd)
    assert again is out and frame_is_whole(delta, delta_buffer) and frame_is_whole(out, out_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 96), (33, 96), (33, 576), (3, 4096), (1, 5000)], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_rms_norm_backward(shape, dtype, with_residual):
    N, D = shape
    x = 3 * randn(*shape, seed=0, dtype=dtype)
    weight = 1 + randn(D, seed=1) / 4
    dh, dh_buffer = framed(randn(*shape, seed=2, dtype=dtype), right=16)
    residual, residual_buffer = framed(randn(*shape, seed=3, dtype=dtype))
    added = residual.double() if with_residual else torch.zeros_like(x, dtype=torch.float64)

    def gradient(work: torch.dtype) -> Tensor:
        """By autograd through the reference, in one precision throughout."""
        leaf = x.to(work).requires_grad_()
        elementwise.rms_norm(leaf, weight.to(work), 1e-5).backward(dh.to(work))
        return added + leaf.grad.double()

    true, plain = gradient(torch.float64), gradient(torch.float32).to(dtype)
    rstd = (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    g, n = dh.double() * weight.double(), x.double() * rstd
    # rstd, off by (D/2 E + FAST), is a factor of the last term three times; the mean of D products adds D E of
    # their magnitudes, and a dozen single operations E each.
    terms = added.abs() + rstd * (g.abs() + n.abs() * (g * n).abs().mean(1, keepdim=True))
    inner = (3 * (D / 2 * E + FAST) + D * E + 12 * E) * terms

    kept = dh.clone(), residual.clone()
    _, kernel_rstd = elementwise_triton.rms_norm(x, weight, 1e-5)
    dx = elementwise_triton.rms_norm_backward(dh, x, weight, kernel_rstd, residual if with_residual else None)
    check(dx, plain, true, inner)
    assert torch.equal(dh, kept[0]) and torch.equal(residual, kept[1])
    assert frame_is_whole(dh, dh_buffer) and frame_is_whole(residual, residual_buffer)


def rotation_error(x: Tensor, head_dim: int, cos: Tensor, sin: Tensor) -> Tensor:
    """What rotating the heads of x (N, heads * head_dim) in float32 may lose: two products and a sum."""
    first, second = x.double().abs().view(len(x), -1, head_dim).chunk(2, -1)
    c, s = cos.double().abs()[:, None], sin.double().abs()[:, None]
    return 3 * E * torch.cat((first * c + second * s, second * c + first * s), -1).view(len(x), -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, heads, head_dim", [(1, 3, 64), (33, 12, 64), (5, 3, 128), (4, 2, 96), (3, 1, 8)])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_rope(N, heads, head_dim, backward, dtype):
    """Also for rows that lie apart; the v part behind the rotated heads, and what lies between rows, stay."""
    rotated, width = heads * head_dim, heads * head_dim + 48
    angles = 100 * torch.rand(N, head_dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    qkv, buffer = framed(randn(N, width, seed=0, dtype=dtype), right=16)
    before = qkv.clone()

    def turned(x: Tensor, sign: int) -> Tensor:
        heads_apart = x[:, :rotated].view(1, N, heads, head_dim)
        return elementwise.apply_rope(heads_apart, cos.to(x)[None], sign * sin.to(x)[None]).view(N, -1)

    sign = -1 if backward else 1
    true = elementwise.apply_rope(
        before[:, :rotated].double().view(1, N, heads, head_dim), cos.double()[None], sign * sin.double()[None]
    ).view(N, -1)
    plain = elementwise.apply_rope(before[:, :rotated].view(1, N, heads, head_dim), cos[None], sign * sin[None])
    inner = rotation_error(before[:, :rotated], head_dim, cos, sin)
    elementwise_triton.rope_(qkv, heads, head_dim, cos, sin, backward)
    check(qkv[:, :rotated], plain.view(N, -1), true, inner)
    assert torch.equal(qkv[:, rotated:], before[:, rotated:]) and frame_is_whole(qkv, buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("B, T, H, KV, head_dim", [(1, 1, 3, 1, 64), (2, 33, 9, 3, 64), (3, 2, 2, 2, 96)])
def test_rope_backward(B, T, H, KV, head_dim, dtype):
    """The bits of `rope_` on gradients that were put side by side first, from any memory order."""
    angles = 100 * torch.rand(B * T, head_dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    q = randn(B, H, T, head_dim, seed=0, dtype=dtype).transpose(1, 2)
    k, v = (randn(B, T, KV + 1, head_dim, seed=seed, dtype=dtype)[:, :, 1:] for seed in (1, 2))
    got = elementwise_triton.rope_backward(q, k, v, angles.cos(), angles.sin())
    expected = torch.cat([d.flatten(2) for d in (q, k, v)], 2).flatten(0, 1)
    elementwise_triton.rope_(expected, H + KV, head_dim, angles.cos(), angles.sin(), backward=True)
    assert torch.equal(got, expected)
    twin = block_parts.rope_backward(q, k, v, angles.cos(), angles.sin())
    cos, sin = (x.view(B, T, -1) for x in (angles.cos(), angles.sin()))
    turned = [elementwise.apply_rope(x.double(), cos.double(), -sin.double()) for x in (q, k)]
    true = torch.cat([x.flatten(2) for x in (*turned, v.double())], 2).flatten(0, 1)
    before = torch.cat([x.flatten(2) for x in (q, k)], 2).flatten(0, 1)
    inner = rotation_error(before, head_dim, angles.cos(), angles.sin())
    inner = torch.nn.functional.pad(inner, (0, KV * head_dim))  # v stays as it is
    check(got, twin, true, inner)
    check(twin, got, true, inner)


@pytest.mark.parametrize("D", [64, 100])
def test_embedding_from_host(D):
    """Rows of the table, also out of the host's pinned memory."""
    table = torch.randn(300, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.randint(300, (3, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = elementwise_triton.embedding_from_host(tokens, table.pin_memory() if DEVICE == "cuda" else table)
    assert torch.equal(rows, torch.nn.functional.embedding(tokens.cpu(), table).to(DEVICE))


def silu_error(z: Tensor) -> Tensor:
    """A bound on the relative error of s = 1 / (1 + exp(-z)) and of 1 - s in float32.

    -z log2(e) is rounded before the power of two is taken, which costs exp 2 E |z|; exp and 1/x cost FAST each. Of
    1 - s the absolute error is that of s, and 1 / (1 - s) = 1 + exp(z) makes it relative.
    """
    return 2 * E * z.abs() + 2 * FAST


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, FF", [(1, 96), (33, 80), (2, 4100)])
def test_swiglu(N, FF, dtype):
    gate_up, buffer = framed(torch.cat((4 * randn(N, FF, seed=0), randn(N, FF, seed=1)), 1).to(dtype))
    gate_up[0, :4] = torch.tensor([-200.0, -87.0, 87.0, 200.0])  # where exp overflows, and where it vanishes
    before = gate_up.clone()
    gate, up = gate_up.chunk(2, 1)
    act = elementwise_triton.swiglu(gate_up)
    true = elementwise.swiglu(gate.double(), up.double())
    tiny = 2.0**-126 * (1 + up.abs().double() * gate.abs().double())  # below it 1/x of a huge number is a zero
    check(act, elementwise.swiglu(gate, up), true, (silu_error(gate.double()) + 3 * E) * true.abs() + tiny)
    assert torch.equal(gate_up, before) and frame_is_whole(gate_up, buffer)
    out, out_buffer = framed(torch.empty_like(act), right=16)
    assert elementwise_triton.swiglu(gate_up, out) is out and torch.equal(out, act) and frame_is_whole(out, out_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, FF", [(1, 96), (33, 80), (2, 4100)])
def test_swiglu_backward(N, FF, dtype):
    gate_up, buffer = framed(torch.cat((4 * randn(N, FF, seed=0), randn(N, FF, seed=1)), 1).to(dtype))
    gate_up[0, :4] = torch.tensor([-200.0, -87.0, 87.0, 200.0])
    dact, dact_buffer = framed(randn(N, FF, seed=2, dtype=dtype))
    act = elementwise_triton.swiglu(gate_up)

    def gradients(work: torch.dtype) -> Tensor:
        leaves = [x.to(work).requires_grad_() for x in gate_up.chunk(2, 1)]
        elementwise.swiglu(*leaves).backward(dact.to(work))
        return torch.cat([leaf.grad for leaf in leaves], 1)

    true, plain = gradients(torch.float64), gradients(torch.float32).to(dtype)
    gate, up, d = *gate_up.double().chunk(2, 1), dact.double()
    s = gate.sigmoid()
    # dgate's two terms can cancel, so its error is measured in their magnitudes; 1 - s is a difference of numbers of
    # size one, so it is off by the error of s and E, whatever its own size.
    e = silu_error(gate)
    dgate_terms = (d * up).abs() * (s * (e + 4 * E) + gate.abs() * s * ((2 * e + 5 * E) * (1 - s) + (e * s + E)))
    dup_terms = (d * gate * s).abs() * (e + 3 * E)
    inner = torch.cat((dgate_terms, dup_terms), 1) + 2.0**-126 * (1 + (gate * d).abs().repeat(1, 2))

    elementwise_triton.swiglu_backward_(dact, gate_up)
    check(gate_up, plain, true, inner)
    assert torch.equal(dact, act), "the activation comes back as the forward pass made it"
    assert frame_is_whole(gate_up, buffer) and frame_is_whole(dact, dact_buffer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, V", [(1, 500), (33, 500), (3, 1003), (2, 9000)])
@pytest.mark.parametrize("order", ["shuffled", "ascending", "descending"])
def test_cross_entropy(n, V, dtype, order, monkeypatch):
    """Ascending logits beat the largest one so far again and again, descending ones never; V need not fill a tile."""
    if V < 8192:
        monkeypatch.setattr(loss_triton, "CROSS_ENTROPY", Launch(256, 1))  # several rounds of the loop
    values = 8 * randn(n, V, seed=0)
    if order != "shuffled":
        values = values.sort(1, descending=order == "descending").values
    logits, buffer = framed(values.to(dtype))
    targets = torch.randint(V, (n,), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def losses_and_gradient(work: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = logits.to(work).requires_grad_()
        losses = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
        losses.sum().backward()
        return losses.detach(), leaf.grad

    (true_losses, true), (plain_losses, plain) = losses_and_gradient(torch.float64), losses_and_gradient(torch.float32)
    z = logits.double()
    spread = z.amax(1, keepdim=True) - z
    p = z.softmax(1)
    wanted = spread.gather(1, targets[:, None])[:, 0]
    # exp(-d) is off by 2 E d + FAST; so is each term of the sum, once more for every time that the largest changed
    # (at most once in 4 logits, each time by a factor whose exponents add up to d), and the sum of V by V E.
    off = 2 * E * spread + FAST
    total_off = (p * (2 * off + V / 4 * FAST)).sum(1, keepdim=True) + V * E
    losses = loss_triton.cross_entropy_(logits, targets)
    onehot = torch.nn.functional.one_hot(targets, V)
    check(logits, plain.to(dtype), true, p * (off + total_off + FAST + 2 * E) + onehot * E)
    check(losses, plain_losses, true_losses, total_off[:, 0] + 4 * E * (wanted + true_losses))
    assert frame_is_whole(logits, buffer)


@pytest.mark.parametrize("n", [1, 4096, 5000])
def test_scale(n):
    """The product in float32, rounded once: a factor rounded to bfloat16 first would be off by up to 0.4 %."""
    x, factor = randn(n, 3, seed=0, dtype=torch.bfloat16), torch.tensor(1.0039, device=DEVICE)
    scaled = x.clone()
    loss_triton.scale_(scaled, factor)
    assert torch.equal(scaled, (x.float() * factor).bfloat16()) and not torch.equal(scaled, x * factor.bfloat16())


def test_cross_entropy_at_the_edges():
    """A hopeless target has its exact loss; a logit of -inf has no probability, in a row's first tile as well."""
    logits = torch.full((2, 300), -float("inf"), device=DEVICE)
    logits[0, 290:292] = torch.tensor([200.0, 0.0])
    logits[1, 5] = -3e4
    losses = loss_triton.cross_entropy_(logits, torch.tensor([291, 5], device=DEVICE))
    assert losses.tolist() == [200.0, 0.0]
    expected = torch.zeros(2, 300, device=DEVICE)
    expected[0, 290:292] = torch.tensor([1.0, -1.0])
    assert torch.equal(logits, expected)


def random_nf4(n_out: int, n_in: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every nibble and every scale's code is as likely as any other: packed, codes, nested_absmax, nested_offset."""
    g = torch.Generator().manual_seed(0)
    packed = torch.randint(256, (n_out, n_in // 2), generator=g).byte()
    codes = torch.randint(256, (n_out, n_in // 64), generator=g).byte()
    nested_absmax = torch.rand(-(-codes.numel() // 256), generator=g) / 50
    return packed, codes, nested_absmax, torch.tensor(0.0312345)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("launch", [Launch(1024, 4), Launch(4096, 4), Launch(16384, 8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (33, 576), (7, 4096)], ids=str)
def test_dequantize_is_bit_equal(shape, launch, dtype, monkeypatch):
    monkeypatch.setattr(nf4_triton, "DEQUANTIZE", launch)
    packed, codes, nested_absmax, nested_offset = parts = random_nf4(*shape)
    absmax = nf4.dequantize_absmax(codes, nested_absmax, nested_offset)
    expected = nf4.dequantize_nf4(packed, absmax, dtype)
    out, buffer = framed(torch.zeros(shape, dtype=dtype, device=DEVICE), right=16)
    nf4_triton.dequantize_nf4_double(*(x.to(DEVICE) for x in parts), out)
    assert torch.equal(out.cpu(), expected) and frame_is_whole(out, buffer)
    # A fused multiply-add would have rounded once where the reference rounds twice; this data can tell (5 % differ).
    scales = nested_absmax.repeat_interleave(256)[: codes.numel()].view_as(codes).double()
    fused = (nf4.dynamic_levels()[codes.int()].double() * scales + nested_offset.double()).float()
    assert codes.numel() == 1 or not torch.equal(fused, absmax)


def test_dequantize_undoes_quantize():
    """From real weights, whole and as a slice of rows into a larger contiguous buffer."""
    w = randn(40, 512, seed=0).cpu() * torch.linspace(0.5, 2, 40)[:, None]
    packed, absmax = nf4.quantize_nf4(w)
    parts = packed, *nf4.quantize_absmax(absmax)
    buffer = torch.full((100, 512), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    nf4_triton.dequantize_nf4_double(*(x.to(DEVICE) for x in parts), buffer[30:70])
    expected = nf4.dequantize_nf4(packed, nf4.dequantize_absmax(*parts[1:]), torch.bfloat16)
    assert torch.equal(buffer[30:70].cpu(), expected)
    assert buffer[:30].isnan().all() and buffer[70:].isnan().all()
    assert (expected.double() - w).norm() < 0.11 * w.double().norm()


@pytest.mark.parametrize("lora_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, r", [((1, 64), 4), ((70, 192), 16), ((65, 576), 40)], ids=str)
def test_dequantize_merged(shape, r, dtype, lora_dtype):
    n_out, n_in = shape
    parts = random_nf4(*shape)
    lora_A, lora_B = randn(r, n_in, seed=1, dtype=lora_dtype) / 8, randn(n_out, r, seed=2, dtype=lora_dtype) / 8
    w = nf4.dequantize_nf4(parts[0], nf4.dequantize_absmax(*parts[1:]), torch.float32).to(DEVICE)
    true = w.double() + 0.3 * lora_B.double() @ lora_A.double()
    plain = (w + 0.3 * (lora_B.float() @ lora_A.float())).to(dtype)
    out, buffer = framed(torch.zeros(shape, dtype=dtype, device=DEVICE), right=16)
    nf4_triton.dequantize_nf4_merged(*(x.to(DEVICE) for x in parts), lora_A, lora_B, 0.3, out)
    # w has E in the product with its scale, but it starts here from the rounded w; a sum of r products, times s, plus w
    inner = (r + 2) * E * 0.3 * (lora_B.double().abs() @ lora_A.double().abs()) + E * true.abs()
    check(out, plain, true, inner)
    assert frame_is_whole(out, buffer)
    c = 1 + torch.rand(n_out, generator=torch.Generator().manual_seed(3)).to(DEVICE)  # DoRA's row scale
    scaled = true + (c.double()[:, None] - 1) * w.double()
    plain = (w * c[:, None] + 0.3 * (lora_B.float() @ lora_A.float())).to(dtype)
    nf4_triton.dequantize_nf4_merged(*(x.to(DEVICE) for x in parts), lora_A, lora_B, 0.3, out, c)
    check(out, plain, scaled, inner + 2 * E * (w.double() * c.double()[:, None]).abs() + E * scaled.abs())
    assert frame_is_whole(out, buffer)
