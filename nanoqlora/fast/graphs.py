"""The blocks of a training step as CUDA graphs: one launch instead of one per kernel.

A fused block is about fifty launches, and Python needs about 5 microseconds for each. On an 8B model the GPU is slower
than that; on a 1B model, or with short rows, it waits. A CUDA graph is recorded once and then costs one launch. A graph
reads and writes at fixed addresses, so its inputs are copied there first:

    x, cos and sin, dropout seeds, where documents end  ->  [blocks forward]  ->  hidden states
    gradient of the hidden states                       ->  [blocks backward] ->  added to the gradients of A and B

Embedding, head, loss and optimizer are a few launches and stay outside. The number of documents and the longest length
are launch parameters of attention, so each is rounded up to a power of two, and every pair has its own graphs.
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
    """Whether the blocks can be recorded: fused, on one GPU, with nothing offloaded, in 16 bits.

    In float32 no kernel takes several documents, and attention creates a mask for every batch.
    """
    blocks, weight = model.model.layers, model.model.norm.weight
    return (
        weight.is_cuda
        and weight.itemsize == 2
        and not hasattr(model, "store")  # the blocks are gathered while they run
        and all(isinstance(b, FusedBlock) and b.keep not in ON_HOST for b in blocks)
    )


class RecordedSegments:
    """In place of `Segments` in a graph: the documents' ends at a fixed address, padded with empty documents."""

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


class Buffers:
    """What all recordings share: tensors at fixed addresses, the memory pool of the graphs, and a stream.

    Sharing is safe because the backward graph of one recording runs before the forward graph of the next: so all
    recordings need the memory of one.
    """

    def __init__(self, x: Tensor, rope: tuple[Tensor, Tensor], row_seeds: Tensor | None) -> None:
        self.x = x.detach().clone()
        self.rope = tuple(c.clone() for c in rope)
        self.seeds = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if row_seeds is not None:
            self.seeds.copy_(row_seeds)
        self.dy, self.y = torch.zeros_like(x), torch.empty_like(x)
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # one, because cuBLAS allocates 32 MiB for each stream and thread


class Recording:
    """Forward and backward graphs of all blocks and the last norm, for B rows of T tokens."""

    def __init__(self, model: Llama, buffers: Buffers, segments: Segments, is_first: bool) -> None:
        self.model, self.buffers = model, buffers
        self.segments = RecordedSegments(segments, buffers.x.shape[1], buffers.x.device)
        self.layers = list(lora_layers(model).values())
        row_seeds = self.layers[0].row_seeds
        for layer in self.layers:
            layer.row_seeds = buffers.seeds
            # Gradients that are allocated during the recording would be set to zero in every replay.
            gradient_of(layer.lora_A), gradient_of(layer.lora_B)
        if is_first:
            self.warm_up(segments)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

        before = torch.cuda.memory_stats()["active_bytes.all.current"]
        torch.cuda.reset_peak_memory_stats()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with self.capture(self.forward):
            y = self.run(self.segments)
            buffers.y.copy_(y.detach())
        held = torch.cuda.memory_stats()["active_bytes.all.current"] - before
        with self.capture(self.backward):
            y.backward(buffers.dy)
        peak = torch.cuda.memory_stats()["active_bytes.all.peak"]
        stats.count_graph(held=held, peak=peak)
        torch.cuda.reset_peak_memory_stats()  # the graph's peak is counted; from here on the allocator sees the rest
        for layer in self.layers:
            layer.row_seeds = row_seeds

    def capture(self, graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
        """Record what runs within. thread_local: NCCL's watchdog thread calls the GPU in the meantime."""
        buffers = self.buffers
        return torch.cuda.graph(graph, pool=buffers.pool, stream=buffers.stream, capture_error_mode="thread_local")

    def warm_up(self, segments: Segments) -> None:
        """Run one block, so that kernels are compiled and loaded and shared buffers allocated, for both attentions.

        Only before the first recording: a block that runs outside of the graphs later would need memory of its own.
        dy is zero, so nothing is added to the gradients.
        """
        buffers = self.buffers
        B, T = buffers.x.shape[:2]
        other = Segments(((1, T - 1),) * B) if segments.one_each else Segments.one_per_row(B, T)
        buffers.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(buffers.stream):
            for kind in (self.segments, RecordedSegments(other, T, buffers.x.device)):
                self.run(kind, blocks=1).backward(buffers.dy)
        torch.cuda.current_stream().wait_stream(buffers.stream)

    def run(self, segments: RecordedSegments, blocks: int | None = None) -> Tensor:
        """The last norm's result, after all blocks or the first few."""
        h = self.buffers.x
        for block in self.model.model.layers[:blocks]:
            h = block(h, self.buffers.rope, segments, None)
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
    """As `model.model(tokens, segments)` in training, with graphs recorded at the first batch of each kind.

    A batch with fewer rows than the first, such as the last of an epoch, runs in the same graphs: rows of zeros are
    added, and their results are dropped. Their gradients are zero. Launched kernel by kernel, it would need memory for
    its activations beside that of the graphs, which is never freed.
    """

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.buffers: Buffers | None = None  # created with the first batch, whose shape all graphs have
        self.recordings: dict[bool | tuple[int, int], Recording] = {}

    def __call__(self, tokens: Tensor, segments: Segments) -> Tensor:
        (count, width), body = tokens.shape, self.model.model
        B, T = self.buffers.x.shape[:2] if self.buffers else tokens.shape
        if width != T or count > B:
            raise ValueError(f"graphs of {B} rows of {T} tokens cannot run {count} rows of {width}")
        x = F.pad(body.embed_tokens(tokens), (0, 0, 0, 0, 0, B - count))
        segments = with_empty_rows(segments, B - count)
        rope = body.rope(segments.positions.to(tokens.device))
        recording = self.recording_for(x, rope, segments)
        recording.buffers.x.copy_(x)
        for ours, given in zip(recording.buffers.rope, rope, strict=True):
            ours.copy_(given)
        seeds = recording.layers[0].row_seeds
        if seeds is not None:
            recording.buffers.seeds[:count].copy_(seeds)
        recording.segments.set(segments)
        return Replay.apply(recording.buffers.x.detach().requires_grad_(), recording)[:count]

    def recording_for(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments) -> Recording:
        """The recording for such documents; made now if this is their first batch."""
        kind = segments.one_each or (power_of_two(len(segments.documents)), power_of_two(segments.longest))
        if kind not in self.recordings:
            is_first = self.buffers is None
            row_seeds = next(iter(lora_layers(self.model).values())).row_seeds
            self.buffers = self.buffers or Buffers(x, rope, row_seeds)
            self.recordings[kind] = Recording(self.model, self.buffers, segments, is_first)
        return self.recordings[kind]


def with_empty_rows(segments: Segments, count: int) -> Segments:
    """The same with `count` rows of padding at the end, whose documents are as long as this kind of graph allows."""
    T = sum(segments.lengths[0])
    longest = T if segments.one_each else min(T, power_of_two(segments.longest))
    row = (longest,) * (T // longest) + ((T % longest,) if T % longest else ())
    return Segments(segments.lengths + (row,) * count)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
