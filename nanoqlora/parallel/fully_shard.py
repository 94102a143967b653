"""`fsdp_version: 2`: the frozen base under PyTorch's own FSDP, `fully_shard`, the reference for `BlockStore`.

The unit is a block here too, and its flat buffer is the same: one parameter `frozen` of the block, its bytes viewed as
bfloat16 because PyTorch 2.11 shards only floating point. There is no mixed precision policy, so no byte is converted.
Everything else (LoRA, norms, embedding, head) is in `ignored_params`: every rank holds it, and LoRA's gradients are
summed once a step as always. PyTorch's hooks gather a block before its forward pass and before its backward pass, and
reshard it after each; so nothing in the blocks changes, also where a fused block computes its backward pass by hand.

PyTorch frees the storage of a gathered parameter and fills the same one again. So the layers' tensors, views of it,
are created once.
"""

import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..model import Llama
from .fsdp import BlockStore, point_at

# It warns of views that are changed in place, which the result of a block is not.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


class FullyShardStore(BlockStore):
    """Loads as `BlockStore` does; from `attach` on PyTorch has this rank's shards and gathers them."""

    memory = staticmethod(lambda _: nullcontext())

    def __init__(self, rank: int, ranks: int, num_blocks: int, num_bytes: int, offload: int, device: torch.device):
        if not dist.is_initialized():  # one process: PyTorch needs a group for that too
            place: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            if device.type == "cuda":
                dist.init_process_group("nccl", device_id=device, **place)
            else:
                dist.init_process_group("gloo", **place)
        super().__init__(rank, ranks, num_blocks, num_bytes, offload, device)

    def attach(self, model: Llama) -> None:
        """Give the blocks, as they will train, to PyTorch."""
        device, num_bytes = self.slots.device, self.slots.shape[1]
        mesh = init_device_mesh(device.type, (self.ranks,))
        self.blocks: list[Any] = [*model.model.layers]
        for i, block in enumerate(self.blocks):
            shard, ignored = self.shard(i), set(block.parameters())
            block.frozen = nn.Parameter(torch.empty(num_bytes // 2, dtype=torch.bfloat16, device="meta"), False)
            policy = OffloadPolicy() if shard.device == device else CPUOffloadPolicy()
            fully_shard(block, mesh=mesh, ignored_params=ignored, offload_policy=policy)
            sharded = DTensor.from_local(shard.view(torch.bfloat16), mesh, [Shard(0)]).to(shard.device)
            block.frozen = nn.Parameter(sharded, requires_grad=False)  # PyTorch takes it up when it first gathers
            delattr(self, f"shard{i}")
            self.unshard(i)
            point_at(block, block.frozen.data.view(torch.uint8), resident=False)
        del self.slots
        fully_shard(model.model, mesh=mesh, ignored_params=set(model.parameters()))  # orders what is prefetched

    def unshard(self, i: int) -> None:
        """Gather block i outside of a step, and reshard the one before it."""
        if i:
            self.blocks[i - 1].reshard()
        self.blocks[i].unshard()
