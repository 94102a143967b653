"""`nanoqlora compare` against runs whose files are written here: what differs, what came out, and a picture."""

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml
from small_runs import run_here

from nanoqlora.run import compare
from nanoqlora.run.figure import DPI, HEIGHT_IN, WIDTH_IN
from nanoqlora.run.report import write_report

REPORT = """**Held-out perplexity: 9.97 before, 4.06 after.** Held-out loss: 2.3000 before, 1.4000 after, in nats.

| time, s | 1,000 | 1,234 |
"""


def write_run(folder: Path, losses: list[float], held_out: dict[int, float], report: str = "", **settings: Any) -> Path:
    folder.mkdir()
    rows = [{"step": step, "eval_loss": loss} for step, loss in held_out.items()]
    more = {"tokens_per_second": 2000.0, "memory/max_rss_gib": 1.5}
    rows += [{"step": i + 1, "loss": loss} | more for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings:
        (folder / "train.yml").write_text(yaml.safe_dump({"output_dir": str(folder)} | settings))
        (folder / "report.md").write_text(report)
    return folder


def columns(out: str) -> dict[str, list[str]]:
    """The cells of each row of the table, by its first one."""
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()[1:-1]]
    return {line[0]: line[1:] for line in lines}


def test_table_has_what_differs_and_what_came_out(tmp_path):
    same = {"seed": 1, "datasets": [{"path": "x.jsonl", "type": "alpaca"}]}
    a = write_run(tmp_path / "a", [2.0, 1.0], {0: 2.5, 2: 1.5}, REPORT, lora_r=8, **same)
    other = same | {"datasets": [{"path": "y.jsonl", "type": "alpaca"}]}
    b = write_run(
        tmp_path / "b", [2.0] * 30, {0: 2.3}, REPORT, lora_r=16, chat_template_jinja="\x1b[2J {{ x }}\n" * 9, **other
    )
    unended = write_run(tmp_path / "c", [3.0], {})
    ended = run_here(compare.main, a, b, unended, "--out", tmp_path / "all.png")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0].split() == [str(a), str(b), str(unended)]
    assert columns(ended.out) == {
        "lora_r": ["8", "16", "-"],
        "datasets.0.path": ["x.jsonl", "y.jsonl", "-"],
        "chat_template_jinja": ["-", "\\x1b[2J {{ x }} \\x1b[2J {{ x }} \\x1b[2J {{ x }} [...]", "-"],
        "held-out loss, first": ["2.5000", "2.3000", "-"],
        "held-out loss, lowest": ["1.5000", "1.4000", "-"],  # of b only the report has the loss after training
        "held-out loss, last": ["1.5000", "1.4000", "-"],
        "training loss, smoothed, last": ["1.0000", "2.0000", "3.0000"],
        "steps": ["2", "30", "1"],
        "time, s": ["1,234", "1,234", "-"],
        "tokens per second, mean": ["2,000"] * 3,
        "max_rss_gib, peak": ["1.50"] * 3,
    }
    height, width, _ = matplotlib.image.imread(tmp_path / "all.png").shape
    assert (width, height) == (round(WIDTH_IN * DPI), round(HEIGHT_IN * DPI))


def test_report_of_a_real_run_has_the_two_figures(tmp_path):
    """The lines that are looked for are those that report.py writes."""
    facts = {"loss": {"before": 2.3, "after": 1.4}, "perplexity": {"before": 9.97, "after": 4.06}}
    write_report(tmp_path / "report.md", facts | {"time_s": {"predicted": 1000, "measured": 1234}})
    text = (tmp_path / "report.md").read_text()
    assert {key: line.search(text)[1] for key, line in compare.IN_REPORT.items()} == {
        "eval_loss": "1.4000",
        "seconds": "1,234",
    }


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "no metrics.jsonl with a step"),
        ({"metrics.jsonl": "not a row"}, "no metrics.jsonl with a step"),
        ({"metrics.jsonl": '{"step": 1}', "train.yml": "a: ["}, "Correct the YAML"),
        ({"metrics.jsonl": '{"step": 1}', "train.yml": "a: &a [*a]"}, "Correct the YAML"),
    ],
    ids=["no run", "no rows", "no YAML", "endless YAML"],
)
def test_what_is_no_run_is_one_line(tmp_path, files, found):
    (tmp_path / "bad").mkdir()
    for name, text in files.items():
        (tmp_path / "bad" / name).write_text(text)
    good = write_run(tmp_path / "good", [1.0], {})
    ended = run_here(compare.main, good, tmp_path / "bad", "--out", tmp_path / "x.png")
    assert ended.code == 2 and ended.err.startswith(f"error: {tmp_path / 'bad'}") and found in ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "x.png").exists()


def test_one_run_is_no_comparison(tmp_path):
    ended = run_here(compare.main, write_run(tmp_path / "one", [1.0], {}))
    assert ended.code == 2 and "one run is given" in ended.err and ended.err.count("\n") == 1
