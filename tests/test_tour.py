"""The lesson in one file against the package: the same losses and gradient norms."""

import sys

import pytest
from paths import ROOT
from small_runs import run_here, save_tiny_model, steps_of, write_run

import train
from nanoqlora import ops


@pytest.fixture
def one_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tour"))
    import one_file

    yield one_file
    del sys.modules["one_file"]


def test_one_file_is_the_same_run(tmp_path, monkeypatch, one_file):
    """Twenty steps over chats, packed: text to ids, masks, order, four bits, gradients, clip, AdamW and schedule."""
    monkeypatch.setattr(ops, "_fast", False)  # bitsandbytes rounds one scale of a thousand to the next level
    model = save_tiny_model(tmp_path / "model")
    lines = (ROOT / "data" / "pirate.jsonl").read_text("utf-8").splitlines()[:60]
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(lines) + "\n", "utf-8")
    keys = {"sequence_len": 512, "sample_packing": True, "pad_to_sequence_len": True, "lora_dropout": 0.0}
    keys |= {"lora_r": 8, "lora_alpha": 16, "micro_batch_size": 2, "max_steps": 20, "warmup_ratio": 0.1}
    keys |= {"datasets": [{"path": str(data), "type": "chat_template"}], "save_strategy": "no", "learning_rate": 1e-2}
    file = write_run(tmp_path / "run.yml", model, data, **keys)
    ended = run_here(train.main, file)
    assert ended.code == 0, ended.err
    settings = one_file.Settings(str(model), str(data), lora_r=8, lora_alpha=16.0, learning_rate=1e-2)
    logged: list[tuple[int, float, float, float]] = []
    one_file.train(settings, lambda *row: logged.append(row))
    expected = steps_of(tmp_path / "out")
    assert len(logged) == len(expected) == 20
    for (step, loss, norm, rate), row in zip(logged, expected, strict=True):
        assert step == row["step"] and rate == pytest.approx(row["learning_rate"], rel=1e-12)
        assert loss == pytest.approx(row["loss"], rel=1e-6), step
        assert norm == pytest.approx(row["grad_norm"], rel=2e-6, abs=1e-6), step
    assert logged[-1][1] < logged[0][1] - 0.3, "it learns"
