"""The blocks of a training step as recorded CUDA graphs: launched as one, not kernel by kernel.

A block of the fast path is some fifty launches, and Python needs about 5 microseconds for each. On an 8B model the GPU
is slower than that; on a 1B model, or with short rows, it waits. A CUDA graph is recorded once and then costs one
launch. What a graph reads and writes stays at the same addresses, so inputs are copied to where it looks for them:

    x, the angles, the seeds of dropout, where documents end  ->  [blocks forward]  ->  hidden states
    gradient of the hidden states                             ->  [blocks backward] ->  gradients of A and B, added

Embedding, head, loss and optimizer are a few launches and stay outside. Rows of several documents: their number and
the longest length are launch parameters, so each is rounded up to a power of two, and every pair has its own graphs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Llama
from ..ops import Segments
from ..qlora import lora_layers
from . import stats
from .block import ON_HOST, FusedBlock, gradient_of


def can_record(model: Llama) -> bool:
    """Whether every block is one that a graph can hold: on a GPU, with all that it keeps there, in 16 bits.

    In float32 no kernel takes several documents, and attention builds a mask anew for every batch.
    """
    blocks, weight = model.model.layers, model.model.norm.weight
    return (
        weight.is_cuda
        and weight.itemsize == 2
        and not hasattr(model, "store")  # the blocks are gathered while they run
        and all(isinstance(b, FusedBlock) and b.keep not in ON_HOST for b in blocks)
    )


class RecordedSegments:
    """Stands in for `Segments` in a graph: the same documents' ends at a fixed address, padded with empty documents."""

    def __init__(self, segments: Segments, T: int, device: torch.device) -> None:
        self.one_each = segments.one_each
        self.longest = T if self.one_each else min(T, power_of_two(segments.longest))
        self._ends = torch.zeros(power_of_two(len(segments.documents)) + 1, dtype=torch.int32, device=device)
        self.set(segments)

    def set(self, segments: Segments) -> None:
        ends = segments.ends(self._ends.device)
        self._ends[: len(ends)].copy_(ends)
        self._ends[len(ends) :].copy_(ends[-1])

    def ends(self, device: torch.device) -> Tensor:
        return self._ends


