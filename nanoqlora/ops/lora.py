"""A linear layer with a frozen weight and a low-rank update. The reference, in plain PyTorch.

    y = x W^T + s * dropout(x) A^T B^T

W (n_out, n_in) is frozen, in four bits or more; only A (r, n_in) and B (n_out, r) are trained, with r far below both
widths. B starts at zero, so training starts at the base model exactly. Dropout applies to the update's input only.

Gradients (autograd derives them here; the twin in `ops/fast/lora.py` has them written out), with x' = dropout(x):

    dB = s * dy^T (x' A^T)          dA = s * (dy B)^T x'          dx = dy W + s * dropout'((dy B) A)

W has no gradient and is not saved for the backward pass: it is dequantized again.
Source: LoRA (arXiv:2106.09685), QLoRA (arXiv:2305.14314).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Rebuild = Callable[[torch.dtype], Tensor]  # gives W (n_out, n_in) in a dtype


class Dropout(NamedTuple):
    """What decides the dropout mask: the probability p, and for each token the seed and the place that it has.

    A row has one seed, (B,) int64, and its tokens are numbered from 0. Or each token has its own of both, (B, T): in a
    row that several others were laid into, it keeps those of its own row, and so its mask.
    """

    p: float
    seed: Tensor
    places: Tensor | None = None

    def mask(self, x: Tensor) -> Tensor:
        """For x (B, T, n_in): 0 where dropped and 1 / (1 - p) elsewhere, in float32 or more.

        In bfloat16 1 / 0.95 would be 0.2 % too large, and so would every update.
        """
        return dropout_mask(x.shape, self.p, self.seed, torch.promote_types(x.dtype, torch.float32), self.places)


class FrozenLinear(torch.autograd.Function):
    """y = x W^T for a frozen W that is rebuilt in the backward pass instead of saved."""

    @staticmethod
    def forward(ctx, x: Tensor, rebuild: Rebuild) -> Tensor:
        ctx.rebuild = rebuild
        return F.linear(x, rebuild(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.rebuild(dy.dtype), None


def frozen_linear(x: Tensor, rebuild: Rebuild) -> Tensor:
    """x (..., n_in) -> (..., n_out)."""
    return FrozenLinear.apply(x, rebuild)


def lora_linear(
    x: Tensor, rebuild: Rebuild, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: Dropout | None
) -> Tensor:
    """y = x W^T + scaling * dropout(x) A^T B^T.

    Args:
        x: (B, T, n_in). lora_A: (r, n_in), lora_B: (n_out, r): float32, cast to the dtype of x.
        dropout: None when p = 0 and in evaluation.
    Returns:
        (B, T, n_out) in the dtype of x.
    """
    dropped = x if dropout is None else (x * dropout.mask(x)).to(x.dtype)
    update = F.linear(F.linear(dropped, lora_A.to(x.dtype)), lora_B.to(x.dtype))
    return frozen_linear(x, rebuild) + scaling * update


def dropout_mask(
    shape: Sequence[int], p: float, seed: Tensor, dtype: torch.dtype, places: Tensor | None = None
) -> Tensor:
    """0 with probability p, else 1 / (1 - p), from a hash and not from a random state.

    The same token of the same step and layer gets the same mask on one GPU or eight, in the forward pass and in its
    recomputation, before and after a resume, and nothing is stored for it.

    Args:
        shape: (B, T, n_in).
        seed: (B,) int64, a number for each row made of (run, step, row, layer). places: as in `token_numbers`.
    """
    return mask_of(token_numbers(seed, shape[1], places), shape[2], p, dtype)


def token_numbers(seed: Tensor, T: int, places: Tensor | None = None) -> Tensor:
    """An odd 32-bit number for each of T tokens of every row: (..., B) int64 seeds -> (..., B, T) int32.

    Args:
        places: (B, T) int64, if tokens have their own; `seed` is then (..., B, T).
    """
    if places is None:
        seed, places = seed[..., None], torch.arange(T, device=seed.device)
    return mix(to_32_bits(seed) ^ mix(places.to(torch.int32))) | 1


def mask_of(numbers: Tensor, n_in: int, p: float, dtype: torch.dtype) -> Tensor:
    """As `dropout_mask`, from the numbers of tokens, (...) int32 -> (..., n_in).

    The number of a token times the number of a pair of features has 64 bits. The XOR of its halves gives 32 random
    bits, 16 for each feature of the pair. One multiplication serves two features, because the mask is recomputed in
    every pass over its input and a GPU is limited by the number of integer instructions there.
    Source: the step of wyhash (Wang Yi), there called MUM.
    """
    pairs = torch.arange((n_in + 1) // 2, device=numbers.device, dtype=torch.int32)
    of_pairs = (mix(pairs - 0x61C88647) | 1).to(torch.int64) & 0xFFFFFFFF
    product = (numbers.to(torch.int64) & 0xFFFFFFFF)[..., None] * of_pairs
    both = product.bitwise_xor_(product >> 32).to(torch.int32)
    bits = torch.stack([both >> 16 & 0xFFFF, both & 0xFFFF], dim=-1).flatten(-2)[..., :n_in]
    threshold, scale = threshold_and_scale(p)
    return (bits >= threshold).to(dtype).mul_(scale)


def threshold_and_scale(p: float) -> tuple[int, float]:
    """How many of the 65,536 values are dropped, and 1 / (1 - p) for exactly that share: 0.05 is 3277 / 65536."""
    threshold = round(p * 2**16)
    return threshold, 2**16 / (2**16 - threshold)


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash (int32 in and out): every bit of the input changes about half of the output's bits.

    Two rounds of shift, XOR and multiply. PyTorch has no unsigned shift, so the copies of the sign bit are masked off.
    Constants: Chris Wellons, "Prospecting for Hash Functions", lowbias32.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def to_32_bits(seed: Tensor) -> Tensor:
    """int64 -> int32, from all 64 bits."""
    return mix((seed >> 32).to(torch.int32)) ^ (seed & 0xFFFFFFFF).to(torch.int32)
