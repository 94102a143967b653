"""Runs that are killed, or whose disk is full, before one of their changes of a file: they end as if nothing had been.

`make kills` and `make disks` do the same for every command, at every change and at random times.
"""

import shutil
import sys
from pathlib import Path

import pytest
from faults import Fault, run_under
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, snapshot, write_rows, write_run

import export_gguf
import merge
import train
from nanoqlora.run import checkpoints

STOPS_EARLY = {"val_set_size": 3, "eval_steps": 1, "early_stopping_patience": 2, "learning_rate": 0.5}
STOPS_EARLY |= {"load_best_model_at_end": True, "save_steps": 1, "save_total_limit": 2, "micro_batch_size": 4}
VARIES = "tokens_per_second", "memory/"


def facts(folder: Path) -> dict:
    """All that two equal runs leave: the log without speeds, the bytes of all other files."""
    found = snapshot(folder)
    rows = [{k: v for k, v in row.items() if not k.startswith(VARIES)} for row in metrics_of(folder)]
    times = {"metrics.jsonl": rows, "report.md": "", "Fine-Tuning.png": ""}
    return {name: times.get(name, data) for name, data in found.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    save_tiny_model(folder / "model", num_hidden_layers=1, intermediate_size=64)
    write_rows(folder / "data.jsonl", alpaca_rows(16))
    return folder


@pytest.fixture(scope="module")
def run(world: Path) -> tuple[Path, dict, int]:
    """A run that stops early, with its best model: the YAML, what it leaves, the number of its changes of files."""
    keys = STOPS_EARLY | {"auto_resume_from_checkpoints": True, "num_epochs": 4}
    yml = write_run(world / "train.yml", world / "model", world / "data.jsonl", **keys)
    ended = run_here(train.main, yml)
    assert ended.code == 0 and "ends here, 2 evaluations" in ended.err, ended.err
    found = facts(world / "out")
    shutil.rmtree(world / "out")
    code, count, err = run_under(Fault(0), world, "train.py", yml)
    assert code == 0 and facts(world / "out") == found, err
    assert len([row for row in found["metrics.jsonl"] if "loss" in row]) < 12
    return yml, found, count


def points(count: int, number: int) -> list[int]:
    """So many, from the first to the last; changes 1 and 2 are stdout and stderr."""
    return sorted({3 + (count - 3) * i // (number - 1) for i in range(number)})


def test_a_killed_run_ends_as_if_nothing_had_been(world, run):
    """Early stopping too: the same log, checkpoints and adapter."""
    yml, right, count = run
    for at in points(count, 9):
        shutil.rmtree(world / "out")
        assert run_under(Fault(at), world, "train.py", yml)[0] == -9
        ended = run_here(train.main, yml)
        assert ended.code == 0 and facts(world / "out") == right, f"before change {at} of {count}: {ended}"


def test_a_kill_between_the_last_checkpoint_and_the_removal_of_the_oldest(world, run, monkeypatch):
    yml, right, _ = run
    shutil.rmtree(world / "out")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "drop_oldest", lambda run: sys.exit(9) if run.progress.since_best == 2 else None)
        assert run_here(train.main, yml).code == 9
    assert len([*(world / "out").glob("checkpoint-*")]) == 3
    assert run_here(train.main, yml).code == 0 and facts(world / "out") == right


def test_a_run_whose_disk_is_full_goes_on_when_there_is_space(world, run):
    yml, right, count = run
    for at in points(count, 6):
        shutil.rmtree(world / "out")
        code, _, err = run_under(Fault(at, full=True), world, "train.py", yml)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code in (0, 1) and len(lines) == code and "Traceback" not in err, err
        assert not code or ("No space left on device" in lines[0] and " free. " in lines[0]), lines
        assert not [*(world / "out").glob(".*")], at
        ended = run_here(train.main, yml)
        assert ended.code == 0 and facts(world / "out") == right, f"from change {at} of {count} on: {ended}"


@pytest.mark.parametrize("script", ["merge.py", "export_gguf.py"])
@pytest.mark.parametrize("full", [False, True])
def test_the_old_result_or_the_new_one_is_there(world, run, script, full):
    """Whatever happens; the same command then leaves what it should and nothing else."""
    yml, _, _ = run
    out, words = world / "results" / f"{script}-{full}", ("--dtype", "fp16") if script == "merge.py" else ()
    (out / "model").mkdir(parents=True)
    ended = run_here(merge.main, yml, "--out", out / "model" / "merged", "--max_tokens", 0)
    assert ended.code == 0, ended
    words = ("--max_tokens", 0, "--dtype", "fp16", "--out", out / "merged")
    if script == "export_gguf.py":
        words = ("--model", out / "model" / "merged", "--out", out / "it.gguf")
    assert run_here(MAINS[script], yml, *words, *EARLIER[script]).code == 0
    earlier = shutil.copytree(out, world / f"earlier-{script}-{full}")
    code, count, err = run_under(Fault(0), world, script, yml, *words)
    assert code == 0, err
    old, new = snapshot(earlier), snapshot(out)
    assert old != new
    for at in points(count, 6):
        shutil.rmtree(out)
        shutil.copytree(earlier, out)
        code, _, err = run_under(Fault(at, full), world, script, yml, *words)
        assert code == (1 if full else -9) or (full and code == 0), err
        found = {name: data for name, data in snapshot(out).items() if ".tmp" not in name}
        assert old.keys() <= found.keys()
        assert all(data in (old.get(name), new.get(name)) for name, data in found.items()), at
        if script == "merge.py":
            assert found in (old, new), f"mixed, at {at}"
        assert not full or set(found) == set(snapshot(out)), "something is left over"
        assert run_here(MAINS[script], yml, *words).code == 0 and snapshot(out) == new, at


MAINS = {"merge.py": merge.main, "export_gguf.py": export_gguf.main}
EARLIER = {"merge.py": ("--dtype", "fp32"), "export_gguf.py": ("--type", "f32")}  # the last value counts
