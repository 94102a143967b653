"""The Triton kernels of a low-rank update and their plain twins, against float64.

Shapes are small on purpose: rows that fill no tile, widths that fill no block, ranks that are no power of two.
"""

import pytest
import torch
from triton_kernels import CUDA, DEVICE, STEP, Case, U, rms

from nanoqlora.ops import block_parts, lora, lora_parts
from nanoqlora.ops.lora_parts import RowDropout
from nanoqlora.ops.triton import elementwise as elementwise_triton
from nanoqlora.ops.triton import lora as lora_triton
from nanoqlora.ops.triton.lora import Tile

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("triton_kernels"), *([pytest.mark.gpu] if CUDA else [])]

# (B, T, n_in, R), small tiles: 1, 33, 130 and 132 rows.
SHAPES = [
    ((1, 1, 96, 8), False),
    ((1, 33, 320, 24), False),
    ((2, 65, 96, 64), False),
    ((2, 65, 320, 192), False),
    ((3, 11, 96, 24), True),
    ((4, 33, 320, 64), True),
]
WIDTHS = [(80, 8, False), (320, 24, True), (96, 64, False), (136, 192, False)]  # n_out, r, small tiles
DROPS = [0.0, 0.05]


def use_small_tiles(monkeypatch) -> None:
    """Tiles so small that a sum over 320 columns is split, and that one program walks over all tiles of rows.

    The tiles meant for 8192 rows do neither at the sizes of these tests.
    """
    for site in lora_triton.TILES:
        tile = Tile(32, 16, 4, 2, 264) if site[0] in ("down", "swiglu") else Tile(32, 32, 4, 2, 1)
        monkeypatch.setitem(lora_triton.TILES, site, tile)


