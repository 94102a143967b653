"""Decoding: the blocks once more, for one new token of every row at a time and without a backward pass.

A new token reads every weight once, so its time is the time to read the weights. What is prepared once for many tokens:

    weights     merged with the adapter, W + s B A with DoRA's norms, q k v side by side, gate and up too, where a copy
                fits into free memory; on a CPU that computes in float32 in half precision, with sums in float32.
                Elsewhere W as it is held: in 4 bits it is multiplied without being dequantized to memory
    cache       keys and values of all rows, allocated once for the prompts and all tokens that may follow
    a CUDA graph of one step on a GPU, which is some hundred small kernels

Prompts of different lengths are decoded together, each padded at its end: padding comes after the tokens of a prompt,
so none of them attends to it, and the new tokens overwrite its keys and values. Read next: `run/generate.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config.errors import is_out_of_memory
from ..model import Llama
from ..ops import Segments
from ..parallel import collectives
from ..qlora import QLoRALinear, block_linears
from . import stats
from .graphs import no_collection, recording_stream
from .memory import free_host_bytes, gpu_budget

Linear = Callable[[Tensor], Tensor]
ROUND_TO = 64  # the cache's number of tokens, so that a GPU's attention kernel can read its mask in vectors


def merged(layer: nn.Linear | QLoRALinear, dtype: torch.dtype) -> Tensor:
    """W + s B A (n_out, n_in), with DoRA its rows at their learned norms; rounded to `dtype` once."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    w = layer.rebuild(torch.promote_types(dtype, torch.float32))
    if layer.has_lora:
        w = w + layer.delta()
    if layer.magnitude is not None:
        w = w.mul_((layer.magnitude / w.norm(dim=1))[:, None])
    return w.to(dtype)


