"""Numbers that are known to within a bound, and the check that a computed tensor is."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

U32 = 2.0**-24  # half a unit in the last place of float32's 24 bits
MEASURED: list[
    tuple[str, str, float, float]
] = []  # test, tensor, its largest error, the largest bound; in units of its rms


@dataclass
class Near:
    """A number known as v, computed as anything within v - e and v + e; both float64 tensors."""

    v: Tensor
    e: Tensor

    @classmethod
    def of(cls, x: "Tensor | float | Near") -> "Near":
        if isinstance(x, Near):
            return x
        x = torch.as_tensor(x, dtype=torch.float64) if not isinstance(x, Tensor) else x.detach().double()
        return cls(x, torch.zeros_like(x))

    @property
    def most(self) -> Tensor:
        return self.v.abs() + self.e

    def rounded(self, u: float) -> "Near":
        return Near(self.v, self.e + u * self.most)

    def __add__(self, other) -> "Near":
        other = Near.of(other)
        return Near(self.v + other.v, self.e + other.e).rounded(U32)

    def __sub__(self, other) -> "Near":
        return self + Near.of(other) * -1.0

    def __mul__(self, other) -> "Near":
        other = Near.of(other)
        return Near(self.v * other.v, self.v.abs() * other.e + self.e * other.most).rounded(U32)

    def __matmul__(self, other) -> "Near":
        """A sum of n products in float32, in any order: n roundings of no more than the sum of magnitudes."""
        other = Near.of(other)
        error = self.v.abs() @ other.e + self.e @ other.most
        return Near(self.v @ other.v, error + self.v.shape[-1] * U32 * (self.most @ other.most))

    @property
    def T(self) -> "Near":
        return Near(self.v.mT, self.e.mT)

    def sum(self, dim: int) -> "Near":
        magnitude = self.most.sum(dim, keepdim=True)
        return Near(self.v.sum(dim, keepdim=True), self.e.sum(dim, keepdim=True) + self.v.shape[dim] * U32 * magnitude)

    def rsqrt(self) -> "Near":
        """The steepest slope is at the smallest value; the function itself is good to 2 roundings."""
        slope = 0.5 * (self.v - self.e) ** -1.5
        return Near(self.v.rsqrt(), slope * self.e).rounded(2 * U32)

    def softmax(self) -> "Near":
        """Over the last dimension. A score that is off by e moves a probability by a factor of exp(2 e) at most."""
        p, e = self.v.softmax(-1), self.e.nan_to_num(0).amax(-1, keepdim=True)
        return Near(p, p * torch.expm1(2 * e)).rounded((self.v.shape[-1] + 8) * U32)


def check(name: str, computed: Tensor, near: Near, dtype: torch.dtype | None = None) -> None:
    """The computed tensor is within the bound, and the bound is not so wide that a shifted one would be too."""
    assert dtype is None or computed.dtype == dtype
    error, bound = (computed.double() - near.v).abs(), near.e + 1e-40  # below that float32 has no normal numbers
    assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"
    if computed.shape[-1] > 1 and near.v.std() > 0:
        size = near.v.square().mean().sqrt()
        MEASURED.append(
            (os.environ["PYTEST_CURRENT_TEST"], name, *((x.max() / size).item() for x in (error.detach(), bound)))
        )
        assert ((computed.double().roll(1, -1) - near.v).abs() > bound).any(), f"{name}: the bound says nothing"
