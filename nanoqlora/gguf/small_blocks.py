"""The block formats of 2 and 3 bits, and the two of 4 bits whose codes stand for values that are not evenly spaced.

Weights of a layer are about normally distributed: many small ones, few large ones. VALUES stand closer together where
the weights do. These formats are at their best with an importance matrix. As in `ggml_blocks.py`, to which they belong,
the bytes are llama.cpp's.
"""

import torch
from torch import Tensor

from ..ops.ggml import VALUES, from_half, places
from .bits import divide, first_extreme, nearest, pack_nibbles, sum_in_order, to_half
from .k_quants import TINY, TRIALS, codes_with, improved_codes, round_scales, search_lines, search_scales


def round_to_codes(x: Tensor, w: Tensor | None, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round the scales, or minima, of a block's groups to multiples of one number, d.

    Args:
        x: (n, groups) float32, of which none is negative.
        w: the same shape, the weights of their errors; None: the largest has code `highest`.
    Returns:
        d as bytes; codes, (n, groups) uint8; and d times codes as it is read back, flat.
    """
    if w is not None:
        largest, codes = round_scales(x.T.contiguous(), w.T.contiguous(), highest)
        d, codes = to_half(largest[:, None]), codes.T.contiguous().to(torch.uint8)
    else:
        largest = x.amax(dim=-1, keepdim=True)
        largest = torch.where(largest > 0, largest, 0)  # never -0.0
        codes = nearest(torch.where(largest > 0, x.new_tensor(highest) / largest, 0) * x)
        codes = (codes.to(torch.int32) & 255).clamp_(max=highest).to(torch.uint8)
        d = to_half(divide(largest, highest))
    return d, codes, (from_half(d) * codes).flatten()


def _pack_pairs(codes: Tensor) -> Tensor:
    """(n, 256) codes of two bits -> (n, 64) bytes: byte l of each half has elements l, l + 32, l + 64 and l + 96."""
    return (codes.view(-1, 2, 4, 32) << places(codes, 0, 2, 4, 6)).sum(dim=2, dtype=torch.uint8).flatten(1)


def quantize_q2_k(x: Tensor, w: Tensor | None) -> Tensor:
    """16 bytes with the scale (low) and the minimum of a group, codes, d, dmin."""
    groups = x.view(-1, 16).T.contiguous()  # (16, n * 16)
    if w is None:
        found = search_lines(groups, groups.abs(), 3, (-0.5, 0.1, 16), squared=False)
    else:
        w = w.view(-1, 16).T.contiguous()
        found, w = search_lines(groups, w, 3, TRIALS), sum_in_order(w).view(-1, 16)
    scale, minimum, inverse, its_minimum = found
    d, scales, rough_scale = round_to_codes(scale.view(-1, 16), w, 15)
    dmin, minima, rough_minimum = round_to_codes(-minimum.view(-1, 16), w, 15)
    codes = nearest((groups + rough_minimum) / rough_scale)
    codes = torch.where(rough_scale == 0, nearest((groups - its_minimum) * inverse), codes)  # C leaves the search's
    codes = codes.clamp_(0, 3).to(torch.uint8).T.reshape(-1, 256)
    return torch.cat([scales | minima << 4, _pack_pairs(codes), d, dmin], dim=-1)


def quantize_q3_k(x: Tensor, w: Tensor | None) -> Tensor:
    """Third bits, low two bits, 12 bytes of scales, d.

    A scale has 6 bits. Bytes 0-7 have the low four of group g, and above them those of group g + 8; bytes 8-11 the top
    two of groups g, g + 4, g + 8 and g + 12.
    """
    groups = x.view(-1, 16).T.contiguous()  # (16, n * 16)
    if w is None:
        scale, left = improved_codes(groups, middle=4)
        scale = scale.view(-1, 16)
        largest = first_extreme(scale, dim=1)
        inverse = torch.where(largest == 0, 0, x.new_tensor(-32) / largest)
        scales = nearest(inverse * scale).clamp_(-32, 31)
        d = to_half(torch.where(largest == 0, 0, 1 / inverse))
        scales.masked_fill_(largest == 0, -32)
    else:
        w = w.view(-1, 16).T.contiguous()
        scale, inverse = search_scales(groups, w, middle=4)
        left = codes_with(groups, inverse, 4)
        columns = scale.view(-1, 16).T.contiguous()
        of_scales, inverse = search_scales(columns, sum_in_order(w).view(-1, 16).T.contiguous(), middle=32)
        d, scales = to_half(of_scales[:, None]), codes_with(columns, inverse, 32).T
    rough_scale = (from_half(d) * scales).flatten()
    codes = torch.where(rough_scale == 0, left, nearest(groups / rough_scale))  # C leaves the search's
    codes = (codes.clamp_(-4, 3) + 4).to(torch.uint8).T.reshape(-1, 256)
    third = (codes.view(-1, 8, 32) >> 2 << places(codes, *range(8))).sum(dim=1, dtype=torch.uint8)
    scales = (scales + 32).to(torch.uint8)
    tops = (scales.view(-1, 4, 4) >> 4 << places(scales, 0, 2, 4, 6)).sum(dim=1, dtype=torch.uint8)
    return torch.cat([third, _pack_pairs(codes & 3), pack_nibbles(scales), tops, d], dim=-1)


def _nearest_values(y: Tensor) -> Tensor:
    """The codes of the VALUES nearest to y; half-way the higher one."""
    between = y.new_tensor([(a + b) / 2 for a, b in zip(VALUES, VALUES[1:], strict=False)])
    return torch.bucketize(y, between, right=True)


def _search_values(x: Tensor, w: Tensor | None) -> Tensor:
    """For each group, a column of x, the scale for which scale * VALUES[q] is nearest to its weights."""
    w = x * x if w is None else w
    values, extreme = x.new_tensor(VALUES), first_extreme(x, dim=0)[0]
    is_zero = extreme.abs() < TINY
    extreme.masked_fill_(is_zero, 1)

    def fit(inverse: Tensor) -> tuple[Tensor, Tensor]:
        q = values[_nearest_values(x * inverse)]
        w_q = w * q
        return sum_in_order(w_q * x), sum_in_order(w_q * q)

    sum_xq, sum_qq = fit(1 / (-extreme / values[0]))
    scale = torch.where(sum_qq > 0, sum_xq / sum_qq, 0)
    best = scale * sum_xq
    for trial in range(-7, 8):
        sum_xq, sum_qq = fit((values[0] + trial) / extreme)
        is_better = (sum_qq > 0) & (sum_xq * sum_xq > best * sum_qq)
        scale = torch.where(is_better, sum_xq / sum_qq, scale)
        best = torch.where(is_better, scale * sum_xq, best)
    return scale.masked_fill_(is_zero, 0)


def quantize_iq4_nl(x: Tensor, w: Tensor | None) -> Tensor:
    scale = _search_values(x.T.contiguous(), None if w is None else w.T.contiguous())[:, None]
    codes = _nearest_values(torch.where(scale == 0, 0, 1 / scale) * x)
    return torch.cat([to_half(scale), pack_nibbles(codes.to(torch.uint8))], dim=-1)


def quantize_iq4_xs(x: Tensor, w: Tensor | None) -> Tensor:
    """d; 2 bytes with the top two bits of the 8 scales, 4 with their low four; codes."""
    groups = x.view(-1, 32)
    scale = _search_values(groups.T.contiguous(), None if w is None else w.view(-1, 32).T.contiguous()).view(-1, 8)
    largest = first_extreme(scale, dim=1)
    d = divide(-torch.where(largest == 0, 0, largest), 32)  # of zeros it is -0.0, as in C
    scales = nearest(torch.where(d == 0, 0, 1 / d) * scale).clamp_(-32, 31)
    rough_scale = (d * scales).view(-1, 1)  # not of the d that a reader will see
    codes = _nearest_values(torch.where(rough_scale == 0, 0, 1 / rough_scale) * groups).to(torch.uint8)
    scales = (scales + 32).to(torch.uint8)
    low, high = scales.view(-1, 4, 2), (scales >> 4).view(-1, 2, 4) << places(scales, 0, 2, 4, 6)[:, 0]
    low = low[:, :, 0] & 15 | low[:, :, 1] << 4
    return torch.cat([to_half(d), high.sum(dim=2, dtype=torch.uint8), low, pack_nibbles(codes).view(-1, 128)], dim=-1)
