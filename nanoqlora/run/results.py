"""What a finished run leaves for people: the report with figures before and after, and all that is needed to use it."""

import hashlib
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError, visible
from ..config.files import write_text
from ..config.schema import Config
from ..config.scripts import this_command
from ..config.splits import split_and_part
from ..data.prepare import Reading
from ..data.prompts import PromptFormat
from ..data.rows import placed_rows
from ..fast.stats import stage, stages
from ..parallel import collectives
from ..tokenizer.chat_template import Messages
from ..tokenizer.tokenizer import Tokenizer, save_tokenizer
from ..weights.adapter import save_adapter
from .figure import plot_metrics
from .forecast import Forecast
from .generate import answers
from .inputs import Data, data_files, row_format
from .log import Say
from .quality import domain_score, domain_words, plain_samples, plain_text, supervised_texts
from .report import write_report
from .scoring import loss_over_ranks
from .state import Run
from .usable import Usable


def judge(run: Run, data: Data, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """What the model can do now: {"loss" on held-out data, "plain_loss", "answers" to some questions}.

    Args:
        step: steps taken; an evaluation that was logged after it is not repeated.
    """
    share = run.config.sequence_len, run.rank, run.ranks, run.body
    run.model.eval()
    logged = [row["eval_loss"] for row in run.metrics.rows if row["step"] == step and "eval_loss" in row]
    is_logged = collectives.minimum(len(logged), run.device)  # a host may not see the log of an earlier run
    figures = {
        "loss": logged[-1] if is_logged else loss_over_ranks(run.model, run.held_out, *share),
        "plain_loss": loss_over_ranks(run.model, plain_samples(tokenizer, run.config.sequence_len), *share),
        "answers": sample_answers(run, tokenizer, data.prompt_format),
    }
    run.model.train()
    return figures


@stage("answers")
def sample_answers(
    run: Run, tokenizer: Tokenizer, prompt_format: PromptFormat, count: int = 3, max_new_tokens: int = 80
) -> list[str]:
    """Greedy answers to the first questions of the held-out file, or of the training data without one."""
    return answers(Usable(run.model, tokenizer, prompt_format), questions(run.config, count), max_new_tokens)


def answer_table(run: Run, data: Data, tokenizer: Tokenizer, step: int, note: Say) -> None:
    """Answer `eval_table_size` questions, as an evaluation after `step` steps does: printed, and a line of the log."""
    count, max_new_tokens = run.config.eval_table_size, run.config.eval_max_new_tokens
    if not count:
        return
    run.model.eval()
    given = sample_answers(run, tokenizer, data.prompt_format, count, max_new_tokens)
    run.model.train()
    asked = [messages[-1]["content"] for messages in questions(run.config, count)]
    table = [{"prompt": prompt, "answer": text} for prompt, text in zip(asked, given, strict=True)]
    run.metrics.write({"step": step, "eval_table": table})
    for row in table:
        note(visible(f"step {step}: {' '.join(row['prompt'].split())}\n    {' '.join(row['answer'].split())}"))


def answers_over_steps(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """What `answer_table` has logged: prompt -> step -> answer."""
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        for line in row.get("eval_table", ()):
            found.setdefault(line["prompt"], {})[row["step"]] = line["answer"]
    return found


def questions(config: Config, count: int = 3) -> list[Messages]:
    """The messages before the first answer of a file's first rows; nothing for those without questions."""
    dataset = (config.test_datasets or config.datasets)[0]
    _, part = split_and_part(dataset.split)
    prompt_format, found = row_format(dataset), []
    for _, row in islice(placed_rows(data_files(dataset), part), count):
        with suppress(UserError):  # with skip_invalid_rows
            found.append(None if isinstance(row, UserError) else prompt_format.question(row))
    return [messages for messages in found if messages]


def save_results(
    run: Run, data: Data, tokenizer: Tokenizer, after: dict[str, Any], forecast: Forecast, seconds: float, say: Say
) -> None:
    """Write everything that a finished run leaves in output_dir.

    Args:
        after: what `judge` finds now; used where it was asked before training too.
        forecast: what was predicted for the steps that this process took; seconds: what they took.
    """
    folder = Path(run.config.output_dir)
    save_trained(run, data, tokenizer, folder)
    with stage("results"):
        plot_metrics(run.metrics.rows, folder / "Fine-Tuning.png", folder.name)
    facts = run_facts(run, data, forecast, seconds)
    if run.before:
        facts |= before_and_after(run, tokenizer, after)
        say("Held-out perplexity: {before:.3f} before, {after:.3f} after".format(**facts["perplexity"]))
    write_report(folder / "report.md", facts)
    say(f"adapter, report and figure: {folder}/adapter_model.safetensors, report.md, Fine-Tuning.png")


def save_trained(run: Run, data: Data, tokenizer: Tokenizer, folder: Path) -> None:
    """The adapter with all that is needed to merge it, and to talk to it in the way that it was trained."""
    save_adapter(run.model, folder, run.config.base_model, run.trained)
    save_tokenizer(tokenizer, folder, data.prompt_format.jinja(tokenizer))
    write_text(folder / "prompt.json", data.prompt_format.to_json())
    is_bf16 = run.model.model.embed_tokens.weight.dtype == torch.bfloat16
    resolved = run.config.model_copy(update={"bf16": is_bf16, "overwrite_output_dir": False})
    write_text(folder / "train.yml", resolved.to_yaml())


def command_line() -> str:
    """What started this run, quoted for a shell: under torchrun its own command line too."""
    launcher = Path(f"/proc/{os.getppid()}/cmdline")
    if "TORCHELASTIC_RUN_ID" in os.environ and launcher.exists():
        words = launcher.read_text("utf-8", "replace").rstrip("\0").split("\0")
        return shlex.join(["torchrun", *words[2:]] if Path(words[1]).name == "torchrun" else ["python", *words[1:]])
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return f"torchrun --nproc_per_node={ranks} {shlex.join(sys.argv)}"
    return this_command(*sys.argv[1:])


# Files of output_dir, as the report explains them; keys of the YAML that it shows, by their beginning.
FILES = {
    "adapter_model.safetensors, adapter_config.json": "the adapter, as PEFT reads it",
    "metrics.jsonl": "every step and evaluation",
    "train.yml": "the configuration with every default filled in",
    "prompt.json, tokenizer files": "how to talk to it",
}
SHOWN_KEYS = "lora_", "learning", "num_", "micro", "gradient_acc", "sequence", "sample_", "lr_", "warm"
PACKAGES = "torch", "bitsandbytes", "safetensors", "tiktoken", "numpy"


def run_facts(run: Run, data: Data, forecast: Forecast, seconds: float) -> dict[str, Any]:
    """The facts in report.md, except those that need held-out data."""
    config, dtype = run.config, run.model.model.embed_tokens.weight.dtype
    losses = [row for row in run.metrics.rows if "loss" in row]
    memory = {
        key.removeprefix("memory/"): {"predicted": forecast.memory.get(key), "measured": max(r[key] for r in losses)}
        for key in (losses or [{}])[-1]
        if key.startswith("memory/")
    }
    shown = {key: value for key, value in config.model_dump().items() if key.startswith(SHOWN_KEYS)}
    return {
        "name": Path(config.output_dir).name,
        "command": command_line(),
        "folder": str(Path.cwd()),
        "figure": "Fine-Tuning.png",
        "notes": [f"{name}: {note}" for name, reading in data.readings.items() for note in row_notes(reading, config)],
        "data": [_describe_data(name, reading) for name, reading in data.readings.items()],
        "model": {
            "base": config.base_model,
            "base in 4 bits": config.load_in_4bit and ("the file's blocks" if config.keep_gguf_blocks else True),
            "trained parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
            "computed in": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if run.device.type == "cuda" else platform.processor() or "CPU",
            "ranks": run.ranks,
        },
        "hyper_parameters": {key: value for key, value in shown.items() if value not in (None, (), "")},
        "memory": memory,
        "time_s": {"predicted": round(forecast.seconds), "measured": round(seconds)},
        "basis": forecast.basis,
        "stages": {name: round(spent, 1) for name, spent in stages.items()},
        "progress": answers_over_steps(run.metrics.rows),
        "tokens_per_second": sum(row["tokens_per_second"] for row in losses) / max(1, len(losses)),
        "files": FILES,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def before_and_after(run: Run, tokenizer: Tokenizer, after: dict[str, Any]) -> dict[str, Any]:
    """What `judge` found before training and now, side by side, as facts of the report."""
    texts = supervised_texts(run.samples, tokenizer)
    marks, when = domain_words(texts, plain_text()), {"before": run.before, "after": after}
    asked = zip(questions(run.config), run.before["answers"], after["answers"], strict=False)
    return {
        "loss": {time: found["loss"] for time, found in when.items()},
        "perplexity": {time: math.exp(found["loss"]) for time, found in when.items()},
        "plain_perplexity": {time: math.exp(found["plain_loss"]) for time, found in when.items()},
        "domain": {time: domain_score(found["answers"], marks) for time, found in when.items()}
        | {"data": domain_score(texts, marks)},
        "samples": [{"prompt": m[-1]["content"], "before": old, "after": new} for m, old, new in asked],
    }


def row_notes(reading: Reading, config: Config) -> list[str]:
    """What became of rows that were not used as they stand."""
    notes = reading.describe_notes()
    if reading.too_long or reading.unsupervised:
        notes = [reading.describe(config.sequence_len, config.excess_length_strategy), *notes]
    return notes


def _describe_data(name: str, reading: Reading) -> dict[str, Any]:
    hashes, samples = list(reading.files.values()), reading.samples
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    counts = {"samples": len(samples), "tokens": int(samples.lengths.sum())}
    return {"path": name, **counts, "supervised_tokens": int(samples.num_targets.sum()), "sha256": sha256}
