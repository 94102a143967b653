"""Every number of the chapters that can be computed again, computed again.

    python -m tour.recompute             all of them, each beside what the chapter says; exit code 1 if one differs
    python -m tour.recompute --write     put what was computed into the chapters

In a chapter a comment behind a number names the function here that computes it:

    a weight takes **4.127** <!-- = bits_per_weight --> bits

A function returns the number as text, rounded as the chapter has it. Nothing here takes more than a few seconds.
"""

import math
import re
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import bench
import nanoqlora as nq
from nanoqlora.data.batches import Samples
from nanoqlora.data.files import find_files
from nanoqlora.data.packing import Rows, pack
from nanoqlora.data.prepare import Encoding, read_samples
from nanoqlora.gguf.reader import GGUFFile, read_gguf
from nanoqlora.model import Block, Llama, rope_frequencies
from nanoqlora.ops import elementwise, lora, lora_parts, nf4
from nanoqlora.tokenizer.tokenizer import load_tokenizer
from nanoqlora.weights.pretrained import empty_model

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
def llama3_8b(in_4bit: bool = True) -> Llama:
    """Llama-3-8B with every shape and no values; LoRA of rank 64 on all linear layers of the blocks."""
    config = bench.GEOMETRIES["llama3-8b"]
    device = torch.device("meta")
    model, _ = empty_model(config, lambda *_: torch.empty(0), load_in_4bit=in_4bit, dtype=torch.bfloat16, device=device)
    nq.inject_lora(model, r=64, alpha=32)
    return model


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
