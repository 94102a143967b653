"""Sums and gathers over the ranks. With one process each gives back what it got."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.errors import Failed, UserError
from .distributed import stop

T = TypeVar("T")


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Tell what an exchange says when another rank is gone in one line. Which one, torchrun and `Heartbeat` say.

    Raises:
        Failed: with that line.
    """
    try:
        yield
    except RuntimeError as error:
        lost = ("peer", "Socket", "socket", "Timed out", "NCCL", "gloo")
        if not dist.is_initialized() or not any(word in str(error) for word in lost):
            raise
        raise Failed(
            f"rank {dist.get_rank()} has lost the others ({str(error).splitlines()[0][:120]}). The rank that failed "
            f"first is named below by torchrun, as root cause. Start again with --auto_resume_from_checkpoints true."
        ) from error


def sum_over_ranks(x: Tensor) -> Tensor:
    """Add `x` of all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_to_parts(x: Tensor) -> Tensor:
    """This rank's part (n,) of the sum of `x` (ranks * n,) over the ranks, in its place in `x`, whose rest is spent."""
    part = x.view(dist.get_world_size(), -1)[dist.get_rank()]
    dist.reduce_scatter_tensor(part, x)
    return part


def smallest(number: int, device: torch.device) -> int:
    """The least of every rank's `number`."""
    x = torch.tensor(number, device=device)
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MIN)
    return int(x)


def any_has(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag whether it is set on any rank."""
    return (sum_over_ranks(torch.tensor(flags, dtype=torch.float32, device=device)) > 0).tolist()


def of_first_rank(x: Tensor) -> Tensor:
    """`x` as rank 0 has it, in place."""
    if dist.is_initialized():
        dist.broadcast(x, 0)
    return x


def all_gather(whole: Tensor, part: Tensor) -> Callable[[], None] | None:
    """Begin to put the parts (n,) of all ranks one after another into `whole` (ranks * n,).

    `part` may be this rank's place in `whole`. Returns what waits for the end: on a GPU the current stream does, and
    the gather itself begins when the stream that is current now has done all it was given.
    """
    if dist.is_initialized():
        return dist.all_gather_into_tensor(whole, part, async_op=True).wait
    if whole.data_ptr() != part.data_ptr():
        whole.copy_(part)
    if not whole.is_cuda:
        return None
    done = torch.cuda.current_stream().record_event()
    return lambda: torch.cuda.current_stream().wait_event(done)


@contextmanager
def memory_to_gather(device: torch.device) -> Iterator[None]:
    """Where both of `all_gather`'s tensors are made in here, GPUs joined by NVLink move them by their copy engines.

    A gather then takes no multiprocessor from the products beside it. Every rank has to make the same tensors.
    """
    if not dist.is_initialized() or device.type != "cuda":
        yield
        return
    nccl = dist.group.WORLD._get_backend(device)
    pool = torch.cuda.MemPool(nccl.mem_allocator)
    with torch.cuda.use_mem_pool(pool):
        yield
    nccl.register_mem_pool(pool, symm=True)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))  # for ever: to free it when NCCL is gone would be an abort


def everyones(flat: Tensor) -> tuple[Tensor, ...]:
    """`flat` (n,) of every rank, by rank."""
    if not dist.is_initialized():
        return (flat,)
    whole = flat.new_empty(dist.get_world_size(), len(flat))
    dist.all_gather_into_tensor(whole.view(-1), flat)
    return whole.unbind()


def everyones_object(x: T) -> list[T]:
    """`x`, anything that pickle takes, of every rank, by rank."""
    if not dist.is_initialized():
        return [x]
    everyone = [x] * dist.get_world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def exchange(flat: Tensor) -> tuple[Tensor, ...]:
    """This rank's part of the `flat` (n,) of every rank, by rank: each (n / ranks,)."""
    if not dist.is_initialized():
        return (flat,)
    parts = torch.empty_like(flat)
    dist.all_to_all_single(parts, flat)
    return parts.view(dist.get_world_size(), -1).unbind()


@contextmanager
def together() -> Iterator[None]:
    """Work that every rank does for itself and that its input may spoil: if it does on one, all of them stop.

    Raises:
        UserError: on every rank, with what the first of them found.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = everyones_object(problem)
    for rank, found in enumerate(problems):
        if found:
            stop()
            everywhere = all(other == found for other in problems)
            raise UserError(found if everywhere else f"rank {rank}: {found}")


def first_of_host_first(work: Callable[[], T]) -> T:
    """`work()` on the first rank of every host, then on the others, which find done what it has left on the disk.

    Raises:
        UserError: as `together`.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in (True, False):
        with together():
            if is_first == turn:
                done = work()
    return done


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
