"""`report.md`, the one page of a run to send to somebody.

The text is in `report.md.jinja`, and is filled from a dict of facts that the run has anyway. A fact may be missing,
and then its line or section is left out.

Left out: interactive plots and loggers over the network; `metrics.jsonl` is easy to read with anything.
"""

import re
from pathlib import Path
from typing import Any

import jinja2

from ..config.errors import printable
from ..config.files import write_text

PAIRS = ("perplexity", "loss", "plain_perplexity", "domain")
COLUMNS = {"path": "file", "samples": "samples", "tokens": "tokens", "supervised_tokens": "supervised tokens"}
COLUMNS |= {"sha256": "SHA-256"}


def write_report(path: str | Path, facts: dict[str, Any]) -> None:
    """Write report.md, one page, from what is known of a run.

    Args:
        path: the Markdown file, written atomically.
        facts: any of these; a missing one leaves its line or section out.
            name: str, of the run.    command: str, that repeats it in folder: str.
            figure: str, path of Fine-Tuning.png as seen from the report.
            perplexity: {"before": x, "after": y}, on held-out data.    loss: the same, nats per token.
            plain_perplexity: {"before": x, "after": y}, on plain text.
            domain: {"before": x, "after": y, "data": z}, shares of words that mark the data; `quality.py` has the rule.
            data: list of {"path", "samples", "tokens", "supervised_tokens", "sha256"}, one per file.
            model: {label: value}, such as {"base": "...", "trained parameters": 1234}.
            hyper_parameters: {key of the YAML: value}.
            memory: {label: {"predicted": GiB, "measured": GiB}}.
            time_s: {"predicted": s, "measured": s}.    tokens_per_second: x.    basis: str, of the predictions.
            stages: {name: s}, what this process did besides training steps.
            samples: list of {"prompt", "before", "after"}, all text.
            progress: {prompt: {step: answer}}.
            files: {file: what it is}.                  versions: {"torch": "2.13.0", ...}.
            notes: list of str, what the reader should know.
    """
    facts = {name: fact for name, fact in facts.items() if name not in PAIRS or {"before", "after"} <= fact.keys()}
    model, hyper, files = (facts.get(name) or {} for name in ("model", "hyper_parameters", "files"))
    data = [{**file, "sha256": file.get("sha256", "-")[:16]} for file in facts.get("data") or []]
    columns = {key: title for key, title in COLUMNS.items() if any(key in file for file in data)}
    tables = {
        "parameters": [*model.items(), *((f"`{key}`", value) for key, value in hyper.items())],
        "file_rows": [(f"`{file}`", meaning) for file, meaning in files.items()],
        "data_head": [*columns.values()],
        "data_rows": [[file.get(key) for key in columns] for file in data],
    }
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"inline": inline, "fenced": fenced, "percent": "{:.0%}".format}
    template = environment.from_string(Path(__file__).with_name("report.md.jinja").read_text("utf-8"))
    write_text(path, printable(template.render(facts | tables, table=table)))


def inline(value: Any) -> str:
    """A value on one line, safe inside a table cell, without pictures and links.

    Whole numbers get thousands separators, others four digits.
    """
    if isinstance(value, bool | None | jinja2.Undefined):
        return "-" if not isinstance(value, bool) else str(value).lower()
    if isinstance(value, int | float):
        return format(value, "," if isinstance(value, int) else ".4g")
    if isinstance(value, list | tuple):
        return ", ".join(map(inline, value))
    return re.sub(r"([|\[])", r"\\\1", " ".join(str(value).split())).replace("<", "&lt;")


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; columns are right-aligned where their values are numbers."""
    number = int | float | None | jinja2.Undefined
    are_numbers = [all(isinstance(cell, number) for cell in cells) for cells in zip(*rows, strict=True)]
    rule = ["---:" if number else "---" for number in are_numbers]
    return "\n".join(f"| {' | '.join(map(inline, cells))} |" for cells in (head, rule, *rows))


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text, so that an answer cannot end it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"
