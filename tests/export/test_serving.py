"""The table at the end of `export_gguf.py --prove`: which form of a run to serve."""

import json
import re
import shutil
from pathlib import Path

import pytest
from small_runs import merged, run_here

import export_gguf
from nanoqlora.export.certificate import Score
from nanoqlora.export.serving import advise


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A merged folder; what `export` needs of its run beside it."""
    assert merged(run, tmp_path / "merged", "--max_tokens", 0).code == 0
    shutil.copytree(run / "out", tmp_path / "out")
    return tmp_path / "merged"


def export(run: Path, model: Path, *words: object) -> str:
    more = ("--output_dir", model.parent / "out", "--model", model, "--prove", "--max_tokens", 2000, *words)
    ended = run_here(export_gguf.main, run / "run.yml", *more)
    assert ended.code == 0, ended.out + ended.err
    return ended.out


def table(said: str) -> dict[str, list[str]]:
    """Its lines by form: size, unit, KL, top-1, perplexity, and tokens/s of files."""
    lines = said.split("which to serve")[1].splitlines()[2:]
    rows = [line for line in lines if re.search(r"\d MB ", line)]
    return {row[:32].strip(): row[32:].split() for row in rows}


def test_all_files_of_a_run_are_in_one_table(run: Path, model: Path, tmp_path: Path):
    """Each with the figures of its own proof, the largest first; until it is another file, or other texts are asked."""
    export(run, model, "--type", "f32")
    said = export(run, model, "--type", "q4_0", "--imatrix")
    names = ["adapter on 4-bit base", "merged", "model-f32.gguf", "model-q4_0.gguf --imatrix"]
    assert list(table(said)) == names
    proofs = json.loads((model / "merge.json").read_text())["gguf"]
    for name, facts in proofs.items():
        (row,) = [row for form, row in table(said).items() if form.startswith(name)]
        (form,) = [form for form in facts["forms"] if form["form"] == f"GGUF {name}"]
        assert row[2] == f"{form['mean_kl']:.5f}" and row[4] == f"{form['perplexity']:.3f}"
        assert form["num_bytes"] == (tmp_path / "out" / name).stat().st_size
        if facts["tokens_per_second"] is not None:  # where llama.cpp is
            assert float(row[5]) == facts["tokens_per_second"] > 0
    assert "advice: model-" in said and proofs["model-q4_0.gguf"]["advice"] in said

    other = export(run, model, "--type", "q8_0", "--data", shutil.copy(run / "held.jsonl", tmp_path / "other.jsonl"))
    assert list(table(other)) == ["adapter on 4-bit base", "merged", "model-q8_0.gguf"]
    with (tmp_path / "out" / "model-f32.gguf").open("ab") as file:
        file.write(b"\0")
    assert "model-f32.gguf" not in table(export(run, model, "--type", "q5_0"))


NEAR, FAR = 0.001, 0.5
BOTH, SMALL, LARGE = "base + adapter-f32.gguf", "model-q4_k_m.gguf", "model-q8_0.gguf"
ADVICE = {  # sizes and distances of files -> those that are named, in this order
    "two files are nearest": ({BOTH: (3, 0), SMALL: (2, FAR), LARGE: (4, NEAR)}, [BOTH, LARGE]),
    "and no single one is near": ({BOTH: (3, 0), SMALL: (2, FAR)}, [BOTH, SMALL]),
    "and there is no single one": ({BOTH: (3, 0)}, [BOTH, "merge it"]),
    "a single one is smaller": ({BOTH: (3, 0), SMALL: (2, NEAR), LARGE: (4, 0)}, [SMALL]),
    "an adapter meets other weights": ({BOTH: (3, FAR), LARGE: (4, NEAR)}, [LARGE]),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_names_two_files_and_what_is_left_without_adapters(case: str):
    files, named = ADVICE[case]
    said = advise([Score(name, kl, 1.0, 1.0, size) for name, (size, kl) in files.items()])
    assert [name for name in (BOTH, SMALL, LARGE, "merge it") if name in said] == named, said
    assert ("For Ollama" in said) == (named[0] == BOTH) and "GGUF" not in said
