"""The search for scales: llama.cpp's, for many groups of weights at once.

The older formats take a group's scale from its largest weight. The K types try: for about twenty scales near that one,
round the weights to codes, fit the best line through (code, weight) by weighted least squares, and keep the line with
the smallest error. Large weights get more weight, since they move more of a layer's output.

    Q4_K, Q5_K   w = scale * q + minimum   a line with an offset; weight of an error: rms of the group + |w|
    Q2_K         the same                  the error itself, not its square, with the weight |w|
    Q6_K         w = scale * q             a line through 0;      weight of an error: w ** 2
    Q3_K         the same                  from one scale on, code after code is improved

With an importance matrix (`imatrix.py`) all of them, and the older formats too, weigh an error by what was measured of
the input that the weight meets. The scales of a block are then rounded by a search as well.

A group is a column here: x is (P, n), P the 32 or 16 weights of a group. Every step is then a few operations on
rows, however many groups there are. For the bytes to be llama.cpp's, three things have to be as in C: float32
throughout, sums that add one weight after the other (`sum_in_order`), and no fused multiply-add, which would skip a
rounding: so a multiplication and the sum that it goes into are always two operations.

`gguf/ggml_blocks.py` packs what is found here into bytes.
"""

import numpy as np
import torch
from torch import Tensor

from .bits import first_extreme, first_least, nearest, root, sum_in_order

TINY = 1e-15  # groups of Q6_K whose weights are all below it become zeros


def usual_weights(x: Tensor) -> Tensor:
    """The weights of errors in Q4_K and Q5_K where nothing was measured: rms of the group + |w|."""
    squares = sum_in_order(x * x)
    return root(squares / squares.new_tensor(len(x))) + x.abs()


TRIALS = -0.9, 0.05, 37  # of every format with minima, for weights of errors that were measured


