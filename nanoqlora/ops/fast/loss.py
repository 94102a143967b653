"""The fast twin of `ops/loss.py`: a chunk of rows of logits at a time, and the gradient in the forward pass.

The logits of a batch are the largest tensor of training (1,024 tokens with a vocabulary of 49,152: 200 MB in float32).
The head is frozen, so the only gradient is that of `hidden`, (p - onehot) weight, and it needs the probabilities of its
chunk only. It is computed in the forward pass, while the logits are in the cache; the backward pass only multiplies it
by the incoming factor.
"""

import torch
from torch import Tensor

from .. import loss as reference
from .scratch import scratch

if torch.cuda.is_available():
    from ..triton import loss as loss_triton

ROWS = 256  # of logits at a time: enough for an efficient matmul
ROWS_IN_CACHE = 8  # of probabilities at a time, in float32: 1.6 MB with a vocabulary of 49,152
ROWS_ON_GPU = 1024


_buffers: dict[tuple, tuple[Tensor, Tensor]] = {}


def buffers(hidden: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """Buffers for logits, (ROWS, V) in the dtype of `hidden`, and for probabilities, (ROWS_IN_CACHE, V) float32.

    All chunks share them: allocated for each chunk, the last one of another size, they fragmented the heap.
    """
    key = (hidden.dtype, hidden.device, V)
    if key not in _buffers:
        _buffers[key] = hidden.new_empty(ROWS, V), hidden.new_empty(ROWS_IN_CACHE, V, dtype=torch.float32)
    return _buffers[key]


def chunk_losses(hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool = False) -> tuple[Tensor, Tensor]:
    """Losses (n,) float32 of at most ROWS rows and their logits (n, V), or the logits' gradient if `gradient`.

    The second is a part of the buffers, which the next call overwrites.
    """
    logits, probabilities = buffers(hidden, len(weight))
    logits = torch.mm(hidden, weight.t(), out=logits[: len(hidden)])
    losses = []
    for z, t in zip(logits.split(ROWS_IN_CACHE), targets.split(ROWS_IN_CACHE), strict=True):
        p = torch.softmax(z, dim=-1, dtype=torch.float32, out=probabilities[: len(z)])
        losses.append(losses_of(p, z, t))
        if gradient:
            z.copy_(p.scatter_add_(1, t[:, None], p.new_full((len(t), 1), -1.0)))
    return torch.cat(losses), logits


def losses_of(p: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of each row's target, also where p underflows in float32."""
    losses = p.gather(1, targets[:, None]).squeeze(1).log_().neg_()
    tiny = losses > 80  # nats: there p begins to underflow, while the most probable token has at least 1 / V
    if tiny.any():
        top, where = logits[tiny].max(dim=-1, keepdim=True)
        lse = top.float() - p[tiny].gather(1, where).log()
        losses[tiny] = (lse - logits[tiny].gather(1, targets[tiny, None]).float()).squeeze(1)
    return losses


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of the losses. Saves only the gradient of `hidden`, which has the size of `hidden`."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total, dhidden = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        rows = ROWS_ON_GPU if hidden.is_cuda else ROWS
        for h, dh, t in zip(hidden.split(rows), dhidden.split(rows), targets.split(rows), strict=True):
            if hidden.is_cuda:
                dlogits = torch.mm(h, weight.t(), out=scratch(len(h), len(weight), h.dtype, h.device))
                losses = loss_triton.cross_entropy_(dlogits, t)
            else:
                losses, dlogits = chunk_losses(h, weight, t, gradient=True)
            total += losses.sum()
            torch.mm(dlogits, weight, out=dh)
        ctx.save_for_backward(dhidden)
        return total

    @staticmethod
    def backward(ctx, g: Tensor):
        (dhidden,) = ctx.saved_tensors
        # In float32: g rounded to bfloat16 would change every gradient of the step by up to 0.4 %. In place: here a
        # step needs most memory.
        if dhidden.is_cuda:
            loss_triton.scale_(dhidden, g)
        else:
            for part in dhidden.split(ROWS):
                part.copy_(part.float().mul_(g))
        return dhidden, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `loss.linear_cross_entropy`."""
    if hidden.dtype == torch.float64 or not len(hidden):
        return reference.linear_cross_entropy(hidden, weight, targets)
    return LinearCrossEntropy.apply(hidden, weight, targets)


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `loss.token_losses`, without a gradient."""
    if hidden.dtype == torch.float64 or not len(hidden):
        return reference.token_losses(hidden, weight, targets)
    chunks = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
    return torch.cat([chunk_losses(h, weight, t)[0] for h, t in chunks])
