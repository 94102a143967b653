"""Attention over rows that may hold several documents. The reference, in plain PyTorch.

Training rows are packed: short samples follow each other in one row of `sequence_len` tokens, so that no arithmetic is
spent on padding. A token must then attend only to the earlier tokens of its own document, and positions start at zero
in every document. Otherwise samples would attend to each other, which trains a different model without any error.
`Segments` holds where the documents are. It is created once for a batch and used by every layer.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where documents begin and end in a batch of B rows of T tokens.

    lengths: for each row the lengths of its documents in order; their sum is T (padding is a document too).
    offset: position of the first token, above 0 only when earlier tokens are in a KV cache.
    """

    lengths: tuple[tuple[int, ...], ...]
    offset: int = 0

    @classmethod
    def one_per_row(cls, B: int, T: int, offset: int = 0) -> "Segments":
        return cls(((T,),) * B, offset)

    @cached_property
    def documents(self) -> list[tuple[int, int, int]]:
        """(row, first token, last token + 1) of every document, in order."""
        spans = []
        for row, lengths in enumerate(self.lengths):
            end = 0
            for length in lengths:
                spans.append((row, end, end + length))
                end += length
        return spans

    @cached_property
    def one_each(self) -> bool:
        """Whether every row is one document."""
        return all(len(row) == 1 for row in self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(max(row) for row in self.lengths)

    def ends(self, device: torch.device) -> Tensor:
        """(number of documents + 1,) int32 on `device`: where each document ends when all rows are concatenated."""
        if device not in self._ends:
            lengths = [0, *(length for row in self.lengths for length in row)]
            ends = torch.tensor(lengths).cumsum(0).to(torch.int32)
            self._ends[device] = (ends.pin_memory() if device.type == "cuda" else ends).to(device, non_blocking=True)
        return self._ends[device]

    @cached_property
    def _ends(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def positions(self) -> Tensor:
        """(B, T) int64: each token's position in its own document, which RoPE uses."""
        rows = [torch.cat([torch.arange(length) for length in lengths]) for lengths in self.lengths]
        return torch.stack(rows) + self.offset

    @cached_property
    def mask(self) -> Tensor:
        """(B, 1, T, T) bool, True where the token of the row may attend to the token of the column."""
        T = sum(self.lengths[0])
        document = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in self.lengths])
        same = document[:, :, None] == document[:, None, :]
        return (same & torch.ones(T, T, dtype=torch.bool).tril()).unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v, each token over itself and the earlier tokens of its document.

    Args:
        q: (B, T, H, hd). k, v: (B, T, KV, hd); query heads h * H/KV to (h + 1) * H/KV - 1 share key/value head h.
    Returns:
        (B, T, H, hd), in the dtype of `q`.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = segments.mask.to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def attention_to_past(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a KV cache: q (B, T, H, hd) are the last T of S tokens, k and v (B, S, KV, hd) all of them."""
    T, S = q.shape[1], k.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
