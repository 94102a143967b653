"""How fast is a training step, and how far from the fastest that this machine could do it?

    python bench.py [--model llama3-8b | FOLDER | FILE.gguf] [--micro_batch_size 4] [--sequence_len 2048] ...
    python bench.py --model llama3-8b --decode  prefill and decode of a 4-bit model with an adapter
    python bench.py --deploy OUTPUT_DIR         prefill and decode of what a run left (nanoqlora/export/answer_speed.py)

What is timed is the loop of train.py itself, on random tokens, all supervised: rows to tensors, forward, backward, sum
over the ranks, clip, AdamW, log. The floor is what no QLoRA step in this dtype can beat: the base's and the head's
matmuls, forward and input gradient, and attention, alone, measured in the same run. Prints a table and one JSON line;
every speed we publish comes from here.
"""

import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nanoqlora.config.load import answer_early, load_options, make_config
from nanoqlora.config.options import BenchOptions

if __name__ == "__main__":
    answer_early(BenchOptions)  # --help and wrong settings, before PyTorch is imported

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from nanoqlora import ops
from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import UserError
from nanoqlora.config.files import check_file, write_text
from nanoqlora.config.schema import Config
from nanoqlora.data.batches import SUPERVISED, Samples
from nanoqlora.data.packing import BatchSchedule, Rows
from nanoqlora.export.answer_speed import bench_deploy, speed_of
from nanoqlora.fast.decode import Decoder, merged_fits
from nanoqlora.fast.graphs import recorded_width
from nanoqlora.fast.memory import held_bytes, step_bytes
from nanoqlora.fast.projections import Fp8
from nanoqlora.fast.stats import GIB
from nanoqlora.model import Llama, ModelConfig
from nanoqlora.ops import Segments
from nanoqlora.parallel import distributed
from nanoqlora.run.build import build_run
from nanoqlora.run.log import Display, Metrics
from nanoqlora.run.optim import state_bytes
from nanoqlora.run.state import Run
from nanoqlora.weights.checkpoint import model_config, open_weights
from nanoqlora.weights.pretrained import Fill, empty_model, open_model
from train import train_loop


def llama3(D: int, FF: int, L: int, H: int, KV: int, hd: int, tied: bool = False) -> ModelConfig:
    """A Llama-3 geometry with its vocabulary of 128,256."""
    return ModelConfig(
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=KV,
        head_dim=hd,
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
    )


GEOMETRIES = {
    "llama3-1b": llama3(2048, 8192, 16, 32, 8, 64, tied=True),
    "llama3-3b": llama3(3072, 8192, 28, 24, 8, 128, tied=True),
    "llama3-8b": llama3(4096, 14336, 32, 32, 8, 128),
    "llama3-70b": llama3(8192, 28672, 80, 64, 8, 128),
    "llama3-405b": llama3(16384, 53248, 126, 128, 8, 128),
}


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Llama, Fill]:
    """A 4-bit Llama with N(0, 0.02) weights, made and quantised on the device, one tensor at a time."""

    def make(name: str, shape: torch.Size) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        same_everywhere = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, dtype=dtype, device=device, generator=same_everywhere).mul_(0.02)

    return empty_model(config, make, load_in_4bit=True, dtype=dtype, device=device)


def timed(step: Callable[[], None], steps: int, warmup: int, device: torch.device) -> list[float]:
    """Milliseconds of each of `steps` calls after `warmup` others. A GPU is not waited for between them."""
    for _ in range(warmup):
        step()
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Names of kernels on a GPU, of operations on a CPU; the first pattern that is found in a name decides.
KINDS = {
    "between GPUs": r"nccl",
    "attention": r"cudnn|fmha|flash|sdpa|bmm|softmax_backward",
    "dequantise": r"quantize|row_scales",
    "loss": r"cross_entropy|softmax|gather|scatter",
    "optimizer": r"[Aa]dam",
    "host copies": r"Memcpy HtoD|Memcpy DtoH",
    "low-rank update": r"\b(down|rows|add|sum|place)_kernel",
    "matrix products": r"gemm|nvjet|cutlass|splitK|::mm|::addmm",
}


