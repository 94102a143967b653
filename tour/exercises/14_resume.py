"""Chapter 14: what must be kept of an AdamW, so that nobody can tell that it was stopped?

`tour.one_file.AdamW` has `parameters`, and what it needs to go on. Look at its `step`.
"""

import io
from typing import Any

from tour.one_file import AdamW


def state_of(optimizer: AdamW) -> dict[str, Any]:
    """Everything that a new AdamW over equal parameters needs, as tensors, lists and numbers."""
    raise NotImplementedError


def restore(optimizer: AdamW, state: dict[str, Any]) -> None:
    raise NotImplementedError


def test_resume() -> None:
    import torch

    from tour.one_file import Settings

    def steps(optimizer: AdamW, numbers: range) -> None:
        for step in numbers:
            for i, p in enumerate(optimizer.parameters):
                p.grad = p.detach() - torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step(0.01)

    def fresh() -> AdamW:
        return AdamW([torch.nn.Parameter(torch.ones(7, 3)), torch.nn.Parameter(torch.ones(5))], Settings())

    once, first, second = fresh(), fresh(), fresh()
    steps(once, range(20))
    steps(first, range(10))
    file = io.BytesIO()
    torch.save((first.parameters, state_of(first)), file)
    steps(first, range(10, 20))  # what was saved must not change with it
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    for p, value in zip(second.parameters, values, strict=True):
        p.data.copy_(value)
    restore(second, state)
    steps(second, range(10, 20))
    assert all(torch.equal(a, b) for a, b in zip(once.parameters, second.parameters, strict=True))