def check(got: torch.Tensor, twin: torch.Tensor, true: torch.Tensor, sum_error: torch.Tensor) -> None:
    """Every element within its bound, and all of them together at most twice as far off as the twin.

    sum_error: what the float32 sum may be off by. A bfloat16 result is then rounded once.
    """
    assert got.dtype == twin.dtype and got.shape == twin.shape
    rounding = U if got.dtype == torch.bfloat16 else 0.0
    error, bound = got.double() - true, rounding * true.abs() + (1 + rounding) * sum_error
    assert (error.abs() <= bound).all(), f"error is {(error.abs() / bound.clamp_min(1e-300)).max():.1f} x its bound"
    own = max(rms(twin.double() - true), 1e-7 * rms(true))
    assert rms(error) <= 2 * own, f"{rms(error):.2e} against {own:.2e} of the twin"


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("shape, small", SHAPES)
def test_lora_down(shape, small, p, monkeypatch):
    """xa loses float32's rounding of each of n_in additions, that of the scale, and one to bfloat16."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(*shape, p)
    x, A = c.x.double() * c.mask, c.A.double()
    got, twin = (m.lora_down(c.x, c.A, c.dropout) for m in (lora_triton, lora_parts))
    check(got, twin, x @ A.t(), (c.n_in + 4) * STEP * (x.abs() @ A.abs().t()))
    assert torch.equal(got, lora_triton.lora_down(c.x, c.A, c.dropout)), "not the same bits twice"
    for module, alone in ((lora_triton, got), (lora_parts, twin)):
        wider = torch.full((c.N, c.n_in + 24), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        copy = wider[:, 8 : 8 + c.n_in]
        assert torch.equal(module.lora_down(c.x, c.A, c.dropout, out=copy), alone)
        assert torch.equal(copy, c.x) and wider[:, :8].isnan().all() and wider[:, 8 + c.n_in :].isnan().all()


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("shape, small", SHAPES)
def test_swiglu_lora_down(shape, small, p, monkeypatch):
    """act as SwiGLU alone makes it, bit for bit; xa within the bound of `lora_down` on that act."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(*shape, p)
    gate_up = c.random(c.N, 2 * c.n_in + 8)[:, : 2 * c.n_in]
    results = []
    for module in (lora_triton, lora_parts):
        wider = torch.full((c.N, c.n_in + 24), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        act = wider[:, 8 : 8 + c.n_in]
        results.append((module.swiglu_lora_down(gate_up, c.A, c.dropout, out=act), act))
        assert wider[:, :8].isnan().all() and wider[:, 8 + c.n_in :].isnan().all()
    (xa, act), (twin, twin_act) = results
    assert torch.equal(act, elementwise_triton.swiglu(gate_up)) and torch.equal(twin_act, block_parts.swiglu(gate_up))
    assert torch.equal(twin, lora_parts.lora_down(twin_act, c.A, c.dropout))
    x, A = act.double() * c.mask, c.A.double()
    check(xa, lora_parts.lora_down(act, c.A, c.dropout), x @ A.t(), (c.n_in + 4) * STEP * (x.abs() @ A.abs().t()))


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("shape, small", SHAPES)
def test_lora_backward_A(shape, small, p, monkeypatch):
    """dA is never rounded to bfloat16, and is added to what is there."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(*shape, p)
    x, dxa = c.x.double() * c.mask, c.dxa.double()
    true, sum_error = dxa.t() @ x, (c.N + 4) * STEP * (dxa.abs().t() @ x.abs())
    got, twin = (m.lora_backward_A(c.dxa, c.x, c.dropout) for m in (lora_triton, lora_parts))
    check(got, twin, true, sum_error)
    assert torch.equal(got, lora_triton.lora_backward_A(c.dxa, c.x, c.dropout)), "not the same bits twice"

    before = c.random(c.R, c.n_in).float()
    got, twin = before.clone(), before.clone()
    for module, out in ((lora_triton, got), (lora_parts, twin)):
        assert module.lora_backward_A(c.dxa, c.x, c.dropout, out) is out
    total = before.double() + true
    check(got, twin, total, sum_error + STEP * total.abs())

    for module, whole in ((lora_triton, got), (lora_parts, twin)):
        places = [part.clone() for part in before.split([c.R // 4, c.R - c.R // 4])]
        assert module.lora_backward_A(c.dxa, c.x, c.dropout, places) is places
        # Ours makes the same bits; a library may sum the narrower products in another order.
        assert torch.equal(torch.cat(places), whole) or module is lora_parts
        assert ((torch.cat(places) - whole).abs() <= 2 * U * (dxa.abs().t() @ x.abs())).all()


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("shape, small", SHAPES)
def test_lora_backward_A_of_a_norm(shape, small, p, monkeypatch):
    """As from the normalised x itself in float64; dxa rstd is rounded once, and each term by no more than that."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(*shape, p)
    rstd = torch.rand(c.N, generator=c.g).to(DEVICE) + 0.5
    weight = c.random(c.n_in)
    h = c.x.double() * rstd.double()[:, None] * weight.double() * c.mask
    dxa = c.dxa.double()
    true, sum_error = dxa.t() @ h, (2 * U + (c.N + 4) * STEP) * (dxa.abs().t() @ h.abs())
    got, twin = (m.lora_backward_A(c.dxa, c.x, c.dropout, norm=(rstd, weight)) for m in (lora_triton, lora_parts))
    check(got, twin, true, sum_error)


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("shape, small", SHAPES)
def test_lora_dx_add(shape, small, p, monkeypatch):
    """One rounding to bfloat16, of the sum."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(*shape, p)
    product = (c.dxa.double() @ c.A.double()) * c.mask
    size = (c.dxa.double().abs() @ c.A.double().abs()) * c.mask + c.dx.double().abs()
    got, twin = c.dx.clone(), c.dx.clone()
    for module, dx in ((lora_triton, got), (lora_parts, twin)):
        assert module.lora_dx_add_(dx, c.dxa, c.A, c.dropout) is None
    check(got, twin, c.dx.double() + product, (c.R + 4) * STEP * size)


@pytest.mark.parametrize("n_out, r, small", WIDTHS)
@pytest.mark.parametrize("N", [1, 33, 130])
def test_lora_backward_B(N, n_out, r, small, monkeypatch):
    """From parts of wider tensors; never rounded to bfloat16, and added to what is there."""
    if small:
        use_small_tiles(monkeypatch)
    c = Case(1, N, n_out, r)
    wide_dy, wide_xa, scaling = c.random(N, n_out + 16), c.random(N, r + 16), 0.3
    dy, xa = wide_dy[:, 8 : 8 + n_out], wide_xa[:, 8 : 8 + r]
    true = scaling * dy.double().t() @ xa.double()
    sum_error = scaling * (N + 4) * STEP * (dy.double().abs().t() @ xa.double().abs())
    got, twin = (m.lora_backward_B(dy, xa, scaling) for m in (lora_triton, lora_parts))
    check(got, twin, true, sum_error)
    before = c.random(n_out, r).float()
    for module, alone in ((lora_triton, got), (lora_parts, twin)):
        out = before.clone()
        assert module.lora_backward_B(dy, xa, scaling, out) is out
        total = before.double() + alone.double()
        assert ((out.double() - total).abs() <= STEP * total.abs() + 2 * sum_error).all()
    scale = c.random(n_out).float()  # DoRA's
    for module in (lora_triton, lora_parts):
        out = before.clone()
        assert module.lora_backward_B(dy, xa, scaling, out, scale) is out
        for scaled, base in ((out, before.double()), (module.lora_backward_B(dy, xa, scaling, None, scale), 0)):
            part = scale.double()[:, None] * true
            error, rounding = (scaled.double() - base - part).abs(), U * part.abs() * (module is lora_parts)
            assert (error <= 4 * STEP * scaled.abs() + 2 * scale.abs()[:, None] * sum_error + rounding).all()


@pytest.mark.parametrize("N, columns", [(1, 8), (33, 130), (130, 576)])
def test_column_dot(N, columns):
    """Slices of wider tensors. A sum of N products in float32: N + 1 roundings of its absolute values."""
    c = Case(1, N, columns, 16)
    dy, y = c.random(N, columns + 16)[:, 8 : 8 + columns], c.random(N, columns + 8)[:, :columns]
    true = (dy.double() * y.double()).sum(0)
    for module in (lora_triton, lora_parts):
        got = module.column_dot(dy, y)
        assert got.shape == (columns,) and got.dtype == torch.float32
        assert ((got - true).abs() <= (N + 1) * STEP * (dy.double() * y.double()).abs().sum(0)).all()


@pytest.mark.parametrize(
    "n_in, n_out, r, first, side", [(64, 96, 8, 0, 8), (576, 33, 16, 16, 48), (130, 2100, 3, 5, 16)]
)
def test_place_adapter(n_in, n_out, r, first, side):
    """Values rounded once, zeros beside them, and nothing written anywhere else."""
    g = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((r, n_in), (n_out, r)))
    for module in (lora_triton, lora_parts):
        wx = torch.full((n_out + side, n_in + side), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        A_rows, B_columns = wx[n_out + first : n_out + first + r, :n_in], wx[:n_out, n_in:]
        module.place_adapter(A, B, 0.3, A_rows, B_columns, first)
        assert torch.equal(A_rows, A.bfloat16())
        expected = torch.zeros(n_out, side, device=DEVICE)
        expected[:, first : first + r] = B * torch.tensor(0.3)
        assert torch.equal(B_columns, expected.bfloat16())
        A_rows[:], B_columns[:] = torch.nan, torch.nan
        assert wx.isnan().all(), "wrote outside"


@pytest.mark.parametrize("p", DROPS)
@pytest.mark.parametrize("small", [False, True])
def test_new_tensors_are_filled_and_nothing_more(small, p, monkeypatch):
    """Whatever the functions allocate starts as NaN with more NaN behind it: none is left in it, all of it behind."""
    if small:
        use_small_tiles(monkeypatch)
    behind, new_empty = [], torch.Tensor.new_empty

    def guarded(self: torch.Tensor, *shape, **options) -> torch.Tensor:
        if "device" in options:  # Triton's interpreter itself
            return new_empty(self, *shape, **options)
        shape = torch.Size(shape[0] if len(shape) == 1 else shape)
        memory = torch.full((shape.numel() + 2**15,), torch.nan, device=self.device, dtype=self.dtype)
        memory = memory.to(options.get("dtype", self.dtype))
        behind.append(memory[shape.numel() :])
        return memory[: shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    c = Case(2, 35, 320, 24, p)
    results = [lora_triton.lora_down(c.x, c.A, c.dropout), lora_triton.lora_backward_A(c.dxa, c.x, c.dropout)]
    results += [lora_triton.lora_backward_B(c.x, c.dxa, 0.5)]
    assert len(behind) >= 4, "the functions allocate in a way that this test does not see"
    assert not any(x.isnan().any() for x in results)
    assert all(x.isnan().all() for x in behind)


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("B, T", [(1, 130), (2, 65), (3, 43), (4, 33)])
def test_the_mask_is_that_of_dropout_mask(B, T, p):
    """Bit for bit, in each of the three places that make it, where nothing but the mask decides what is zero."""
    n_in = 160
    c = Case(B, T, n_in, 1, p)
    kept = c.mask != 0
    assert 0.5 * p < 1 - kept.double().mean() < 1.5 * p
    ones = torch.ones(c.N, n_in, dtype=torch.bfloat16, device=DEVICE)
    p = round(p * 65536) / 65536  # the share that is dropped exactly
    value = torch.tensor(1 / (1 - p), dtype=torch.bfloat16, device=DEVICE) * kept

    identity = torch.eye(n_in, dtype=torch.bfloat16, device=DEVICE)  # its product with x is x
    assert torch.equal(lora_triton.lora_down(ones, identity, c.dropout), value)

    dx = torch.zeros_like(ones)
    lora_triton.lora_dx_add_(dx, ones[:, :1], ones[:1], c.dropout)
    assert torch.equal(dx, value)

    rows = torch.eye(c.N, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(lora_triton.lora_backward_A(rows, ones, c.dropout).bfloat16(), value)

    assert torch.equal(c.dropout.mask(ones).bfloat16(), value), "the plain twin's, which is float32"


def test_parts_are_the_layer_and_its_gradients():
    """In float64 the twins put together are `lora.lora_linear` and what autograd makes of it."""
    B, T, n_in, n_out, r, scaling = 2, 5, 12, 10, 4, 0.7
    g = torch.Generator().manual_seed(3)
    x, w, A, B_, dy = (
        torch.randn(*s, generator=g, dtype=torch.float64)
        for s in ((B, T, n_in), (n_out, n_in), (r, n_in), (n_out, r), (B * T, n_out))
    )
    seed = torch.tensor([2**40 + 7, -5])
    for p in (0.0, 0.3):
        leaves = [t.clone().requires_grad_() for t in (x, A, B_)]
        layer = lora.lora_linear(leaves[0], lambda _: w, leaves[1], leaves[2], scaling, lora.Dropout(p, seed))
        layer.backward(dy.view_as(layer))

        rows, dropout = x.view(-1, n_in), RowDropout(p, lora.token_numbers(seed, T).flatten()) if p else None
        xa = lora_parts.lora_down(rows, A, dropout)
        y = rows @ w.t() + scaling * xa @ B_.t()
        dxa, dB = scaling * dy @ B_, lora_parts.lora_backward_B(dy, xa, scaling)
        dA = lora_parts.lora_backward_A(dxa, rows, dropout)
        dx = dy @ w
        lora_parts.lora_dx_add_(dx, dxa, A, dropout)
        expected = layer.view_as(y), leaves[0].grad.view_as(dx), leaves[1].grad, leaves[2].grad
        for got, want in zip((y, dx, dA, dB), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("n_in, R", [(4096, 64), (4096, 192), (14336, 128)])
def test_at_full_size(n_in, R):
    """Loops long enough for every stage of the pipeline, with a ragged last tile in each row."""
    for p in (0.0, 0.05):
        c = Case(4, 2039, n_in, R, p)
        x, A, dxa = c.x.double() * c.mask, c.A.double(), c.dxa.double()
        true = x @ A.t(), dxa.t() @ x, c.dx.double() + (dxa @ A) * c.mask
        got = [lora_triton.lora_down(c.x, c.A, c.dropout), lora_triton.lora_backward_A(c.dxa, c.x, c.dropout)]
        again = [lora_triton.lora_down(c.x, c.A, c.dropout), lora_triton.lora_backward_A(c.dxa, c.x, c.dropout)]
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "not the same bits twice"
        lora_triton.lora_dx_add_(c.dx, c.dxa, c.A, c.dropout)
        # One rounding to bfloat16 has rms 0.425 U, and dA has none; a sum of n random terms in float32 adds next to
        # nothing, and one lost or doubled tile of 64 in n_in = 14336 would already show as 0.07.
        for result, expected, most in zip((*got, c.dx), true, (0.5 * U, 1e-4, 0.5 * U), strict=True):
            assert rms(result.double() - expected) <= most * rms(expected)
        before = c.random(n_in, R).float()
        dB, want = before.clone(), before.double() + 0.25 * c.x.double().t() @ dxa
        lora_triton.lora_backward_B(c.x, c.dxa, 0.25, dB)
        assert rms(dB.double() - want) <= 1e-4 * rms(want)
