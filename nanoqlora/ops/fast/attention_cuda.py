"""The fast twin of `ops/attention.py` for GPUs: PyTorch's fused kernels, which do not store the T x T scores.

Rows of one document each go to scaled_dot_product_attention, for which cuDNN has the fastest kernel on a Hopper GPU
(forward and backward of 32 layers of 4 x 2048 tokens: 39 ms on an H100). Rows of several documents go to the
variable-length FlashAttention-2 kernel, which takes the documents concatenated (66 ms for the same tokens). It has no
float32; there the documents run one by one.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Segments


@cache
def variable_length() -> Callable[..., Tensor] | None:
    """PyTorch's variable-length attention, causal; None before PyTorch 2.10.

    Imported at the first use: the import loads all of torch._dynamo.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    arguments = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"window_size": (-1, 0)} if "window_size" in arguments else {"is_causal": True}
    if "enable_gqa" in arguments:  # newer versions have this switch; 2.11 takes fewer key/value heads without it
        options["enable_gqa"] = True
    return partial(cast(Callable[..., Tensor], varlen_attn), **options)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As `attention.attention`."""
    if segments.one_each:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    kernel = variable_length() if q.itemsize == 2 else None
    if kernel is None:
        ys = []
        for row, start, end in segments.documents:
            q_, k_, v_ = (x[row, start:end].transpose(0, 1)[None] for x in (q, k, v))
            ys.append(F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(ys).view(q.shape)
    ends, longest = segments.ends(q.device), segments.longest
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return kernel(*flat, ends, ends, longest, longest).view(q.shape)
