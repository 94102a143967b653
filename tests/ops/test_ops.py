"""Every fast twin against its reference: error against float64 at most twice the reference's own, both ways."""

import subprocess
import sys

import pytest
import torch
from paths import ROOT

from nanoqlora.ops import Dropout, Segments, attention_reference, block_parts, elementwise, lora, loss
from nanoqlora.ops.fast import attention_cpu
from nanoqlora.ops.fast import elementwise as elementwise_fast
from nanoqlora.ops.fast import lora as lora_fast
from nanoqlora.ops.fast import loss as loss_fast
from nanoqlora.ops.lora import dropout_mask

DTYPES = [torch.float32, torch.bfloat16]


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def check_twins(fast, reference, inputs: list[torch.Tensor], factor: float = 2.0) -> None:
    """Compare values and gradients of two functions with the reference in float64.

    inputs: leaves in the dtype under test. Both see the same values and the same incoming gradient.
    """
    results = {}
    for name, function, dtype in (("fast", fast, None), ("plain", reference, None), ("true", reference, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        y = function(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        y.backward(dy.to(torch.bfloat16).to(y.dtype))
        results[name] = [y.detach(), *(leaf.grad for leaf in leaves)]
    for i, (f, p, t) in enumerate(zip(results["fast"], results["plain"], results["true"], strict=True)):
        assert f.dtype == p.dtype and f.shape == p.shape
        own = max(rms(p.double() - t), 1e-7 * rms(t))
        assert rms(f.double() - t) <= factor * own, f"result {i}: {rms(f.double() - t):.2e} against {own:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (9, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("lengths", [((1,),), ((33,), (33,)), ((5, 1, 260, 33), (150, 149))], ids=str)
def test_attention(dtype, heads, lengths):
    H, KV = heads
    segments, hd = Segments(lengths), 16
    B, T = len(lengths), sum(lengths[0])
    g = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(B, T, n, hd, generator=g) for n in (H, KV, KV))
    inputs = [x.to(dtype) for x in (q, k, v)]
    check_twins(
        lambda *x: attention_cpu.attention(*x, segments), lambda *x: attention_reference.attention(*x, segments), inputs
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 64)], ids=str)
def test_lora_linear(dtype, p, shape):
    """x, A and B against float64, with the same dropout mask; B is random, or dA would be zero."""
    B, T = shape
    n_in, n_out, r = 96, 80, 8
    g = torch.Generator().manual_seed(1)
    w = torch.randn(n_out, n_in, generator=g).bfloat16()
    x = torch.randn(B, T, n_in, generator=g).to(dtype)
    lora_A, lora_B = torch.randn(r, n_in, generator=g) / 10, torch.randn(n_out, r, generator=g) / 10
    dropout = Dropout(p, torch.arange(B)) if p else None

    def call(module):
        return lambda x, a, b: module.lora_linear(x, lambda dtype: w.to(dtype), a, b, 0.5, dropout)

    check_twins(call(lora_fast), call(lora), [x, lora_A, lora_B])


def test_lora_gradients_are_those_of_the_formula():
    """dA, dB and dx as the equations of the paper say, in float64, without autograd."""
    g = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(1, 7, n, generator=g, dtype=torch.float64) for n in (12, 10))
    w, a, b = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((10, 12), (4, 12), (10, 4)))
    seed = torch.tensor([3])
    mask = dropout_mask(x.shape, 0.3, seed, torch.float64)
    for module in (lora, lora_fast):
        leaves = [t.clone().requires_grad_() for t in (x, a, b)]
        module.lora_linear(leaves[0], lambda _: w, leaves[1], leaves[2], 2.0, Dropout(0.3, seed)).backward(dy)
        rows, d = (x * mask)[0], dy[0]
        expected = (d @ w + 2.0 * mask[0] * (d @ b @ a))[None], 2.0 * (d @ b).T @ rows, 2.0 * d.T @ (rows @ a.T)
        for leaf, want in zip(leaves, expected, strict=True):
            assert torch.allclose(leaf.grad, want.to(leaf.grad.dtype), rtol=1e-6, atol=1e-6)


