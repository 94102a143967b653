"""Collective operations over the ranks. With one process each returns its input."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.errors import Failed, UserError
from .distributed import stop

T = TypeVar("T")


@contextmanager
def naming_dead_ranks() -> Iterator[None]:
    """Turn the error of a collective whose other ranks are dead into one line; torchrun and `Heartbeat` name the rank.

    Raises:
        Failed: with that line.
    """
    try:
        yield
    except RuntimeError as error:
        connection = ("peer", "Socket", "socket", "Timed out", "NCCL", "gloo")
        if not dist.is_initialized() or not any(word in str(error) for word in connection):
            raise
        what = f"rank {dist.get_rank()} cannot reach the other ranks ({str(error).splitlines()[0][:120]})"
        advice = "torchrun names the rank that failed first below, as root cause. Start again"
        raise Failed(f"{what}. {advice} with --auto_resume_from_checkpoints true.") from error


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add `x` of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def reduce_scatter(x: Tensor) -> Tensor:
    """This rank's part (n,) of the sum of `x` (ranks * n,) over the ranks. Overwrites `x`."""
    part = x.view(dist.get_world_size(), -1)[dist.get_rank()]
    dist.reduce_scatter_tensor(part, x)
    return part


def minimum(number: int, device: torch.device) -> int:
    """The minimum of `number` over the ranks."""
    x = torch.tensor(number, device=device)
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return int(x)


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag, whether any rank has set it."""
    return (sum_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()


def broadcast(x: Tensor) -> Tensor:
    """Replace `x` by that of rank 0, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
    return x


def all_gather(gathered: Tensor, part: Tensor) -> Callable[[], None] | None:
    """Begin to concatenate the parts (n,) of all ranks in `gathered` (ranks * n,).

    `part` may be this rank's slice of `gathered`. Returns the function that waits for the end: on a GPU it makes the
    current stream wait. The gather begins when all earlier work of the stream that is current now is done.
    """
    if dist.is_initialized():
        return dist.all_gather_into_tensor(gathered, part, async_op=True).wait
    if gathered.data_ptr() != part.data_ptr():
        gathered.copy_(part)
    if not gathered.is_cuda:
        return None
    done = torch.cuda.current_stream().record_event()
    return lambda: torch.cuda.current_stream().wait_event(done)


@contextmanager
def memory_to_gather(device: torch.device) -> Iterator[None]:
    """Tensors allocated within are registered with NCCL: GPUs with NVLink gather them by their copy engines.

    The gather then takes no multiprocessor from the matmuls that run at the same time. Both tensors of `all_gather`
    have to be allocated here, and every rank has to allocate the same tensors.
    """
    if not dist.is_initialized() or device.type != "cuda":
        yield
        return
    world = dist.group.WORLD
    assert world is not None
    nccl: Any = world._get_backend(device)  # the type stubs lack what follows
    pool = torch.cuda.MemPool(nccl.mem_allocator)
    with torch.cuda.use_mem_pool(pool):
        yield
    nccl.register_mem_pool(pool, symm=True)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))  # never freed: after NCCL's end that aborts the process


def gather_tensors(flat: Tensor) -> tuple[Tensor, ...]:
    """`flat` (n,) of every rank, by rank."""
    if not dist.is_initialized():
        return (flat,)
    gathered = flat.new_empty(dist.get_world_size(), len(flat))
    dist.all_gather_into_tensor(gathered.view(-1), flat)
    return gathered.unbind()


def gather_objects(x: T) -> list[T]:
    """`x` of every rank, by rank: any Python object that can be pickled."""
    if not dist.is_initialized():
        return [x]
    gathered = [x] * dist.get_world_size()
    dist.all_gather_object(gathered, x)
    return gathered


def all_to_all(flat: Tensor) -> tuple[Tensor, ...]:
    """This rank's part of the `flat` (n,) of every rank, by rank: each (n / ranks,)."""
    if not dist.is_initialized():
        return (flat,)
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat)
    return parts.view(dist.get_world_size(), -1).unbind()


@contextmanager
def together() -> Iterator[None]:
    """For work that every rank does by itself and that can raise UserError: if one rank does, all ranks stop.

    Raises:
        UserError: on every rank, with the text of the first rank that raised it.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = gather_objects(problem)
    for rank, found in enumerate(problems):
        if found:
            stop()
            everywhere = all(other == found for other in problems)
            raise UserError(found if everywhere else f"rank {rank}: {found}")


def first_of_host_first(work: Callable[[], T]) -> T:
    """`work()` on the first rank of every host, then on the others, which find its result on the disk.

    Raises:
        UserError: as `together`.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        with together():
            if is_first == turn:
                done = work()
    return done


def barrier() -> None:
    """Continue when every rank has called it."""
    if dist.is_initialized():
        dist.barrier()
