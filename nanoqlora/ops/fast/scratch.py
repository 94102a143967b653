"""One buffer for what lives for a moment: the rebuilt weight of one product, or a chunk of logits."""

import torch
from torch import Tensor

_buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
_outgrown: list[Tensor] = []  # recorded CUDA graphs know their addresses


def scratch(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A (rows, columns) tensor in the same memory for all: on one stream, the next waits until the last is done."""
    key = (dtype, device)
    if key not in _buffers or _buffers[key].numel() < rows * columns:
        if key in _buffers and device.type == "cuda":
            _outgrown.append(_buffers[key])
        _buffers[key] = torch.empty(rows * columns, dtype=dtype, device=device)
    return _buffers[key][: rows * columns].view(rows, columns)