def breakdown(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by kind, as the profiler counts them; whatever has no kind is elementwise."""
    activities = [ProfilerActivity.CUDA] if device.type == "cuda" else [ProfilerActivity.CPU]
    with profile(activities=activities) as recorded:
        step()
        synchronize(device)
    kinds = dict.fromkeys([*reversed(KINDS), "elementwise"], 0.0)
    for event in recorded.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "elementwise")
        time_us = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kinds[kind] += time_us / 1e3
    return {kind: round(ms, 1) for kind, ms in kinds.items()}


def peer_figures(command: str) -> dict[str, Any]:
    """Run another trainer's benchmark and read the JSON line that it prints last."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"--peer {command}: no JSON line came back ({last}); run it alone to see why")
    return json.loads(lines[-1])


def floor_ms(config: ModelConfig, B: int, T: int, dtype: torch.dtype, device: torch.device, fp8: Fp8 = False) -> float:
    """Milliseconds of a step's unavoidable work: base and head matmuls forward and backward, and attention.

    All of it in one go, as often and so as long as a step does it: a GPU's clock falls when it multiplies for more than
    a few milliseconds, and what it does in a burst of one block is up to a tenth faster than a step can be. The
    operands of fp8 are in fp8 already.
    """

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    D, FF, H, KV, hd = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    N, L = B * T, config.num_hidden_layers
    shapes = [(H * hd, D), (KV * hd, D), (KV * hd, D), (D, H * hd), (FF, D), (FF, D), (D, FF)]
    kernels = ops.kernels(make(1))

    def product(x: torch.Tensor, w: torch.Tensor, in_fp8: bool) -> Callable[[], object]:
        if not in_fp8:
            return lambda: x @ w.t()
        (x8, x_scale), (w8, w_scale) = kernels.quantize_fp8(x), kernels.quantize_fp8(w.contiguous())
        return lambda: kernels.matmul_fp8(x8, w8, x_scale, w_scale.flatten(), dtype)

    products = [product(make(N, n_in), make(n_out, n_in), fp8 is True) for n_out, n_in in shapes]
    products += [product(make(N, n_out), make(n_out, n_in).t(), bool(fp8)) for n_out, n_in in shapes]

    def block_products() -> None:
        for matmul in products:
            matmul()

    rows = min(N, 1024)  # of logits at a time
    head, hidden, dlogits = make(config.vocab_size, D), make(rows, D), make(rows, config.vocab_size)

    def head_products() -> None:
        for n in [rows] * (N // rows) + [N % rows]:
            hidden[:n] @ head.t()
            dlogits[:n] @ head

    q, k, v = (make(B, heads, T, hd).requires_grad_() for heads in (H, KV, KV))

    def attend() -> None:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != KV)
        torch.autograd.grad(y, (q, k, v), y.detach())

    def attend_by_hand() -> None:  # our own kernel on a CPU is faster than PyTorch's
        y = ops.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), Segments.one_per_row(B, T))
        torch.autograd.grad(y, (q, k, v), y.detach())

    attentions = [attend, attend_by_hand] if device.type == "cpu" else [attend]
    attention = min(attentions, key=lambda work: statistics.median(timed(work, 5, 2, device)))

    def whole_step() -> None:
        for _ in range(L):
            block_products()
            attention()
        head_products()

    return statistics.median(timed(whole_step, 4, 1, device))


def useful_flops(config: ModelConfig, num_lora: int, B: int, T: int) -> float:
    """Operations that a step has to do: 4 a weight and token in blocks and head, 6 a trained value, attention."""
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, KV, L = config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers
    weights = L * (D * hd * (2 * H + 2 * KV) + 3 * D * FF) + D * config.vocab_size
    attention = 3 * L * 4 * H * hd * T / 2  # a token, forward and twice that backward, half of the square
    return B * T * (4 * weights + 6 * num_lora + attention)