class Recording:
    """Forward and backward graphs of all blocks and the last norm for B rows of T tokens.

    Args:
        first: an earlier recording of the same shape. Its buffers and its memory are used again, which is safe because
            the backward part of one runs before the forward part of the next: so all of them need what one needs.
    """

    def __init__(
        self, model: Llama, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, first: "Recording | None"
    ) -> None:
        self.model, device = model, x.device
        self.segments = RecordedSegments(segments, x.shape[1], device)
        self.layers = list(lora_layers(model).values())
        current = self.layers[0].row_seeds
        if first:
            self.x, self.rope, self.seeds, self.dy, self.y = first.x, first.rope, first.seeds, first.dy, first.y
            self.dy.zero_()  # nothing is added to any gradient while we try
        else:
            self.x = x.detach().clone()
            self.rope = tuple(c.clone() for c in rope)
            self.seeds = torch.zeros(len(x), dtype=torch.int64, device=device) if current is None else current.clone()
            self.dy, self.y = torch.zeros_like(x), torch.empty_like(x)
        self.pool = first.pool if first else torch.cuda.graph_pool_handle()
        for layer in self.layers:
            layer.row_seeds = self.seeds
            # Gradients made while recording would be made, and so be zero, in every replay.
            gradient_of(layer.lora_A), gradient_of(layer.lora_B)

        # One stream for all that is recorded: cuBLAS has 32 MiB of its own for each stream and thread.
        self.stream = side = first.stream if first else torch.cuda.Stream()
        if first is None:
            self.warm_up(segments)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

        before = torch.cuda.memory_stats()["active_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # NCCL's watchdog looks at the GPU too while we record.
        options = {"pool": self.pool, "stream": side, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **options):
            y = self.run(self.segments)
            self.y.copy_(y.detach())
        held = torch.cuda.memory_stats()["active_bytes.all.current"] - before
        with torch.cuda.graph(self.backward, **options):
            y.backward(self.dy)
        peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
        stats.count_graph(held=held, peak=peak)
        torch.cuda.reset_peak_memory_stats()  # what was recorded is counted; from here on the allocator sees the rest
        for layer in self.layers:
            layer.row_seeds = current

    def warm_up(self, segments: Segments) -> None:
        """Have one block compile, load and allocate what all blocks share, for both kernels of attention.

        Only before the first recording: a block that runs by itself later would need memory beside that of the graphs.
        """
        B, T = self.x.shape[:2]
        other = Segments(((1, T - 1),) * B) if segments.one_each else Segments.one_per_row(B, T)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for kind in (self.segments, RecordedSegments(other, T, self.x.device)):
                self.run(kind, blocks=1).backward(self.dy)
        torch.cuda.current_stream().wait_stream(self.stream)

    def run(self, segments: RecordedSegments, blocks: int | None = None) -> Tensor:
        """The last norm's result, after all blocks or so many of them."""
        h = self.x
        for block in self.model.model.layers[:blocks]:
            h = block(h, self.rope, segments, None)
        return self.model.model.norm(h)


class Replay(torch.autograd.Function):
    """Autograd's view of a recording: one node whose backward pass launches the other graph."""

    @staticmethod
    def forward(ctx, x: Tensor, recording: Recording) -> Tensor:
        ctx.recording = recording
        recording.forward.replay()
        return recording.y.view_as(recording.y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.recording.dy.copy_(dy)
        ctx.recording.backward.replay()
        return None, None


class GraphedBody:
    """As `model.model(tokens, segments)` in training, from graphs recorded at the first batch of each kind.

    A batch with fewer rows than the first, such as the last of an epoch, runs in the same graphs: rows of zeros fill it
    up, and their results are dropped. Launched kernel by kernel, its activations would need memory of their own beside
    that of the graphs, which is kept for good. Its gradients of zero change nothing.
    """

    def __init__(self, model: Llama) -> None:
        self.model, self.shape = model, None
        self.recordings: dict[tuple, Recording] = {}

    def __call__(self, tokens: Tensor, segments: Segments) -> Tensor:
        self.shape = self.shape or tokens.shape
        count, (B, T) = len(tokens), self.shape
        if tokens.shape[1] != T or count > B:
            raise ValueError(f"graphs of {B} rows of {T} tokens cannot run {count} rows of {tokens.shape[1]}")
        body = self.model.model
        x = F.pad(body.embed_tokens(tokens), (0, 0, 0, 0, 0, B - count))
        segments = with_empty_rows(segments, B - count)
        rope = body.rope(segments.positions.to(tokens.device))
        kind = segments.one_each or (power_of_two(len(segments.documents)), power_of_two(segments.longest))
        if kind not in self.recordings:
            first = next(iter(self.recordings.values()), None)
            self.recordings[kind] = Recording(self.model, x, rope, segments, first)
        recording = self.recordings[kind]
        recording.x.copy_(x)
        for ours, given in zip(recording.rope, rope, strict=True):
            ours.copy_(given)
        seeds = recording.layers[0].row_seeds
        if seeds is not None:
            recording.seeds[:count].copy_(seeds)
        recording.segments.set(segments)
        return Replay.apply(recording.x.detach().requires_grad_(), recording)[:count]


def with_empty_rows(segments: Segments, count: int) -> Segments:
    """The same with `count` rows of padding below, whose documents are as long as this kind of graph allows."""
    T = sum(segments.lengths[0])
    longest = T if segments.one_each else min(T, power_of_two(segments.longest))
    row = (longest,) * (T // longest) + ((T % longest,) if T % longest else ())
    return Segments(segments.lengths + (row,) * count)


def power_of_two(n: int) -> int:
    """The next power of two that is no smaller."""
    return 1 << (n - 1).bit_length()