def search_lines(
    x: Tensor, w: Tensor, highest: int, trials: tuple[float, float, int], squared: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each group the line scale * q + minimum, minimum <= 0, that is nearest to its weights.

    Args:
        x: (P, n) float32, a group in each column.
        w: the same shape, the weight of an error there.
        highest: largest code; the smallest is 0.
        trials: first, step and number. The scales of the trials put `highest + first`, `highest + first + step`, ...
            codes between minimum and maximum.
        squared: it is the squares of errors that count.
    Returns:
        scale and minimum, (n,) each; then what made the codes of the best trial: their inverse scale and minimum.
    """
    sum_w, sum_x = sum_in_order(w), sum_in_order(w * x)
    minimum, maximum = first_least(x, dim=0)[0], x.amax(0)
    minimum = torch.where(minimum > 0, 0, minimum)
    q, error, w_q = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)

    def round_with(inverse: Tensor) -> None:
        """q = the codes of x for this inverse scale and the current minimum."""
        torch.sub(x, minimum, out=q)
        q.mul_(inverse).round_().clamp_(0, highest)

    def error_of(scale: Tensor, minimum: Tensor) -> Tensor:
        torch.mul(q, scale, out=error)
        error.add_(minimum).sub_(x)
        return sum_in_order((error.mul_(error) if squared else error.abs_()).mul_(w))

    inverse = x.new_tensor(highest) / (maximum - minimum)
    scale = torch.where(maximum > minimum, 1 / inverse, 0)  # never -0.0
    inverse = inverse.nan_to_num_(nan=0, posinf=0)  # of constant and of tiny groups: then every code is 0, as in C
    round_with(inverse)
    best, best_inverse, best_minimum = error_of(scale, minimum), inverse, minimum
    first, step, num_trials = trials
    for trial in range(num_trials):
        spread = np.float32(first) + np.float32(step) * np.float32(trial) + np.float32(highest)
        inverse = (x.new_tensor(spread) / (maximum - minimum)).nan_to_num_(nan=0, posinf=0, neginf=0)
        round_with(inverse)
        sum_q = sum_in_order(torch.mul(w, q, out=w_q))
        sum_qq = sum_in_order(torch.mul(w_q, q, out=error))
        sum_qx = sum_in_order(w_q.mul_(x))
        determinant = sum_w * sum_qq - sum_q * sum_q
        new_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant
        new_minimum = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        is_above = new_minimum > 0  # then the best line through 0
        new_scale, new_minimum = torch.where(is_above, sum_qx / sum_qq, new_scale), new_minimum.clamp_(max=0)
        new_error = error_of(new_scale, new_minimum)
        is_better = (determinant > 0) & (new_error < best)
        pairs = (new_error, best), (inverse, best_inverse), (minimum, best_minimum), (new_scale, scale)
        best, best_inverse, best_minimum, scale = (torch.where(is_better, new, old) for new, old in pairs)
        minimum = torch.where(is_better, new_minimum, minimum)  # the next trial starts from it
    return scale, minimum, best_inverse, best_minimum


def search_scales(x: Tensor, w: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """For each group the scale for which scale * q is nearest to its weights, q from -middle to middle - 1.

    Args:
        x, w: (P, n) float32, the weights and the weights of their errors; a group in each column.
    Returns:
        scale, (n,), and the inverse scale that made the codes of the best trial.
    """
    extreme = first_extreme(x, dim=0)[0]
    is_zero = extreme.abs() < TINY
    extreme.masked_fill_(is_zero, 1)
    w_x = w * x
    q, weighted = torch.empty_like(x), torch.empty_like(x)

    def fit(spread: np.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with `spread` of them for the largest weight -> their inverse scale, sum of w x q, sum of w q q."""
        inverse = x.new_tensor(-spread) / extreme
        torch.mul(x, inverse, out=q)
        q.round_().clamp_(-middle, middle - 1)
        sum_xq = sum_in_order(torch.mul(w_x, q, out=weighted))
        return inverse, sum_xq, sum_in_order(torch.mul(w, q, out=weighted).mul_(q))

    best_inverse, sum_xq, sum_qq = fit(np.float32(middle))
    scale = torch.where(sum_qq == 0, 0, sum_xq / sum_qq)
    best = scale * sum_xq
    for trial in (*range(-9, 0), *range(1, 10)):
        inverse, sum_xq, sum_qq = fit(np.float32(middle) + np.float32(0.1) * np.float32(trial))
        is_better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = torch.where(is_better, sum_xq / sum_qq, scale)
        best = torch.where(is_better, scale * sum_xq, best)
        best_inverse = torch.where(is_better, inverse, best_inverse)
    return scale.masked_fill_(is_zero, 0), best_inverse.masked_fill_(is_zero, 0)


def codes_with(x: Tensor, inverse: Tensor, middle: int) -> Tensor:
    """The codes of `search_scales`, from -middle on. A group of zeros has the lowest code, as in C."""
    codes = nearest(x * inverse).clamp_(-middle, middle - 1)
    return codes.masked_fill_(inverse == 0, -middle)


def improve_codes(x: Tensor, w: Tensor, q: Tensor, lowest: int, highest: int) -> Tensor:
    """Change q in place, one code after the other, where that brings scale * q nearer to x. Returns the best scale."""
    w_x = w * x
    sum_xq, sum_qq = sum_in_order(w_x * q), sum_in_order(w * q * q)
    for _ in range(5):
        for i in range(len(x)):
            rest_xq, rest_qq = sum_xq - w_x[i] * q[i], sum_qq - w[i] * q[i] * q[i]  # without code i
            code = nearest(x[i] * rest_qq / rest_xq).clamp_(lowest, highest)
            new_xq, new_qq = rest_xq + w_x[i] * code, rest_qq + w[i] * code * code
            is_better = (rest_xq > 0) & (new_qq > 0) & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            is_better &= code != q[i]
            if lowest == 0:
                is_better &= rest_qq > 0
            pairs = (code, q[i]), (new_xq, sum_xq), (new_qq, sum_qq)
            q[i], sum_xq, sum_qq = (torch.where(is_better, new, old) for new, old in pairs)
    return torch.where(sum_qq > 0, sum_xq / sum_qq, 0)


def improved_codes(x: Tensor, middle: int) -> tuple[Tensor, Tensor]:
    """Q3_K without importance: for each group the scale, and its codes, (P, n) from -middle to middle - 1."""
    extreme = first_extreme(x, dim=0)[0]
    is_zero = extreme.abs() < TINY
    q = codes_with(x, x.new_tensor(-middle) / extreme.masked_fill_(is_zero, 1), middle)
    scale = improve_codes(x, x * x, q, -middle, middle - 1)
    return scale.masked_fill_(is_zero, 0), q.masked_fill_(is_zero, -middle)


def round_scales(x: Tensor, w: Tensor, highest: int) -> tuple[Tensor, Tensor]:
    """For each block the d for which d * code, code from 0 to `highest`, is nearest to the scales of its groups.

    Args:
        x, w: (P, n) float32, the scales, none negative, and the weights of their errors; a block in each column.
    Returns:
        d, (n,), and the codes, (P, n) float32.
    """
    largest = x.amax(0)
    is_zero = largest < TINY
    largest.masked_fill_(is_zero, 1)

    def error_of(inverse: Tensor) -> Tensor:
        error = x - 1 / inverse * nearest(x * inverse).clamp_(max=highest)
        return sum_in_order(w * error * error)

    inverse = x.new_tensor(highest) / largest
    best = error_of(inverse)
    for trial in (-4, -3, -2, -1, 1, 2, 3, 4):
        spread = np.float32(0.1) * np.float32(trial) + np.float32(highest)
        new = x.new_tensor(spread) / largest
        error = error_of(new)
        best, inverse = torch.where(error < best, error, best), torch.where(error < best, new, inverse)
    codes = nearest(x * inverse).clamp_(max=highest)
    d = improve_codes(x, w, codes, 0, highest)
    return d.masked_fill_(is_zero, 0), codes.masked_fill_(is_zero, 0)
