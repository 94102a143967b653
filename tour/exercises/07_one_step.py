"""Chapter 7: the gradient of a step over micro-batches.

A model with one weight vector w predicts y = x . w. The loss of a token is (x . w - y)^2, and only supervised tokens
count. The loss of the step is the mean over its supervised tokens.
"""

from torch import Tensor

MicroBatch = tuple[Tensor, Tensor, Tensor]  # x (N, n), y (N,), is_supervised (N,) bool


def accumulate(w: Tensor, micro_batches: list[MicroBatch]) -> None:
    """Leave the gradient of the step's loss in w.grad. Each micro-batch has its own forward and backward pass, as if
    there were no memory for two; what one may know beforehand is how many tokens are supervised."""
    raise NotImplementedError


def test_accumulate() -> None:
    import torch

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((40, 5), (40,)))
    is_supervised = torch.rand(40, generator=g) < torch.linspace(0, 1, 40)
    w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (x @ w - y)[is_supervised].square().mean().backward()
    assert w.grad is not None
    expected, w.grad = w.grad, None
    accumulate(w, [(x[i : i + 10], y[i : i + 10], is_supervised[i : i + 10]) for i in range(0, 40, 10)])
    assert w.grad is not None
    torch.testing.assert_close(w.grad, expected)
