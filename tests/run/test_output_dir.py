"""No run ends another: a folder with a run is refused, gone on with, or emptied on demand; one run at a time."""

import json
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import context
from ranks import end_of_run, hold_lock, on_ranks
from safetensors.torch import load_file, save_file
from small_runs import (
    alpaca_rows,
    metrics_of,
    run_here,
    save_tiny_model,
    snapshot,
    steps_of,
    write_rows,
    write_run,
)

import train
from nanoqlora.config.errors import UserError
from nanoqlora.gguf.modelfile import write_modelfiles, write_template
from nanoqlora.run import checks, results, trackers
from nanoqlora.run.optim import make_optimizer
from nanoqlora.run.optimizer_state import PartOptimizer, state_problem
from nanoqlora.run.output_dir import lock

ADAPTER = "adapter_model.safetensors"
OVERWRITE = ("--overwrite_output_dir", "true")
AUTO = ("--auto_resume_from_checkpoints", "true")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and the finished run of train.yml in `out`: 6 steps, checkpoints 2, 4, 6."""
    folder = tmp_path_factory.mktemp("first")
    model, data = save_tiny_model(folder / "model"), write_rows(folder / "data.jsonl", alpaca_rows(11))
    path = write_run(folder / "train.yml", model, data, max_steps=6, save_steps=2, val_set_size=3, eval_steps=2)
    assert run_here(train.main, path).code == 0
    return folder


@pytest.fixture
def world(first: Path, tmp_path: Path) -> Path:
    """A copy of its output folder, with files that the user and the other commands have put there."""
    out = shutil.copytree(first / "out", tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    (out / "merged").mkdir()
    (out / "merged" / "merge.json").write_text("{}")
    (out / "model-q8_0.gguf").write_text("made from it")
    (out / "my-model.gguf").write_text("mine")
    (out / "checkpoint-best").mkdir()
    (out / "Modelfile").write_text("FROM mine\n")
    write_modelfiles(out / "model-q8_0.gguf", "FROM ./model-q8_0.gguf\n", is_model=True)
    write_template(out / "adapter-f32.jinja", "{{ messages }}")
    return out


def again(first: Path, out: Path, *words: object):
    """A second run with another rate, in the folder of the first."""
    return run_here(train.main, first / "train.yml", "--output_dir", out, "--learning_rate", "1e-4", *words)


def test_the_way_to_resume_runs_as_printed(first, world):
    """Pasted into a shell, also from a folder with a space in its name."""
    out = world.rename(world.with_name("my run"))
    way = again(first, out).err.split("true or ")[1].split(";")[0]
    ended = run_here(train.main, first / "train.yml", "--output_dir", out, *shlex.split(way))
    assert ended.code == 0 and "goes on from step 6 of 6" in ended.out, ended


@pytest.mark.parametrize("words", [(), ("--max_steps", 4), ("--plan",)])
@pytest.mark.parametrize("left", ["all", "log", "checkpoint", "adapter"])
def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(first, world, monkeypatch, words, left):
    """Whatever is left of it, and whether the run is only planned; the line names the run and the ways to go on."""
    kept = {"log": "metrics.jsonl", "checkpoint": "checkpoint-4", "adapter": ADAPTER}.get(left)
    for path in world.iterdir() if kept else ():
        if path.name != kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = snapshot(world)
    monkeypatch.setattr(train, "read_inputs", None)
    ended = again(first, world, *words)
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    expected = ["--output_dir", "--overwrite_output_dir true", "20"]  # ..., and the year
    expected += {"all": ["a finished run, 6 steps"], "log": ["has not ended, 6 steps"]}.get(left, [])
    expected += {"checkpoint": ["has not ended, 4 steps"], "adapter": [ADAPTER]}.get(left, [])
    expected += ["--auto_resume_from_checkpoints", "checkpoint-"] if left in ("all", "checkpoint") else []
    assert all(text in ended.err for text in expected), ended.err
    assert snapshot(world) == before


def test_overwriting_leaves_the_run_that_an_empty_folder_gets(first, world, tmp_path):
    """Nothing of the first run is left, and what is not a run's stays."""
    ended = again(first, world, *OVERWRITE, "--max_steps", 4)
    assert ended.code == 0, ended.err
    assert "removed" in ended.out and "checkpoint-6" in ended.out
    assert again(first, tmp_path / "new", "--max_steps", 4).code == 0
    mine = {"notes.txt", "my-model.gguf", "checkpoint-best", "Modelfile"}
    names = {path.name for path in world.iterdir()}
    assert names == mine | {path.name for path in (tmp_path / "new").iterdir()}
    assert (world / ADAPTER).read_bytes() == (tmp_path / "new" / ADAPTER).read_bytes()
    assert [row["step"] for row in steps_of(world)] == [1, 2, 3, 4]


