"""--rehearse: a minute that ends as the run would end, and leaves nothing."""

import pytest
from safetensors.torch import load_file
from small_runs import alpaca_rows, run_here, save_tiny_model, snapshot, write_rows, write_run

import train
from nanoqlora.run import rehearsal


@pytest.fixture
def world(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(6))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("of an earlier run")
    return write_run(tmp_path / "train.yml", model, data, val_set_size=2)


def test_rehearsal_goes_to_the_end_and_leaves_nothing(world, monkeypatch):
    """The commands really ran, on files with one block of the two, and the output folder is as it was."""
    seen, real = {}, rehearsal.command

    def watched(script, model, out, *words):
        real(script, model, out, *words)
        folder = out.parent
        seen[script] = snapshot(folder)
        if script == "merge.py":
            seen["names"] = set(load_file(out / "model.safetensors"))

    monkeypatch.setattr(rehearsal, "command", watched)
    before = snapshot(world.parent)
    ended = run_here(train.main, world, "--rehearse")
    assert ended.code == 0, ended.err
    assert snapshot(world.parent) == before
    assert "rehearsed to the end" in ended.out and ended.out.count("rehearsed after") == 5
    assert {"checkpoint-1/optimizer.safetensors", "merged/merge.json", "adapter/prompt.json"} <= seen["merge.py"].keys()
    assert {"model.gguf", "Modelfile", "Fine-Tuning.png"} <= seen["export_gguf.py"].keys()
    assert {name.split(".")[2] for name in seen["names"] if ".layers." in name} == {"0"}


def test_what_would_fail_at_the_end_fails_now(world, monkeypatch):
    """A checkpoint that is read back with other values; an export that is refused."""
    before = snapshot(world.parent)
    real = rehearsal.load_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "load_checkpoint", lambda run: (real(run), run.flat.data.add_(1)))
        with pytest.raises(RuntimeError, match="other values"):
            run_here(train.main, world, "--rehearse")
    assert snapshot(world.parent) == before
    monkeypatch.setattr(rehearsal, "PROGRAMS", world.parent)
    for code in (2, 1):  # a wrong input, a full disk
        script = f"import sys; print('error: no space for it', file=sys.stderr); sys.exit({code})"
        (world.parent / "merge.py").write_text(script)
        ended = run_here(train.main, world, "--rehearse")
        assert (ended.code, ended.err) == (code, "error: merge.py would end with: no space for it\n")


def test_two_commands_in_one_are_refused(world):
    ended = run_here(train.main, world, "--plan", "--rehearse")
    assert ended.code == 2 and ended.err.startswith("error: command line: --plan and --rehearse"), ended.err