def test_dropout_mask_is_a_fair_coin():
    """Share, scale and independence: over rows, tokens, features and seeds, within 5 standard deviations."""
    p, shape = 0.05, (4, 256, 512)
    mask = dropout_mask(shape, p, torch.arange(4) * 12345, torch.float32)
    dropped = (mask == 0).double()
    n = dropped.numel()
    assert abs(dropped.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(mask[mask > 0].unique(), torch.tensor([1 / (1 - round(p * 65536) / 65536)]))  # 16 bits decide
    for dim, count in enumerate(shape):
        means = dropped.mean(dim)
        deviation = means.std() / (p * (1 - p) / count) ** 0.5
        assert abs(deviation - 1) < 5 * (2 * means.numel()) ** -0.5, f"along {dim}: {deviation:.3f} of a coin's"
    for other in (dropped.roll(1, 0), dropped.roll(1, 1), dropped.roll(1, 2)):
        assert abs((dropped * other).mean() - p * p) < 5 * p / n**0.5
    again = dropout_mask((4, 100, 512), p, torch.arange(4) * 12345, torch.float32)
    assert torch.equal(again, mask[:, :100]), "a token's mask must not depend on the padding behind it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 33, 300])
def test_linear_cross_entropy(dtype, N):
    g = torch.Generator().manual_seed(3)
    hidden = (3 * torch.randn(N, 64, generator=g)).to(dtype)
    weight = torch.randn(500, 64, generator=g).bfloat16()
    targets = torch.randint(500, (N,), generator=g)

    def call(module):
        return lambda h: module.linear_cross_entropy(h, weight.to(h.dtype), targets)

    check_twins(call(loss_fast), call(loss), [hidden])
    w = weight.to(dtype)
    true = loss.token_losses(hidden.double(), w.double(), targets)
    own = rms(loss.token_losses(hidden, w, targets) - true)
    assert rms(loss_fast.token_losses(hidden, w, targets) - true) <= 2 * max(own, 1e-7)


def test_loss_of_a_hopeless_target_is_finite():
    """A token whose probability underflows still has its exact loss, 200 nats here."""
    hidden, weight = torch.tensor([[200.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert loss_fast.token_losses(hidden, weight, torch.tensor([1])).item() == pytest.approx(200.0)


def test_no_targets_no_loss():
    hidden = torch.randn(0, 8, requires_grad=True)
    total = loss_fast.linear_cross_entropy(hidden, torch.randn(5, 8), torch.zeros(0, dtype=torch.int64))
    total.backward()
    assert total.item() == 0


@pytest.mark.parametrize("T", [1, 33])
def test_elementwise_against_float64(T):
    """In bfloat16 each loses one rounding of its result and nothing inside."""
    g = torch.Generator().manual_seed(4)
    x, up = (torch.randn(2, T, 3, 32, generator=g).bfloat16() for _ in range(2))
    weight = torch.rand(32, generator=g)
    angles = torch.rand(2, T, 16, generator=g) * 100
    cases = [
        (elementwise.rms_norm(x, weight, 1e-5), elementwise.rms_norm(x.double(), weight.double(), 1e-5)),
        (elementwise.swiglu(x, up), elementwise.swiglu(x.double(), up.double())),
        (
            elementwise.apply_rope(x, angles.cos(), angles.sin()),
            elementwise.apply_rope(x.double(), angles.double().cos(), angles.double().sin()),
        ),
    ]
    for got, true in cases:
        # half a unit in the last place, and float32's error in a difference of two products
        assert ((got.double() - true).abs() <= 2.0**-8 * true.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 33])
def test_elementwise_twins(dtype, T):
    g = torch.Generator().manual_seed(6)
    x, up = ((2 * torch.randn(2, T, 3, 32, generator=g)).to(dtype) for _ in range(2))
    weight, angles = torch.rand(32, generator=g), torch.rand(2, T, 16, generator=g) * 100
    rope = angles.cos(), angles.sin()

    def fast_norm(x):
        return elementwise_fast.rms_norm(x, weight, 1e-5, block_parts.rms_norm, block_parts.rms_norm_backward)

    check_twins(fast_norm, lambda x: elementwise.rms_norm(x, weight, 1e-5), [x])
    check_twins(elementwise_fast.swiglu, elementwise.swiglu, [x, up])
    check_twins(lambda x: elementwise_fast.apply_rope(x, *rope), lambda x: elementwise.apply_rope(x, *rope), [x])


def test_import_loads_no_compiler():
    """bitsandbytes and variable-length attention load torch._dynamo; they are imported at their first use."""
    code = "import sys, nanoqlora; print([m for m in ('torch._dynamo', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"
