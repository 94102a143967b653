from torch import Tensor


def gradients(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    dxa = s * dy @ B
    return dxa.t() @ x, s * dy.t() @ (x @ A.t()), dy @ W + dxa @ A
