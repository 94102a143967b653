"""bench.py --deploy: every form that a run's folder holds is measured, and nothing else."""

import json
import shutil
import time
from pathlib import Path

import pytest
from small_runs import merged, run_here

import bench
import export_gguf
from nanoqlora.export import answer_speed
from nanoqlora.export import answer_speed as deploy_bench
from nanoqlora.weights.pretrained import load_model


def test_every_form_of_a_run_is_measured(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp")
    folder = shutil.copytree(run / "out", tmp_path / "out")
    assert merged(run, folder / "merged", "--max_tokens", 0).code == 0
    export_gguf.export(folder / "merged", folder / "model-q8_0.gguf", "Q8_0")
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
    """With a model that takes 20 ms for a prompt and 10 ms for a token."""

    def slow(model, ids, stop_ids, max_new_tokens):
        time.sleep(0.02)
        for _ in range(max_new_tokens):
            yield 0
            time.sleep(0.01)

    monkeypatch.setattr(deploy_bench, "generate", slow)
    speeds = answer_speed.speed_of(load_model(run / "model"), prompt_tokens=100, new_tokens=8)
    assert 500 < speeds["prefill"] <= 5000 and 10 < speeds["decode"] <= 100


def test_folder_that_is_no_run_is_refused(tmp_path: Path):
    ended = run_here(bench.main, "--deploy", tmp_path)
    assert ended.code == 2 and "no train.yml" in ended.err
