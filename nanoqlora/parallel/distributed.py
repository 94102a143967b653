"""Several processes, one run: start and end under torchrun, and the device to run on.

Every rank trains on its share of each step's rows. After the backward passes the flat gradient is summed over the
ranks, once, and all take the same optimizer step. `parallel/fsdp.py` says where the frozen base is.
"""

import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

from ..config.commands import asks_ranks
from ..config.errors import Failed, UserError
from .devices import keep_freed_memory, map_gpu_memory_in_pages
from .heartbeat import Heartbeat

# PyTorch 2.13 has other names for the same collectives; 2.11 does not know them yet.
warnings.filterwarnings("ignore", message=".*is deprecated. Please use .torch.distributed", category=FutureWarning)
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
