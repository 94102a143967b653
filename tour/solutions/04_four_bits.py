from statistics import NormalDist

quantile = NormalDist().inv_cdf
HIGHEST = ((1 - 1 / 32) + (1 - 1 / 30)) / 2


def levels() -> list[float]:
    above = [quantile(HIGHEST - (HIGHEST - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(HIGHEST - (HIGHEST - 0.5) * i / 7) for i in range(7)]
    return sorted(level / above[0] for level in (*above, 0.0, *below))
