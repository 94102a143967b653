"""Several processes, one run: start and stop under torchrun, sums over ranks, and the device to run on.

Every rank holds the whole base and trains on its share of each step's rows. After the backward passes the flat
gradient is summed over the ranks, once, and all take the same optimizer step.
"""

import ctypes
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def start() -> tuple[int, int, torch.device]:
    """Join the other ranks if torchrun started us. Returns (rank, number of ranks, this rank's device)."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", "0")), ranks, device


def stop() -> None:
    """Leave the other ranks, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add `x` of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def keep_freed_memory() -> None:
    """Ask the C library to keep freed memory for the next tensor instead of giving it back to the system.

    A training step makes and frees tensors of many megabytes all the time, and a page fresh from the system costs
    more to touch than to fill: products of a step ran up to twice as fast with this on two cores.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: take anything below 32 MiB from the heap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and do not shrink the heap
    except (OSError, AttributeError):
        return  # another C library than glibc: only slower


def return_freed_memory() -> None:
    """Give the holes in the heap back to the system: now and then, or tensors of changing sizes let it grow."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def compute_dtype(bf16: bool | str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32; `auto` takes bfloat16 where the hardware multiplies it."""
    if bf16 == "auto":
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported()
        else:
            info = Path("/proc/cpuinfo")
            flags = info.read_text().split() if info.exists() else []
            bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if bf16 else torch.float32
