"""Whole runs of train.py on a tiny random model, against transformers, PEFT and torch's AdamW in float64."""

import csv
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pyarrow.parquet
import pytest
import tokenizers
import torch
import transformers
from peft_witness import (
    dequantised_transformers,
    encoded_by_tokenizers,
    peft_on_dequantised,
    save_random_adapter,
    train_with_peft,
)
from processes import run_process, start_process
from ranks import end_of_run, on_ranks
from safetensors.torch import load_file, save_file
from small_runs import (
    PIRATE,
    PREPARED,
    Ended,
    alpaca_rows,
    assert_one_line_bar,
    metrics_of,
    run_here,
    save_tiny_model,
    snapshot,
    steps_of,
    write_rows,
    write_run,
)

import nanoqlora as nq
import train
from nanoqlora.config.load import load_config, make_config
from nanoqlora.data.batches import Sample, collate
from nanoqlora.data.packing import schedule_batches
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.ops import linear_cross_entropy
from nanoqlora.qlora import flatten_trainable, inject_lora, lora_layers
from nanoqlora.run.cadence import due
from nanoqlora.run.inputs import prepare_data
from nanoqlora.run.optim import clip_gradient, learning_rate_at, make_optimizer
from nanoqlora.run.output_dir import checkpoints
from nanoqlora.run.results import questions
from nanoqlora.run.state import row_seeds
from nanoqlora.weights.adapter import load_adapter
from nanoqlora.weights.pretrained import load_model


class World(NamedTuple):
    """A model, an adapter to start from, data and held-out data."""

    model: Path
    adapter: Path
    data: Path
    held_out: Path

    @property
    def tests(self) -> list[dict[str, str]]:
        return [{"path": str(self.held_out), "type": "alpaca"}]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    model = save_tiny_model(folder / "model")
    data = write_rows(folder / "data.jsonl", alpaca_rows(11))
    held_out = write_rows(folder / "held-out.jsonl", alpaca_rows(5, seed=1))
    return World(model, save_random_adapter(model, folder / "start"), data, held_out)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """`python train.py` to its end: 2 epochs of 11 rows, two by two, two micro-batches a step, from PEFT's adapter."""
    folder = tmp_path_factory.mktemp("finished")
    keys = {"lora_model_dir": str(world.adapter), "lora_r": None, "lora_alpha": None, "test_datasets": world.tests}
    keys |= {"gradient_accumulation_steps": 2, "shuffle_merged_datasets": False, "warmup_steps": 2}
    keys |= {"evals_per_epoch": 1, "saves_per_epoch": 1, "save_total_limit": 1}
    ended = run_process("train.py", write_run(folder / "train.yml", world.model, world.data, **keys))
    assert ended.code == 0, ended.err
    return ended, folder / "out"


