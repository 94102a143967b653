"""nq.train, nq.evaluate and nq.generate do what the commands do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, steps_of, write_rows, write_run

import nanoqlora as nq
import nanoqlora.chat
import nanoqlora.evaluate
import train
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.run import forecast
from nanoqlora.run.optimizer_state import gradient_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", alpaca_rows(12))
    tests = [{"path": str(write_rows(folder / "tests.jsonl", alpaca_rows(4, seed=9))), "type": "alpaca"}]
    write_run(folder / "train.yml", folder / "model", rows, test_datasets=tests, num_epochs=1)
    return folder


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    assert run_here(train.main, world / "train.yml", "--output_dir", world / "out", "--lora_r", 2).code == 0
    return world / "out"


def test_a_run_from_python_is_that_of_the_command(world, trained):
    run = nq.train(world / "train.yml", output_dir=str(world / "python"), lora_r=2)
    assert run.output_dir == world / "python" and run.metrics == metrics_of(run.output_dir)
    for ours, theirs in zip(steps_of(run.output_dir), steps_of(trained), strict=True):
        assert all(ours[key] == theirs[key] for key in ("step", "loss", "grad_norm", "learning_rate"))
    files = ("adapter_model.safetensors", "adapter_config.json", "prompt.json")
    assert all((run.output_dir / name).read_bytes() == (trained / name).read_bytes() for name in files)
    assert run.eval_loss == [row["eval_loss"] for row in run.metrics if "eval_loss" in row][-1]


def test_a_wrong_key_has_the_text_of_the_command_line(world):
    ended = run_here(train.main, world / "train.yml", "--lora_rr", 2)
    with pytest.raises(nq.UserError, match="lora_rr.*lora_r") as error:
        nq.train(world / "train.yml", lora_rr=2)
    assert ended.err.split("lora_rr", 1)[1].rstrip() == str(error.value).split("lora_rr", 1)[1]


def test_evaluate_and_generate_are_the_commands(world, trained, tmp_path):
    model, tok = nq.Llama.from_pretrained(world / "model", load_in_4bit=True), nq.load_tokenizer(trained)
    nq.load_adapter(model, trained)
    words = ("--model", world / "model", "--adapter", trained, "--load_in_4bit", "true")
    ended = run_here(nanoqlora.evaluate.main, *words, "--data", world / "tests.jsonl", "--out", tmp_path / "nll.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "nll.jsonl").read_text().splitlines()]
    found = nq.evaluate(model, tok, world / "tests.jsonl")
    assert ended.code == 0 and found["tokens"] == sum(row["tokens"] for row in rows)
    assert found["loss"] == pytest.approx(sum(row["nll"] for row in rows) / found["tokens"], rel=1e-12)

    form = PromptFormat.from_json((trained / "prompt.json").read_text())
    greedy = ("--prompt", "Name a colour.", "--temperature", 0, "--max_new_tokens", 9)
    said = run_here(nanoqlora.chat.main, *words, *greedy)
    messages = [{"role": "user", "content": "Name a colour."}]
    assert nq.generate(model, tok, messages, max_new_tokens=9, prompt_format=form) == said.out.removesuffix("\n")


def test_the_forecast_times_what_the_loop_does(world, tmp_path, monkeypatch):
    """Its gradient of the first micro-batch is the loop's, which is divided by the supervised tokens of the step."""
    loop, clip, seen = train.train_loop, train.sum_and_clip, []

    def forecast_first(run: train.Run, *rest: Any) -> int:
        forecast.forward_backward(run, run.plan[0].rows)
        seen.append(run.grad.clone())
        return loop(run, *rest)

    def clip_last(flat: torch.nn.Parameter, *rest: Any) -> torch.Tensor:
        seen.append(gradient_of(flat).clone())
        return clip(flat, *rest)

    monkeypatch.setattr(train, "train_loop", forecast_first)
    monkeypatch.setattr(train, "sum_and_clip", clip_last)
    ended = run_here(train.main, world / "train.yml", "--output_dir", tmp_path / "out", "--max_steps", 1)
    (row,) = steps_of(tmp_path / "out")
    assert ended.code == 0 and seen[0].abs().max() > 0
    assert torch.allclose(
        seen[0], seen[1] * row["supervised_tokens"], rtol=1e-5, atol=1e-5 * seen[0].abs().max().item()
    )


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": n} for n in (0, -1, 1.5, "x")]
    + [{"temperature": t} for t in (-1, float("nan"), "a")]
    + [{"messages": m} for m in ("hi", [], [{"content": "hi"}])],
    ids=str,
)
def test_generate_refuses_what_has_no_meaning(options):
    """Before the model is used, which is not there."""
    arguments = {"messages": [{"role": "user", "content": "hi"}]} | options
    with pytest.raises(nq.UserError, match=next(iter(options))):
        nq.generate(None, None, **arguments)
