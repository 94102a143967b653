"""FSDP (ZeRO-3) for weights that never change: the frozen base, sharded over the ranks.

    replicate     every rank holds the complete base; nothing of it is sent after loading
    full_shard    every rank holds 1/N of each block; an all-gather assembles a block just before it is used

The base has no gradients, so this is the smaller half of FSDP: parameters are gathered, nothing is reduced and nothing
is written back. LoRA's values and gradients are not sharded here: every rank holds them all, and one all-reduce a step
sums the gradients.

The unit is a block. The frozen tensors of its seven linear layers (four-bit codes and their scales, or 16-bit weights)
are one flat buffer of bytes, as long as that of the largest block, and rank r holds the r-th of N equal shards of it.
Two slots hold gathered blocks in turn, block i in slot i % 2; the layers' tensors are views of the slot. Resharding
costs nothing: the next all-gather overwrites the slot.

    forward    block i is computed from one slot while block i + 1 is prefetched into the other
    backward   the same with block i - 1; the last two blocks are still in their slots, which saves two all-gathers

A matrix is quantised by one rank, then cut: its scales, and so the loss, do not depend on the number of ranks. Loading
goes in rounds: each rank reads and quantises one block, then all exchange shards, so that N ranks read a checkpoint
together, each tensor once. `fully_shard.py` does the same with PyTorch's own FSDP, as a reference.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from ..model import Llama
from . import collectives
from .host_memory import embedding_to_host

Sharding = Literal["replicate", "full_shard"]
FROZEN = ("packed", "absmax", "nested_absmax", "nested_offset", "weight")
ALIGNMENT = 256  # bytes: where tensors begin in the buffer, for the kernels that read them


def frozen_tensors(block: nn.Module) -> Iterator[tuple[Any, str, Tensor, int]]:
    """(layer, name, tensor, its first byte in the block's buffer) of all frozen tensors of its linear layers."""
    start = 0
    for name, layer in block.named_modules():
        if name.endswith("_proj"):
            for kind in FROZEN:
                if getattr(layer, kind, None) is not None:
                    tensor = getattr(layer, kind)
                    yield layer, kind, tensor, start
                    start += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT


def block_bytes(blocks: Iterable[nn.Module], ranks: int) -> int:
    """Length of the flat buffer of a block, which `ranks` divides; of the largest one, where types differ."""
    ends = (start + tensor.nbytes for block in blocks for _, _, tensor, start in frozen_tensors(block))
    return math.ceil(max(ends) / (ranks * ALIGNMENT)) * ranks * ALIGNMENT


def to_bytes(block: nn.Module, flat: Tensor) -> Tensor:
    """Copy the frozen tensors of a block into `flat`, uint8."""
    for _, _, tensor, start in frozen_tensors(block):
        flat[start : start + tensor.nbytes] = tensor.detach().reshape(-1).view(torch.uint8)
    return flat


def point_at(block: nn.Module, flat: Tensor, resident: bool) -> None:
    """Make the frozen tensors of a block views of `flat`, uint8, whatever they were before."""
    for layer, name, tensor, start in list(frozen_tensors(block)):
        view = flat[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        setattr(layer, name, nn.Parameter(view, requires_grad=False) if name == "weight" else view)
        layer.resident = resident


class BlockStore(nn.Module):
    """This rank's shard of every block, and the two slots that blocks are gathered into."""

    slots: Tensor
    memory: Callable[[torch.device], AbstractContextManager[None]] = staticmethod(collectives.memory_to_gather)

    def __init__(
        self, rank: int, ranks: int, num_blocks: int, num_bytes: int, offload: int, device: torch.device
    ) -> None:
        """num_bytes: of a complete block. offload: so many blocks, the first ones, have their shard in host memory."""
        super().__init__()
        self.rank, self.ranks, self.num_blocks = rank, ranks, num_blocks
        offload = offload if device.type == "cuda" else 0
        with self.memory(device):
            slots = torch.zeros(2, num_bytes, dtype=torch.uint8, device=device)
            shards = torch.empty(num_blocks - offload, num_bytes // ranks, dtype=torch.uint8, device=device)
        in_host = [torch.empty(num_bytes // ranks, dtype=torch.uint8, pin_memory=True) for _ in range(offload)]
        self.register_buffer("slots", slots, persistent=False)
        for i, shard in enumerate([*in_host, *shards]):
            self.register_buffer(f"shard{i}", shard, persistent=False)
        self.gathered: list[int | None] = [None, None]  # the block in each slot
        self.waits: list[Callable[[], None] | None] = [None, None]  # for the all-gather that fills it
        self.last = -1  # the block that was unsharded last
        self.copies = torch.cuda.Stream(device) if offload else None

    def shard(self, i: int) -> Tensor:
        """This rank's shard of block i, (bytes / ranks,) uint8."""
        return self.get_buffer(f"shard{i}")

    def attach(self, model: Llama) -> None:
        """Make the blocks, fused or not, unshard their weights before each forward and backward pass."""
        blocks: list[Any] = [*model.model.layers]
        for i, block in enumerate(blocks):
            if hasattr(block, "unshard_weights"):
                block.unshard_weights = partial(self.unshard, i)
            else:
                block.register_forward_pre_hook(lambda *_, i=i: self.unshard(i))
                block.register_full_backward_pre_hook(lambda *_, i=i: self.unshard(i))

    def unshard(self, i: int) -> None:
        """Return when block i is in its slot, for the current stream; prefetch the block that is needed next.

        Every rank has to call this for the same blocks in the same order. A backward pass calls it in descending order,
        for some blocks twice: a block that is recomputed calls it as in a forward pass.
        """
        backward, self.last = 0 < i <= self.last, i
        if self.gathered[i % 2] != i:
            self._all_gather(i)
        self._wait(i % 2)
        prefetch = i - 1 if backward else i + 1
        if 0 <= prefetch < self.num_blocks and self.gathered[prefetch % 2] != prefetch:
            self._all_gather(prefetch)

    def _wait(self, slot: int) -> None:
        wait, self.waits[slot] = self.waits[slot], None
        if wait:
            wait()

    def _all_gather(self, i: int) -> None:
        """Begin to fill the slot of block i. NCCL waits until the current stream has used what it holds."""
        slot, shard = i % 2, self.shard(i)
        self._wait(slot)
        block, self.gathered[slot] = self.slots.data[slot], i  # .data: outside of autograd
        if shard.device == block.device or self.copies is None:
            self.waits[slot] = collectives.all_gather(block, shard)
            return
        self.copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.copies):
            own = block.view(self.ranks, -1)[self.rank]
            own.copy_(shard, non_blocking=True)
            self.waits[slot] = collectives.all_gather(block, own)


def share_outside_blocks(model: Llama, device: torch.device) -> None:
    """Broadcast embedding, head and norms from the first rank, which has read them."""
    for name, parameter in list(model.named_parameters()):
        path, _, attribute = name.rpartition(".")
        if not path.endswith("_proj"):
            w = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.data
            setattr(model.get_submodule(path), attribute, nn.Parameter(collectives.broadcast(w), requires_grad=False))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def fill_over_ranks(
    model: Llama,
    fill: Callable[[int | None], None],
    *,
    sharding: Sharding,
    rank: int,
    ranks: int,
    device: torch.device,
    offload: int = 0,
    host_embedding: bool = False,
    store_type: type[BlockStore] = BlockStore,
) -> BlockStore | None:
    """Load an empty model: the ranks read its blocks in turn and exchange them, complete or in shards.

    Args:
        model, fill: of `pretrained.open_model`.
        offload: for full_shard, so many blocks have this rank's shard in pinned host memory.
        host_embedding: the embedding stays there too, unless the head is the same tensor.
        store_type: or `FullyShardStore`.
    Returns:
        For full_shard the store, to be attached when the blocks are as they will train.
    Raises:
        UserError: on all ranks, if any of them cannot read its tensors; naming that rank.
    """
    layers = model.model.layers
    with collectives.together():
        if rank == 0:
            fill(None)
    share_outside_blocks(model, device)
    if host_embedding:
        embedding_to_host(model)
    num_bytes, store = block_bytes(layers, ranks), None
    if sharding == "full_shard":
        store = model.store = store_type(
            rank, ranks, len(layers), num_bytes, offload, device
        )  # in the model, so that `held_bytes` counts it
    rounds = range(0, len(layers), ranks)
    for first in tqdm(rounds, "loading", disable=None if rank == 0 else True, leave=False):  # None: on a terminal
        mine = min(first + rank, len(layers) - 1)  # in the last round several ranks may read the last block
        with collectives.together():
            fill(mine)
        if ranks == 1 and store is None:
            continue
        flat = to_bytes(layers[mine], torch.zeros(num_bytes, dtype=torch.uint8, device=device))
        blocks = range(first, min(first + ranks, len(layers)))
        if store is None:
            for i, gathered in zip(blocks, collectives.gather_tensors(flat), strict=False):
                point_at(layers[i], gathered, resident=True)
            continue
        for i, shard in zip(blocks, collectives.all_to_all(flat), strict=False):
            store.shard(i).copy_(shard)
            point_at(layers[i], store.slots[i % 2], resident=False)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the 16-bit tensors have fragmented it
    return store