def test_finished_run_leaves_what_is_promised(world, finished):
    ended, out = finished
    promised = ["adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "Fine-Tuning.png", "report.md"]
    promised += ["train.yml", "prompt.json", "checkpoint-6"]
    tokenizer = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
    assert {path.name for path in out.iterdir()} == {*promised, *tokenizer}, "no more, no temporary file"
    assert (out / "Fine-Tuning.png").read_bytes().startswith(b"\x89PNG")

    keys = {"step", "epoch", "loss", "grad_norm", "learning_rate", "supervised_tokens", "tokens_per_second"}
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for line in lines:
        evaluation = {"step", "eval_loss", "eval_perplexity"}
        assert line.keys() == (evaluation if "eval_loss" in line else keys | {"memory/max_rss_gib"})

    # The resolved configuration is the same run again, and says what it was computed in.
    again, first = load_config([str(out / "train.yml")]), load_config([str(out.parent / "train.yml")])
    assert again == first and again.bf16 is False
    theirs, text = transformers.AutoTokenizer.from_pretrained(out), PIRATE[1]
    expected = tokenizers.Tokenizer.from_file(str(world.model / "tokenizer.json")).encode(text).ids
    assert theirs(text)["input_ids"] == expected == nq.load_tokenizer(out).encode(text, bos=True)


def test_every_step_equals_peft_and_torch_in_float64(world, finished):
    """Loss, gradient norm, rate and tokens of all steps, held-out loss and perplexity, and the adapter at the end.

    What is logged is rounded to six digits behind the point; float32 adds less than that. In the adapter the largest
    difference is 5e-8 after moving by 6e-3; Adam, which divides by the gradient's size, makes it more than rounding.
    """
    _, out = finished
    rows = [encoded_by_tokenizers(world.model, row) for row in alpaca_rows(11)]
    held_out = [encoded_by_tokenizers(world.model, row) for row in alpaca_rows(5, seed=1)]
    batches = [rows[i : i + 4] for i in (0, 4, 8)] * 2
    reference = train_with_peft(world.model, world.adapter, batches, held_out, peak=0.002, warmup=2)
    for line, (loss, norm, rate, tokens) in zip(steps_of(out), reference.steps, strict=True):
        assert abs(line["loss"] - loss) < 2e-6 and abs(line["grad_norm"] - norm) < 5e-6
        assert line["learning_rate"] == pytest.approx(rate, rel=1e-12) and line["supervised_tokens"] == tokens
    assert [line["epoch"] for line in steps_of(out)] == [round(i / 11, 4) for i in (4, 8, 11, 15, 19, 22)]
    for line in metrics_of(out):
        if "eval_loss" in line:
            assert abs(line["eval_loss"] - reference.held_out[line["step"]]) < 2e-6
            assert line["eval_perplexity"] == pytest.approx(math.exp(reference.held_out[line["step"]]), rel=1e-5)
    assert {line["step"] for line in metrics_of(out) if "eval_loss" in line} == {0, 3, 6}

    ours, start = (load_file(folder / "adapter_model.safetensors") for folder in (out, world.adapter))
    theirs = peft.get_peft_model_state_dict(reference.model)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-6 and (start[name] - tensor).abs().max() > 1e-3


def test_the_perplexity_is_said_before_and_after(finished):
    ended, out = finished
    before, _, after = [line["eval_perplexity"] for line in metrics_of(out) if "eval_loss" in line]
    assert f"Held-out perplexity: {before:.3f} before, {after:.3f} after" in ended.out and before > after
    assert f"{before:.2f} before, {after:.2f} after" in (out / "report.md").read_text("utf-8")


def test_peft_reads_the_trained_adapter(world, finished):
    """On the dequantised base it gives our logits, float64 against float32; without the adapter it would not."""
    _, out = finished
    ours = load_model(world.model, load_in_4bit=True)
    load_adapter(ours, out)
    tokens = torch.randint(300, (2, 90), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = peft_on_dequantised(world.model, out)(tokens).logits
        assert (ours(tokens) - expected).abs().max() < 1e-4
        assert (dequantised_transformers(world.model)(tokens).logits - expected).abs().max() > 0.1
    ours, start = (json.loads((folder / "adapter_config.json").read_text()) for folder in (out, world.adapter))
    for key in ("r", "lora_alpha", "use_rslora", "peft_type", "task_type", "bias", "base_model_name_or_path"):
        assert ours[key] == start[key], key
    assert sorted(ours["target_modules"]) == sorted(start["target_modules"])


# ------------------------------------------------------------------------------------------------ one step


def gradient_and_loss(model: nq.Llama, flat: torch.nn.Parameter, rows: list[list[Sample]]) -> torch.Tensor:
    """The gradient of the sum of losses, with the loss behind it, as one vector."""
    flat.grad.zero_()
    batch = collate(rows)
    hidden = model.model(batch.tokens, batch.segments).flatten(0, 1)
    loss = linear_cross_entropy(hidden[batch.supervised], model.lm_head.weight, batch.targets)
    loss.backward()
    return torch.cat((flat.grad, loss.detach()[None]))


def test_packed_samples_learn_as_alone(world):
    """Loss and gradient of samples in shared rows, side by side in padded rows, and one after the other.

    Sums of a few hundred float32 terms in another order: 1e-5 of the gradient's length is a hundred roundings.
    """
    model = load_model(world.model, load_in_4bit=True)
    load_adapter(model, world.adapter)
    flat = flatten_trainable(model.train())
    a, b, c, d = (
        Sample(row.ids, [place in row.counted for place in range(len(row.ids))])
        for row in (encoded_by_tokenizers(world.model, row) for row in alpaca_rows(4))
    )
    alone = sum(gradient_and_loss(model, flat, [[sample]]) for sample in (a, b, c, d))
    for rows in ([[a, b, c, d]], [[d, a], [c, b]], [[a], [b], [c], [d]]):
        together = gradient_and_loss(model, flat, rows)
        assert (together - alone).norm() < 1e-5 * alone.norm() and together[-1] == pytest.approx(
            alone[-1].item(), rel=1e-6
        )
    one_text = Sample(*(sum((getattr(s, name) for s in (a, b, c, d)), []) for name in ("tokens", "supervised")))
    assert (gradient_and_loss(model, flat, [[one_text]]) - alone).norm() > 0.01 * alone.norm()


def test_accumulation_and_ranks_change_nothing(world, tmp_path):
    """4 x 1, 1 x 4 and 2 ranks of 1 x 2, with dropout, on packed rows of 40 to 140 tokens that count.

    Nine rows in steps of four: the last step of an epoch has one row, and the second rank none. Measured: the losses
    and the norms of the gradient differ in no more than the last of six logged digits.
    """
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(24, seed=2))
    keys = {"sequence_len": 512, "sample_packing": True, "num_epochs": 3, "lora_model_dir": str(world.adapter)}
    keys |= {"test_datasets": world.tests, "eval_steps": 9}
    splits = {"4x1": (4, 1, 0.05), "1x4": (1, 4, 0.05), "ranks": (1, 2, 0.05), "no dropout": (4, 1, 0.0)}
    for name, (micro, accumulation, dropout) in splits.items():
        (tmp_path / name).mkdir()
        split = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "lora_dropout": dropout}
        path = write_run(tmp_path / name / "train.yml", world.model, data, **keys, **split)
        if name == "ranks":
            ranks = [Ended(*ended) for ended in on_ranks(2, end_of_run, path)]
            assert [ended.out.count("trained values") for ended in ranks] == [1, 0], "only rank 0 prints"
            assert [ended.err.count(": held-out loss") for ended in ranks] == [1, 0], "there too"
            ended = max(ranks)
        else:
            ended = run_here(train.main, path, terminal=True)
            assert_one_line_bar(ended.err, num_steps=9)
        assert ended.code == 0, ended.err
    first, *others, without_dropout = (steps_of(tmp_path / name / "out") for name in splits)
    assert [line["epoch"] for line in first[:3]] == [round(share, 4) for share in (4 / 9, 8 / 9, 1)]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert all(a[key] == b[key] for key in ("step", "epoch", "learning_rate", "supervised_tokens"))
    before = [metrics_of(tmp_path / name / "out")[0] for name in splits]
    assert all(line == before[0] and "eval_loss" in line for line in before), "an evaluation drops nothing"
    assert without_dropout[0]["loss"] != pytest.approx(first[0]["loss"], rel=1e-4), "dropout was not on"


