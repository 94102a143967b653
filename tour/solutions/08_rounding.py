from torch import Tensor


def total(x: Tensor) -> Tensor:
    while len(x) > 1:  # neighbours have the same size, so no addition loses a small number beside a large one
        x = x[0::2] + x[1::2]
    return x[0]
