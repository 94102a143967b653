"""The picture is a real one of the promised size whatever is logged, and the report holds what is known, no more."""

import math
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nanoqlora.data.batches import SUPERVISED, Samples
from nanoqlora.data.prepare import Places, Reading
from nanoqlora.fast import stats
from nanoqlora.run.figure import DPI, HEIGHT_IN, WIDTH_IN, limits, plot_metrics, series, smooth
from nanoqlora.run.report import write_report
from nanoqlora.run.results import row_notes


def logged(steps: int, **more) -> list[dict]:
    """Rows as a run writes them: a falling loss, a schedule, an evaluation before and after."""
    rows = [{"step": 0, "eval_loss": 3.0, "eval_perplexity": math.exp(3)}]
    for step in range(1, steps + 1):
        row = {"step": step, "epoch": 2 * step / steps, "loss": 1 + 2 / step, "grad_norm": 1 / step}
        rows.append(row | {"learning_rate": 1e-3 / step, "memory/max_rss_gib": 1.5} | more)
    return rows + [{"step": steps, "eval_loss": 1.2, "eval_perplexity": math.exp(1.2)}]


def png_size(path) -> tuple[int, int]:
    """(width, height) of a PNG whose every chunk has the right checksum, down to the end chunk."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds, size = 8, [], (0, 0)
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        kinds.append(kind)
        at += 12 + length
    assert kinds[0] == b"IHDR" and b"IDAT" in kinds and kinds[-1] == b"IEND"
    return size


GPU = {f"memory/{name}": 24.7 for name in ("max_mem_active_gib", "max_mem_allocated_gib", "device_mem_reserved_gib")}
ODD = {"step": 9, "loss": math.nan, "grad_norm": None, "learning_rate": math.inf}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": 2.0, "grad_norm": 0.0, "learning_rate": 0.0}],
        [{"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.1}],
        [{"note": "no step"}, ODD],
        logged(40),
        logged(40, **GPU) + [ODD, {"step": 20, "grad_norm": 1e6, "loss": 1e3}],
        logged(200, loss=1.0, grad_norm=1.0),
    ],
    ids=["none", "one", "one evaluation", "nothing finite", "cpu", "gpu with spikes", "constant"],
)
def test_picture_is_a_real_png_of_the_promised_size(tmp_path, rows):
    path = tmp_path / "run $1_a" / "Fine-Tuning.png"
    plot_metrics(rows, path)
    assert png_size(path) == (WIDTH_IN * DPI, round(HEIGHT_IN * DPI))
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file stays


def test_picture_depends_on_the_rows(tmp_path):
    """The same rows in any order give the same bytes; other rows give others."""
    for name, rows in {"a": logged(20), "b": logged(20)[::-1], "c": logged(21)}.items():
        plot_metrics(rows, tmp_path / name, name="run")
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_series_keeps_finite_numbers_in_order():
    rows = [{"step": 3, "x": 1.0}, {"step": 1, "x": 2}, {"step": 2, "x": math.nan}, {"step": 4, "x": None}, {"x": 5.0}]
    assert series(rows, "x") == ([1, 3], [2, 1.0])


def test_smooth_follows_a_line_exactly_and_halves_noise():
    """A straight line fitted to a straight line is that line, ends included; alternating noise nearly cancels."""
    line = [3 - 0.01 * i for i in range(200)]
    assert smooth(line) == pytest.approx(line, abs=1e-9)
    # Over at least 9 points, noise of +-1 leaves 1/9 of itself inside and, with the slope's error, under 1/2 at an end.
    noisy = [value + (-1) ** i for i, value in enumerate(line)]
    assert max(abs(a - b) for a, b in zip(smooth(noisy), line, strict=True)) < 0.5
    assert smooth([]) == [] and smooth([5.0]) == [5.0]


def test_limits_show_the_curve_and_not_the_spike():
    values = [1 + 0.001 * i for i in range(100)]
    bottom, top = limits([*values, 50.0])
    assert bottom < 1 and 1.099 < top < 1.2
    assert limits([*values, 50.0], low=0.0)[0] == 0.0
    assert limits(values, always=[3.0])[1] > 3  # an evaluation is never cut off
    assert limits([2.0])[0] < 2 < limits([2.0])[1] and limits([0.0] * 20)[0] < limits([0.0] * 20)[1]


EVERYTHING = {
    "name": "pirate",
    "command": "python train.py train.yml --seed 1",
    "figure": "Fine-Tuning.png",
    "perplexity": {"before": 21.1234, "after": 4.1},
    "loss": {"before": 3.05, "after": 1.41},
    "data": [{"path": "data/a|b.jsonl", "samples": 1200, "tokens": 98765, "sha256": "0123456789abcdef" * 4}],
    "model": {"base": "SmolLM2-135M", "trained parameters": 4884480},
    "hyper_parameters": {"lora_r": 16, "learning_rate": 0.001, "sample_packing": True, "max_steps": None},
    "memory": {"peak": {"predicted": 1.5, "measured": 1.62}},
    "time_s": {"predicted": 300.0, "measured": 280.5},
    "tokens_per_second": 812.34,
    "samples": [{"prompt": "Who are\nyou?", "before": "I am an assistant.", "after": "Arr!\n```\nbooty\n```"}],
    "files": {"adapter_model.safetensors": "the adapter"},
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "notes": ["2 samples were too long"],
}


def test_report_with_everything(tmp_path):
    write_report(tmp_path / "report.md", EVERYTHING)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for line in (
        "# pirate",
        "**Held-out perplexity: 21.12 before, 4.10 after.**",
        "![Loss, gradient norm, learning rate and memory](Fine-Tuning.png)",
        "- 2 samples were too long",
        "**Who are you?**",
        "````\nArr!\n```\nbooty\n```\n````",  # the answer's own fence does not end the block
        "| peak, GiB | 1.5 | 1.62 |",
        "| time, s | 300 | 280.5 |",
        "| tokens per second | - | 812.3 |",
        "| data/a\\|b.jsonl | 1,200 | 98,765 | 0123456789abcdef |",
        "| trained parameters | 4,884,480 |",
        "| `learning_rate` | 0.001 |",
        "| `sample_packing` | true |",
        "| `max_steps` | - |",
        "| `adapter_model.safetensors` | the adapter |",
        "```sh\npython train.py train.yml --seed 1\n```",
        "With python 3.11, torch 2.13.0.",
    ):
        assert line in text, line
    assert "3.0500 before, 1.4100 after" in text
    assert len(text.splitlines()) < 90  # one page


def test_report_with_little(tmp_path):
    write_report(tmp_path / "report.md", {})
    assert (tmp_path / "report.md").read_text() == "# Fine-tuning run\n"


@pytest.mark.parametrize("key", EVERYTHING)
def test_missing_fact_leaves_only_its_line_out(tmp_path, key):
    write_report(tmp_path / "report.md", {name: fact for name, fact in EVERYTHING.items() if name != key})
    write_report(tmp_path / "alone.md", {key: EVERYTHING[key]})
    text, alone = (tmp_path / "report.md").read_text(), (tmp_path / "alone.md").read_text()
    assert "None" not in text + alone and "\n\n\n" not in text + alone
    assert len(alone) > 5
    whole = tmp_path / "whole.md"
    write_report(whole, EVERYTHING)
    missing = set(whole.read_text().splitlines()) - set(text.splitlines())
    assert missing and len(missing) <= 10


def test_half_a_pair_is_left_out(tmp_path):
    write_report(tmp_path / "report.md", {"perplexity": {"before": 3.0}, "time_s": {"measured": 5.0}})
    text = (tmp_path / "report.md").read_text()
    assert "perplexity" not in text and "| time, s | - | 5 |" in text


def test_empty_answer_is_shown_as_one(tmp_path):
    write_report(tmp_path / "report.md", {"samples": [{"prompt": "Why?", "before": "So.", "after": ""}]})
    text = (tmp_path / "report.md").read_text()
    assert "before:\n\n```\nSo.\n```" in text and "after:\n\n```\n(nothing: it ends at once)\n```" in text


def test_what_became_of_rows_is_noted():
    samples = Samples.of(np.array([1, 2 | SUPERVISED], np.uint32), np.array([2]), np.array([1]), "")
    reading = Reading(samples=samples, notes={"the column id was not read": Places(2, ["a.jsonl, line 1"])})
    config = SimpleNamespace(sequence_len=8, excess_length_strategy="drop")
    [note] = row_notes(reading, config)
    assert note == "2 rows: the column id was not read (first: a.jsonl, line 1)"
    reading = replace(reading, too_long=Places(1, ["a.jsonl, line 7"]), longest=9)
    dropped, same = row_notes(reading, config)
    assert same == note and "1 longer than sequence_len 8 dropped (first: a.jsonl, line 7" in dropped


def test_stages_leave_out_what_ran_within_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stats.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(stats, "stages", {})

    @stats.stage("inner")
    def inner() -> None:
        now[0] += 3

    for _ in range(2):
        with stats.stage("outer"):
            now[0] += 1
            inner()
            with pytest.raises(ValueError), stats.stage("fails"):
                now[0] += 0.5
                raise ValueError
    assert stats.stages == {"inner": 6, "fails": 1, "outer": 2}