def test_every_row_of_every_step_drops_its_own():
    """Seeds of rows: none twice among seeds, steps and rows; the same for a row whatever stands before it."""
    seeds = [
        row_seeds(seed, step, first, 4).tolist()
        for seed in (0, 1, 42)
        for step in (0, 1, 2, 100_000)
        for first in (0, 4, 8)
    ]
    assert len({seed for some in seeds for seed in some}) == 3 * 4 * 12
    assert row_seeds(42, 7, 0, 8).tolist()[5:] == row_seeds(42, 7, 5, 3).tolist()


# ------------------------------------------------------------------------------------------------ run/optim.py


@pytest.mark.parametrize("num_steps, warmup", [(1, 0), (10, 0), (10, 3), (7, 7), (50, 5), (4, 9)])
def test_schedules_equal_those_of_transformers(num_steps, warmup):
    get = transformers.optimization
    theirs = {
        ("cosine", 0.0): lambda o: get.get_cosine_schedule_with_warmup(o, warmup, num_steps),
        ("cosine", 0.25): lambda o: get.get_cosine_with_min_lr_schedule_with_warmup(
            o, warmup, num_steps, min_lr_rate=0.25
        ),
        ("linear", 0.0): lambda o: get.get_linear_schedule_with_warmup(o, warmup, num_steps),
        ("constant_with_warmup", 0.0): lambda o: get.get_constant_schedule_with_warmup(o, warmup),
        ("constant", 0.0): lambda o: get.get_constant_schedule(o),
    }
    for (name, min_ratio), make in theirs.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.002)
        schedule = make(optimizer)
        for step in range(num_steps):
            rate = learning_rate_at(step, num_steps, warmup, 0.002, name, min_ratio)
            assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-18), (name, step)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
