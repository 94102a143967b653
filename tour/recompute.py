"""Every number of the chapters that can be computed again, computed again.

    python -m tour.recompute             all of them, each beside what the chapter says; exit code 1 if one differs
    python -m tour.recompute --write     put what was computed into the chapters

In a chapter a comment behind a number names the function here that computes it:

    a weight takes **4.127** <!-- = bits_per_weight --> bits

A function returns the number as text, rounded as the chapter has it. Nothing here takes more than a few seconds.
"""

import math
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import bench
import nanoqlora as nq
from nanoqlora import ops
from nanoqlora.data.batches import Sample, Samples, collate
from nanoqlora.data.files import find_files
from nanoqlora.data.packing import Rows, pack
from nanoqlora.data.prepare import Encoding, read_samples
from nanoqlora.export.certificate import compare
from nanoqlora.fast import memory
from nanoqlora.fast.block import Keep
from nanoqlora.gguf.container import Metadata
from nanoqlora.gguf.ggml_blocks import FORMATS as FORMATS
from nanoqlora.gguf.ggml_blocks import quantize
from nanoqlora.gguf.reader import GGUFFile, read_gguf
from nanoqlora.gguf.writer import NewTensor, write_gguf
from nanoqlora.model import Block, Llama, ModelConfig, rope_frequencies
from nanoqlora.ops import elementwise, lora, lora_parts, nf4
from nanoqlora.ops import loss as cross_entropy
from nanoqlora.ops.lora import dropout_mask
from nanoqlora.parallel.fsdp import BlockStore, block_bytes
from nanoqlora.qlora import lora_layers
from nanoqlora.run.optim import learning_rate_at, make_optimizer, set_learning_rate
from nanoqlora.run.optimizer_state import as_tensors, load_state
from nanoqlora.run.state import row_seeds
from nanoqlora.tokenizer.tokenizer import load_tokenizer
from nanoqlora.weights.pretrained import empty_model
from tour.measure import measured

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = re.compile(r"([-+\d.,e]*\d)(\*\*)? ?<!-- = (\w+) -->")
NUMBERS: dict[str, Callable[[], str]] = {}