CHECKS = {
    "data": ["--sequence_len", 16],
    "validation rows": ["--val_set_size", 11],
    "model": ["--lora_target_modules", "[q_pro]"],
    "another folder's checkpoint": ["--resume_from_checkpoint", "OTHER"],
    "a tracker": ["--wandb_project", "x"],
    "memory": [],
    "the tracker's service": ["--wandb_project", "x", "--wandb_mode", "offline"],
}


@pytest.mark.parametrize("case", CHECKS)
def test_nothing_is_removed_until_all_checks_have_passed(first, world, monkeypatch, case):
    other = shutil.copytree(world / "checkpoint-2", world.parent / "other")
    (other / "optimizer.safetensors").write_bytes(b"cut")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(world.parent / "nothing"))
    if case == "memory":

        def measure(*_: object) -> None:
            raise UserError("does not fit")

        monkeypatch.setattr(train, "measure", measure)
    if case == "the tracker's service":
        import wandb

        def init(**_: object) -> None:
            raise wandb.Error("no such project\nmore")

        monkeypatch.setattr(wandb, "init", init)
    before = snapshot(world)
    ended = again(first, world, *OVERWRITE, *(other if word == "OTHER" else word for word in CHECKS[case]))
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert snapshot(world) == before


def test_what_the_run_reads_is_never_removed(first, world):
    """An adapter to start from, or data, in the folder that is to be emptied; the base model's own folder."""
    before = snapshot(world.parent)
    for words in (
        ["--lora_model_dir", world],
        ["--lora_model_dir", world / "checkpoint-2"],
        ["--base_model", world / "merged"],
        ["--datasets", json.dumps([{"path": str(world / "metrics.jsonl"), "type": "completion"}])],
    ):
        ended = again(first, world, *OVERWRITE, *words)
        assert ended.code == 2 and "would" in ended.err and ended.err.count("\n") == 1, ended.err
        assert snapshot(world.parent) == before
    ended = again(first, first / "model")
    assert ended.code == 2 and "is base_model too" in ended.err


