"""Several processes, one run: start and stop under torchrun, sums over ranks, and the device to run on.

Every rank trains on its share of each step's rows. After the backward passes the flat gradient is summed over the
ranks, once, and all take the same optimizer step. `sharding.py` says where the frozen base is.
"""

import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .cli import Failed, UserError, asks_ranks
from .heartbeat import Heartbeat

# PyTorch 2.13 has other names for the same collectives; 2.11 does not know them yet.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .torch.distributed", category=FutureWarning)


T = TypeVar("T")
MEETING_LIMIT = timedelta(minutes=5)  # for imports from a slow disk
_heartbeat: Heartbeat | None = None


def start() -> tuple[int, int, torch.device]:
    """Join the other ranks if torchrun started us. Returns (rank, number of ranks, this rank's device)."""
    ranks = _check_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        map_gpu_memory_in_pages()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    global _heartbeat
    if ranks > 1:
        rank, attempt = int(os.environ["RANK"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        place = {"host_name": os.environ["MASTER_ADDR"], "port": int(os.environ["MASTER_PORT"])}
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store, not rank 0
        store = dist.TCPStore(**place, is_master=rank == 0 and not by_agent, wait_for_workers=False)
        # After a restart the addresses of those that are gone are still in it: each attempt has names of its own.
        store = dist.PrefixStore(f"attempt{attempt}", store)
        meet(store, rank, ranks, MEETING_LIMIT)
        asks_ranks[:] = [lambda: _first_to_tell(store)]
        meeting = {"store": store, "rank": rank, "world_size": ranks}
        meeting["timeout"] = timedelta(days=1)  # one rank may tokenise for hours; who is gone, the heartbeat notices
        if device.type == "cuda":  # with the device it is set up now, not at first use
            options = dist.ProcessGroupNCCL.Options()
            options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO  # see `memory_to_gather`
            dist.init_process_group("nccl", device_id=device, pg_options=options, **meeting)
        else:
            dist.init_process_group("gloo", **meeting)
        _heartbeat = Heartbeat(rank, ranks)
    return int(os.environ["RANK"]) if ranks > 1 else 0, ranks, device


def _check_environment() -> int:
    """How many ranks there are.

    Raises:
        UserError: variables of torchrun that are no numbers, or only some of them, or more ranks than GPUs.
    """
    numbers = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "LOCAL_RANK")}
    given = {name: text for name, text in numbers.items() if text}
    ranks = given.get("WORLD_SIZE", "1")
    needed = [] if ranks == "1" else ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    wrong = [f"{name}={text}" for name, text in given.items() if not text.isdecimal()]
    if missing or wrong or ranks == "0" or (needed and int(given["RANK"]) >= int(ranks)):
        cause = f"{wrong[0]} is no number" if wrong else f"{missing[0]} is not set" if missing else "RANK does not fit"
        raise UserError(
            f"environment: WORLD_SIZE is {ranks}, so {ranks} processes have to meet, but {cause}. torchrun sets all of "
            f"it: start with torchrun --nproc_per_node=N, or unset WORLD_SIZE for one process."
        )
    if torch.cuda.is_available() and int(given.get("LOCAL_RANK", "0")) >= torch.cuda.device_count():
        raise UserError(
            f"rank {given.get('RANK', '0')} is number {given['LOCAL_RANK']} (from 0) of its host, which has "
            f"{torch.cuda.device_count()} GPUs. Give torchrun an --nproc_per_node of at most that."
        )
    return int(ranks)


def _first_to_tell(store: dist.Store) -> bool:
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # its host is gone
        return True


def meet(store: dist.Store, rank: int, ranks: int, limit: timedelta) -> None:
    """Return when all ranks are here.

    Raises:
        Failed: some have not come within `limit`.
    """
    names = [f"here{other}" for other in range(ranks)]
    store.set(names[rank], "")
    try:
        store.wait(names, limit)
    except RuntimeError as error:
        missing = [other for other in range(ranks) if not store.check([names[other]])]
        raise Failed(
            f"rank {rank} has waited {limit.total_seconds():.0f} s for rank {', '.join(map(str, missing))}, which has "
            f"not begun. What does its host say? Every host has to be given the same command."
        ) from error


def stop() -> None:
    """Leave the other ranks, if there are any."""
    if dist.is_initialized():
        if _heartbeat:
            _heartbeat.stop()
        dist.destroy_process_group()


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


def map_gpu_memory_in_pages() -> None:
    """Ask PyTorch to map GPU memory in pages, to where a tensor needs it: tensors of many sizes then leave no holes.

    Whoever has set PyTorch's own variable for this is left alone.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & set(os.environ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # a newer name for it, which 2.11 does not document either
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


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
