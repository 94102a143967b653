def positions(lengths: list[int]) -> list[int]:
    return [p for length in lengths for p in range(length)]


def mask(lengths: list[int]) -> list[list[bool]]:
    document = [i for i, length in enumerate(lengths) for _ in range(length)]
    return [[mine == other and u <= t for u, other in enumerate(document)] for t, mine in enumerate(document)]