@pytest.mark.parametrize("words", [(), OVERWRITE, AUTO])
def test_a_train_yml_of_the_user_is_never_written_over(first, tmp_path, words):
    """One that lies in output_dir, and from which the run is started; a run's own resolved one may start the next."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(first / "train.yml", out)
    before = snapshot(out)
    ended = run_here(train.main, out / "train.yml", "--output_dir", out, *words)
    assert ended.code == 2 and "holds a train.yml that no run has written" in ended.err, ended.err
    assert snapshot(out) == before
    if words == OVERWRITE:
        shutil.copy(first / "out" / "train.yml", out)
        assert run_here(train.main, out / "train.yml", "--output_dir", out, *words, "--max_steps", 1).code == 0


def test_the_later_course_is_removed_when_an_earlier_checkpoint_is_named(first, world):
    """Or a kill would leave both, and the newest checkpoint would be one of the course that was left."""
    ended = again(first, world, "--resume_from_checkpoint", world / "checkpoint-2", "--save_steps", 5)
    assert ended.code == 0, ended.err
    assert "goes on from step 2 of 6" in ended.out and "removed checkpoint-4, checkpoint-6" in ended.out
    assert {p.name for p in world.glob("checkpoint-[0-9]")} == {"checkpoint-2", "checkpoint-5"}
    assert [row["learning_rate"] < 1.1e-4 for row in steps_of(world)] == [False, False, True, True, True, True]


def test_a_report_of_the_course_that_was_left_does_not_finish_the_run(first, world, monkeypatch):
    """Killed between the new adapter and the new report."""
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_report", lambda *_: sys.exit(9))
        ended = again(first, world, "--resume_from_checkpoint", world / "checkpoint-2")
    assert ended.code == 9 and (world / ADAPTER).exists() and not (world / "report.md").exists()
    ended = again(first, world, *AUTO)
    assert ended.code == 0 and "goes on from step 6 of 6" in ended.out and (world / "report.md").exists(), ended


def test_a_checkpoint_of_another_folder_goes_on_in_an_empty_one_only(first, world, tmp_path):
    checkpoint = shutil.copytree(world / "checkpoint-4", tmp_path / "elsewhere" / "checkpoint-4")
    ended = again(first, world, "--resume_from_checkpoint", checkpoint)
    assert ended.code == 2 and "a finished run, 6 steps" in ended.err
    ended = run_here(
        train.main, first / "train.yml", "--output_dir", tmp_path / "new", "--resume_from_checkpoint", checkpoint
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "new" / ADAPTER).read_bytes() == (world / ADAPTER).read_bytes()


def test_auto_resume_of_a_finished_run_does_nothing(first, world):
    before = snapshot(world)
    ended = again(first, world, *AUTO)
    assert ended.code == 0 and "is finished" in ended.out, ended
    assert snapshot(world) == before
    (world / "report.md").unlink()  # killed while it wrote its results
    assert again(first, world, *AUTO).code == 0 and (world / "report.md").exists()


def test_auto_resume_begins_anew_where_only_a_log_is(first, tmp_path):
    """Of a run that was killed before its first checkpoint. A finished one without checkpoints is not written over."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    ended = again(first, out, *AUTO, "--max_steps", 2, "--save_strategy", "no", "--save_steps", "null")
    assert ended.code == 0 and "has no checkpoint, so the run begins with step 1" in ended.out, ended
    assert [row["step"] for row in steps_of(out)] == [1, 2]
    before = snapshot(out)
    ended = again(first, out, *AUTO, "--max_steps", 2)
    assert ended.code == 2 and "a finished run, 2 steps" in ended.err
    assert snapshot(out) == before


def test_the_key_and_auto_resume_exclude_each_other(first, world):
    before = snapshot(world)
    ended = again(first, world, *AUTO, *OVERWRITE)
    assert ended.code == 2 and "overwrite_output_dir" in ended.err
    assert snapshot(world) == before


def test_a_second_run_in_the_folder_is_refused_while_the_first_one_runs(first, world):
    """The lock is a process's: it goes with it, however that ends."""
    with lock(world):
        before = snapshot(world)
        for words in (OVERWRITE, AUTO):
            ended = again(first, world, *words)
            assert ended.code == 2 and f"process {os.getpid()} is writing there now" in ended.err, ended.err
        assert snapshot(world) == before
    reader, writer = context().Pipe(duplex=False)
    process = context().Process(target=hold_lock, args=(world, writer))
    process.start()
    assert reader.poll(60) and reader.recv() == "locked"
    assert again(first, world, *OVERWRITE).code == 2
    process.kill()
    process.join()
    assert again(first, world, *OVERWRITE, "--max_steps", 1).code == 0


