"""One buffer for short-lived tensors: the dequantized weight of one matmul, or a chunk of logits."""

import torch
from torch import Tensor

_buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_outgrown: list[Tensor] = []  # kept, because recorded CUDA graphs hold their addresses


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) tensor in memory that all callers share: on one stream they use it one after the other."""
    key = (dtype, device)
    if key not in _buffers or _buffers[key].numel() < rows * columns:
        if key in _buffers and device.type == "cuda":
            _outgrown.append(_buffers[key])
        _buffers[key] = torch.empty(rows * columns, dtype=dtype, device=device)
    return _buffers[key][: rows * columns].view(rows, columns)