def test_one_flat_buffer_learns_as_separate_parameters_do(world, name):
    """Clip and AdamW with weight decay on the flat buffer, against torch on every lora_A and lora_B in float64.

    Ten steps of at most 0.01 in float32: each value off by a few roundings of a number below 2, 1e-6. Each gradient is
    longer than 1, so all are clipped, and the norm is said as it was before.
    """
    model = load_model(world.model)
    inject_lora(model, 4, 8)
    parameters = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    theirs = [torch.nn.Parameter(p.detach().double()) for p in parameters]
    flat = flatten_trainable(model)
    assert flat.numel() == sum(p.numel() for p in parameters)
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, reference = make_optimizer(name, flat, **options), torch.optim.AdamW(theirs, **options)
    g = torch.Generator().manual_seed(0)
    for step in range(10):
        for p, q in zip(parameters, theirs, strict=True):
            q.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
            p.grad.copy_(q.grad)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        assert clip_gradient(flat.grad, 0.5).item() == pytest.approx(norm.item(), rel=1e-6)
        ours.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.01 / (step + 1)
        ours.step()
        reference.step()
    assert all((p - q).abs().max() < 1e-6 for p, q in zip(parameters, theirs, strict=True))


def test_the_norm_of_a_long_gradient_is_exact():
    """Ten million float32 values: as in float64 to 1e-6, where one float32 sum over them is off by more than 1e-4."""
    grad = torch.randn(10_000_019, generator=torch.Generator().manual_seed(0))
    expected = grad.double().norm().item()
    assert abs(clip_gradient(grad, 1.0).item() / expected - 1) < 1e-6
    assert grad.double().norm().item() == pytest.approx(1.0, abs=1e-5)


def test_short_gradients_are_not_clipped_and_zero_means_never():
    grad = torch.tensor([0.3, 0.4])
    assert clip_gradient(grad, 1.0) == 0.5 and grad.tolist() == pytest.approx([0.3, 0.4])
    assert clip_gradient(grad.mul_(10), 0.0) == 5 and grad.tolist() == pytest.approx([3, 4])


@pytest.mark.parametrize(
    "options, expected",
    [
        ((None, None, "epoch"), [5, 10, 15]),
        ((None, None, None), [5, 10, 15]),
        ((None, None, "no"), []),
        ((2, None, "steps"), [3, 5, 8, 10, 13, 15]),  # half an epoch is passed within the third step
        ((9, None, "steps"), list(range(1, 16))),
        ((None, 4, "steps"), [4, 8, 12]),
        ((None, 0.2, "steps"), [3, 6, 9, 12, 15]),
        ((None, 0.01, "steps"), list(range(1, 16))),
    ],
)
def test_when_something_is_due(options, expected):
    """Three epochs of five steps."""
    plan = schedule_batches([3] * 5, rows_per_step=1, capacity=3, packing=False, num_epochs=3, max_steps=None, seed=0)
    assert [step for step in range(1, 16) if due(step, plan, *options)] == expected


# ------------------------------------------------------------------------------------------------ stop and go on


LONG = {"max_steps": 80, "lora_dropout": 0.05, "eval_strategy": "no", "save_steps": 20, "save_total_limit": 3}


@pytest.fixture(scope="module")
def uninterrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    path = write_run(folder / "train.yml", world.model, world.data, test_datasets=world.tests, **LONG)
    assert run_here(train.main, path).code == 0
    return folder / "out"