def config_of(args: BenchOptions) -> Config:
    """The run that is timed, as its YAML file would describe it."""
    given: tuple[str, ...] = (
        "micro_batch_size",
        "sequence_len",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "gradient_checkpointing",
        "fp8",
    )
    given += ("shard_optimizer_state", "optimizer", "bf16", "peft_use_dora", "lora_target_modules", "fsdp_version")
    values = (
        {key: getattr(args, key) for key in given}
        | {"sequence_len": max(args.sequence_len, *args.row_lengths, 2)}
        | ({} if args.fsdp == "auto" else {"fsdp": [args.fsdp]})
    )
    data = {"path": "random tokens", "type": "completion"}
    values |= {"base_model": args.model, "datasets": [data], "load_in_4bit": True, "adapter": "qlora"}
    values |= {"sample_packing": not args.row_lengths, "save_strategy": "no", "warmup_steps": 0}
    values |= {"lora_target_linear": not args.lora_target_modules}
    return make_config(values | {"learning_rate": 1e-4, "lr_scheduler": "constant", "output_dir": "none"}, "bench.py")


def random_samples(
    num_rows: int, T: int, packed: bool, row_lengths: Sequence[int], vocab_size: int
) -> tuple[Samples, Rows]:
    """Random tokens, the same on every rank, in rows of T, of one document or of three; or in rows of given lengths."""
    in_row = (T // 2, T // 3, T - T // 2 - T // 3) if packed else (T,)
    lengths = np.resize(row_lengths, num_rows) if row_lengths else np.tile(in_row, num_rows)
    tokens = np.random.default_rng(0).integers(vocab_size, size=lengths.sum(), dtype=np.uint32) | SUPERVISED
    starts = np.arange(0, len(lengths) + 1, 1 if row_lengths else len(in_row))
    return Samples.of(tokens, lengths, lengths - 1, ""), Rows(np.arange(len(lengths)), starts)


class Times(Metrics):
    """The log of a run that is timed: when each step was written to it."""

    def __init__(self) -> None:
        super().__init__(Path("none"), writes=False)
        self.written: list[float] = []

    def write(self, row: dict[str, Any]) -> None:
        super().write(row)
        self.written.append(time.perf_counter())


WARM_UP = 3  # steps before those that count: the first one compiles, the second one records graphs


def prepare(args: BenchOptions, metrics: Metrics, rank: int, ranks: int, device: torch.device) -> tuple[Run, float]:
    """The run that is timed, and the seconds that it took to build."""
    if args.memory_gib and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_gib * GIB / total), device)
    config = config_of(args)
    geometry = GEOMETRIES.get(args.model)
    empty = partial(random_model, geometry) if geometry else partial(open_model, args.model, load_in_4bit=True)
    vocab_size = (geometry or model_config(open_weights(args.model).config, args.model)).vocab_size
    num_steps, rows_per_step = WARM_UP + args.steps, args.micro_batch_size * ranks
    samples, rows = random_samples(
        num_steps * rows_per_step, args.sequence_len, args.packed, args.row_lengths, vocab_size
    )
    started = time.perf_counter()
    run = build_run(
        config,
        empty,
        samples=samples,
        held_out=samples.take(np.arange(0)),
        plan=BatchSchedule(lambda epoch: rows, len(rows), rows_per_step, num_steps),
        metrics=metrics,
        rank=rank,
        ranks=ranks,
        device=device,
        say=lambda *_: None,
    )
    return run, time.perf_counter() - started


