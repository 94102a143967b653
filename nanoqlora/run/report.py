"""`report.md`, the one page of a run to send to somebody.

Made from a dict of facts that the run has anyway; nothing is measured here. A fact may be missing, and then its line
or section is left out.

Left out: interactive plots and loggers over the network; `metrics.jsonl` is easy to read with anything.
"""

from pathlib import Path
from typing import Any

from ..config.files import write_text

# report.md


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
            samples: list of {"prompt", "before", "after"}, all text.
            files: {file: what it is}.                  versions: {"torch": "2.13.0", ...}.
            notes: list of str, what the reader should know.
    """
    parts = (_summary, _notes, _samples, _resources, _data, _parameters, _files, _command)
    sections = [f"# {_inline(facts.get('name') or 'Fine-tuning run')}", *(part(facts) for part in parts)]
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")


def _inline(value: Any) -> str:
    """A value on one line, safe inside a table cell. Whole numbers get thousands separators, others four digits."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_inline(item) for item in value)
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; columns after the first are right-aligned where their values are numbers."""
    are_numbers = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(head))]
    rule = ["---:" if number else "---" for number in are_numbers]
    lines = [head, rule, *([_inline(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text, so that an answer cannot end it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _pair(facts: dict, name: str, template: str) -> str:
    """A sentence with a value before and after, when both are there."""
    pair = facts.get(name) or {}
    return template.format(**pair) if {"before", "after"} <= pair.keys() else ""


def _summary(facts: dict) -> str:
    lines = [
        _pair(facts, "perplexity", "**Held-out perplexity: {before:.2f} before, {after:.2f} after.**"),
        _pair(facts, "loss", "Held-out loss: {before:.4f} before, {after:.4f} after, in nats per supervised token."),
    ]
    plain = "Perplexity on plain text, which shows what was forgotten: {before:.2f} before, {after:.2f} after."
    domain = (
        "Domain score, the share of words that mark the data: {before:.0%} of the answers below before, "
        "{after:.0%} after, {data:.0%} of the data's own answers."
    )
    more = [_pair(facts, "domain", domain), _pair(facts, "plain_perplexity", plain)]
    figure = [f"![Loss, gradient norm, learning rate and memory]({facts['figure']})"] if facts.get("figure") else []
    return "\n\n".join(part for part in (" ".join(filter(None, lines)), *more, *figure) if part)


def _notes(facts: dict) -> str:
    return "\n".join(f"- {_inline(note)}" for note in facts.get("notes") or [])


def _samples(facts: dict) -> str:
    samples = facts.get("samples") or []
    shown = []
    for sample in samples:
        shown.append(f"**{_inline(sample.get('prompt', ''))}**")
        answers = {when: sample[when] or "(nothing: it ends at once)" for when in ("before", "after") if when in sample}
        shown += [f"{when}:\n\n{_fenced(text)}" for when, text in answers.items()]
    return "\n\n".join(["## Answers", *shown]) if shown else ""


def _resources(facts: dict) -> str:
    """Predicted and measured, side by side, so that the next prediction can be judged."""
    rows = [[f"{label}, GiB", pair] for label, pair in (facts.get("memory") or {}).items()]
    rows += [["time, s", facts["time_s"]]] if facts.get("time_s") else []
    rows = [[label, pair.get("predicted"), pair.get("measured")] for label, pair in rows]
    if facts.get("tokens_per_second"):
        rows.append(["tokens per second", None, facts["tokens_per_second"]])
    basis = f"\n\nPredicted before the first step, {_inline(facts['basis'])}." if facts.get("basis") else ""
    return "## Memory and time\n\n" + _table(["", "predicted", "measured"], rows) + basis if rows else ""


def _data(facts: dict) -> str:
    columns = {"path": "file", "samples": "samples", "tokens": "tokens", "supervised_tokens": "supervised tokens"}
    columns["sha256"] = "SHA-256"
    files = facts.get("data") or []
    present = [key for key in columns if any(file.get(key) is not None for file in files)]
    rows = [
        [str(file[key])[:16] if key == "sha256" and key in file else file.get(key) for key in present] for file in files
    ]
    return "## Data\n\n" + _table([columns[key] for key in present], rows) if present else ""


def _parameters(facts: dict) -> str:
    model, hyper = facts.get("model") or {}, facts.get("hyper_parameters") or {}
    rows = [[key, value] for key, value in (*model.items(), *((f"`{key}`", value) for key, value in hyper.items()))]
    return "## Model and hyper-parameters\n\n" + _table(["", "value"], rows) if rows else ""


def _files(facts: dict) -> str:
    rows = [[f"`{file}`", meaning] for file, meaning in (facts.get("files") or {}).items()]
    return "## Files\n\n" + _table(["file", "what"], rows) if rows else ""


def _command(facts: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
    command = _fenced(facts["command"], "sh") if facts.get("command") else ""
    folder = (
        command
        and facts.get("folder")
        and (f"In `{facts['folder']}`, with another output_dir, or --overwrite_output_dir true to replace this run:")
    )
    body = [part for part in (folder, command, versions and f"With {versions}.") if part]
    return "\n\n".join(["## To repeat it", *body]) if body else ""