def matmul(weight: Tensor) -> Linear:
    """x W^T. In float32 on a CPU that has FBGEMM, W is rounded to half precision: half the bytes to read.

    The products and sums are in float32. With W in bfloat16 or float16 in the model's files nothing is rounded at all.
    """
    fbgemm = {"fbgemm", "x86"} & set(torch.backends.quantized.supported_engines)
    fbgemm = fbgemm if weight.is_cuda or weight.abs().max() <= torch.finfo(torch.float16).max else set()
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and fbgemm:
        packed = torch.ops.quantized.linear_prepack_fp16(weight.detach(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    return lambda x: F.linear(x, weight)


def as_held(layer: nn.Linear | QLoRALinear, dtype: torch.dtype) -> Linear:
    """c (x W^T + s x A^T B^T) with W as the layer holds it; DoRA's c is computed here, once."""
    if isinstance(layer, nn.Linear):
        return layer
    if not layer.has_lora:
        return layer.frozen
    A, B, c = layer.lora_A.to(dtype), layer.scaling * layer.lora_B, None
    if layer.magnitude is not None:
        c = layer.magnitude / (layer.rebuild(torch.float32) + layer.delta()).norm(dim=1)
        B = c[:, None] * B
    B = B.to(dtype)

    def linear(x: Tensor) -> Tensor:
        y = layer.frozen(x)
        return (y if c is None else (c * y).to(dtype)).addmm_(x @ A.t(), B.t())

    return linear


def merged_fits(model: Llama) -> bool:
    """Whether merged weights fit: into a quarter of a GPU's free memory, half of a CPU's. A sharded base does not.

    Within a run they have to fit below the peak of its steps, which is what was predicted for it.
    """
    device = model.model.norm.weight.device
    numbers = sum(layer.in_features * layer.out_features for _, layer in block_linears(model))
    if device.type != "cuda":
        free = free_host_bytes() // 2
    elif (below := stats.free_below_peak(device)) is not None:
        free = below
    else:
        free = (gpu_budget(device) - torch.cuda.memory_reserved(device)) // 4
    return not hasattr(model, "store") and 2 * numbers < free


class Decoder:
    """A model with its present weights prepared for decoding; later changes of them do not reach it.

    The model must be in evaluation mode. Every rank of a run has to call the same methods with the same arguments.
    """

    def __init__(self, model: Llama, dense: bool | None = None) -> None:
        """dense: multiply with merged copies of the weights; None: where they fit."""
        config, weight = model.config, model.model.norm.weight
        self.model, self.device, self.dtype = model, weight.device, weight.dtype
        self.head_counts = config.num_attention_heads, 2 * config.num_key_value_heads
        self.store = getattr(model, "store", None)
        self.complete = self.device.type == "cuda"  # attend to the complete cache under a mask, at fixed addresses
        self.cache = weight.new_empty(config.num_hidden_layers, 0, 0, self.head_counts[1], config.head_dim)
        self.dense = merged_fits(model) if dense is None else dense
        self.limit = config.max_position_embeddings
        with torch.no_grad():
            try:
                self.projections = [self.projections_of(i) for i in range(config.num_hidden_layers)]
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:  # under a limit of the system's
                if not (self.dense and dense is None and is_out_of_memory(error)):
                    raise
                self.dense = False
                self.projections = [self.projections_of(i) for i in range(config.num_hidden_layers)]
            self.head = matmul(model.lm_head.weight)

    def projections_of(self, i: int) -> list[Linear]:
        """The matmuls of block i: q, k and v; o; gate and up; down."""
        if self.store:
            self.store.unshard(i)
        block: Any = self.model.model.layers[i]
        attn, mlp = block.self_attn, block.mlp
        groups = (attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)
        if self.dense:
            return [matmul(torch.cat([merged(layer, self.dtype) for layer in layers])) for layers in groups]
        return [side_by_side([as_held(layer, self.dtype) for layer in layers]) for layers in groups]

    @torch.no_grad()
    def start(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """Compute the prompts: `logits` and `tokens` are then those of the first new token of each."""
        B, T = len(prompts), max(map(len, prompts))
        if self.cache.shape[1] != B or self.cache.shape[2] < T + max_new_tokens:
            self.allocate(B, T + max_new_tokens)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        padded = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=self.device)
        segments = Segments.one_per_row(B, T)

        def attend(i: int, q: Tensor, kv: Tensor) -> Tensor:
            self.cache[i, :, :T] = kv
            k, v = kv.chunk(2, dim=2)
            return ops.attention(q, k, v, segments)

        last = self.hidden(padded, self.angles[:, None, :T].expand(-1, B, -1, -1), attend)[self.rows, lengths - 1]
        self.positions.copy_(lengths)
        self.end = T
        self.choose(last)

    def allocate(self, B: int, size: int) -> None:
        """The cache and all else that a step reads and writes; on a GPU the step is recorded."""
        L, _, _, *heads = self.cache.shape
        self.cache = self.cache.new_zeros(L, B, size + -size % ROUND_TO, *heads)
        self.angles = torch.cat(self.model.model.rope(torch.arange(self.cache.shape[2], device=self.device)[None]))
        self.rows = torch.arange(B, device=self.device)
        self.positions, self.tokens = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.logits = self.cache.new_empty(B, self.model.config.vocab_size)
        self.run = record(self.one_step) if self.device.type == "cuda" and not self.store else self.one_step

    @torch.no_grad()
    def step(self) -> None:
        """Compute `tokens`; `logits` and `tokens` are then those of the next new token of each row."""
        self.end += 1
        self.run()

    def one_step(self) -> None:
        size = self.cache.shape[2] if self.complete else self.end
        bias: Tensor | None = None
        if self.complete or len(self.rows) > 1:
            mask = torch.arange(size, device=self.device) <= self.positions[:, None]  # (B, S)
            bias = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, -math.inf)[:, None, None]

        def attend(i: int, q: Tensor, kv: Tensor) -> Tensor:
            """The query heads that share a key/value head are like so many queries of one head."""
            self.write(self.cache[i], kv[:, 0])
            k, v = self.cache[i, :, :size].transpose(1, 2).chunk(2, dim=1)  # (B, KV, S, hd)
            q = q.view(len(q), k.shape[1], -1, q.shape[-1])  # (B, KV, H / KV, hd)
            mask = None if bias is None else bias.expand(-1, *q.shape[1:3], -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        hidden = self.hidden(self.tokens[:, None], self.angles[:, self.positions, None], attend)
        self.positions += 1
        self.choose(hidden[:, 0])

    def write(self, cache: Tensor, kv: Tensor) -> None:
        """Keys and values (B, 2 KV, hd) to the rows' places in the cache (B, S, 2 KV, hd).

        No two of them meet, so that `full_determinism`, whose kernel sorts them first, has nothing to order here.
        """
        is_ordered = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        cache.index_put_((self.rows, self.positions), kv)
        torch.use_deterministic_algorithms(is_ordered)

    def choose(self, hidden: Tensor) -> None:
        """Logits (B, V) and the likeliest tokens (B,) after hidden states (B, D)."""
        self.logits.copy_(self.head(hidden))
        torch.argmax(self.logits, 1, out=self.tokens)

    def hidden(self, tokens: Tensor, angles: Tensor, attend: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
        """The last norm's result (B, T, D).

        Args:
            tokens: (B, T). angles: their cosines and sines, (2, B, T, hd / 2).
            attend: from a block's number, queries (B, T, H, hd) and keys and values (B, T, 2 KV, hd), to as many
                numbers as the queries are.
        """
        layers: list[Any] = [*self.model.model.layers]
        norms = [norm for block in layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
        x = self.model.model.embed_tokens(tokens).flatten(0, 1)  # (N, D)
        cos, sin = angles.flatten(1, 2).contiguous()
        kernels, (H, KV2), eps = ops.kernels(x), self.head_counts, norms[0].eps
        h, _ = kernels.rms_norm(x, norms[0].weight, eps)
        norms.append(self.model.model.norm)
        for i, (qkv, o, gate_up, down) in enumerate(self.projections):
            if self.store:
                self.store.unshard(i)
            projected = qkv(h)
            kernels.rope_(projected, H + KV2 // 2, self.cache.shape[-1], cos, sin, False)
            heads = projected.view(*tokens.shape, H + KV2, -1)
            attended = attend(i, *heads.split(self.head_counts, dim=2)).reshape(len(x), -1)
            x, h, _ = kernels.add_rms_norm(x, o(attended), norms[2 * i + 1].weight, eps)
            x, h, _ = kernels.add_rms_norm(x, down(kernels.swiglu(gate_up(h))), norms[2 * i + 2].weight, eps)
        return h.view(*tokens.shape, -1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        stop_ids: Set[int],
        max_new_tokens: int,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield the next token of every prompt, None for those that have ended, until all have.

        Args:
            stop_ids: a row ends before the first of them.
            max_new_tokens: at most as many as the model's context holds after the longest prompt.
            draw: the next tokens (B,) from logits (B, V); by default the likeliest ones.
        """
        ended, longest = [False] * len(prompts), max(map(len, prompts))
        max_new_tokens = min(max_new_tokens, max(self.limit - longest, longest))
        for i in range(max_new_tokens):
            self.step() if i else self.start(prompts, max_new_tokens)
            if draw:
                self.tokens.copy_(draw(self.logits))
            tokens = collectives.broadcast(self.tokens).tolist()
            ended = [done or token in stop_ids for done, token in zip(ended, tokens, strict=True)]
            if all(ended):
                return
            yield [None if done else token for done, token in zip(ended, tokens, strict=True)]


def side_by_side(linears: Sequence[Linear]) -> Linear:
    """One matmul after the other, with the results as one tensor."""
    return linears[0] if len(linears) == 1 else lambda x: torch.cat([linear(x) for linear in linears], dim=1)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """`step` as a CUDA graph, which reads and writes the tensors that `step` does now. It runs twice before."""
    stream, graph = recording_stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles and loads kernels
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with no_collection(), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()  # thread_local: NCCL's watchdog may call the GPU
    return graph.replay
