"""The fast twin of `ops/attention.py` for CPUs: document by document, a chunk of queries at a time.

PyTorch's CPU kernel spends nearly all of its time outside the matrix units: 18 ms forward and backward on a layer of
4 x 256 tokens (9 heads of 64, bfloat16, two cores), where batched matmuls and a softmax take 5. Working document by
document also skips the pairs of tokens of different documents, instead of masking them. The query heads of one
key/value head are stacked as rows of one matmul, so keys and values are not repeated.

The probabilities are saved for the backward pass: H * t^2 numbers, at most, for a document of t tokens and a layer,
which is little for the lengths that a CPU trains on (0.6 MB at 256 tokens and 9 heads) and 150 MB at 4,096.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ..attention import Segments

QUERIES = 128  # in a chunk: small enough to skip most later keys, large enough for an efficient matmul


def chunks(segments: Segments) -> Iterator[tuple[int, int, int, int]]:
    """(row, document's first token, chunk's first query, its last query + 1) for every chunk of queries."""
    for row, start, end in segments.documents:
        for first in range(start, end, QUERIES):
            yield row, start, first, min(first + QUERIES, end)


def stack_heads(x: Tensor, KV: int) -> Tensor:
    """(t, H, hd) -> (KV, H / KV * t, hd): the query heads of one key/value head as rows of one matrix."""
    t, H, hd = x.shape
    return x.view(t, KV, H // KV, hd).permute(1, 2, 0, 3).reshape(KV, -1, hd)


def unstack_heads(x: Tensor, t: int) -> Tensor:
    """The inverse of `stack_heads`: (KV, H / KV * t, hd) -> (t, H, hd)."""
    KV, _, hd = x.shape
    return x.view(KV, -1, t, hd).permute(2, 0, 1, 3).reshape(t, -1, hd)


class DocumentAttention(torch.autograd.Function):
    """Forward and backward of attention, chunk by chunk."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        KV, y = k.shape[2], torch.empty_like(q)
        probabilities = []
        for row, start, first, end in chunks(segments):
            t, s = end - first, end - start
            q_, k_ = stack_heads(q[row, first:end], KV), k[row, start:end].transpose(0, 1)
            # In float32: scores rounded to bfloat16 would be off by up to 2 %.
            scores = torch.bmm(q_.float(), k_.float().transpose(1, 2)).mul_(1 / math.sqrt(q.shape[-1]))
            scores.view(KV, -1, t, s)[..., -t:].add_(future(t))
            p = torch.softmax(scores, dim=-1).to(v.dtype)  # (KV, G * t, s)
            y[row, first:end] = unstack_heads(torch.bmm(p, v[row, start:end].transpose(0, 1)), t)
            probabilities.append(p)
        ctx.save_for_backward(q, k, v)
        ctx.segments, ctx.probabilities = segments, probabilities
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        q, k, v = ctx.saved_tensors
        KV, scale = k.shape[2], 1 / math.sqrt(q.shape[-1])
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (row, start, first, end), p in zip(chunks(ctx.segments), ctx.probabilities, strict=True):
            q_, dy_ = (stack_heads(x[row, first:end], KV) for x in (q, dy))
            k_, v_ = (x[row, start:end].transpose(0, 1) for x in (k, v))
            dv[row, start:end] += torch.bmm(p.transpose(1, 2), dy_).transpose(0, 1)
            dp = torch.bmm(dy_ * scale, v_.transpose(1, 2))  # not in place: dy_ may be a view of dy
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - sum(p * dp)), in float32 inside
            dq[row, first:end] = unstack_heads(torch.bmm(ds, k_), end - first)
            dk[row, start:end] += torch.bmm(ds.transpose(1, 2), q_).transpose(0, 1)
        return dq, dk, dv, None


@lru_cache
def future(t: int) -> Tensor:
    """(t, t) float32: -inf where the column is later than the row, else 0."""
    return torch.full((t, t), -math.inf).triu_(1)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As `attention.attention`."""
    return DocumentAttention.apply(q, k, v, segments)