def number(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a number by the name of its function; it is computed once."""
    NUMBERS[function.__name__] = lru_cache(function)
    return NUMBERS[function.__name__]


@lru_cache
def weights() -> GGUFFile:
    """The demo's model."""
    return read_gguf(MODEL)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(computed: Tensor, true: Tensor) -> float:
    """The root mean square of the error, as a share of the root mean square of what is right."""
    return ((computed - true).square().mean() / true.square().mean()).sqrt().item()


# 1. Text to ids to mask ----------------------------------------------------------------------------------------------


@lru_cache
def samples(name: str = "pirate") -> Samples:
    """All chats of data/NAME.jsonl as tokens with masks, as training gets them."""
    files = find_files(ROOT / "data" / f"{name}.jsonl")
    return read_samples(files, Encoding(None, load_tokenizer(MODEL), sequence_len=512)).samples


@number
def tokens_of_the_data() -> str:
    return f"{samples().lengths.sum():,}"


@number
def supervised_tokens_of_the_data() -> str:
    return f"{samples().num_targets.sum():,}"


@number
def supervised_share() -> str:
    return f"{100 * samples().num_targets.sum() / samples().lengths.sum():.0f}"


# 2. The model in one picture -----------------------------------------------------------------------------------------


@lru_cache
def geometry(name: str, r: int = 64, **changes: int) -> Llama:
    """A Llama-3 in 4 bits with every shape and no values, and LoRA of rank r on all linear layers of the blocks."""
    config = replace(bench.GEOMETRIES[name], **changes)
    device = torch.device("meta")
    model, _ = empty_model(config, lambda *_: torch.empty(0), load_in_4bit=True, dtype=torch.bfloat16, device=device)
    if r:
        nq.inject_lora(model, r=r, alpha=32)
    return model


def llama3_8b() -> Llama:
    return geometry("llama3-8b")


@number
def parameters_of_8b() -> str:
    with torch.device("meta"):
        model = Llama(bench.GEOMETRIES["llama3-8b"])
    return f"{sum(p.numel() for p in model.parameters()):,}"


@number
def parameters_of_a_block() -> str:
    with torch.device("meta"):
        block = Block(bench.GEOMETRIES["llama3-8b"], 0)
    return f"{sum(p.numel() for p in block.parameters()):,}"


# 3. RoPE and documents in a row --------------------------------------------------------------------------------------


@number
def slowest_turn() -> str:
    """Tokens for one turn of the last pair of dimensions of a head of Llama-3."""
    return f"{2 * math.pi / rope_frequencies(bench.GEOMETRIES['llama3-8b'])[-1].item():,.0f}"


def score_at(query: int, key: int) -> float:
    """q . k of one head of 64 dimensions, in float64, with q and k rotated to these positions."""
    frequencies = 10_000.0 ** -(torch.arange(32).double() / 32)
    q, k = normal(1, 1, 1, 64).double(), normal(1, 1, 1, 64, seed=1).double()
    angles = torch.tensor([query, key])[:, None] * frequencies
    q, k = (
        elementwise.apply_rope(x, angle.cos()[None, None], angle.sin()[None, None])
        for x, angle in zip((q, k), angles, strict=True)
    )
    return (q * k).sum().item()


@number
def score_near_the_start() -> str:
    return f"{score_at(10, 3):.6f}"


@number
def score_far_behind() -> str:
    return f"{score_at(1010, 1003):.6f}"


@lru_cache
def packed_rows() -> Rows:
    """The demo's chats in rows of 512 tokens."""
    return pack(samples().lengths, range(len(samples())), 512)


@number
def rows_when_packed() -> str:
    return str(len(packed_rows()))


@number
def share_of_a_row_used() -> str:
    return f"{100 * samples().lengths.sum() / (512 * len(packed_rows())):.1f}"


# 4. Four bits --------------------------------------------------------------------------------------------------------


@number
def bits_per_weight() -> str:
    """4 bits of code; 8 bits of scale for 64 weights; 32 bits for 256 scales."""
    return f"{4 + 8 / nf4.BLOCKSIZE + 32 / (nf4.BLOCKSIZE * nf4.NESTED_BLOCKSIZE):.3f}"


def in_four_bits(w: Tensor) -> Tensor:
    """What is left of a matrix after quantization, with double quantization of its scales."""
    packed, absmax = nf4.quantize_nf4(w)
    return nf4.dequantize_nf4(packed, nf4.dequantize_absmax(*nf4.quantize_absmax(absmax)))


def in_even_steps(w: Tensor) -> Tensor:
    """The same with 15 evenly spaced levels from -1 to 1, which is what 4 bits that hold zero allow."""
    groups = w.view(-1, nf4.BLOCKSIZE)
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() * scale).view(w.shape)


@number
def nf4_error() -> str:
    """In percent, on normally distributed weights."""
    w = normal(1024, 1024)
    return f"{100 * relative_error(in_four_bits(w), w):.1f}"


@number
def even_error() -> str:
    w = normal(1024, 1024)
    return f"{100 * relative_error(in_even_steps(w), w):.1f}"


@number
def nf4_error_of_the_demo() -> str:
    """In percent, on a matrix of the demo's model."""
    w = weights().load("blk.10.ffn_up.weight")
    return f"{100 * relative_error(in_four_bits(w), w):.1f}"


# 5. LoRA -------------------------------------------------------------------------------------------------------------


@number
def trained_values_of_8b() -> str:
    return f"{sum(p.numel() for p in llama3_8b().parameters() if p.requires_grad):,}"


@number
def trained_share_of_8b() -> str:
    return f"{100 * int(trained_values_of_8b().replace(',', '')) / int(parameters_of_8b().replace(',', '')):.1f}"


def a_lora_layer() -> dict[str, Tensor]:
    """x, W, A and B in float64: 12 tokens, 40 inputs, 24 outputs, rank 4."""
    shapes = {"x": (1, 12, 40), "W": (24, 40), "A": (4, 40), "B": (24, 4)}
    return {name: 0.2 * normal(*shape, seed=i).double() for i, (name, shape) in enumerate(shapes.items())}


