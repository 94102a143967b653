"""The right files that wrong ones are made of: small models in every format, adapters, data, a run with a checkpoint.

They are made once for a process, in a temporary folder. `linked` gives a folder of links to some of them, in which a
reader finds all that it needs beside the one file that was changed.
"""

import contextlib
import io
import json
import os
import shutil
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paths import ROOT
from safetensors.torch import load_file

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256}
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@cache
def work() -> Path:
    """Where this process writes: in memory, where there is such a folder, because many small files are written."""
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() and os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=parent))


@cache
def base() -> Path:
    """The right files. hf and sp: models with a byte-level and a sentencepiece tokenizer; spj: its tokenizer.json."""
    folder = work() / "base"
    (folder / "meta").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()):
        _make_models(folder)
        _make_others(folder)
    return folder


def _make_models(folder: Path) -> None:
    from sentencepiece_models import train
    from small_runs import save_tiny_model
    from tiny import save_random_llama

    from nanoqlora.export.gguf_model import export_gguf
    from nanoqlora.tokenizer.tokenizer import load_tokenizer, save_tokenizer

    hf = save_tiny_model(folder / "hf", **SMALL)
    sp, spj = folder / "sp", folder / "spj"
    sp.mkdir()
    save_random_llama(sp, **(SMALL | {"vocab_size": 900}))
    (sp / "tokenizer.model").write_bytes(train())
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": INST}
    (sp / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(sp, spj)
    save_tokenizer(load_tokenizer(sp), spj)
    (spj / "tokenizer.model").unlink()
    for source, name, kind in ((hf, "hf", "f32"), (hf, "hf-q8", "q8_0"), (sp, "sp", "f32")):
        export_gguf(source, folder / f"{name}.gguf", kind)


def _make_others(folder: Path) -> None:
    from peft_witness import save_random_adapter
    from small_runs import alpaca_rows, write_rows

    from nanoqlora.gguf.names import meta_name

    state = load_file(folder / "hf" / "model.safetensors")
    torch.save({meta_name(name): w.clone() for name, w in state.items()}, folder / "meta" / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "norm_eps": 1e-5, "vocab_size": 300}
    (folder / "meta" / "params.json").write_text(json.dumps(params))
    shutil.copy(folder / "sp" / "tokenizer.model", folder / "meta")
    save_random_adapter(folder / "hf", folder / "adapter")
    save_random_adapter(folder / "hf", folder / "dora", use_dora=True)
    write_rows(folder / "alpaca.jsonl", alpaca_rows(12))
    chats = (ROOT / "data" / "pirate.jsonl").read_text("utf-8").splitlines()[:12]
    write_rows(folder / "chat.jsonl", map(json.loads, chats))


@cache
def json_of(name: str) -> Any:
    return json.loads((base() / name).read_text("utf-8"))


@cache
def bytes_of(name: str) -> bytes:
    return (base() / name).read_bytes()


def linked(name: str, source: str, *files: str) -> Path:
    """A folder of this name with right files, as hard links: symbolic ones out of a folder are refused."""
    folder = work() / name
    if not folder.is_dir():
        folder.mkdir()
        for file in files:
            os.link(base() / source / file, folder / file)
    return folder


def put(path: Path, data: bytes) -> Path:
    """Write a file in the place of a file or a link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


@cache
def tokenizer(source: str = "hf") -> Any:
    from nanoqlora.tokenizer.tokenizer import load_tokenizer

    return load_tokenizer(base() / source)


class RightRun(NamedTuple):
    """A run as train.py builds it, with the files of its first checkpoint and of its prepared data."""

    run: Any
    checkpoint: Path
    files: dict[str, bytes]
    metrics: bytes
    prepared: Path
    prepared_files: dict[str, bytes]


@cache
def right_run() -> RightRun:
    from small_runs import write_run

    from nanoqlora.config.load import load_config
    from nanoqlora.run.build import build_run
    from nanoqlora.run.checkpoints import save_checkpoint
    from nanoqlora.run.checks import read_inputs
    from nanoqlora.run.log import Metrics
    from nanoqlora.weights.pretrained import open_model

    folder = work() / "run"
    folder.mkdir()
    keys: dict[str, Any] = {"dataset_prepared_path": str(folder / "prepared"), "max_steps": 4, "val_set_size": 2}
    keys |= {"auto_resume_from_checkpoints": True, "early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1}
    path = write_run(folder / "train.yml", base() / "hf", base() / "alpaca.jsonl", **keys)
    config = load_config([str(path)])
    _, data = read_inputs(config, 0, 1)
    run = build_run(
        config,
        partial(open_model, config.base_model, load_in_4bit=config.load_in_4bit),
        samples=data.samples,
        held_out=data.held_out,
        plan=data.plan,
        metrics=Metrics(folder / "out" / "metrics.jsonl", writes=True),
        rank=0,
        ranks=1,
        device=torch.device("cpu"),
        say=lambda *_: None,
    )
    run.optimizer.step()
    run.metrics.go_on_after(0)
    run.metrics.write({"step": 1, "loss": 1.0})
    run.before.update(loss=2.0, plain_loss=2.5, answers=["an answer"])
    run.progress.evaluated(1, 1.5)
    save_checkpoint(run, 1)
    checkpoint, prepared = folder / "out" / "checkpoint-1", next((folder / "prepared").iterdir())
    files, kept = ({path.name: path.read_bytes() for path in place.iterdir()} for place in (checkpoint, prepared))
    return RightRun(run, checkpoint, files, (folder / "out" / "metrics.jsonl").read_bytes(), prepared, kept)


def own_work() -> Path:
    """For a forked process: a folder of its own, beside the right files of its parent."""
    base()
    work.cache_clear()
    return work()