def measure(args: BenchOptions, rank: int, ranks: int, device: torch.device) -> dict[str, Any]:
    """Time, memory and floor of the step; the JSON line of the contract with users' scripts."""
    B, T = args.micro_batch_size, round(statistics.mean(args.row_lengths or [args.sequence_len]))
    N = recorded_width(B * T) if args.row_lengths and device.type == "cuda" else B * T
    times_of = Times()
    run, load_s = prepare(args, times_of, rank, ranks, device)
    config, dtype = run.model.config, run.model.model.norm.weight.dtype
    base_gib = held_bytes(run.model) / GIB
    started, display = time.perf_counter(), Display(len(run.plan), 0, rank=1)  # which shows nothing
    train_loop(run, 0, [], display)
    if args.row_lengths:  # the mean of the rows that are timed
        timed_rows = [row for number in range(WARM_UP, len(run.plan)) for row in run.plan[number].rows]
        T = round(sum(int(run.samples.lengths[row].sum()) for row in timed_rows) / len(timed_rows))
    written, rows = times_of.written, run.metrics.rows[WARM_UP:]
    times = [(end - start) * 1e3 for start, end in itertools.pairwise(written[WARM_UP - 1 :])]
    kinds = breakdown(lambda: train_loop(run, len(run.plan) - 1, [], display), device)
    strengths = () if args.memory_gib else (False, args.fp8)  # a floor needs memory of its own
    floors = {fp8: round(floor_ms(config, B, T, dtype, device, fp8), 1) for fp8 in dict.fromkeys(strengths)}
    median = statistics.mean(times) if args.row_lengths else statistics.median(times)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    state = state_bytes(args.optimizer) / (ranks if args.shard_optimizer_state else 1)
    return {
        "model": args.model,
        "device": name,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "ranks": ranks,
        "tokens_per_step": B * T * ranks,
        "step_ms": round(median, 1),
        "step_ms_min": round(min(times), 1),
        "step_ms_max": round(max(times), 1),
        "first_step_s": round(written[0] - started, 2),
        "tokens_per_second": round(B * T * ranks / median * 1e3, 1),
        "tokens_per_second_per_gpu": round(B * T / median * 1e3, 1),
        "tflops_useful": round(useful_flops(config, run.flat.numel(), B, T) / median / 1e9, 2),
        "floor_ms": floors.get(False),
        **({"fp8": args.fp8, "fp8_floor_ms": floors.get(args.fp8)} if args.fp8 else {}),
        **{key.removeprefix("memory/"): max(row[key] for row in rows) for key in rows[0] if key.startswith("memory/")},
        "kept": " ".join(f"{run.keeps.count(level)} {level}" for level in dict.fromkeys(run.keeps)),
        "fsdp": "full_shard" if run.store else "replicate",
        "base_gib": round(base_gib, 2),
        "predicted_gib": round(step_bytes(run.model, N, run.keeps, state) / GIB, 2),
        "load_s": round(load_s, 2),
        "loss": round(rows[-1]["loss"], 4),
        "breakdown_ms": kinds,
    }


def bench_decode(args: BenchOptions, prompt_tokens: int = 256, new_tokens: int = 256) -> list[dict[str, Any]]:
    """Tokens a second, one conversation: with merged weights where they fit, and with the weights as they are held."""
    run, _ = prepare(args, Times(), *distributed.start())
    rows = []
    for dense in (True, False) if merged_fits(run.model) else (False,):
        speeds = speed_of(Decoder(run.model.eval(), dense), prompt_tokens, new_tokens)
        rows.append({"model": args.model, "weights": "merged" if dense else "as held", **speeds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def report(figures: dict[str, Any], peers: list[dict[str, Any]]) -> None:
    """The table, and the figures once more as one line of JSON."""
    for key, value in figures.items():
        print(f"{key:28} {value}")
    for name in ("floor_ms", "fp8_floor_ms"):
        if figures.get(name):
            print(f"{'share of ' + name:28} {figures[name] / figures['step_ms']:.0%}")
    for kind, ms in figures["breakdown_ms"].items():
        print(f"  {kind:26} {ms:.1f} ms")
    for peer in peers:
        print(f"{figures['tokens_per_second'] / peer['tokens_per_second']:.2f} times {json.dumps(peer)}")
    print(json.dumps(figures))


def main() -> None:
    args = load_options(BenchOptions)
    if args.json_file:
        check_file(args.json_file, "--json")
    if args.deploy or args.decode:
        rows = bench_deploy(Path(args.deploy), 256, 32) if args.deploy else bench_decode(args)
        return write_text(args.json_file, json.dumps(rows) + "\n") if args.json_file else None
    if args.peer and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--peer: under torchrun every rank would start it. Run the peer by itself, before or after.")
    peers = [peer_figures(command) for command in args.peer]  # before we take any memory
    rank, ranks, device = distributed.start()
    figures = measure(args, rank, ranks, device)
    distributed.stop()
    if rank == 0:
        report(figures, peers)
    if args.json_file and rank == 0:
        write_text(args.json_file, json.dumps(figures) + "\n")
    assert math.isfinite(figures["loss"])


if __name__ == "__main__":
    run_command(main)