def output_of(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return lora.lora_linear(x, lambda _: W, A, B, 2.0, None)


def gradients_by_hand(x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float = 2.0) -> dict[str, Tensor]:
    """The formulas of the chapter, for the loss sum(tanh(y)), by the functions that the fused block uses."""
    dy = (1 - output_of(x, W, A, B).tanh().square()).flatten(0, 1)
    rows = x.flatten(0, 1)
    xa, dxa, dx = lora_parts.lora_down(rows, A), s * (dy @ B), dy @ W
    lora_parts.lora_dx_add_(dx, dxa, A)
    return {"A": lora_parts.lora_backward_A(dxa, rows), "B": lora_parts.lora_backward_B(dy, xa, s), "x": dx[None]}


def gradient_by_differences(name: str, step: float) -> Tensor:
    """The gradient of one operand of that loss: a central difference for each of its values."""
    given = a_lora_layer()
    flat = given[name].view(-1)
    gradient = torch.empty_like(flat)
    for i in range(len(flat)):
        kept, losses = flat[i].item(), []
        for moved in (kept + step, kept - step):
            flat[i] = moved
            losses.append(output_of(**given).tanh().sum().item())
        flat[i] = kept
        gradient[i] = (losses[0] - losses[1]) / (2 * step)
    return gradient.view(given[name].shape)


def gradient_error(step: float) -> float:
    """The largest relative error of dA, dB and dx."""
    formulas = gradients_by_hand(**a_lora_layer())
    return max(relative_error(gradient_by_differences(name, step), right) for name, right in formulas.items())


@number
def gradient_digits() -> str:
    """Decimal digits in which differences and formulas agree."""
    return str(math.floor(-math.log10(gradient_error(1e-4))))


# 6. Where the memory goes --------------------------------------------------------------------------------------------


def memory_parts(N: int, keeps: Sequence[Keep], host_embedding: bool = False) -> dict[str, float]:
    """The planner's prediction for a step of Llama-3-8B with N tokens, in GiB, in parts."""
    model = llama3_8b()
    values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    base = memory.base_bytes(model, "replicate", 1, host_embedding=host_embedding)
    head = 2 * model.config.vocab_size * model.config.hidden_size  # bytes; the embedding has as many
    tables = head * (1 if host_embedding else 2)
    rank_sum = sum(layer.lora_A.shape[0] for layer in lora_layers(model).values()) // model.config.num_hidden_layers
    kept = sum(memory.kept_bytes(model.config, N, rank_sum, keep) for keep in keeps)
    parts = {"blocks, 4 bits": base - tables, "embedding, head": tables, "adapter, AdamW": 16 * values, "kept": kept}
    parts["scratch"] = memory.step_bytes(model, N, keeps, 8, base) - sum(parts.values())
    return {name: part / 2**30 for name, part in parts.items()}


def memory_settings() -> dict[str, tuple[dict[str, float], float]]:
    """Setting -> parts in GiB, and what docs/speed.md has measured on an H100."""
    model, L = llama3_8b(), 32
    everything: list[Keep] = ["all"] * L
    limit = int(18.6 * 2**30 * (1 - memory.SPARE))
    base = memory.base_bytes(model, "replicate", 1)
    with mock.patch.object(memory, "held_bytes", lambda _: base):
        auto = memory.choose_keeps(model, 8192, limit, host_bytes=2**38)
    offload = memory.keeps_for(model, "offload", 8192)
    return {
        "8 x 2048, everything kept": (memory_parts(16384, everything), 55.6),
        "4 x 2048, everything kept": (memory_parts(8192, everything), 31.8),
        "4 x 2048, auto, 18.6 GiB allowed": (memory_parts(8192, auto), 17.0),
        "1 x 2048, everything kept": (memory_parts(2048, everything), 14.2),
        "4 x 2048, offload": (memory_parts(8192, offload, True), 8.4),
        "1 x 2048, offload": (memory_parts(2048, offload, True), 7.5),
    }


def predicted(setting: str) -> str:
    return f"{sum(memory_settings()[setting][0].values()):.1f}"


@number
def gib_of_4x2048() -> str:
    return predicted("4 x 2048, everything kept")


@number
def gib_of_4x2048_auto() -> str:
    return predicted("4 x 2048, auto, 18.6 GiB allowed")


@number
def gib_of_4x2048_offload() -> str:
    return predicted("4 x 2048, offload")


@number
def gib_of_1x2048() -> str:
    return predicted("1 x 2048, everything kept")


@number
def gib_of_1x2048_offload() -> str:
    return predicted("1 x 2048, offload")


@number
def gib_kept_by_4x2048() -> str:
    return f"{memory_settings()['4 x 2048, everything kept'][0]['kept']:.1f}"


# 7. One step ---------------------------------------------------------------------------------------------------------


@lru_cache
def small_model() -> Llama:
    """A random model of two blocks in float64, with LoRA of random values."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Llama(ModelConfig.from_hf(sizes | {"vocab_size": 64})).double()
    for p in model.parameters():
        p.data.normal_(0, 0.2)
    nq.inject_lora(model, r=4, alpha=8)
    for layer in lora_layers(model).values():
        layer.lora_B.data.normal_(0, 0.2)
    return model.double()


def rows_of_a_step() -> list[Sample]:
    """Four rows of 24 tokens with 20, 3, 9 and 1 supervised tokens."""
    rows = torch.randint(64, (4, 24), generator=torch.Generator().manual_seed(0))
    return [Sample(row, torch.arange(24) >= 24 - n) for row, n in zip(rows, (20, 3, 9, 1), strict=True)]


def gradient_of_step(parts: Sequence[Sequence[int]], mean_of_means: bool = False) -> Tensor:
    """The gradient of a step over these rows, cut into micro-batches; of one rank or, summed, of several."""
    model, rows = small_model(), rows_of_a_step()
    trained = [p for p in model.parameters() if p.requires_grad]
    num_targets = sum(row.num_targets for row in rows)
    total = torch.zeros(sum(p.numel() for p in trained), dtype=torch.float64)
    for part in parts:
        batch = collate([[rows[i]] for i in part])
        with mock.patch.object(ops, "_fast", False):  # the fast twins sum gradients in float32
            hidden = model.model(batch.tokens, batch.segments).flatten(0, 1)
        loss = cross_entropy.linear_cross_entropy(hidden[batch.supervised], model.lm_head.weight, batch.targets)
        loss = loss / (len(batch.targets) * len(parts) if mean_of_means else num_targets)
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])
    return total


@number
def equal_digits() -> str:
    """In which the gradients of all ways to cut a step agree; more than 13 are not counted."""
    once = gradient_of_step([range(4)])
    ways = [[range(2), range(2, 4)], [[i] for i in range(4)], [[0, 2], [1, 3]]]
    return str(min(13, math.floor(-math.log10(max(relative_error(gradient_of_step(way), once) for way in ways)))))


@number
def error_of_mean_of_means() -> str:
    """In percent of the right gradient."""
    wrong = gradient_of_step([[i] for i in range(4)], mean_of_means=True)
    return f"{100 * relative_error(wrong, gradient_of_step([range(4)])):.0f}"


# 8. Rounding ---------------------------------------------------------------------------------------------------------


@number
def sum_of_ones() -> str:
    """4096 ones, added one after the other in bfloat16."""
    total = torch.zeros((), dtype=torch.bfloat16)
    for _ in range(4096):
        total += 1
    return f"{total.item():.0f}"


@number
def half_a_step() -> str:
    """The largest relative error of one rounding to bfloat16, in percent."""
    return f"{100 * 2**-8:.2f}"


@number
def chain_of_roundings() -> str:
    """Relative error, in percent, of 64 additions to a residual stream that is rounded to bfloat16 after each."""
    exact, rounded = torch.zeros(4096), torch.zeros(4096, dtype=torch.bfloat16)
    for number in range(64):
        update = normal(4096, seed=number)
        exact, rounded = exact + update, rounded + update.bfloat16()
    return f"{100 * relative_error(rounded.float(), exact):.1f}"


# 10. FSDP by hand ----------------------------------------------------------------------------------------------------


def events_of_micro_batch(num_blocks: int) -> list[tuple[str, int, int]]:
    """What the store does for a forward and a backward pass, in order: "gather" or "use", block, its slot."""
    store = BlockStore(0, 1, num_blocks, 256, 0, torch.device("cpu"))
    events: list[tuple[str, int, int]] = []
    begin = store._all_gather

    def all_gather(i: int) -> None:
        events.append(("gather", i, i % 2))
        begin(i)

    store._all_gather = all_gather  # type: ignore[method-assign]
    for turn in range(2):  # the second micro-batch finds the slots as the first has left them
        events.clear()
        for i in [*range(num_blocks), *reversed(range(num_blocks))]:
            store.unshard(i)
            events.append(("use", i, i % 2))
        assert turn or events
    return events


@number
def gathers_of_8b() -> str:
    return str(sum(kind == "gather" for kind, _, _ in events_of_micro_batch(32)))


@number
def megabytes_of_a_block() -> str:
    return f"{block_bytes(llama3_8b().model.layers, 4) / 1e6:.0f}"


@number
def gathered_gigabytes() -> str:
    return f"{int(gathers_of_8b()) * block_bytes(llama3_8b().model.layers, 4) / 1e9:.1f}"


@number
def summed_megabytes() -> str:
    """The flat gradient of LoRA, float32."""
    return f"{4 * int(trained_values_of_8b().replace(',', '')) / 1e6:.0f}"


@number
def sharded_gib() -> str:
    return f"{memory.base_bytes(llama3_8b(), 'full_shard', 4) / 2**30:.1f}"


@number
def replicated_gib() -> str:
    return f"{memory.base_bytes(llama3_8b(), 'replicate', 4) / 2**30:.1f}"


# 12. A GGUF byte by byte ---------------------------------------------------------------------------------------------

SMALL = ROOT / "docs" / "tour" / "small.gguf"


def write_small_gguf(path: Path) -> None:
    """256 weights of the demo's model in Q4_K, with two metadata entries, by the project's own writer."""
    w = weights().load("blk.0.ffn_down.weight")[0, :256]
    metadata: Metadata = {"general.architecture": ("string", "llama"), "llama.block_count": ("u32", 1)}
    write_gguf(path, metadata, [NewTensor("w", (256,), "Q4_K", lambda: quantize(w[None], "Q4_K")[0])])


@number
def bytes_of_small_gguf() -> str:
    """The file in docs/tour is what the project writes."""
    with tempfile.TemporaryDirectory() as folder:
        write_small_gguf(Path(folder) / "small.gguf")
        assert (Path(folder) / "small.gguf").read_bytes() == SMALL.read_bytes()
    return str(len(SMALL.read_bytes()))


def q4_k_block() -> bytes:
    info = read_gguf(SMALL).tensors["w"]
    return SMALL.read_bytes()[info.offset : info.offset + info.num_bytes]


@number
def scale_d() -> str:
    """The first two bytes, a number in half precision."""
    return f"{struct.unpack('<e', q4_k_block()[:2])[0]:.7f}"


@number
def scale_dmin() -> str:
    return f"{struct.unpack('<e', q4_k_block()[2:4])[0]:.7f}"


@number
def scale_of_group_0() -> str:
    return str(q4_k_block()[4] & 63)


@number
def minimum_of_group_0() -> str:
    return str(q4_k_block()[8] & 63)


@number
def code_0() -> str:
    return str(q4_k_block()[16] & 15)


@number
def weight_0() -> str:
    """d * scale * code - dmin * minimum, as by hand; and the project reads the same."""
    d, dmin = struct.unpack("<ee", q4_k_block()[:4])
    by_hand = d * int(scale_of_group_0()) * int(code_0()) - dmin * int(minimum_of_group_0())
    assert abs(by_hand - read_gguf(SMALL).load("w")[0].item()) < 1e-7
    return f"{by_hand:.6f}"


@number
def original_weight_0() -> str:
    return f"{weights().load('blk.0.ffn_down.weight')[0, 0].item():.6f}"


@number
def bits_of_q4_k() -> str:
    return f"{8 * len(q4_k_block()) / 256:.1f}"


# 9. From plain to fast -----------------------------------------------------------------------------------------------


@number
def tflop_of_a_step() -> str:
    """Matmuls with W and the head of Llama-3-8B, forward and for the inputs' gradients, 8,192 tokens."""
    linear = [m for m in llama3_8b().modules() if hasattr(m, "in_features")]
    weights = sum(m.in_features * m.out_features for m in linear)
    return f"{4 * 8192 * weights / 1e12:.0f}"


@number
def tflops_of_the_matmuls() -> str:
    """TFLOP a second, where an H100 takes 345 ms for them."""
    return f"{int(tflop_of_a_step()) / 0.345:.0f}"


@number
def megabytes_of_gate_and_up() -> str:
    """Of 8,192 tokens, in 16 bits."""
    return f"{2 * 8192 * 2 * llama3_8b().config.intermediate_size / 1e6:.0f}"


# 11. Merge -----------------------------------------------------------------------------------------------------------


def form(name: str) -> dict[str, Any]:
    return next(form for form in measured("merge")["forms"] if form["form"] == name)


@number
def kl_of_original() -> str:
    return f"{form('merged on original')['mean_kl']:.2f}"


@number
def kl_of_base() -> str:
    return f"{form('base without adapter')['mean_kl']:.2f}"


@number
def kl_of_q8_0() -> str:
    return f"{form('GGUF q8_0')['mean_kl']:.4f}"


@number
def kl_of_q4_k_m() -> str:
    return f"{form('GGUF q4_k_m')['mean_kl']:.3f}"


@number
def kl_of_two_coins() -> str:
    """KL of p = (0.9, 0.1) from q = (0.8, 0.2), in nats."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.2]])
    kl, _, _ = compare((p.log(), torch.eye(2)), (q.log(), torch.eye(2)), torch.tensor([0]))
    return f"{kl:.4f}"


@number
def merge_of_one_layer() -> str:
    """How far, in percent of W, the two merged weights of a layer are apart: the error of NF4, whatever the update."""
    w = weights().load("blk.10.ffn_up.weight")
    update = 0.01 * normal(*w.shape) * w.std()
    return f"{100 * relative_error(in_four_bits(w) + update, w + update):.1f}"


# 13. Prompt, mask, Modelfile -----------------------------------------------------------------------------------------


LLAMA3 = "Llama-3's template"


@number
def tokens_of_a_missing_marker() -> str:
    """Llama-3's end token in the vocabulary of SmolLM2, which does not have it."""
    return str(len(load_tokenizer(MODEL).encode("<|eot_id|>", special=True)))


@number
def tokens_around_a_question() -> str:
    """What the chat template of the demo adds to a question."""
    tok, question = load_tokenizer(MODEL), "How many do neither?"
    prompt = tok.encode_chat([{"role": "user", "content": question}], add_generation_prompt=True)
    return str(len(prompt) - len(tok.encode(question)))


@number
def answers_asked() -> str:
    return str(measured("prompts")["questions"])


@number
def answers_ended() -> str:
    return str(measured("prompts")["as in training"]["ended"])


@number
def answers_ended_with_llama3s_template() -> str:
    return str(measured("prompts")[LLAMA3]["ended"])


@number
def loss_as_in_training() -> str:
    return f"{measured('prompts')['as in training']['loss']:.2f}"


@number
def loss_with_llama3s_template() -> str:
    """In nats a token, of the right answers."""
    return f"{measured('prompts')[LLAMA3]['loss']:.2f}"


# 14. Kill it ---------------------------------------------------------------------------------------------------------


def trained_for(steps: Sequence[int], state: dict[str, Any] | None, flat: torch.nn.Parameter) -> dict[str, Any]:
    """Some steps of a small problem with the project's optimizer, schedule and dropout -> the optimizer's state."""
    optimizer = make_optimizer("adamw_torch", flat, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    if state is not None:
        load_state(optimizer, state)
    for step in steps:
        mask = dropout_mask((1, 1, len(flat)), 0.1, row_seeds(42, step, 0, 1), torch.float32)[0, 0]
        flat.grad = (flat.detach() * mask - normal(len(flat), seed=step)) / len(flat)
        set_learning_rate(optimizer, learning_rate_at(step, 40, 4, 1e-2, "cosine", 0.0))
        optimizer.step()
    return {name: x.clone() for name, x in as_tensors(optimizer.state_dict()).items()}


@lru_cache
def resumed(with_state: bool) -> tuple[Tensor, Tensor]:
    """The values after 40 steps, and after 20 and, from what a checkpoint holds, 20 more."""
    once, twice = (torch.nn.Parameter(normal(1000)) for _ in range(2))
    trained_for(range(40), None, once)
    state = trained_for(range(20), None, twice)
    again = torch.nn.Parameter(twice.detach().clone())
    trained_for(range(20, 40), state if with_state else None, again)
    return once.detach(), again.detach()


@number
def values_that_differ() -> str:
    """Of 1000, after a resume with all that a checkpoint holds."""
    once, again = resumed(True)
    return str((once != again).sum().item())


@number
def values_that_differ_without_state() -> str:
    once, again = resumed(False)
    return f"{(once != again).sum().item():,}"


@number
def bytes_of_a_checkpoint() -> str:
    """A, B and AdamW's two means of Llama-3-8B with r 64, in GB."""
    return f"{3 * 4 * int(trained_values_of_8b().replace(',', '')) / 1e9:.1f}"


# ---------------------------------------------------------------------------------------------------------------------


def marks(text: str) -> list[tuple[str, str]]:
    """(name, number as the text has it) of every mark."""
    return [(m[3], m[1]) for m in MARK.finditer(text)]


def main() -> int:
    wrong = 0
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text("utf-8")
        for name, written in marks(text):
            computed = NUMBERS[name]()
            wrong += computed != written
            differs = "" if computed == written else f"   the text has {written}"
            print(f"{path.relative_to(ROOT)!s:32} {name:32} {computed}{differs}", flush=True)
        if "--write" in sys.argv:
            path.write_text(MARK.sub(lambda m: f"{NUMBERS[m[3]]()}{m[2] or ''} <!-- = {m[3]} -->", text), "utf-8")
    return 0 if "--write" in sys.argv else min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
