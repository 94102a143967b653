"""How much memory a training step needs, and what each block may save for the backward pass so that it fits.

The memory model of the peak, in bytes, for N tokens in a micro-batch:

    base        the loaded model: packed weights, scales, embedding, head, norms
    trained     16 per value with AdamW in float32: value, gradient, two moments
    kept        what the blocks save for the backward pass, by `block.Keep`
    scratch     the buffer for the dequantized weights of one matmul, and for a chunk of logits
    temporary   the larger of: the loss's hidden states and their gradient, or the gradients inside one block

The peak is at the end of the forward pass, when all blocks have saved their share. Blocks that save less recompute in
the backward pass, so the first blocks are chosen for it: when their turn comes, the others' share has been freed.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import Llama, ModelConfig
from ..ops.fast.loss import ROWS_ON_GPU
from ..parallel import collectives
from ..parallel.fsdp import Sharding, block_bytes, frozen_tensors
from ..qlora import lora_layers
from .block import Keep, can_fuse

SPARE = 0.06  # of the free memory, for fragmentation and for libraries


def kept_bytes(config: ModelConfig, N: int, R: int, keep: Keep, itemsize: int = 2, dora: bool = False) -> int:
    """What one block saves for N tokens; R is the sum of the r of its layers."""
    D, FF = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    kv = 2 * config.num_key_value_heads * config.head_dim
    xa = R // 7  # of down_proj, which is not recomputed
    numbers = {"offload": xa, "input": D + xa, "no_mlp": (4 if dora else 2) * D + 2 * heads + kv + R}
    numbers |= {"all": numbers["no_mlp"] + 2 * FF, "mlp_host": numbers["no_mlp"]}
    lse = 4 * N * config.num_attention_heads if keep not in ("input", "offload") else 0
    return numbers[keep] * N * itemsize + lse


def held_bytes(model: Llama) -> int:
    """The memory of the frozen tensors of a loaded model on its device; blocks may share memory."""
    device = model.model.norm.weight.device
    modules = [module for module in model.modules() if getattr(module, "resident", True)]  # the others are views
    tensors = [t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    return sum({t.data_ptr(): t.nbytes for t in tensors if not t.requires_grad and t.device == device}.values())


def base_bytes(model: Llama, sharding: Sharding, ranks: int, offload: int = 0, host_embedding: bool = False) -> int:
    """The same, predicted from an empty model, for one rank; `parallel/fsdp.py` describes what it holds."""
    frozen = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    if host_embedding and not model.config.tie_word_embeddings:
        frozen -= model.model.embed_tokens.weight.nbytes
    if sharding == "replicate":
        return frozen
    L, block = model.config.num_hidden_layers, block_bytes(model.model.layers, ranks)
    outside = frozen - sum(t.nbytes for layer in model.model.layers for _, _, t, _ in frozen_tensors(layer))
    return outside + 2 * block + (L - offload) * block // ranks


def step_bytes(model: Llama, N: int, keeps: Sequence[Keep], optimizer_bytes: float = 8, base: int | None = None) -> int:
    """The predicted peak of a training step, in bytes.

    Args:
        model: with LoRA injected.
        N: tokens of a micro-batch, padding included. keeps: one for each block.
        optimizer_bytes: state per trained value, 8 for AdamW in float32 and 2 in 8 bits.
        base: bytes of the frozen tensors; by default `held_bytes`.
    """
    base = held_bytes(model) if base is None else base
    config = model.config
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    itemsize = model.model.embed_tokens.weight.element_size()
    heads, kv = config.num_attention_heads * config.head_dim, 2 * config.num_key_value_heads * config.head_dim
    layers = lora_layers(model).values()
    trained = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad)
    R = sum(layer.lora_A.shape[0] for layer in layers) // config.num_hidden_layers
    dora = any(layer.magnitude is not None for layer in layers)
    kept = sum(kept_bytes(config, N, R, keep, itemsize, dora) for keep in keeps)
    scratch = itemsize * max(D * max(2 * FF, heads + kv), min(N, ROWS_ON_GPU) * V)
    loss = itemsize * 4 * N * D
    gradients = itemsize * N * (FF + 3 * D)  # in the last block: of its output, of act, of its input
    recomputed = {"all": 0, "no_mlp": 2 * FF, "input": 2 * FF + 2 * D + 2 * heads + kv}[keeps[-1]] * N * itemsize
    if "offload" in keeps:
        recomputed += 2 * D * N * itemsize  # the inputs of this block and of the one below
    if "mlp_host" in keeps:
        recomputed += 4 * FF * N * itemsize
    return base + int(trained * (8 + optimizer_bytes)) + kept + scratch + max(loss, gradients + recomputed)


def choose_keeps(model: Llama, N: int, budget: int, optimizer_bytes: float = 8, host_bytes: int = 0) -> list[Keep]:
    """The most that the blocks can save within `budget` bytes for the step; all "input" if even that is more.

    Offloading costs less time than recomputing, as long as the copy overlaps: gate and up of an 8B block take 9 ms to
    the host at 50 GB/s, two blocks' forward passes 11 ms. So every other block may offload them, within `host_bytes`.
    The matmuls that a saved byte replaces are about the same for every part of a block, except that "input" also
    recomputes attention; so all other blocks become "no_mlp" before the first becomes "input".
    """
    L = model.config.num_hidden_layers
    gate_up = 2 * model.config.intermediate_size * N * model.model.embed_tokens.weight.element_size()
    offloading = list(range(0, L - 1, 2))[: host_bytes // gate_up]
    others = [block for block in range(L) if block not in offloading]
    changes: list[tuple[int, Keep]] = [(block, "mlp_host") for block in offloading]
    changes += [(block, "no_mlp") for block in others]
    changes += [(block, "input") for block in (*others, *offloading)]
    keeps: list[Keep] = ["all"] * L
    for block, less in changes:
        if step_bytes(model, N, keeps, optimizer_bytes) <= budget:
            break
        keeps[block] = less
    return keeps


def gpu_budget(device: torch.device) -> int:
    """Bytes that this process may use in all: what it holds and what is free, less `SPARE`."""
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), limit) * (1 - SPARE))


def free_host_bytes() -> int:
    """This process's share of the host's free memory, which the ranks of the host divide; file caches are free."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: *(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS: all, free or not
    free = int(found[1]) * 1024 if found else os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_budget(device: torch.device) -> int:
    """Bytes for a step on the rank that has the least."""
    here = gpu_budget(device) if device.type == "cuda" else int(free_host_bytes() * (1 - SPARE))
    return collectives.minimum(here, device)


