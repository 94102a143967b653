"""The blocks of a training step as CUDA graphs: one launch instead of one per kernel.

A fused block is about fifty launches, and Python needs about 5 microseconds for each. On an 8B model the GPU is slower
than that; on a 1B model, or with short rows, it waits. A CUDA graph is recorded once and then costs one launch. A graph
reads and writes at fixed addresses, so its inputs are copied there first:

    x, cos and sin, dropout seeds, where documents end  ->  [blocks forward]  ->  hidden states
    gradient of the hidden states                       ->  [blocks backward] ->  added to the gradients of A and B

Embedding, head, loss and optimizer are a few launches and stay outside. The number of documents and the longest length
are launch parameters of attention: a graph has those of its first batch, rounded up to powers of two, and runs every
batch that needs no more. Rows that are laid into one have a width of their own in each micro-batch; it is rounded up to
a few (`recorded_width`), each with its own graph. Evaluation has graphs too, of the forward pass only.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Llama
from ..ops import Segments
from ..qlora import lora_layers
from . import stats
from .block import ON_HOST, FusedBlock
from .projections import gradient_of


def can_record(model: Llama) -> bool:
    """Whether the blocks can be recorded: fused, on one GPU, with nothing offloaded, in 16 bits.

    In float32 no kernel takes several documents.
    """
    blocks, weight = model.model.layers, model.model.norm.weight
    return (
        weight.is_cuda
        and weight.itemsize == 2
        and not hasattr(model, "store")  # the blocks are gathered while they run
        and all(isinstance(b, FusedBlock) and b.keep not in ON_HOST for b in blocks)
    )


def recorded_width(tokens: int) -> int:
    """The width of the graph for so many tokens in a row: the next 2^k or 1.5 * 2^k, from 128 on."""
    width = max(128, power_of_two(tokens))
    return width * 3 // 4 if tokens <= width * 3 // 4 and width > 128 else width


@cache
def recording_stream() -> torch.cuda.Stream:
    """The stream to record graphs on: one, because cuBLAS allocates 32 MiB for each stream and thread."""
    return torch.cuda.Stream()


class RecordedSegments:
    """In place of `Segments` in a graph: the documents' ends at a fixed address, padded with empty documents."""

    def __init__(self, segments: Segments, T: int, device: torch.device) -> None:
        self.one_each = segments.one_each
        self.longest = T if self.one_each else min(T, power_of_two(segments.longest))
        self._ends = torch.zeros(power_of_two(len(segments.documents)) + 1, dtype=torch.int32, device=device)
        self.set(segments)

    def fits(self, segments: Segments) -> bool:
        """Whether this graph can run these documents."""
        if self.one_each or segments.one_each:
            return self.one_each and segments.one_each
        return len(segments.documents) < len(self._ends) and segments.longest <= self.longest

    def set(self, segments: Segments) -> None:
        ends = segments.ends(self._ends.device)
        self._ends[: len(ends)].copy_(ends)
        self._ends[len(ends) :].copy_(ends[-1])

    def ends(self, device: torch.device) -> Tensor:
        return self._ends


