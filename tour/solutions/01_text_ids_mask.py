from itertools import pairwise

IGNORED = -100


def targets(ids: list[int], supervised: list[bool]) -> list[int]:
    following = [i if is_learnt else IGNORED for i, is_learnt in zip(ids, supervised, strict=True)]
    return [b for _, b in pairwise(following)] + [IGNORED]
