"""Chapter 8: a sum in bfloat16 that does not stop at 256.

Every addition must be in bfloat16. What is free is the order: which numbers are added to which.
"""

from torch import Tensor


def total(x: Tensor) -> Tensor:
    """The sum of x (n,) bfloat16, as a bfloat16 number; n is a power of two."""
    raise NotImplementedError


def test_total() -> None:
    import torch

    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert total(ones).dtype == torch.bfloat16 and total(ones).item() == 4096
    x = torch.rand(2**14, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double().sum().item()
    assert abs(total(x).item() / exact - 1) < 0.02
