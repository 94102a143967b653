"""Several processes, one run: start and end under torchrun, and the device of this rank.

Every rank trains on its share of each step's rows. After the backward passes the flat gradient is summed over the
ranks, once, and all ranks take the same optimizer step. The frozen base is replicated or sharded: `parallel/fsdp.py`.
"""

import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..config.commands import asks_ranks
from ..config.errors import Failed, UserError
from .devices import keep_freed_memory, map_gpu_memory_in_pages
from .heartbeat import Heartbeat

# PyTorch 2.13 has new names for the same collectives; 2.11 does not have them.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .torch.distributed", category=FutureWarning)
MEETING_LIMIT = timedelta(minutes=5)  # imports from a slow disk take long
_heartbeat: Heartbeat | None = None


def start() -> tuple[int, int, torch.device]:
    """Join the other ranks under torchrun. Returns (rank, number of ranks, this rank's device)."""
    ranks = _check_environment()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        map_gpu_memory_in_pages()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if ranks == 1:
        return 0, 1, device
    rank = int(os.environ["RANK"])
    _join(rank, ranks, device)
    return rank, ranks, device


def _join(rank: int, ranks: int, device: torch.device) -> None:
    """Meet the other ranks at torchrun's store, and set up the process group and the heartbeat."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun runs the store, not rank 0
    host, port, is_master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank == 0 and not by_agent
    try:
        limit = MEETING_LIMIT / (5 if by_agent else 1)  # torchrun's is there before its ranks; it is tried twice
        tcp = dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=limit)
        tcp.set_timeout(MEETING_LIMIT)
        # After a restart the store still has the addresses of dead processes, so each attempt has a prefix of its own.
        store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
        meet(store, rank, ranks, MEETING_LIMIT)
    except RuntimeError as error:
        what = f"rank {rank} does not reach torchrun at {host}:{port} ({(str(error).splitlines() or [''])[0][:200]})"
        raise Failed(f"{what}. Was it killed? Start it again.") from error
    asks_ranks[:] = [lambda: _first_to_report(store)]
    options: Any = None
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        nccl: Any = dist.ProcessGroupNCCL  # the type stubs lack what follows
        options.config.cta_policy = nccl.NCCL_CTA_POLICY_ZERO  # gathers by copy engines, see `memory_to_gather`
    dist.init_process_group(
        "gloo" if options is None else "nccl",
        store=store,
        rank=rank,
        world_size=ranks,
        timeout=timedelta(days=1),  # one rank may tokenize for hours; the heartbeat notices dead ranks
        device_id=None if options is None else device,  # with a device NCCL is set up now, not at the first use
        pg_options=options,
    )
    global _heartbeat
    _heartbeat = Heartbeat(rank, ranks)


def _check_environment() -> int:
    """The number of ranks.

    Raises:
        UserError: variables of torchrun that are not numbers, or only some of them, or more ranks than GPUs.
    """
    numbers = {name: os.environ.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "LOCAL_RANK")}
    given = {name: text for name, text in numbers.items() if text}
    ranks = given.get("WORLD_SIZE", "1")
    needed = [] if ranks == "1" else ["RANK", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    wrong = [f"{name}={text}" for name, text in given.items() if not text.isdecimal()]
    if missing or wrong or ranks == "0" or (needed and int(given["RANK"]) >= int(ranks)):
        found = [f"{text} is not a number" for text in wrong] + [f"{name} is not set" for name in missing]
        cause = [*found, "RANK does not fit"][0]
        cause = f"environment: WORLD_SIZE is {ranks}, so {ranks} processes have to meet, but {cause}. torchrun sets all"
        raise UserError(f"{cause} of it: start with torchrun --nproc_per_node=N, or unset WORLD_SIZE for one process.")
    if torch.cuda.is_available() and int(given.get("LOCAL_RANK", "0")) >= torch.cuda.device_count():
        where = f"rank {given.get('RANK', '0')} is number {given['LOCAL_RANK']} (from 0) of its host, which has"
        raise UserError(f"{where} {torch.cuda.device_count()} GPUs. Give torchrun an --nproc_per_node of at most that.")
    return int(ranks)


def _first_to_report(store: dist.Store) -> bool:
    """Whether this is the first rank to report an error: the others then keep silent."""
    try:
        return store.add("told", 1) == 1
    except RuntimeError:  # the store's host is dead
        return True


def meet(store: dist.Store, rank: int, ranks: int, limit: timedelta) -> None:
    """Return when all ranks have called this.

    Raises:
        Failed: some have not within `limit`.
    """
    names = [f"here{other}" for other in range(ranks)]
    store.set(names[rank], "")
    try:
        store.wait(names, limit)
    except RuntimeError as error:
        missing = [other for other in range(ranks) if not store.check([names[other]])]
        what = f"rank {rank} has waited {limit.total_seconds():.0f} s for rank {', '.join(map(str, missing))}, which"
        raise Failed(f"{what} has not begun. See its host's output. Every host has to run the same command.") from error


def stop() -> None:
    """Leave the other ranks, if there are any."""
    if dist.is_initialized():
        if _heartbeat:
            _heartbeat.stop()
        dist.destroy_process_group()