class Buffers(NamedTuple):
    """Tensors at fixed addresses, for B rows of T tokens each. Graphs of fewer tokens use a part of them."""

    x: Tensor  # (B, T, D)
    cos: Tensor  # (B, T, hd / 2) float32; sin likewise
    sin: Tensor
    seeds: Tensor  # (B, T) int64, and places: as `set_dropout_rows` takes them
    places: Tensor
    dy: Tensor  # (B, T, D)
    y: Tensor

    @classmethod
    def like(cls, x: Tensor, rope: tuple[Tensor, Tensor]) -> "Buffers":
        """For batches of up to as many tokens as x (B, T, D) has."""
        seeds, places = (torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) for _ in range(2))
        ours, dy, y = (torch.zeros_like(x) for _ in range(3))
        return cls(ours, torch.zeros_like(rope[0]), torch.zeros_like(rope[1]), seeds, places, dy, y)

    def part(self, B: int, T: int) -> "Buffers":
        """The first tokens of the same tensors as B rows of T."""
        return Buffers(*(tensor.flatten(0, 1)[: B * T].unflatten(0, (B, T)) for tensor in self))

    def fill(self, x: Tensor, rope: tuple[Tensor, Tensor], row_seeds: Tensor | None, places: Tensor | None) -> None:
        """Copy a batch; the seeds may be of fewer rows."""
        for ours, given in zip((self.x, self.cos, self.sin), (x, *rope), strict=True):
            ours.copy_(given)
        if row_seeds is not None:
            rows = slice(len(row_seeds))
            self.seeds[rows].copy_(row_seeds[:, None] if places is None else row_seeds)
            self.places[rows].copy_(torch.arange(x.shape[1], device=x.device) if places is None else places)


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from running within, where it might free an earlier run's graphs and their pool.

    While a stream is captured the GPU refuses to free memory, and PyTorch ends the process if a pool cannot be freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class Recording:
    """The graphs of all blocks and the last norm for B rows of T tokens: forward, and backward unless in evaluation."""

    def __init__(self, body: "GraphedBody", buffers: Buffers, segments: Segments) -> None:
        self.model, self.pool, self.stream, self.buffers = body.model, body.pool, body.stream, buffers
        self.B, self.T = buffers.x.shape[:2]
        self.trains = torch.is_grad_enabled()
        self.segments = RecordedSegments(segments, self.T, buffers.x.device)
        layers = body.layers
        before = [(layer.row_seeds, layer.places) for layer in layers]
        for layer in layers:
            layer.row_seeds, layer.places = buffers.seeds, buffers.places
            # Gradients that are allocated during the recording would be set to zero in every replay.
            for parameter in layer.parameters(recurse=False):
                if parameter.requires_grad:
                    gradient_of(parameter)
        self.warm_up()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

        in_use = torch.cuda.memory_stats()["active_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self.capture(self.forward):
            y = self.run()
            buffers.y.copy_(y.detach())
        held = torch.cuda.memory_stats()["active_bytes.all.current"] - in_use
        if y.requires_grad:
            with self.capture(self.backward):
                y.backward(buffers.dy)
        del y
        peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
        stats.count_graph(held=held, peak=peak)
        torch.cuda.reset_peak_memory_stats()  # the graph's peak is counted; from here on the allocator sees the rest
        for layer, (seeds, places) in zip(layers, before, strict=True):
            layer.row_seeds, layer.places = seeds, places

    def capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        """Record what runs within. thread_local: NCCL's watchdog thread calls the GPU in the meantime."""
        return torch.cuda.graph(graph, self.pool.id, self.stream, capture_error_mode="thread_local")

    def warm_up(self) -> None:
        """Run all blocks once, so that kernels are compiled and loaded and shared buffers allocated.

        What they save comes from the pool of the graphs. dy is zero, so nothing is added to the gradients.
        """
        self.buffers.dy.zero_()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            y = self.run()
            if y.requires_grad:
                y.backward(self.buffers.dy)
            del y
        torch.cuda.current_stream().wait_stream(self.stream)

    def run(self) -> Tensor:
        """The last norm's result."""
        h, rope = self.buffers.x, (self.buffers.cos, self.buffers.sin)
        for block in self.model.model.layers:
            h = block(h, rope, self.segments, None)
        return self.model.model.norm(h)


class Replay(torch.autograd.Function):
    """A recording as one autograd node, whose backward pass launches the backward graph."""

    @staticmethod
    def forward(ctx, x: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        recording.forward.replay()
        return recording.buffers.y.view_as(recording.buffers.y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.recording.buffers.dy.copy_(dy)
        ctx.recording.backward.replay()
        return None, None


class GraphedBody:
    """As `model.model(tokens, segments)`, with graphs recorded at the first batch that no earlier one fits.

    A batch with fewer rows than the first, such as the last of an epoch, runs in the same graphs: rows of zeros are
    added, and their results are dropped. Their gradients are zero. Launched kernel by kernel, it would need memory for
    its activations beside that of the graphs, which is never freed.

    All graphs share one pool of memory, which is safe because the backward graph of one runs before the forward graph
    of the next: together they need the memory of the largest.
    """

    def __init__(self, model: Llama) -> None:
        self.model, self.layers = model, list(lora_layers(model).values())
        self.buffers: Buffers | None = None  # for the largest batch so far
        self.recordings: list[Recording] = []
        self.pool: Any = torch.cuda.MemPool()  # its id is typed differently from what graphs take
        self.stream = recording_stream()

    def __call__(self, tokens: Tensor, segments: Segments) -> Tensor:
        (count, T), body = tokens.shape, self.model.model
        for block in body.layers:
            assert isinstance(block, FusedBlock)
            block.measure_rows()  # before any of them is recorded or replayed; it holds for one step
        recording, B = self.find(count, T, segments)
        segments = with_empty_rows(segments, B - count)
        x = F.pad(body.embed_tokens(tokens), (0, 0, 0, 0, 0, B - count))
        rope = body.rope(segments.positions.pin_memory().to(tokens.device, non_blocking=True))
        buffers = recording.buffers if recording else self.buffers_for(x, rope)
        layer = self.layers[0]
        buffers.fill(x, rope, layer.row_seeds if layer.training else None, layer.places)
        if recording is None:
            with no_collection():
                recording = Recording(self, buffers, segments)
            self.recordings.append(recording)
        recording.segments.set(segments)
        if not recording.trains:
            recording.forward.replay()
            return buffers.y[:count]
        return Replay.apply(buffers.x.detach().requires_grad_(), recording)[:count]

    def __del__(self) -> None:
        """Free the graphs before the pool that they allocate from."""
        for recording in getattr(self, "recordings", ()):
            recording.forward.reset()
            recording.backward.reset()

    def find(self, count: int, T: int, segments: Segments) -> tuple[Recording | None, int]:
        """A recording that can run this batch, and its rows; without one, how many rows it should have."""
        alike = [r for r in self.recordings if r.trains == torch.is_grad_enabled() and r.T == T and r.B >= count]
        for recording in alike:
            if recording.segments.fits(with_empty_rows(segments, recording.B - count)):
                return recording, recording.B
        return None, max((recording.B for recording in alike), default=count)

    def buffers_for(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Buffers:
        """Buffers of the shape of x, part of those that there are, or of new ones if these are too small."""
        B, T, _ = x.shape
        if self.buffers is None or self.buffers.seeds.numel() < B * T:
            self.buffers = Buffers.like(x.detach(), rope)
        return self.buffers.part(B, T)


def with_empty_rows(segments: Segments, count: int) -> Segments:
    """The same with `count` rows of padding at the end, whose documents are as long as this kind of graph allows."""
    if not count:
        return segments  # which has its tensors already
    T = sum(segments.lengths[0])
    longest = T if segments.one_each else min(T, power_of_two(segments.longest))
    row = (longest,) * (T // longest) + ((T % longest,) if T % longest else ())
    return Segments(segments.lengths + (row,) * count)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
