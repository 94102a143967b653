"""The lesson in one file against the package: the same losses and gradient norms."""

import importlib
import re
import sys

import pytest
from paths import ROOT
from small_runs import run_here, save_tiny_model, steps_of, write_run

import train
from nanoqlora import ops
from tour import include, recompute


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


# The chapters in docs/tour

CHAPTERS = sorted((ROOT / "docs" / "tour").glob("[0-9][0-9]-*.md"))
EXERCISES = sorted((ROOT / "tour" / "exercises").glob("[0-9][0-9]_*.py"))


def test_code_of_the_chapters_is_the_source():
    for path in CHAPTERS:
        text = path.read_text("utf-8")
        assert include.BLOCK.search(text), f"{path.name} has no code of the project"
        assert include.rewritten(text) == text, f"{path.name}: python -m tour.include writes its code again"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_all_its_parts(path):
    """One picture that figures.py draws, an equation, a number that is computed again, an exercise; a page at most."""
    text = path.read_text("utf-8")
    assert re.findall(r"!\[.+\]\((.+?)\)", text) == [f"{path.stem}.svg"]
    source = (ROOT / "tour" / "figures.py").read_text("utf-8")
    assert f"def picture_{path.stem.replace('-', '_')}()" in source and path.with_suffix(".svg").is_file()
    assert re.search(r"\n    \S.* = ", text) and recompute.marks(text)
    exercise = path.stem.replace("-", "_")
    assert f"`tour/exercises/{exercise}.py`" in text
    assert (ROOT / "tour" / "exercises" / f"{exercise}.py").is_file()
    assert len(text.splitlines()) <= 110


@pytest.mark.parametrize("name", recompute.NUMBERS)
def test_a_number_of_the_chapters_is_computed_again(name):
    marks = [(path, *mark) for path in CHAPTERS for mark in recompute.marks(path.read_text("utf-8"))]
    found = [(path, written) for path, mark, written in marks if mark == name]
    computed = recompute.NUMBERS[name]()
    assert found and not [(path.name, written) for path, written in found if written != computed], computed


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)
def test_an_exercise_fails_until_it_is_solved(path):
    exercise, solution = load(path), load(ROOT / "tour" / "solutions" / path.name)
    tests = [function for name, function in vars(exercise).items() if name.startswith("test_")]
    assert tests
    for check in tests:
        with pytest.raises((NotImplementedError, AssertionError)):
            check()
    vars(exercise).update({name: value for name, value in vars(solution).items() if not name.startswith("_")})
    for check in tests:
        check()
