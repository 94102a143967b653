"""Settings of the memory allocators, and the dtype to compute in."""

import ctypes
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError


def map_gpu_memory_in_pages() -> None:
    """Set PyTorch's expandable_segments: GPU memory is mapped in pages, which tensors of many sizes do not fragment.

    A user's own setting of PyTorch's variable has precedence.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it has a new name, which PyTorch 2.11 does not document
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def keep_freed_memory() -> None:
    """Set the C library to reuse freed memory for the next tensor instead of returning it to the system.

    A training step allocates and frees tensors of many megabytes all the time, and the first access to a new page
    costs more than filling it: the matmuls of a step ran up to twice as fast with this on two cores.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: take anything below 32 MiB from the heap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and do not shrink the heap
    except (OSError, AttributeError):
        return  # another C library than glibc: only slower


def return_freed_memory() -> None:
    """Return unused parts of the heap to the system. Called now and then, because changing sizes fragment the heap."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def add_in_fixed_order() -> None:
    """Set PyTorch to kernels for GPUs whose sums have a fixed order. Two runs are then equal, bit for bit.

    Only the backward pass of attention has another kernel then: cuDNN's and FlashAttention-2's usual ones add the
    gradient of q in the order in which parts of it are ready. FlashAttention-2 has one that does not, which PyTorch
    takes if an operation without such a kernel is an error and no warning. None of ours is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch refuses cuBLAS without it
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic  # the type stubs lack what follows
    settings.fill_uninitialized_memory = False  # which only takes time
    torch.backends.cuda.enable_cudnn_sdp(False)


def describe_threads() -> str:
    """A line on PyTorch's CPU threads. `config/load.py` sets how they wait."""
    set_by = {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ}
    how = ", ".join(f"{name}={value}" for name, value in set_by.items()) or "as is usual"
    return f"{torch.get_num_threads()} CPU threads; how they wait for each other: {how}"


def compute_dtype(bf16: bool | str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32; `auto` is bfloat16 where the hardware has it."""
    if bf16 == "auto":
        if device.type == "cuda":
            bf16 = torch.cuda.is_bf16_supported()
        else:
            info = Path("/proc/cpuinfo")
            flags = info.read_text().split() if info.exists() else []
            bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if bf16 else torch.float32


def check_fp8(device: torch.device) -> None:
    """Raises UserError if a device has no matmuls in fp8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    raise UserError(f"fp8: {name} has no matmuls in fp8. Take a GPU that has, as an L40S or H100, or leave out fp8.")
