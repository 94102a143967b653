"""What waits in the host's memory because the GPU has none to spare: tensors between forward and backward pass, and
the embedding's table.

Both are pinned, so that copies run beside the products, on a stream of their own, and that a kernel may read from them.
"""

import torch
import torch.nn as nn
from torch import Tensor

from .. import ops
from ..model import Llama


class HostMemory:
    """Tensors of one shape in pinned memory of the host, from forward to backward pass: last in, first out.

    Copies have a stream of their own, so they run beside the products: while one block goes back, the tensor that is
    asked for next is on its way. None is let go before the main stream has waited for its copy, at the next `put`, and
    the way back has two places on the device in turn: so the memory in use does not depend on who is ahead of whom.
    On a CPU there is nothing to move.
    """

    def __init__(self) -> None:
        self.copies: list[Tensor] = []
        self.count = 0  # of them in use
        self.leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        self.places: list[Tensor] = []
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def put(self, x: Tensor) -> None:
        """Take a contiguous tensor, which the caller then lets go."""
        if self.copies and self.copies[0].shape != x.shape:
            self.copies.clear()  # a batch of another shape
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
        """The tensor put last; the one before it is asked for. It stays whole until the next `get`."""
        self.count -= 1
        n = self.count
        if device.type == "cpu":
            return self.copies[n]
        main = torch.cuda.current_stream()
        if not self.places:  # the way back begins
            main.wait_stream(self.stream)
            self.leaving.clear()
            self.places = [torch.empty_like(self.copies[n], device=device) for _ in range(2)]
            self.stream.wait_stream(main)
            self.bring(n)
        main.wait_stream(self.stream)
        self.stream.wait_stream(main)  # the block above is done with the place that is filled next
        place = self.places[n % 2]
        if n:
            self.bring(n - 1)
        else:
            self.places = []
        return place

    def bring(self, n: int) -> None:
        with torch.cuda.stream(self.stream):
            self.places[n % 2].copy_(self.copies[n], non_blocking=True)


class HostEmbedding(nn.Module):
    """An embedding whose table stays in the host's memory; a GPU reads the rows that a batch needs from there.

    8,192 rows of 8 KB are 67 MB: 1.3 ms of a PCIe link, where the table takes 1 GiB of an 8B model and 2 of a 70B one.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        table = weight.cpu()
        self.weight = nn.Parameter(table.pin_memory() if weight.is_cuda else table, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embedding_from_host(tokens, self.weight)


def embedding_to_host(model: Llama) -> None:
    """Move the embedding's table there, unless the head is the same tensor, which needs it where the loss is."""
    weight = model.model.embed_tokens.weight
    if model.lm_head.weight is not weight:
        model.model.embed_tokens = HostEmbedding(weight.data)