@pytest.fixture(scope="module")
def interrupted(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """The same run in a process that gets SIGINT, as from Ctrl-C, after a few steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    path = write_run(folder / "train.yml", world.model, world.data, test_datasets=world.tests, **LONG)
    log, give_up = folder / "out" / "metrics.jsonl", time.monotonic() + 240
    process = start_process("train.py", path, out=folder / "stdout", err=folder / "stderr")
    while not (log.exists() and log.read_text().count("\n") > 5) and process.is_alive():
        assert time.monotonic() < give_up
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    return Ended(process.exitcode, *((folder / name).read_text() for name in ("stdout", "stderr"))), folder / "out"


def test_ctrl_c_saves_a_checkpoint(interrupted):
    ended, out = interrupted
    last = steps_of(out)[-1]["step"]
    assert ended.code == 130 and 5 <= last < 80
    assert "Traceback" not in ended.err and f"--resume_from_checkpoint {out}/checkpoint-{last}" in ended.err
    assert f"checkpoint-{last}" in {path.name for path in out.iterdir()}
    assert not (out / "adapter_model.safetensors").exists(), "the run is not finished"


def test_ctrl_c_before_the_first_step_is_not_lost(world, tmp_path, monkeypatch):
    """While the untrained model is evaluated, which may take minutes: one step is taken and saved."""
    evaluate = train.evaluate

    def evaluate_and_stop(run: train.Run, step: int) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(run, step)

    monkeypatch.setattr(train, "evaluate", evaluate_and_stop)
    path = write_run(tmp_path / "train.yml", world.model, world.data, test_datasets=world.tests, **LONG)
    assert run_here(train.main, path).code == 130
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and len(steps_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
def test_told_to_end_before_the_loop_a_run_ends_with_130(world, tmp_path, monkeypatch, received):
    monkeypatch.setattr(train, "build_run", lambda *_, **__: os.kill(os.getpid(), received))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    ended = run_here(train.main, write_run(tmp_path / "train.yml", world.model, world.data))
    signal.signal(signal.SIGINT, before)
    assert ended.code == 130 and not ended.err and not (tmp_path / "out").exists()


def resumed(interrupted: tuple[Ended, Path], folder: Path, *words: str) -> Ended:
    """Go on in a copy of the interrupted run's folder; the log as if a kill had come after one more step."""
    shutil.copytree(interrupted[1], folder, dirs_exist_ok=True)
    line = steps_of(folder)[-1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line | {"step": line["step"] + 1}) + '\n{"step": 99, "lo')
    return run_here(train.main, interrupted[1].parent / "train.yml", "--output_dir", folder, *words)


def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(interrupted, uninterrupted, tmp_path):
    """80 steps, or k, Ctrl-C, and 80 - k: the same adapter, every step once in the log, with the same numbers."""
    last = steps_of(interrupted[1])[-1]["step"]
    ended = resumed(interrupted, tmp_path, "--resume_from_checkpoint", str(tmp_path / f"checkpoint-{last}"))
    assert ended.code == 0, ended.err
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
    timeless = [
        [
            {key: value for key, value in line.items() if key != "tokens_per_second" and "memory" not in key}
            for line in metrics_of(folder)
        ]
        for folder in (tmp_path, uninterrupted)
    ]
    assert timeless[0] == timeless[1] and [line["step"] for line in timeless[0]] == list(range(81))


def test_auto_resume_takes_the_newest_whole_checkpoint(interrupted, uninterrupted, tmp_path):
    """One without trainer_state.json is half of one: a copy that was cut off."""
    last = steps_of(interrupted[1])[-1]["step"]
    half = tmp_path / f"checkpoint-{last + 1}"
    shutil.copytree(interrupted[1] / f"checkpoint-{last}", half)
    (half / "trainer_state.json").unlink()
    state = load_file(half / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in state.items()}, half / "adapter_model.safetensors")
    ended = resumed(interrupted, tmp_path, "--auto_resume_from_checkpoints", "true")
    assert ended.code == 0, ended.err
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(81))


