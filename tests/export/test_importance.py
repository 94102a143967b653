"""export_gguf.py --imatrix: measured on the run's texts or read, used for the file, compared in its proof."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_runs import merged, run_here

import export_gguf
from nanoqlora.export.proof import WITHOUT
from nanoqlora.gguf.ggml_blocks import quantize
from nanoqlora.gguf.imatrix import read_imatrix, write_imatrix
from nanoqlora.gguf.reader import read_gguf


@pytest.fixture(scope="module")
def model(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged folder; the YAML of the run beside it."""
    folder = tmp_path_factory.mktemp("model")
    assert merged(run, folder / "merged", "--max_tokens", 0).code == 0
    shutil.copy(run / "run.yml", folder / "run.yml")
    return folder / "merged"


def export(run: Path, model: Path, out: Path, *words: object):
    more = ("--model", model, "--out", out, "--output_dir", run / "out", "--type", "q4_0")
    return run_here(export_gguf.main, run / "run.yml", *more, *words)


def test_measured_used_and_proven(run: Path, model: Path, tmp_path: Path):
    out = tmp_path / "model.gguf"
    ended = export(run, model, out, "--imatrix", "--prove", "--max_tokens", 2000)
    assert ended.code == 0, ended.out + ended.err
    imatrix = read_imatrix(tmp_path / "imatrix.gguf")
    assert f"--imatrix {tmp_path / 'imatrix.gguf'}: measured on {max(imatrix.counts.values())} tokens" in ended.out
    assert imatrix.datasets == [str(run / "held.jsonl")]  # which is also what this run trains on
    forms = {
        form["form"]: form for form in json.loads((model / "merge.json").read_text())["gguf"]["model.gguf"]["forms"]
    }
    kl, other = forms["GGUF model.gguf"]["mean_kl"], forms[WITHOUT]["mean_kl"]
    assert kl != other and f"--imatrix {kl:.5f} nats a token with it, {other:.5f} without: " in ended.out

    file = read_gguf(out)
    layers = [name for name in imatrix.sums if file.tensors[name].ggml_type == "Q4_0"]
    assert len(layers) == 14
    exported = tmp_path / "exact.gguf"
    assert export(run, model, exported, "--type", "f32").code == 0
    for name in layers:
        w = read_gguf(exported).load(name)
        expected = quantize(w, "Q4_0", imatrix.sums[name] / imatrix.counts[name])
        assert torch.equal(file.raw(name).flatten(), expected.flatten()), name


def test_file_in_either_format(run: Path, model: Path, tmp_path: Path):
    assert export(run, model, tmp_path / "a" / "model.gguf", "--imatrix").code == 0
    imatrix = read_imatrix(tmp_path / "a" / "imatrix.gguf")
    write_imatrix(tmp_path / "imatrix.dat", imatrix, older=True)
    for path in (tmp_path / "a" / "imatrix.gguf", tmp_path / "imatrix.dat"):
        ended = export(run, model, tmp_path / "b.gguf", "--imatrix", path)
        assert ended.code == 0 and f"--imatrix {path}: 14 layers, measured on" in ended.out
        assert read_gguf(tmp_path / "b.gguf").metadata["quantize.imatrix.file"] == path.name
    assert (tmp_path / "a" / "imatrix.gguf").exists()


def test_what_cannot_be_used_is_said(run: Path, model: Path, tmp_path: Path):
    out = tmp_path / "model.gguf"
    ended = run_here(export_gguf.main, "--model", model, "--type", "q4_0", "--out", out, "--imatrix")
    assert ended.code == 2 and "--imatrix has no texts to measure on" in ended.err
    ended = export(run, model, out, "--imatrix", run / "run.yml")
    assert ended.code == 2 and "run.yml: is no importance matrix" in ended.err
    assert not out.exists()
    ended = export(run, model, out, "--type", "q8_0", "--imatrix")
    assert ended.code == 0 and "--imatrix: without effect" in ended.out
