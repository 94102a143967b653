"""What a run measures of itself: memory and tokens per second. The names are Axolotl's; GiB = 2^30 bytes."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


_graphs = {"held": 0, "peak": 0}  # bytes
_most = {"active": 0}  # bytes in all figures so far


def count_graph(held: int, peak: int) -> None:
    """Add the memory of a CUDA graph to the figures: the allocator counts it only while the graph is recorded.

    Args:
        held: bytes in use between its forward and its backward part. peak: the most during the recording.
    """
    _graphs["held"], _graphs["peak"] = max(_graphs["held"], held), max(_graphs["peak"], peak)


def memory_figures(device: torch.device) -> dict[str, float]:
    """On a GPU the peaks since the last call, in GiB; on a CPU the peak of the process since its start."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        return {"memory/max_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB, 2)}
    peaks = torch.cuda.memory_stats(device)  # once: it takes a millisecond, in which the GPU may wait
    active, allocated, reserved = (peaks[f"{kind}_bytes.all.peak"] for kind in ("active", "allocated", "reserved"))
    figures = {
        "memory/max_mem_active_gib": max(active + _graphs["held"], _graphs["peak"]),
        "memory/max_mem_allocated_gib": max(allocated + _graphs["held"], _graphs["peak"]),
        "memory/device_mem_reserved_gib": reserved,
    }
    torch.cuda.reset_peak_memory_stats(device)
    _most["active"] = max(_most["active"], figures["memory/max_mem_active_gib"])
    return {name: round(num_bytes / GIB, 2) for name, num_bytes in figures.items()}


def free_below_peak(device: torch.device) -> int | None:
    """Bytes between what is in use on the GPU and the peak of a run's steps; None before any was measured."""
    in_use = torch.cuda.memory_stats(device)["active_bytes.all.current"] + _graphs["held"]
    return _most["active"] - in_use if _most["active"] else None


stages: dict[str, float] = {}  # seconds of this process by what it did, without what ran within it
_within: list[float] = []  # of the stages that run now: seconds of the stages inside


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the time within as that of a stage, for the report; also a decorator."""
    started = time.perf_counter()
    _within.append(0.0)
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        stages[name] = stages.get(name, 0.0) + seconds - _within.pop()
        if _within:
            _within[-1] += seconds


class Stopwatch:
    """Tokens per second of training: the time between `stop` and `start` is left out."""

    def __init__(self) -> None:
        self.tokens, self.seconds, self.started = 0, 0.0, 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self, tokens: int) -> None:
        """A step ends, in which so many tokens were trained."""
        self.seconds += time.perf_counter() - self.started
        self.tokens += tokens

    def rate_since_last(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / self.seconds if self.seconds else 0.0
        self.tokens, self.seconds = 0, 0.0
        return rate
