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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..model import Llama
from ..ops import Segments
from ..parallel.fsdp import BlockStore
from ..qlora import lora_layers
from . import stats
from .block import ON_HOST, FusedBlock, not_sharded
from .projections import gradient_of


def can_record(model: Llama) -> bool:
    """Whether the blocks can be recorded: fused, on one GPU, with nothing offloaded, in 16 bits.

    In float32 no kernel takes several documents.
    """
    blocks, weight, store = model.model.layers, model.model.norm.weight, getattr(model, "store", None)
    return (
        weight.is_cuda
        and weight.itemsize == 2
        and (store is None or type(store) is BlockStore and store.copies is None)  # gathered between two graphs
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


@contextmanager
def nothing_gathered(model: Llama) -> Iterator[None]:
    """Run blocks within on whatever their slots hold: other ranks may record at other times, or not at all."""
    blocks: list[Any] = [*model.model.layers]
    before = [block.unshard_weights for block in blocks]
    for block in blocks:
        block.unshard_weights = not_sharded
    try:
        yield
    finally:
        for block, unshard in zip(blocks, before, strict=True):
            block.unshard_weights = unshard


class Recording:
    """The graphs of all blocks and the last norm for B rows of T tokens: forward, and backward unless in evaluation."""

    def __init__(self, body: "GraphedBody", buffers: Buffers, segments: Segments) -> None:
        self.model, self.pool, self.stream, self.buffers = body.model, body.pool, body.stream, buffers
        self.store = body.store
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
        with nothing_gathered(self.model):
            self.warm_up()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            in_use = torch.cuda.memory_stats()["active_bytes.all.current"]
            torch.cuda.reset_peak_memory_stats()
            self.forward, self.backward = self.record(in_use)
        torch.cuda.reset_peak_memory_stats()  # the graphs' peak is counted; from here on the allocator sees the rest
        for layer, (seeds, places) in zip(layers, before, strict=True):
            layer.row_seeds, layer.places = seeds, places

    def record(self, in_use: int) -> tuple[list[torch.cuda.CUDAGraph], list[torch.cuda.CUDAGraph]]:
        """The graphs of all parts, forward and backward, each in the order of the blocks. in_use: bytes before them."""
        h, dy = self.buffers.x, self.buffers.dy
        forward: list[torch.cuda.CUDAGraph] = []
        backward: list[torch.cuda.CUDAGraph] = []
        ends = []  # input and result of every part
        for part in self.parts():
            x = h.detach().requires_grad_(h.requires_grad)
            with self.capture(forward):
                h = part(x)
                if len(forward) == len(self.parts()):
                    self.buffers.y.copy_(h.detach())
            ends.append((x, h))
        held = torch.cuda.memory_stats()["active_bytes.all.current"] - in_use
        for x, y in reversed(ends if h.requires_grad else ()):
            if y.requires_grad:
                with self.capture(backward):
                    y.backward(dy, inputs=[x] if x.requires_grad else None)
                dy = dy if x.grad is None else x.grad
        stats.count_graph(held=held, peak=torch.cuda.memory_stats()["active_bytes.all.peak"])
        return forward, backward[::-1]

    @contextmanager
    def capture(self, graphs: list[torch.cuda.CUDAGraph]) -> Iterator[None]:
        """Record what runs within as one more graph. thread_local: NCCL's watchdog thread calls the GPU meanwhile."""
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], self.pool.id, self.stream, capture_error_mode="thread_local"):
            yield

    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """What is recorded as one graph: all blocks and the last norm, or each block where it has to be gathered."""
        layers = [*self.model.model.layers]
        runs = [layers] if self.store is None else [[block] for block in layers]
        runs[-1] = [*runs[-1], self.model.model.norm]
        return [partial(self.run, run) for run in runs]

    def warm_up(self) -> None:
        """Run all blocks once, so that kernels are compiled and loaded and shared buffers allocated.

        What they save comes from the pool of the graphs. dy is zero, so nothing is added to the gradients.
        """
        self.buffers.dy.zero_()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            y = self.run([*self.model.model.layers, self.model.model.norm], self.buffers.x)
            if y.requires_grad:
                y.backward(self.buffers.dy)
            del y
        torch.cuda.current_stream().wait_stream(self.stream)

    def run(self, modules: Sequence[nn.Module], h: Tensor) -> Tensor:
        """The result of these blocks, and of the last norm, one after the other."""
        for module in modules:
            rope = (self.buffers.cos, self.buffers.sin)
            h = module(h, rope, self.segments, None) if isinstance(module, FusedBlock) else module(h)
        return h

    def replay(self, graphs: list[torch.cuda.CUDAGraph], backward: bool = False) -> None:
        """Launch the graphs of all parts; a block that is sharded is gathered before its own."""
        first = len(self.forward) - len(graphs)  # blocks below the first update have no backward pass
        for i, graph in sorted(enumerate(graphs, first), reverse=backward, key=itemgetter(0)):
            if self.store:
                self.store.unshard(i)
            graph.replay()


class Replay(torch.autograd.Function):
    """A recording as one autograd node, whose backward pass launches the backward graph."""

    @staticmethod
    def forward(ctx, x: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        recording.replay(recording.forward)
        return recording.buffers.y.view_as(recording.buffers.y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.recording.buffers.dy.copy_(dy)
        ctx.recording.replay(ctx.recording.backward, backward=True)
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
        self.store: BlockStore | None = getattr(model, "store", None)
        self.buffers: Buffers | None = None  # for the largest batch so far
        self.recordings: list[Recording] = []
        self.pool: Any = torch.cuda.MemPool()  # its id is typed differently from what graphs take
        self.stream = recording_stream()

    def __call__(self, tokens: Tensor, segments: Segments) -> Tensor:
        (count, T), body = tokens.shape, self.model.model
        for i, block in enumerate(body.layers):
            assert isinstance(block, FusedBlock)
            if block.scales_are_old and self.store:
                self.store.unshard(i)
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
            recording.replay(recording.forward)
            return buffers.y[:count]
        return Replay.apply(buffers.x.detach().requires_grad_(), recording)[:count]

    def __del__(self) -> None:
        """Free the graphs before the pool that they allocate from."""
        for recording in getattr(self, "recordings", ()):
            for graph in (*recording.forward, *recording.backward):
                graph.reset()

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
