"""bench.py --deploy: every form that a run's folder holds is measured, and nothing else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import merged, run_here

import bench
from nanoqlora.export import answer_speed, gguf_model
from nanoqlora.weights.pretrained import load_model


def test_every_form_of_a_run_is_measured(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp")
    folder = shutil.copytree(run / "out", tmp_path / "out")
    assert merged(run, folder / "merged", "--max_tokens", 0).code == 0
    gguf_model.export_gguf(folder / "merged", folder / "model-q8_0.gguf", "Q8_0")
    ended = run_here(bench.main, "--deploy", folder, "--json", tmp_path / "rows.json")
    assert ended.code == 0, ended.err
    rows = json.loads((tmp_path / "rows.json").read_text())
    names = ["base", "adapter on 4-bit base", "merged", "model-q8_0.gguf in llama.cpp"]
    assert [row["form"] for row in rows] == names and all(name in ended.out for name in names)
    assert all(row["prefill"] > row["decode"] > 0 for row in rows), rows

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ended = run_here(bench.main, "--deploy", folder)
    assert ended.code == 0 and "in llama.cpp: not asked, because the package xllamacpp is not installed" in ended.out


def test_speeds_are_tokens_a_second(run: Path, monkeypatch: pytest.MonkeyPatch):
    """By a clock that a prompt moves by 20 ms and every further token by 10 ms."""
    clock = [0.0]

    def generate(prompts, stop_ids, max_new_tokens):
        for i in range(max_new_tokens):
            clock[0] += 0.01 if i else 0.02
            yield [0]

    decoder = SimpleNamespace(generate=generate, model=load_model(run / "model"))
    monkeypatch.setattr(answer_speed, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    speeds = answer_speed.speed_of(decoder, prompt_tokens=100, new_tokens=8)
    assert speeds == pytest.approx({"prefill": 5000, "decode": 100}, rel=1e-9)


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    ended = run_here(bench.main, "--deploy", tmp_path)
    assert ended.code == 2 and "no train.yml" in ended.err
