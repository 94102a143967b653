"""How much memory a training step needs, and what each block may keep so that it fits.

The model of the peak, in bytes, for N tokens in a micro-batch:

    base        what the model holds now: packed weights, scales, embedding, head, norms
    trained     16 a value with AdamW in float32: value, gradient, two moments
    kept        what the blocks keep from forward to backward, by `fused.Keep`
    rebuilt     the buffer for the rebuilt weights of one product
    passing     the largest of what exists only for a moment: a chunk of logits, or the gradients inside one block

The peak comes at the turn from forward to backward, when every block's share is there. Blocks that keep less work
again in the backward pass, so the first blocks are chosen for it: by the time it is their turn, the others are gone.
"""

import os
from collections.abc import Sequence

import torch

from .fused import Keep
from .model import Llama, ModelConfig
from .ops.loss_fast import ROWS_ON_GPU
from .qlora import lora_layers

LEVELS: tuple[Keep, ...] = ("all", "no_mlp", "input")  # what `auto` chooses from
SPARE = 0.06  # of the free memory, for what the allocator cannot use and for libraries


def kept_bytes(config: ModelConfig, N: int, rank: int, keep: Keep, itemsize: int = 2) -> int:
    """What one block keeps for N tokens; `rank` is the sum of the ranks of its seven layers."""
    D, FF = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    xa = rank // 7  # of down_proj, which is not multiplied again
    numbers = {"offload": xa, "input": D + xa, "no_mlp": 2 * D + 2 * heads + kv + rank}
    numbers["all"] = numbers["no_mlp"] + 2 * FF
    lse = 4 * N * config.num_attention_heads if keep in ("all", "no_mlp") else 0
    return numbers[keep] * N * itemsize + lse


def step_bytes(model: Llama, N: int, keeps: Sequence[Keep], optimizer_bytes: int = 8) -> int:
    """The predicted peak of a training step, in bytes.

    Args:
        model: with LoRA injected, as it will train.
        N: tokens of a micro-batch, padding included. keeps: one for each block.
        optimizer_bytes: state for each trained value, 8 for AdamW in float32 and 2 in 8 bits.
    """
    config = model.config
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    itemsize = model.model.embed_tokens.weight.element_size()
    heads, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    layers = lora_layers(model).values()
    trained = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)
    rank = sum(layer.lora_A.shape[0] for layer in layers) // config.num_hidden_layers
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad}
    base = sum(tensors.values())
    kept = sum(kept_bytes(config, N, rank, keep, itemsize) for keep in keeps)
    rebuilt = itemsize * D * max(2 * FF, heads + kv)
    loss = itemsize * (min(N, ROWS_ON_GPU) * V + 4 * N * D)
    turn = itemsize * N * (FF + 3 * D)  # in the last block: the gradients of its result, of act, of its input
    again = {"all": 0, "no_mlp": 2 * FF, "input": 2 * FF + 2 * D + 2 * heads + kv}[keeps[-1]] * N * itemsize
    if "offload" in keeps:
        again += 2 * D * N * itemsize  # the inputs of this block and of the one below
    return base + trained * (8 + optimizer_bytes) + kept + rebuilt + max(loss, turn + again)


def choose_keeps(model: Llama, N: int, budget: int, optimizer_bytes: int = 8) -> list[Keep]:
    """The most that the blocks can keep within `budget` bytes for the whole step; all "input" if even that is more.

    The multiplications saved for a byte kept are the same for every part of a block, except that "input" also repeats
    attention; so all blocks go to "no_mlp" before the first goes to "input".
    """
    L = model.config.num_hidden_layers
    for less, more in zip(LEVELS[1:], LEVELS, strict=False):
        for count in range(L + 1):
            keeps: list[Keep] = [less] * count + [more] * (L - count)
            if step_bytes(model, N, keeps, optimizer_bytes) <= budget:
                return keeps
    return [LEVELS[-1]] * L


def gpu_budget(device: torch.device) -> int:
    """Bytes that this process may use in all: what it holds and what is free, less a spare part."""
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_reserved(device)) * (1 - SPARE))


def keeps_for(model: Llama, checkpointing: bool | str, N: int, budget: int = 0, optimizer_bytes: int = 8) -> list[Keep]:
    """What each block keeps for the configuration's `gradient_checkpointing`.

    Args:
        checkpointing: false keeps all, true keeps the inputs of blocks, offload keeps all of them but the last in the
            host's memory, auto keeps as much as fits.
        budget: bytes for the whole step, for auto; 0 takes what the device has.
    """
    L, device = model.config.num_hidden_layers, model.model.embed_tokens.weight.device
    if checkpointing == "offload":
        return ["offload"] * (L - 1) + ["input"]
    if str(checkpointing).lower() != "auto" or (device.type != "cuda" and not budget):
        return ["input" if str(checkpointing).lower() == "true" else "all"] * L
    return choose_keeps(model, N, budget or gpu_budget(device), optimizer_bytes)


def dense_fits(model: Llama) -> bool:
    """Whether the rebuilt weights of all blocks, kept for good, take less than an eighth of a CPU's free memory."""
    weight = model.model.embed_tokens.weight
    if weight.device.type != "cpu":
        return False
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    layers = lora_layers(model).values()
    return 8 * sum(layer.in_features * layer.out_features for layer in layers) * weight.element_size() < free
