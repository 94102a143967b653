"""NF4: four bits per weight. The reference, in plain PyTorch.

The weights of a trained matrix are about normally distributed, so most of 16 evenly spaced levels would be used for
values that hardly occur. NormalFloat puts its 16 levels at quantiles of the normal distribution: each level is used
about equally often. Weights are scaled in groups (64 neighbours of a row share one scale, their largest magnitude), so
an outlier affects only its own group:

    absmax = max |w| over the group          code = index of the level nearest to w / absmax
    w'     = level[code] * absmax            (a relative error of about 9 % on normally distributed weights)

Scales cost 32 bits per 64 weights. Double quantization reduces them to 8: the mean is subtracted, and the rest is
rounded to a table of 256 levels, again in groups with a scale of their own. In total 4.127 bits per weight.

Everything here runs on any device and in any float dtype up to float64; `ops/fast/nf4.py` has the twins that training
uses, with the same names, shapes and bits. Source: QLoRA (arXiv:2305.14314), section 3. Read next: `../qlora.py`.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKSIZE = 64  # weights that share a scale
NESTED_BLOCKSIZE = 256  # scales that share a scale of the second level

# Quantiles of N(0, 1), scaled to [-1, 1]; seven levels below zero, 0 itself, eight above.
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def quantize_nf4(w: Tensor, blocksize: int = BLOCKSIZE) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to 4-bit NormalFloat, one scale per group of a row.

    Args:
        w: (n_out, n_in), any float dtype.
        blocksize: weights that share a scale. Must divide n_in.
    Returns:
        packed: (n_out, n_in // 2) uint8, two codes per byte, the first in the upper four bits.
        absmax: (n_out, n_in // blocksize) float32, in the units of `w`.
    Raises:
        ValueError: `blocksize` does not divide n_in.

    Cost: 0.5 byte per weight, plus 4 / blocksize byte for the scale (0.0625 at 64).
    """
    n_out, n_in = w.shape
    if n_in % blocksize:
        raise ValueError(
            f"a weight of shape ({n_out}, {n_in}): n_in={n_in} is not a multiple of blocksize={blocksize}. NF4 keeps "
            f"one scale per {blocksize} weights of a row, so a row must split evenly. Keep this layer in 16 bits."
        )
    groups = w.float().view(n_out, n_in // blocksize, blocksize)
    absmax = groups.abs().amax(-1)
    # A group of zeros has the scale 0: it is divided by one instead, and every weight becomes the level 0.
    scaled = groups * (1 / torch.where(absmax == 0, 1.0, absmax)).unsqueeze(-1)
    levels = NF4_LEVELS.to(w.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, midpoints).to(torch.uint8).view(n_out, n_in)  # a tie goes to the lower level
    return codes[:, 0::2] << 4 | codes[:, 1::2], absmax


def dequantize_nf4(packed: Tensor, absmax: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Level times scale, in float32 (float64 for float64), then one rounding to `dtype`.

    Args:
        packed: (n_out, n_in // 2) uint8. absmax: (n_out, n_in // blocksize) float32.
    Returns:
        (n_out, n_in) of `dtype`.
    """
    n_out = packed.shape[0]
    codes = torch.stack((packed >> 4, packed & 15), dim=-1).view(n_out, absmax.shape[1], -1)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    levels = NF4_LEVELS.to(packed.device, work)
    return (levels[codes.int()] * absmax.to(work).unsqueeze(-1)).to(dtype).view(n_out, -1)


@lru_cache
def dynamic_levels(device: torch.device | None = None) -> Tensor:
    """The 256 levels of the second quantization, (256,) float32 in [-0.993, 1].

    A table of seven decades: decade e from the top has 2^(6-e) levels, evenly spaced between 0.1 and 1 times 10^-e,
    on both sides of zero; 0 and 1 are added. Small values have a small error, and large ones have most of the levels.
    Source: Dettmers, 8-bit Approximations for Parallelism in Deep Learning (arXiv:1511.04561), dynamic tree.
    """
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        decades.append((edges[:-1] + edges[1:]) / 2.0 * 10 ** (decade - 6))
    positive = torch.cat(decades)
    return torch.cat((-positive, torch.tensor([0.0, 1.0]), positive)).sort().values.to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round the scales of one matrix to 8 bits (double quantization).

    Args:
        absmax: (n_out, n_in // blocksize) float32.
    Returns:
        codes: the same shape, uint8. nested_absmax: (ceil(n / 256),) float32, a scale per 256 codes.
        nested_offset: () float32, the mean, which was subtracted. It is the mean over the complete matrix, so a matrix
            is quantized first and sharded afterwards.
    """
    offset = absmax.mean()
    centred = absmax.flatten() - offset
    groups = F.pad(centred, (0, -centred.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    nested_absmax = groups.abs().amax(-1)
    levels = dynamic_levels(absmax.device)
    midpoints = (levels[1:] + levels[:-1]) / 2
    scaled = groups / torch.where(nested_absmax == 0, 1.0, nested_absmax).unsqueeze(-1)
    codes = torch.bucketize(scaled, midpoints).to(torch.uint8).flatten()[: absmax.numel()]
    return codes.view_as(absmax), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The scales from their 8-bit codes: float32, of the shape of `codes`."""
    levels = dynamic_levels(codes.device)[codes.flatten().int()]
    scales = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: levels.numel()]
    return (levels * scales + nested_offset).view_as(codes)
