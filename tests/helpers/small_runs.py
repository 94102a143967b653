"""What a small whole run needs: a tiny random model with a tokenizer, rows, a YAML; and how a command ends."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import yaml
from paths import ROOT
from tiny import save_random_llama
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nanoqlora.config.commands import run_command

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PIRATE = [
    message["content"]
    for line in (ROOT / "data" / "pirate.jsonl").read_text("utf-8").splitlines()
    for message in json.loads(line)["messages"]
]


def save_small_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 300 tokens, as the tokenizers package learns it; BOS first, padding is the end."""
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(alphabet), special_tokens=special, show_progress=False
    )
    tok.train_from_iterator(PIRATE[:100], trainer)
    tok.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(special[0], 0)])
    tok.decoder = decoders.ByteLevel()
    tok.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, "bos_token": special[0]}
    config |= {"eos_token": special[2], "pad_token": special[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def save_tiny_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model folder as from a hub: weights, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_random_llama(folder, seed, **(TINY | changes))
    save_small_tokenizer(folder)
    return folder


def alpaca_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Answers of 1 to 16 words, so that rows differ much in how many of their tokens count."""
    g = torch.Generator().manual_seed(seed)
    spans = torch.randint(1, 17, (count, 2), generator=g).tolist()
    return [
        {
            "instruction": f"Question {seed} {i}?",
            "input": "some context" if i % 3 == 0 else "",
            "output": " ".join(PIRATE[1].split()[start : start + length]),
        }
        for i, (start, length) in enumerate(spans)
    ]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


PREPARED = tempfile.TemporaryDirectory()  # of all tests; removed when the last one ends


def write_run(path: Path, model: Path, data: Path, **keys: Any) -> Path:
    """The YAML of a small run; keys whose value is None are left out."""
    run = {"base_model": str(model), "adapter": "qlora", "bf16": False, "output_dir": str(path.parent / "out")}
    run |= {"datasets": [{"path": str(data), "type": "alpaca"}], "sequence_len": 256, "learning_rate": 0.002}
    run |= {"lora_r": 4, "lora_alpha": 8, "micro_batch_size": 2, "num_epochs": 2}
    run |= {"dataset_prepared_path": PREPARED.name} | keys
    path.write_text(yaml.safe_dump({key: value for key, value in run.items() if value is not None}))
    return path


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def run_here(main: Callable[[], None], *words: object, terminal: bool = False) -> Ended:
    """A command's main with these words after its name, in this process, ended as `run_command` ends it.

    terminal: stderr is one.
    """
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    err.isatty = lambda: terminal  # type: ignore[method-assign]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [main.__module__, *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(main)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(code, out.getvalue(), err.getvalue())


def merged(run: Path, out: Path, *words: object) -> Ended:
    """merge.py on the run of tests/export/conftest.py."""
    import merge

    model, adapter = run / "model", run / "out"
    return run_here(merge.main, run / "run.yml", "--model", model, "--adapter", adapter, "--out", out, *words)


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    assert "Traceback" not in ended.err
    assert all(word in ended.err for word in words), ended.err


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def assert_one_line_bar(err: str, num_steps: int) -> None:
    """Every state of the bar is written over the one before; what is said above it has whole lines."""
    states = [part for part in re.split("[\r\n]", err) if f"/{num_steps} [" in part]
    assert len(states) > num_steps and f"{num_steps}/{num_steps} [" in states[-1]
    assert sum(f"/{num_steps} [" in line for line in re.split("\n", err)) <= 1 + err.count(": held-out loss")


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with what it holds, every folder too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"folder" for p in folder.rglob("*")}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_of(folder) if "loss" in row]
