"""The forecast: operations against PyTorch's counter, time against brute force, disk against files; and the preview."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, snapshot, write_rows, write_run
from tiny import CONFIG, save_random_llama
from torch.utils.flop_counter import FlopCounterMode

import train
from nanoqlora.config.errors import UserError
from nanoqlora.config.files import read_json
from nanoqlora.data.batches import SUPERVISED, Sample, Samples, collate, micro_batches
from nanoqlora.data.packing import schedule_batches
from nanoqlora.model import ModelConfig
from nanoqlora.run import forecast
from nanoqlora.run.forecast import disk_bytes, measure, operations
from nanoqlora.run.preview import DIM, END, GREEN, INVERSE, coloured, duration, histogram
from nanoqlora.tokenizer.tokenizer import load_tokenizer

ANSI = re.compile(r"\033\[[0-9;]*m")


def test_operations_equal_those_that_pytorch_counts(tmp_path):
    """transformers' forward, counted by PyTorch: we count it twice, once for the backward pass, and half a square."""
    save_random_llama(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ours = ModelConfig.from_hf(read_json(tmp_path / "config.json"))
    B, T = 2, 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.zeros(B, T, dtype=torch.int64))
    counts = {str(op).split(".")[-1]: n for op, n in counter.get_flop_counts()["Global"].items()}
    products = counts["mm"]
    heads = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    attention = CONFIG["num_hidden_layers"] * B * 4 * heads * T * T
    assert counts["bmm"] == attention
    assert operations(ours, [[T]] * B, 0, 1.0) == 2 * products + 3 * attention / 2
    # Two documents of half the length attend to half as much, and padding to twice the width costs all but the head.
    assert operations(ours, [[T // 2] * 2] * B, 0, 1.0) == 2 * products + 3 * attention / 4
    head = 4 * B * T * CONFIG["hidden_size"] * CONFIG["vocab_size"]
    assert operations(ours, [[T]] * B, 2 * T, 1.0) == 2 * (2 * products - head) + head + 2 * 3 * attention / 2


class Clock:
    """A device on which work takes exactly as long as we say."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(forecast.time, "perf_counter", lambda: self.now)


def fake_run(lengths: list[int], ranks: int, **keys) -> SimpleNamespace:
    flat = torch.nn.Parameter(torch.ones(5))
    flat.grad = torch.zeros(5)
    config = SimpleNamespace(
        optimizer="adamw_torch",
        micro_batch_size=2,
        row_width=0,
        sequence_len=64,
        max_grad_norm=1.0,
        output_dir="/tmp",
        **{"save_total_limit": 3, "load_best_model_at_end": False} | keys,
    )
    plan = schedule_batches(
        lengths, rows_per_step=4 * ranks, capacity=64, packing=False, num_epochs=2, max_steps=None, seed=0
    )
    words = np.concatenate([np.array([1] + [1 | SUPERVISED] * (n - 1), np.uint32) for n in lengths])
    samples = Samples.of(words, np.array(lengths), np.array(lengths) - 1, "")
    geometry = ModelConfig(**{name: value for name, value in CONFIG.items() if name != "rope"})
    optimizer = torch.optim.AdamW([flat], lr=1.0, weight_decay=0.5)
    return SimpleNamespace(
        config=config,
        plan=plan,
        samples=samples,
        held_out=[],
        ranks=ranks,
        rank=0,
        device=torch.device("cpu"),
        model=SimpleNamespace(config=geometry),
        flat=flat,
        optimizer=optimizer,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_time_is_the_sum_over_the_micro_batches_of_rank_0(monkeypatch, ranks):
    """Where time is a + b * operations of what `collate` really builds, the forecast is exact."""
    clock, lengths = Clock(monkeypatch), [5 + (7 * i) % 60 for i in range(45)]
    run = fake_run(lengths, ranks)
    share = sum(n - 1 for n in lengths) / sum(lengths)

    def cost(rows) -> float:
        rows = [[run.samples[i] for row in rows for i in row]]  # laid into one
        B, T = collate(rows).tokens.shape
        squares = sum(len(s) ** 2 for row in rows for s in row)
        D, heads, kv = 128, 4 * 32, 2 * 32
        products = 3 * 4 * B * T * D * (2 * heads + 2 * kv + 3 * 192)
        return 0.5 + 1e-9 * (
            products + 3 * 6 * heads * squares + 4 * D * 300 * share * sum(len(s) for r in rows for s in r)
        )

    def forward_backward(run, rows):
        clock.now += cost(rows)

    monkeypatch.setattr(forecast, "forward_backward", forward_backward)
    expected = sum(cost(mine) for step in run.plan for _, mine in micro_batches(step.rows, 2, 0, ranks))
    got = measure(run, 0, 1)
    assert got.seconds == pytest.approx(expected, rel=1e-9)
    assert got.memory["memory/max_rss_gib"] > 0


def test_measuring_leaves_no_trace(monkeypatch):
    """Values, gradients, optimizer and random state are as before, down to the bit."""
    run = fake_run([10, 20, 30], 1)
    state, before = torch.random.get_rng_state(), run.flat.detach().clone()
    faster = torch.nn.Parameter(torch.ones(3))  # as LoRA+ has it: a second group with a rate of its own
    faster.grad = torch.ones(3)
    run.optimizer.add_param_group({"params": [faster], "lr_ratio": 16})

    def forward_backward(run, *_):
        run.flat.grad += 3.0

    monkeypatch.setattr(forecast, "forward_backward", forward_backward)
    measure(run, 0, 0)
    assert torch.equal(faster, torch.ones(3))
    assert torch.equal(run.flat, before) and not run.flat.grad.any() and not run.optimizer.state
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_does_not_fit_is_said_before_the_first_step(monkeypatch):
    run = fake_run([10, 20, 30], 1)

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(forecast, "forward_backward", out_of_memory)
    monkeypatch.setattr(forecast, "dials", lambda run: "these settings")
    expected = "longest micro-batch, in step [12], does not fit cpu: CUDA out of memory.*20.00 GiB. these settings."
    with pytest.raises(UserError, match=expected):
        measure(run, 0, 0)

    def cannot_allocate(*_):  # a CPU has no type for it
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(forecast, "forward_backward", cannot_allocate)
    with pytest.raises(UserError, match="does not fit cpu: .*can't allocate memory.*these settings"):
        measure(run, 0, 0)
    monkeypatch.setattr(forecast, "forward_backward", lambda *_: None)
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    usage.free = disk_bytes(5, 40, 1)  # AdamW keeps two numbers for each value
    measure(run, 0, 1)
    usage.free -= 1
    with pytest.raises(UserError, match="/tmp: takes .* free, .*lower save_total_limit"):
        measure(run, 0, 1)
    usage.free = 10**9
    # One of two saves is kept, beside it the one with the best evaluation.
    best = fake_run([10, 20, 30], 1, save_total_limit=1, load_best_model_at_end=True)
    assert measure(best, 0, 2).disk_bytes == disk_bytes(5, 40, 2)


# ------------------------------------------------------------------------------------------------ --plan


def test_plan_says_what_the_run_then_does(tmp_path):
    """Steps, tokens and masks as the run has them; nothing is written; the report has both sides afterwards."""
    model = save_tiny_model(tmp_path / "model")
    rows = alpaca_rows(12)
    data = write_rows(tmp_path / "data.jsonl", rows)
    tests = [{"path": str(write_rows(tmp_path / "tests.jsonl", alpaca_rows(3, seed=1))), "type": "alpaca"}]
    path = write_run(tmp_path / "train.yml", model, data, warmup_ratio=0.2, test_datasets=tests, saves_per_epoch=1)
    before = snapshot(tmp_path)
    planned = run_here(train.main, path, "--plan")
    assert planned.code == 0, planned.err
    assert snapshot(tmp_path) == before

    done = run_here(train.main, path)
    assert done.code == 0, done.err
    steps = [row for row in metrics_of(tmp_path / "out") if "loss" in row]
    said = ANSI.sub("", planned.out)
    assert f"steps      {len(steps)} in 2 epochs, {-(-len(steps) // 5)} of them warm-up" in said
    counted = sum(row["supervised_tokens"] for row in steps)
    tokens = int(re.search(r"tokens +([\d,]+) in", said)[1].replace(",", ""))
    assert f"{counted / tokens:.1%} of the data's tokens are supervised" in said

    theirs = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    for number in range(3):
        shown = planned.out.split(f"sample {number + 1}: ")[1].split("\n", 1)[1]
        green = [part.split(END)[0] for part in shown.split(GREEN)[1:3]]
        assert green == [rows[number]["output"], f"{INVERSE}<|im_end|>"]
        assert shown.startswith(f"{DIM}{INVERSE}<|endoftext|>{END}{DIM}Below is an instruction")
        assert theirs.encode(rows[number]["output"]).ids  # the text is that of the file, not of ids made up

    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    for label in ("max_rss_gib, GiB", "time, s"):
        predicted, measured = re.search(rf"\| {label} \| ([\d.,]+) \| ([\d.,]+) \|", report).groups()
        assert f"max_rss_gib {float(predicted):.2f}"[:13] in said or label.startswith("time")
        assert float(measured.replace(",", "")) >= 0
    space = float(re.search(r"disk +([\d.]+) GiB", said)[1]) * 2**30
    written = sum(len(data) for name, data in snapshot(tmp_path / "out").items() if name.startswith("checkpoint"))
    assert written < space + 0.01 * 2**30


def test_plan_ends_as_the_run_would(tmp_path):
    """A row that is too long is an error of the plan already."""
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(4))
    path = write_run(tmp_path / "train.yml", save_tiny_model(tmp_path / "model"), data, excess_length_strategy="raise")
    ended = run_here(train.main, path, "--plan", "--sequence_len", 40)
    assert ended.code == 2 and "data.jsonl, line 1" in ended.err and ended.err.count("\n") == 1
    ended = run_here(train.main, path, "--plan", "--resume_from_checkpoint", tmp_path / "nothing")
    assert ended.code == 2 and "nothing: is no folder" in ended.err and ended.err.count("\n") == 1


def test_preview_shows_what_is_special_and_what_a_terminal_would_obey(smollm2_path):
    """A marker in a text looks like text; escape sequences and characters that turn lines round are shown."""
    tok = load_tokenizer(smollm2_path)
    ids = [*tok.encode("a <|im_end|>\x1b[2J\u202e\n\tb"), tok.eos_id]
    shown = coloured(Sample(np.array(ids), np.array([False] * (len(ids) - 1) + [True])), tok)
    assert shown == f"{DIM}a <|im_end|>\\x1b[2J\\u202e\n\tb{END}{GREEN}{INVERSE}<|im_end|>{END}"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")]
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_histogram_counts_every_length():
    lengths = [1, 8, 9, 16, 64, 64, 64]
    lines = histogram(lengths)
    assert [int(line.split()[-1]) for line in lines] == [2, 2, 0, 0, 0, 0, 0, 3]
    assert lines[-1].split()[:3] == ["57", "-", "64"] and lines[-1].count("#") == 40
