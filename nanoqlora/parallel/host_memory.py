"""Offloading to host memory, where the GPU has none to spare: saved activations, and the embedding's table.

Both are pinned, so that copies run beside the matmuls, on a stream of their own, and that a kernel can read from them.
"""

from functools import cached_property

import torch
import torch.nn as nn
from torch import Tensor

from .. import ops
from ..model import Llama


class HostMemory:
    """Tensors of one dtype in pinned host memory, from forward to backward pass: last in, first out.

    Copies have a stream of their own, so they run beside the matmuls: during the backward pass of one block, the tensor
    of the next is already being copied. A tensor is released when the main stream has waited for its copy, at the next
    `put`, and the backward pass has two buffers on the device in turn: so the memory in use does not depend on which
    stream is ahead. On a CPU nothing is moved.
    """

    def __init__(self) -> None:
        self.copies: list[Tensor] = []
        self.count = 0  # of them in use
        self.leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        self.buffers: list[Tensor] = []

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def put(self, x: Tensor) -> None:
        """Take a contiguous tensor, which the caller then drops."""
        if self.count < len(self.copies) and self.copies[self.count].shape != x.shape:
            del self.copies[self.count :]  # a batch of another shape
        if self.count == len(self.copies):
            self.copies.append(torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda))
        self.count += 1
        if not x.is_cuda:
            self.copies[self.count - 1].copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.copies[self.count - 1].copy_(x, non_blocking=True)
            self.leaving.append((x, self.stream.record_event()))
        if len(self.leaving) > 1:
            _, copied = self.leaving.pop(0)
            copied.wait()

    def get(self, device: torch.device) -> Tensor:
        """The tensor put last, valid until the next `get`. The copy of the one before it begins."""
        self.count -= 1
        n = self.count
        if device.type == "cpu":
            return self.copies[n]
        main = torch.cuda.current_stream()
        if not self.buffers:  # the first of a backward pass
            main.wait_stream(self.stream)
            self.leaving.clear()
            largest = max(copy.numel() for copy in self.copies[: n + 1])
            self.buffers = [torch.empty(largest, dtype=self.copies[n].dtype, device=device) for _ in range(2)]
            self.stream.wait_stream(main)
            self.fetch(n)
        main.wait_stream(self.stream)
        self.stream.wait_stream(main)  # the block above has finished with the buffer that is filled next
        buffer = self.buffer(n)
        if n:
            self.fetch(n - 1)
        else:
            self.buffers = []
        return buffer

    def fetch(self, n: int) -> None:
        """Begin to copy tensor n to its buffer."""
        with torch.cuda.stream(self.stream):
            self.buffer(n).copy_(self.copies[n], non_blocking=True)

    def buffer(self, n: int) -> Tensor:
        """Where tensor n comes back to on the device."""
        return self.buffers[n % 2][: self.copies[n].numel()].view(self.copies[n].shape)


class HostEmbedding(nn.Embedding):
    """An embedding whose table stays in host memory; a GPU reads the rows that a batch needs from there.

    8,192 rows of 8 KB are 67 MB: 1.3 ms of a PCIe link, where the table takes 1 GiB of an 8B model and 2 of a 70B one.
    """

    def __init__(self, weight: Tensor) -> None:
        table = weight.cpu()
        pinned = table.pin_memory() if weight.is_cuda else table
        super().__init__(table.shape[0], table.shape[1], _weight=pinned, _freeze=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embedding_from_host(tokens, self.weight)


def embedding_to_host(model: Llama) -> None:
    """Move the embedding's table to host memory, unless the head is the same tensor, which needs it on the device."""
    weight = model.model.embed_tokens.weight
    if model.lm_head.weight is not weight:
        model.model.embed_tokens = HostEmbedding(weight.data)
