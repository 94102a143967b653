"""The fast twin of `ops/attention.py` for GPUs: PyTorch's fused kernels, which do not store the T x T scores.

Rows of one document each go to scaled_dot_product_attention, for which cuDNN has the fastest kernel on a Hopper GPU
(forward and backward of 32 layers of 4 x 2048 tokens: 39 ms on an H100). Rows of several documents go to the
variable-length FlashAttention-2 kernel, which takes the documents concatenated (66 ms for the same tokens).
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


def can_run(q: Tensor, segments: Segments) -> bool:
    """Whether there is a kernel for these dtypes and documents."""
    return segments.one_each or (q.dtype in (torch.bfloat16, torch.float16) and variable_length() is not None)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As `attention.attention`."""
    if segments.one_each:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    ends, longest = segments.ends(q.device), segments.longest
    flat = (x.flatten(0, 1) for x in (q, k, v))
    kernel = variable_length()
    assert kernel is not None, "can_run decides"
    return kernel(*flat, ends, ends, longest, longest).view(q.shape)