def keeps_for(
    model: Llama, checkpointing: bool | str, N: int, budget: int = 0, optimizer_bytes: float = 8
) -> list[Keep]:
    """What each block saves for the configuration's `gradient_checkpointing`.

    Args:
        checkpointing: false saves everything, true the inputs of blocks; offload saves these in host memory, except
            the last; auto saves as much as fits.
        budget: bytes for the step, for auto; 0 takes what the device has.
    """
    L, device, level = model.config.num_hidden_layers, model.model.norm.weight.device, str(checkpointing).lower()
    if level == "offload":
        offloaded: list[Keep] = ["offload"] * (L - 1)
        return [*offloaded, "input"]
    if level == "auto" and (device.type == "cuda" or budget):
        if can_fuse(model):
            host_bytes = free_host_bytes() // 2 if device.type == "cuda" else 0
            return choose_keeps(model, N, budget or gpu_budget(device), optimizer_bytes, host_bytes)
        level = "true"  # what plain blocks save is not known here
    keep: Keep = "input" if level == "true" else "all"
    return [keep] * L


def dense_fits(model: Llama) -> bool:
    """Whether the dequantized weights of all blocks take less than an eighth of a CPU's free memory."""
    weight = model.model.norm.weight
    if weight.device.type != "cpu":
        return False
    weights = sum(layer.in_features * layer.out_features for layer in lora_layers(model).values())
    return 8 * weights * weight.element_size() < free_host_bytes()
