"""Chapter 4: where do the 16 levels of NF4 come from?

A level is a quantile of the normal distribution: `quantile(p)` is the number that is larger than a share p of it. The
largest level stands at p = HIGHEST, zero at p = 1/2.

- Above zero there are 8 levels. Their p are evenly spaced from HIGHEST down to 1/2, without 1/2 itself.
- Below zero there are 7, mirrored, with their own even spacing from HIGHEST down to 1/2, without 1/2 itself.
- Zero is the 16th. At last all are divided by the largest.
"""

from statistics import NormalDist

quantile = NormalDist().inv_cdf
HIGHEST = ((1 - 1 / 32) + (1 - 1 / 30)) / 2


def levels() -> list[float]:
    """The 16 levels, in ascending order."""
    raise NotImplementedError


def test_levels() -> None:
    from nanoqlora.ops.nf4 import NF4_LEVELS

    computed = levels()
    assert len(computed) == 16 and computed == sorted(computed)
    assert all(abs(a - b) < 1e-6 for a, b in zip(computed, NF4_LEVELS.tolist(), strict=True))
