"""The fast twin of `attention.py` for CPUs: document by document, a block of queries at a time.

PyTorch's CPU kernel spends 18 ms on a layer of 4 x 256 tokens (9 heads of 64, bfloat16, forward and backward, two
cores), nearly all of it outside the matrix units; plain batched products with a softmax in place take 5. Going by
documents also skips every pair of tokens that may not look at each other, instead of masking it.

The backward pass rebuilds the probabilities from the scores and the saved log-sum-exp, as FlashAttention does
(arXiv:2205.14135), so nothing of size T x T is kept. Query heads of one key/value head are stacked as more rows of
one product, so keys and values are never repeated.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import Segments

QUERIES = 128  # in a block: small enough to skip most of the future, large enough for a good product


def blocks(segments: Segments) -> Iterator[tuple[int, int, int, int]]:
    """(row, document's first token, block's first query, one past its last) for every block of queries."""
    for row, start, end in segments.documents:
        for first in range(start, end, QUERIES):
            yield row, start, first, min(first + QUERIES, end)


def stack_heads(x: Tensor, KV: int) -> Tensor:
    """(t, H, hd) -> (KV, H / KV * t, hd): the query heads of one key/value head under each other."""
    t, H, hd = x.shape
    return x.view(t, KV, H // KV, hd).permute(1, 2, 0, 3).reshape(KV, -1, hd)


def unstack_heads(x: Tensor, t: int) -> Tensor:
    """The way back: (KV, H / KV * t, hd) -> (t, H, hd)."""
    KV, _, hd = x.shape
    return x.view(KV, -1, t, hd).permute(2, 0, 1, 3).reshape(t, -1, hd)


def scores_of(q: Tensor, k: Tensor, t: int) -> Tensor:
    """Scaled scores in float32 of t queries a head against all keys up to the last query, -inf in the future.

    q: (KV, G * t, hd), k: (KV, s, hd) -> (KV, G * t, s). Scores in bfloat16 would be off by up to 2 %.
    """
    scores = torch.bmm(q.float(), k.float().transpose(1, 2)).mul_(1 / math.sqrt(q.shape[-1]))
    future = torch.ones(t, t, dtype=torch.bool).triu_(1)
    scores.view(k.shape[0], -1, t, k.shape[1])[..., -t:].masked_fill_(future, -math.inf)
    return scores


class DocumentAttention(torch.autograd.Function):
    """Forward and backward of attention by blocks; see the module's text."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        KV, y = k.shape[2], torch.empty_like(q)
        lse = []
        for row, start, first, end in blocks(segments):
            t = end - first
            scores = scores_of(stack_heads(q[row, first:end], KV), k[row, start:end].transpose(0, 1), t)
            p = torch.softmax(scores, dim=-1)
            top, where = scores.max(dim=-1, keepdim=True)
            lse.append(top - p.gather(-1, where).log_())  # the largest of p is at least 1 / s: no underflow
            y[row, first:end] = unstack_heads(torch.bmm(p.to(v.dtype), v[row, start:end].transpose(0, 1)), t)
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.lse = segments, lse
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v = ctx.saved_tensors
        KV, scale = k.shape[2], 1 / math.sqrt(q.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (row, start, first, end), lse in zip(blocks(ctx.segments), ctx.lse, strict=True):
            t = end - first
            q_, dy_ = (stack_heads(x[row, first:end], KV) for x in (q, dy))
            k_, v_ = (x[row, start:end].transpose(0, 1) for x in (k, v))
            p = scores_of(q_, k_, t).sub_(lse).exp_()
            dv[row, start:end] += torch.bmm(p.to(dy.dtype).transpose(1, 2), dy_).transpose(0, 1)
            # Softmax backward, ds = p * (dp - sum(p * dp)). The sum could be had from y and dy, over hd terms only,
            # but then what dp lost in bfloat16 would not cancel.
            pdp = torch.bmm(dy_, v_.transpose(1, 2)).float().mul_(p)
            ds = pdp.sub_(p.mul_(pdp.sum(-1, keepdim=True))).mul_(scale).to(q.dtype)
            dq[row, first:end] = unstack_heads(torch.bmm(ds, k_), t)
            dk[row, start:end] += torch.bmm(ds.transpose(1, 2), q_).transpose(0, 1)
        return dq, dk, dv, None


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As `attention.attention`."""
    return DocumentAttention.apply(q, k, v, segments)