def test_two_runs_that_begin_together_in_a_new_folder(first, tmp_path, monkeypatch):
    """The other one takes the folder while this one loads its model."""
    real = train.build_run

    def meanwhile(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(train, "build_run", real)
            assert again(first, tmp_path / "out", "--max_steps", 1).code == 0
        return real(*arguments, **options)

    monkeypatch.setattr(train, "build_run", meanwhile)
    ended = again(first, tmp_path / "out")
    assert ended.code == 2 and "a finished run, 1 steps" in ended.err
    assert [row["step"] for row in steps_of(tmp_path / "out")] == [1]


def test_ranks_are_refused_together(first, world):
    before = snapshot(world)
    words = (first / "train.yml", "--output_dir", world, "--micro_batch_size", 1)
    ended = on_ranks(2, end_of_run, *words)
    assert [code for code, _, _ in ended] == [2, 2] and "a finished run" in ended[0][2] and not ended[1][2]
    assert snapshot(world) == before
    ended = on_ranks(2, end_of_run, *words, *OVERWRITE)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    assert len(steps_of(world)) == 6


# ------------------------------------------------------------------------------------------------ the checkpoint


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_decision_to_stop_is_part_of_the_checkpoint(first, tmp_path, monkeypatch, where):
    """Killed behind the checkpoint of the step that decided, or gone on with from there without the log."""
    losses = iter([9, 5, 6, 7, 8, 9, 9, 9])
    monkeypatch.setattr(train, "evaluate", lambda run, step: next(losses) + 0.0)
    words = ["--early_stopping_patience", 2, "--eval_steps", 1, "--save_steps", 1, "--save_total_limit", 9]
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_best", lambda *_: sys.exit(9))
        patch.setattr(train, "judge", lambda *_: {})
        assert again(first, tmp_path / "out", *words).code == 9
    assert [row["step"] for row in steps_of(tmp_path / "out")] == [1, 2, 3]
    out = tmp_path / "out" if where == "here" else tmp_path / "new"
    resume = AUTO if where == "here" else ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-3"]
    ended = again(first, out, *words, *resume)
    assert ended.code == 0, ended.err
    assert "ends here, 2 evaluations without a better one than after step 1" in ended.err
    assert [row["step"] for row in metrics_of(out) if "loss" in row] == ([1, 2, 3] if where == "here" else [])
    if where == "elsewhere":
        ended = again(first, tmp_path / "patient", *words, *resume, "--early_stopping_patience", 3)
        assert ended.code == 0 and [row["step"] for row in steps_of(tmp_path / "patient")] == [4]


def spoilt_states(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Optimizer states that would be read beyond their ends, or as something else."""
    name = "0.exp_avg" if "0.exp_avg" in state else "0.state1"
    moment = state[name]
    return {
        "one value": state | {name: torch.zeros(1)},
        "twice as long": state | {name: moment.repeat(2)},
        "float64": state | {name: moment.double()},
        "bytes": state | {name: moment.to(torch.int8)},
        "two dimensions": state | {name: moment[None]},
        "missing": {key: x for key, x in state.items() if key != name},
        "a number": state | {name: torch.tensor(3)},
        "more": state | {"0.more": torch.zeros(3)},
        "step": state | {"0.step": torch.zeros(3)},
        "no number": state | {key: x * float("nan") for key, x in state.items() if x.is_floating_point() and x.dim()},
        "two parameters": state | {f"1.{key[2:]}": x for key, x in state.items()},
        "other keys": {key[2:]: x for key, x in state.items()},
    }


@pytest.mark.parametrize("kind", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "sharded"])
def test_every_tensor_of_an_optimizer_state_is_compared_before_use(first, tmp_path, kind):
    sharded = (
        ("--shard_optimizer_state", "true", "--micro_batch_size", 1) if kind == "sharded" else ("--optimizer", kind)
    )
    words = (first / "train.yml", "--output_dir", tmp_path / "out", *sharded, "--max_steps", 2)
    assert on_ranks(2, end_of_run, *words)[0][0] == 0 if kind == "sharded" else run_here(train.main, *words).code == 0
    file = tmp_path / "out" / "checkpoint-2" / "optimizer.safetensors"
    right = load_file(file)
    n = len(right.get("0.exp_avg", right.get("0.state1")))
    flat = torch.nn.Parameter(torch.zeros(n))
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if kind == "sharded":
        flat = torch.nn.Parameter(torch.zeros(-(-n // 512) * 512))
        flat.grad = torch.zeros_like(flat)
        optimizer = PartOptimizer("adamw_torch", flat, n, 0, 2, **options)
    else:
        optimizer = make_optimizer(kind, flat, **options)
    assert state_problem(optimizer, right) == ""
    for case, state in spoilt_states(right).items():
        assert state_problem(optimizer, state), case
    save_file(spoilt_states(right)["one value"], file)
    (tmp_path / "out" / "report.md").unlink()
    before = snapshot(tmp_path)
    run = (lambda *words: on_ranks(2, end_of_run, *words)[0]) if kind == "sharded" else partial(run_here, train.main)
    code, _, err = run(*words, *AUTO)
    assert code == 2 and "optimizer.safetensors" in err and err.count("\n") == 1, err
    assert snapshot(tmp_path) == before


STATES = {
    "step": ["1", None, 1.5, True, 0, -3, [], 10**30],
    "plan": [None, 3, {}],
    "steps": ["6", [6]],
    "base_fingerprint": [3],
    "optimizer": [None, 8],
    "fixed": [[], "lora_alpha"],
    "before": [{"loss": "x"}, {"loss": 1.0, "plain_loss": 1.0, "answers": [1]}, [1], 3],
    "progress": [{"best_step": "1"}, [], {"best_loss": []}],
}


@pytest.mark.parametrize("key", STATES)
def test_a_state_file_of_another_shape_is_one_line(first, world, key):
    file = world / "checkpoint-6" / "trainer_state.json"
    right = json.loads(file.read_text())
    (world / "report.md").unlink()
    for value in STATES[key]:
        file.write_text(json.dumps(right | {key: value}))
        before = snapshot(world)
        ended = again(first, world, *AUTO)
        assert ended.code == 2 and "trainer_state.json" in ended.err and ended.err.count("\n") == 1, (value, ended.err)
        assert snapshot(world) == before


def test_betas_and_decay_are_those_of_the_configuration_after_a_resume(first, tmp_path, monkeypatch):
    checkpoint = first / "out" / "checkpoint-2"
    seen = []
    real = checks.load_checkpoint
    monkeypatch.setattr(
        checks, "load_checkpoint", lambda run: (real(run), seen.append(run.optimizer.param_groups[0]))[0]
    )
    words = ("--resume_from_checkpoint", checkpoint, "--adam_beta2", 0.95, "--weight_decay", 0.25)
    assert again(first, tmp_path / "out", *words).code == 0
    assert seen[0]["betas"] == (0.9, 0.95) and seen[0]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    "what, said", [("empty", "is empty"), ("run", "It has checkpoint-2, checkpoint-4"), ("data", "no complete")]
)
def test_a_folder_that_is_no_checkpoint_is_named_as_it_is(first, tmp_path, what, said):
    folder = {"run": first / "out", "data": first}.get(what, tmp_path / "empty")
    folder.mkdir(exist_ok=True)
    ended = again(first, tmp_path / "out", "--resume_from_checkpoint", folder)
    assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err


# ------------------------------------------------------------------------------------------------ trackers, terminals


def test_a_tracker_that_fails_in_the_middle_does_not_end_the_run(first, tmp_path, monkeypatch):
    def fails(row: dict) -> None:
        if row["step"] == 2:
            raise ConnectionError("no network")

    monkeypatch.setattr(train, "make_trackers", lambda *_: [fails])
    ended = again(first, tmp_path / "out")
    assert ended.code == 0 and ended.err.count("warning: fails failed (no network)") == 1, ended.err
    assert len(steps_of(tmp_path / "out")) == 6


def test_trackers_are_checked_before_anything_is_loaded(first, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "read_inputs", None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for words, said in ((("--use_tensorboard", "true"), "tensorboard"), (("--wandb_project", "x"), "wandb")):
        ended = again(first, tmp_path / "out", *words)
        assert ended.code == 2 and f"pip install {said}" in ended.err
    assert not os.listdir(tmp_path)


def test_without_a_terminal_there_is_a_line_for_each_logged_step(first, tmp_path):
    ended = again(first, tmp_path / "out", "--logging_steps", 2)
    lines = [line for line in ended.err.splitlines() if line.startswith("step ") and "loss" in line and "lr" in line]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"] and "\r" not in ended.err
