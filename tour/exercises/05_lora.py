"""Chapter 5: the backward pass of y = x W^T + s (x A^T) B^T.

x: (N, n_in), dy: (N, n_out), W: (n_out, n_in), A: (r, n_in), B: (n_out, r). No autograd: matrix products only.
"""

from torch import Tensor


def gradients(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dB, dx, each with the shape of A, B, x."""
    raise NotImplementedError


def test_gradients() -> None:
    import torch

    g = torch.Generator().manual_seed(0)
    shapes = (9, 6), (9, 5), (5, 6), (2, 6), (5, 2)
    x, dy, W, A, B = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    leaves = [t.clone().requires_grad_() for t in (A, B, x)]
    y = leaves[2] @ W.t() + 1.5 * (leaves[2] @ leaves[0].t()) @ leaves[1].t()
    y.backward(dy)
    for computed, leaf in zip(gradients(x, dy, W, A, B, 1.5), leaves, strict=True):
        torch.testing.assert_close(computed, leaf.grad)