def test_auto_resume_begins_where_there_is_nothing(world, uninterrupted, tmp_path):
    path = write_run(tmp_path / "train.yml", world.model, world.data, test_datasets=world.tests, **LONG)
    words = ["--auto_resume_from_checkpoints", "true", "--max_steps", "2", "--save_steps", "2"]
    assert run_here(train.main, path, *words).code == 0
    assert len(steps_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "change",
    [["--seed", "1"], ["--micro_batch_size", "3"], ["data"], ["--lora_r", "8"], ["--max_steps", "70"], ["base"]],
)
def test_resume_with_another_run_is_refused(world, interrupted, tmp_path, change):
    """Other data, seed or batches would train on the wrong samples; another rank has no such tensors.

    With another number of steps the learning rate would have been another; over another base it is another update.
    """
    words = ["--auto_resume_from_checkpoints", "true", *change]
    if change == ["data"]:
        other = write_rows(tmp_path / "other.jsonl", [*alpaca_rows(10), alpaca_rows(11)[10] | {"output": "Arr."}])
        words[2:] = ["--datasets", json.dumps([{"path": str(other), "type": "alpaca"}])]
    if change == ["base"]:
        words[2:] = ["--base_model", str(save_tiny_model(tmp_path / "other", seed=9))]
    shutil.copytree(interrupted[1], tmp_path / "out")
    before = snapshot(tmp_path)
    ended = run_here(train.main, interrupted[1].parent / "train.yml", "--output_dir", tmp_path / "out", *words)
    assert ended.code == 2 and ended.err.startswith("error: ") and "checkpoint-" in ended.err
    assert {"--max_steps": "80 steps, this one 70", "base": "other weights"}.get(change[0], "") in ended.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["cut", "other", "missing"])
def test_damaged_checkpoint_is_refused(interrupted, tmp_path, file, damage):
    last = steps_of(interrupted[1])[-1]["step"]
    shutil.copytree(interrupted[1], tmp_path / "out")
    path = tmp_path / "out" / f"checkpoint-{last}" / file
    whole = path.read_bytes()
    path.unlink() if damage == "missing" else path.write_bytes(whole[:-9] if damage == "cut" else b"another file")
    before = snapshot(tmp_path)
    words = ["--output_dir", tmp_path / "out", "--resume_from_checkpoint", path.parent]
    ended = run_here(train.main, interrupted[1].parent / "train.yml", *words)
    assert ended.code == 2 and ended.err.startswith("error: ") and file in ended.err, ended.err
    assert snapshot(tmp_path) == before


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    assert [path.name for path in checkpoints(uninterrupted)] == ["checkpoint-40", "checkpoint-60", "checkpoint-80"]


def test_resume_with_another_optimizer_or_scale_is_refused(world, uninterrupted, tmp_path):
    """bitsandbytes cannot read PyTorch's state; PyTorch's own two read each other's."""
    path = write_run(tmp_path / "train.yml", world.model, world.data, test_datasets=world.tests, **LONG)
    words = (path, "--overwrite_output_dir", "true", "--resume_from_checkpoint", uninterrupted / "checkpoint-80")
    ended = run_here(train.main, *words, "--optimizer", "adamw_8bit")
    assert ended.code == 2 and "its run had optimizer: adamw_torch" in ended.err and ended.err.count("\n") == 1, (
        ended.err
    )
    assert run_here(train.main, *words, "--optimizer", "adamw_torch_fused").code == 0
    for key, value in (("lora_r", 3), ("lora_alpha", 16), ("peft_use_rslora", "true"), ("loraplus_lr_ratio", 4)):
        ended = run_here(train.main, *words, f"--{key}", value)
        assert ended.code == 2 and f"its run had {key}: " in ended.err and ended.err.count("\n") == 1, ended.err


def test_a_place_that_cannot_be_written_to_is_found_before_anything_is_loaded(world, tmp_path, monkeypatch):
    path = write_run(tmp_path / "train.yml", world.model, world.data)
    monkeypatch.setattr(train, "build_run", None)
    ended = run_here(train.main, path, "--output_dir", path / "out")
    assert ended.code == 2 and f"{path}: is a file, not a folder" in ended.err and ended.err.count("\n") == 1
    ended = run_here(train.main, path, "--output_dir", "/proc/new/out")
    assert ended.code == 2 and "/proc: No such file or directory" in ended.err


