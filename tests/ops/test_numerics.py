"""Every layer, forward and backward, in float32 and bfloat16, within bounds that follow from its roundings alone.

`Near` is a value in float64 with a bound of how far a computed one may be off. Each test writes its layer down once
more in that arithmetic, from the formula, and says where the layer rounds: `rounded(u)`. The bound is then a result,
not a guess, and nothing is tuned: a rounding too many, a sum in 16 bits or a wrong sign is outside of it. What is
computed inside an operation is in float32, so every step there costs U32.
"""

import math

import pytest
import torch
from near import U32, Near, check
from torch import Tensor

from nanoqlora import ops
from nanoqlora.model import MLP, ModelConfig, RMSNorm
from nanoqlora.ops import Segments, nf4
from nanoqlora.qlora import QLoRALinear

UNIT = {torch.float32: U32, torch.bfloat16: 2.0**-8}
DTYPES = [torch.float32, torch.bfloat16]
pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def draw(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))).to(dtype)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("D", [1, 48])
def test_norm(dtype, T, D):
    """y = x w / sqrt(mean(x^2) + eps), all in float32 and rounded once."""
    u, eps = UNIT[dtype], 1e-5
    x, dy, w = draw(dtype, 2, T, D), draw(dtype, 2, T, D, seed=1), draw(torch.float32, D, seed=2)
    norm, x_leaf = RMSNorm(D, eps), leaf(x)
    norm.weight = torch.nn.Parameter(w, requires_grad=False)
    y = norm(x_leaf)
    y.backward(dy)
    X, rstd = Near.of(x), ((Near.of(x) * x).sum(-1) * (1 / D) + eps).rsqrt()
    check("y", y, (X * rstd * w).rounded(u), dtype)
    xhat, g = X * rstd, Near.of(dy) * w
    check("dx", x_leaf.grad, ((g - xhat * ((g * xhat).sum(-1) * (1 / D))) * rstd).rounded(u), dtype)


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("heads, hd", [(1, 2), (3, 16)])
def test_rope(dtype, T, heads, hd):
    """Two products and their difference in float32, rounded once; backward turns the other way."""
    u, x, dy = UNIT[dtype], draw(dtype, 2, T, heads, hd), draw(dtype, 2, T, heads, hd, seed=1)
    angles = 50 * torch.rand(2, T, hd // 2, generator=torch.Generator().manual_seed(T))
    cos, sin, x_leaf = angles.cos(), angles.sin(), leaf(x)
    y = ops.apply_rope(x_leaf, cos, sin)
    y.backward(dy)

    def turned(x: Tensor, sin: Tensor) -> Near:
        a, b = (Near.of(half) for half in x.chunk(2, -1))
        c, s = cos.unsqueeze(2), sin.unsqueeze(2)
        halves = a * c - b * s, b * c + a * s
        return Near(torch.cat([h.v for h in halves], -1), torch.cat([h.e for h in halves], -1)).rounded(u)

    check("y", y, turned(x, sin), dtype)
    check("dx", x_leaf.grad, turned(dy, -sin), dtype)


def silu(gate: Near) -> tuple[Near, Near]:
    """silu and its slope, each good to 8 roundings of float32; silu's slope is at most 1.1, its slope's 0.5."""
    s = gate.v.sigmoid()
    slope = s * (1 + gate.v * (1 - s))
    return Near(gate.v * s, 1.1 * gate.e).rounded(8 * U32), Near(slope, 0.5 * gate.e + 8 * U32 * (1 + gate.v.abs()))


@pytest.mark.parametrize("T", [1, 33])
def test_mlp(dtype, T):
    """down(silu(gate(x)) up(x)): each product, silu and their product rounded once, and so in the backward pass."""
    D, FF, u = 24, 40, UNIT[dtype]
    config = {"hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 1, "num_attention_heads": 1}
    mlp = MLP(ModelConfig.from_hf(config | {"vocab_size": 8})).to(dtype).requires_grad_(False)
    for i, layer in enumerate((mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        layer.weight.data = draw(dtype, *layer.weight.shape, seed=10 + i, scale=0.3)
    x, dy = draw(dtype, 2, T, D), draw(dtype, 2, T, D, seed=1)
    x_leaf = leaf(x)
    y = mlp(x_leaf)
    y.backward(dy)
    Wg, Wu, Wd = (Near.of(layer.weight) for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    gate, up = (Near.of(x) @ Wg.T).rounded(u), (Near.of(x) @ Wu.T).rounded(u)
    s, slope = silu(gate)
    s = s.rounded(u)
    check("y", y, ((s * up).rounded(u) @ Wd.T).rounded(u), dtype)
    dact = (Near.of(dy) @ Wd).rounded(u)
    dup, dgate = (dact * s).rounded(u), ((dact * up).rounded(u) * slope).rounded(u)
    check("dx", x_leaf.grad, ((dup @ Wu).rounded(u) + (dgate @ Wg).rounded(u)).rounded(u), dtype)


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("H, KV", [(1, 1), (3, 1), (4, 2)])
def test_attention(dtype, T, H, KV):
    """Scores and softmax in float32; probabilities, both products and each gradient rounded once."""
    hd, u = 8, UNIT[dtype]
    q, dy = draw(dtype, 1, T, H, hd), draw(dtype, 1, T, H, hd, seed=1)
    k, v = draw(dtype, 1, T, KV, hd, seed=2), draw(dtype, 1, T, KV, hd, seed=3)
    leaves = [leaf(x) for x in (q, k, v)]
    y = ops.attention(*leaves, Segments.one_per_row(1, T))
    y.backward(dy)

    def by_head(x: Tensor) -> Near:
        return Near.of(x[0].transpose(0, 1).repeat_interleave(H // x.shape[2], 0))  # (H, T, hd)

    Q, K, V, dY, scale = by_head(q), by_head(k), by_head(v), by_head(dy), 1 / math.sqrt(hd)
    future = torch.ones(T, T).triu(1).bool()
    scores = (Q @ K.T) * scale
    p = Near(scores.v.masked_fill(future, -math.inf), scores.e.masked_fill(future, 0)).softmax().rounded(u)
    dp = ((dY * scale).rounded(u) @ V.T).rounded(u)
    ds = (p * (dp - (p * dp).sum(-1))).rounded(u)

    def check_heads(name: str, computed: Tensor, near: Near) -> None:
        """The heads that share a key are summed; each sum has no more than the roundings of its parts."""
        shape = (computed.shape[2], -1, T, hd)
        near = Near(near.v.view(shape).sum(1), near.e.view(shape).sum(1))
        check(name, computed[0].transpose(0, 1), near, dtype)

    check_heads("y", y, (p @ V).rounded(u))
    check_heads("dv", leaves[2].grad, (p.T @ dY).rounded(u))
    check_heads("dq", leaves[0].grad, (ds @ K).rounded(u))
    check_heads("dk", leaves[1].grad, (ds.T @ Q).rounded(u))


@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("n_out, r", [(5, 1), (40, 3)])
@pytest.mark.parametrize("four_bits", [False, True], ids=["dense", "NF4"])
def test_linear_with_its_update(dtype, T, p, n_out, r, four_bits):
    """y = x W^T + s dropout(x) A^T B^T: W, A and B are rounded to the dtype, and so is each product."""
    n_in, u, s = 64, UNIT[dtype], 1.5
    layer = QLoRALinear(draw(torch.bfloat16, n_out, n_in, seed=4, scale=0.2).to(dtype)).train()
    W = Near.of(layer.weight)
    if four_bits:
        layer.quantize()
        absmax = nf4.dequantize_absmax(layer.absmax, layer.nested_absmax, layer.nested_offset)
        W = Near.of(nf4.dequantize_nf4(layer.packed, absmax, torch.float64)).rounded(2 * U32).rounded(u)
    layer.add_lora(r, s * r, p, False, layer_seed=77)
    layer.lora_A.data, layer.lora_B.data = draw(torch.float32, r, n_in, seed=5), draw(torch.float32, n_out, r, seed=6)
    layer.row_seeds = torch.tensor([3, 4])
    x, dy = draw(dtype, 2, T, n_in), draw(dtype, 2, T, n_out, seed=1)
    x_leaf = leaf(x)
    y = layer(x_leaf)
    y.backward(dy)

    mask = ops.Dropout(p, layer.row_seeds ^ 77).mask(x) if p else torch.ones_like(x)
    mask = Near.of(mask.flatten(0, 1))
    A, B = Near.of(layer.lora_A).rounded(u), Near.of(layer.lora_B).rounded(u)
    rows, dY = Near.of(x.flatten(0, 1)), Near.of(dy.flatten(0, 1))
    dropped = (rows * mask).rounded(u) if p else rows
    xa = (dropped @ A.T).rounded(u)
    expected = ((rows @ W.T).rounded(u) + ((xa @ B.T) * s).rounded(u)).rounded(u)
    check("y", y.flatten(0, 1), expected, dtype)
    dxa = ((dY @ B).rounded(u) * s).rounded(u)
    check("dA", layer.lora_A.grad, (dxa.T @ dropped).rounded(u), torch.float32)
    check("dB", layer.lora_B.grad, (dY.T @ xa).rounded(u) * s, torch.float32)
    expected = ((dY @ W).rounded(u) + ((dxa @ A).rounded(u) * mask).rounded(u)).rounded(u)
    check("dx", x_leaf.grad.flatten(0, 1), expected, dtype)


@pytest.mark.parametrize("N", [1, 33])
@pytest.mark.parametrize("V", [2, 101])
def test_head_with_loss(dtype, N, V):
    """Logits rounded once, softmax and logarithm in float32, the gradient of the logits and of x rounded once."""
    D, u = 24, UNIT[dtype]
    x, w = draw(dtype, N, D), draw(dtype, V, D, seed=1, scale=0.3)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(N))
    x_leaf = leaf(x)
    loss = ops.linear_cross_entropy(x_leaf, w, targets)
    (loss / 7).backward()
    p = (Near.of(x) @ Near.of(w).T).rounded(u).softmax()
    chosen = torch.arange(N), targets
    true = -p.v[chosen].log()
    error = -torch.log1p(-p.e[chosen] / p.v[chosen]) + 4 * U32 * (1 + true)
    losses = ops.token_losses(x, w, targets)
    assert losses.dtype == torch.float32 and ((losses.double() - true).abs() <= error).all()
    assert (loss.double() - true.sum()).abs() <= error.sum() + N * U32 * true.sum()
    dlogits = p - torch.nn.functional.one_hot(targets, V)
    expected = ((dlogits.rounded(u) @ Near.of(w)).rounded(u) * (1 / 7)).rounded(u)
    check("dx", x_leaf.grad, expected, dtype)
