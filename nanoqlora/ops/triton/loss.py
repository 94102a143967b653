"""The Triton twin of `ops/loss.py` from the logits on: the loss, and the gradient in place of the logits.

A row of logits is read twice and written once. The first pass computes the logarithm of the sum of exponentials, the
second replaces each logit by its gradient:

    loss = log(sum(exp(logit))) - logit[target]        dlogit = softmax(logit) - (1 at the target, 0 elsewhere)

**The sum in one pass.** exp overflows beyond 88, so the largest logit has to be subtracted first, and it is known only
at the end. The online softmax keeps both: when a larger logit m appears, the sum so far, which is relative to the old
maximum, is multiplied by exp(old - m). Every thread does this for itself, for the 16 bytes of one load at a time: eight
logits cost nine exponentials and no thread waits. The threads' sums are combined once, at the end of the row.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv:1805.02867).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementwise import Launch

# For rows of 128,256 logits on an H100 in bfloat16. One such program fills a multiprocessor, so 132 rows of 256 KB are
# processed at a time: few enough that the second pass finds part of its row in the cache.
CROSS_ENTROPY = Launch(32768, 32)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each row; the logits become its gradient with respect to them.

    Args:
        logits: (n, V), contiguous, in bfloat16 or float32; overwritten by softmax(logits) - onehot(target).
        targets: (n,) int64, in 0 .. V - 1; there is no ignore_index, so the rows are the supervised tokens only.
    Returns:
        (n,) float32, in nats.

    Everything is float32 inside, so in bfloat16 the gradient has one rounding.
    """
    n, V = logits.shape
    assert logits.is_contiguous() and targets.is_contiguous() and targets.shape == (n,)
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    tile, num_warps = CROSS_ENTROPY
    group = 16 // logits.element_size()  # logits in a 16-byte load, which one thread holds together
    cross_entropy_kernel[(n,)](logits, targets, losses, V=V, TILE=tile, GROUP=group, num_warps=num_warps)
    return losses


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor in float32, rounded once. x: contiguous. factor: () float32 on the device; the host does not wait."""
    assert x.is_contiguous() and factor.numel() == 1
    scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, factor.float(), x.numel(), TILE=4096, num_warps=8)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + place, mask=place < n, other=0.0)
    tl.store(x_ptr + place, (x.to(tl.float32) * tl.load(factor_ptr)).to(x.dtype), mask=place < n)


@triton.jit
def cross_entropy_kernel(logits_ptr, targets_ptr, losses_ptr, V: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TILE // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits_ptr += row * V
    target = tl.load(targets_ptr + row).to(tl.int32)
    wanted = tl.load(logits_ptr + target).to(tl.float32)  # before the second pass overwrites it

    largest = tl.full((TILE // GROUP,), -3.0e38, tl.float32)  # from -inf the first difference could be inf - inf
    total = tl.zeros((TILE // GROUP,), tl.float32)
    for start in tl.range(0, V, TILE):
        z = tl.load(logits_ptr + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        m = tl.maximum(largest, tl.max(z, axis=1))
        total = total * tl.exp(largest - m) + tl.sum(tl.exp(z - m[:, None]), axis=1)
        largest = m
    m = tl.max(largest, axis=0)
    total = tl.sum(total * tl.exp(largest - m), axis=0)
    tl.store(losses_ptr + row, tl.log(total) - (wanted - m))

    scale = 1 / total
    for start in tl.range(0, V, TILE):
        inside = start + lane < V
        z = tl.load(logits_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
        p = tl.exp(z - m) * scale
        tl.store(logits_ptr + start + lane, tl.where(start + lane == target, p - 1, p), mask=inside)