def test_what_a_killed_process_left_half_written_is_removed(world, interrupted, tmp_path, monkeypatch):
    """And a checkpoint that was about to be replaced has its name again."""
    out, last = tmp_path / "out", steps_of(interrupted[1])[-1]["step"]
    shutil.copytree(interrupted[1], out)
    (out / f"checkpoint-{last}").rename(out / f".checkpoint-{last}.old.tmp")
    shutil.copytree(interrupted[1] / f"checkpoint-{last}", out / f".checkpoint-{last}.x1_b2c3d.tmp")
    (out / ".metrics.jsonl.abcdefgh.tmp").write_text("half")
    (out / ".mine.tmp").write_text("of somebody else")
    starts, loop = [], train.train_loop
    monkeypatch.setattr(train, "train_loop", lambda run, start, *rest: starts.append(start) or loop(run, start, *rest))
    words = ["--output_dir", out, "--auto_resume_from_checkpoints", "true"]
    assert run_here(train.main, interrupted[1].parent / "train.yml", *words).code == 0
    assert [path.name for path in out.glob(".*")] == [".mine.tmp"] and starts == [last]
    assert [row["step"] for row in steps_of(out)] == list(range(1, 81))


# ------------------------------------------------------------------------------------------------ data of a run


def test_validation_rows_are_taken_out_of_the_data(world):
    """As many as asked for, none in both parts, the same for a seed."""
    tok = nq.load_tokenizer(world.model)

    def split(**keys: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        run = {"base_model": str(world.model), "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 0.1}
        run |= {"datasets": [{"path": str(world.data), "type": "alpaca"}], "dataset_prepared_path": PREPARED.name}
        run |= keys
        data = prepare_data(make_config(run), tok, 1)
        assert sorted(i for step in data.plan for row in step.rows for i in row) == list(range(len(data.samples)))
        return [tuple(s.tokens) for s in data.samples], [tuple(s.tokens) for s in data.held_out]

    whole, none = split()
    assert len(whole) == 11 and not none
    for size, count in ((0.2, 2), (4, 4)):
        kept, held_out = split(val_set_size=size)
        assert len(held_out) == count and sorted(kept + held_out) == sorted(whole)
        assert split(val_set_size=size) == (kept, held_out) != split(val_set_size=size, seed=1)


def test_data_sets_of_all_kinds_make_one_run(world, tmp_path):
    """The same rows as five kinds of files: one plan, the data sets in order, each with what its kind counts."""
    tok, rows = nq.load_tokenizer(world.model), alpaca_rows(6)
    answers = [row["output"] for row in rows]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pairs = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    roles = {"user": "prompt", "assistant": "completion"}
    chats = [{"messages": [{"role": r, "content": pair[key]} for r, key in roles.items()]} for pair in pairs]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "text.txt").write_text("".join(answer.replace("\n", " ") + "\n" for answer in answers))
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "one.jsonl", rows[:2])
    write_rows(tmp_path / "more" / "two.jsonl", rows[2:])
    kinds = {"a.csv": "alpaca", "chats.parquet": "chat_template", "pairs.json": "prompt_completion"}
    kinds |= {"text.txt": "completion", "more": "alpaca"}
    run = {"base_model": str(world.model), "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 0.1}
    run |= {"datasets": [{"path": str(tmp_path / name), "type": kind} for name, kind in kinds.items()]}
    data = prepare_data(make_config(run | {"dataset_prepared_path": PREPARED.name}), tok, 1)
    assert [len(reading.samples) for reading in data.readings.values()] == [6] * 5
    assert sorted(i for step in data.plan for row in step.rows for i in row) == list(range(30))
    learnt = [tok.decode(sample.tokens[sample.supervised].tolist()) for sample in data.samples]
    assert learnt[:18] == [answer + "<|im_end|>" for answer in answers] * 3
    assert learnt[24:] == learnt[:6] and learnt[18:24] == [
        answer.replace("\n", " ") + "<|im_end|>" for answer in answers
    ]


def test_default_system_message_begins_conversations_without_one(world, tmp_path):
    """Those that have one keep it; it is part of the template, so whoever talks to the model later has it too."""
    system = 'Be "brief"\nand \u00fc {{ x }} %} \\n.'
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    own = [{"role": "system", "content": "Own."}, *chat]
    run = {"base_model": str(world.model), "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 0.1}
    path = write_rows(tmp_path / "chats.jsonl", [{"messages": chat}, {"messages": own}])
    run |= {"datasets": [{"path": str(path), "type": "chat_template"}], "default_system_message": system}
    tok = nq.load_tokenizer(world.model)
    data = prepare_data(make_config(run | {"dataset_prepared_path": PREPARED.name}), tok, 1)
    with_system = [{"role": "system", "content": system}, *chat]
    assert data.samples[0].tokens.tolist() == tok.encode_chat(with_system)
    assert data.samples[1].tokens.tolist() == tok.encode_chat(own)
    assert tok.decode(data.samples[0].tokens[data.samples[0].supervised].tolist()) == "Me.<|im_end|>"
    assert data.prompt_format.encode_prompt(tok, chat[:1]) == tok.encode_chat(
        with_system[:2], add_generation_prompt=True
    )


def test_type_as_a_map_names_columns_and_words(world, tmp_path):
    run = {"base_model": str(world.model), "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 0.1}
    path = write_rows(tmp_path / "pairs.jsonl", [{"q": "Who?", "a": "Me."}])
    kind = {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction}\nA:"}
    run |= {"datasets": [{"path": str(path), "type": kind}], "dataset_prepared_path": PREPARED.name}
    config, tok = make_config(run), nq.load_tokenizer(world.model)
    assert (
        tok.decode(prepare_data(config, tok, 1).samples[0].tokens.tolist()) == "<|endoftext|>Q: Who?\nA:Me.<|im_end|>"
    )
    assert questions(config) == [[{"role": "user", "content": "Who?"}]]
    (tmp_path / "train.yml").write_text(config.to_yaml())
    assert load_config([str(tmp_path / "train.yml")]) == config


CONVERSATIONS = {  # every way to write one that a template can be given
    "plain": ({}, [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]),
    "other names": (
        {"message_property_mappings": {"role": "from", "content": "value"}},
        [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}],
    ),
    "answer first": ({}, [{"role": "assistant", "content": "Ask."}, {"role": "user", "content": "Who?"}]),
    "no assistant": ({"roles_to_train": ["user"]}, [{"role": "user", "content": "Who?"}]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_any_conversation_that_can_be_trained_on_can_be_held_out(world, tmp_path, case):
    """The report asks the questions of the held-out file, and must not stumble over how they are written."""
    keys, messages = CONVERSATIONS[case]
    data = write_rows(tmp_path / "chats.jsonl", [{"messages": messages}] * 3)
    dataset = [{"path": str(data), "type": "chat_template", **keys}]
    path = write_run(tmp_path / "train.yml", world.model, data, datasets=dataset, test_datasets=dataset, max_steps=1)
    ended = run_here(train.main, path)
    assert ended.code == 0, ended.err
    asked = "**Who?**" in (tmp_path / "out" / "report.md").read_text("utf-8")
    assert asked == (case in ("plain", "other names"))


def test_questions_are_answered_at_each_evaluation(world, tmp_path):
    """eval_table_size of them, by the model of that step: the last answers are those of the finished run."""
    keys = {"test_datasets": world.tests, "evals_per_epoch": 2, "eval_table_size": 2, "eval_max_new_tokens": 7}
    file = write_run(tmp_path / "train.yml", world.model, world.data, num_epochs=1, learning_rate=0.01, **keys)
    ended = run_here(train.main, file)
    assert ended.code == 0, ended.err
    out = tmp_path / "out"
    rows = metrics_of(out)
    tables = {row["step"]: row["eval_table"] for row in rows if "eval_table" in row}
    assert [*tables] == [row["step"] for row in rows if "eval_loss" in row] and len(tables) == 3
    form = PromptFormat.from_json((out / "prompt.json").read_text())
    chats = [form.question(row) for row in alpaca_rows(2, seed=1)]
    model, tok = nq.Llama.from_pretrained(world.model, load_in_4bit=True), nq.load_tokenizer(out)
    nq.load_adapter(model, out)
    last = [nq.generate(model, tok, asked, max_new_tokens=7, prompt_format=form) for asked in chats]
    table = [{"prompt": asked[-1]["content"], "answer": text} for asked, text in zip(chats, last, strict=True)]
    assert tables[max(tables)] == table and tables[0] != table
    report = (out / "report.md").read_text()
    assert "## Answers at each evaluation" in report and report.count("| step | answer |") == 2
    assert all(f"step {step}: {' '.join(table[0]['prompt'].split())}" in ended.out + ended.err for step in tables)
