"""The fast twin of `ops/attention.py` for GPUs: PyTorch's fused kernels, none of which makes the T x T scores.

Rows of one document each go to scaled_dot_product_attention, for which cuDNN has the fastest kernel on a Hopper GPU
(forward and backward of 32 layers of 4 x 2048 tokens: 39 ms on an H100). Rows of several documents go to the
variable-length FlashAttention-2 kernel, which takes the documents end to end (66 ms for the same tokens).
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older than 2.10
    varlen_attn = None
else:
    _arguments = inspect.signature(varlen_attn).parameters
    _CAUSAL = {"window_size": (-1, 0)} if "window_size" in _arguments else {"is_causal": True}
    if "enable_gqa" in _arguments:  # newer versions want to be told, 2.11 just takes fewer key/value heads
        _CAUSAL["enable_gqa"] = True


def can_run(q: Tensor, segments: Segments) -> bool:
    """Whether there is a kernel for these dtypes and documents."""
    return segments.one_each or (varlen_attn is not None and q.dtype in (torch.bfloat16, torch.float16))


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """As `attention.attention`."""
    if segments.one_each:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    ends, longest = segments.ends(q.device), segments.longest
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(*flat, ends, ends, longest, longest, **_CAUSAL).view(q.shape)
