"""Readers of what training and merging write. Some inputs begin with a line that names the changed file."""

import io
import json
import math
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import torch
from mutate import dump, mutate_bytes, mutate_json
from read_models import changed_zip, safetensors_of
from right import base, bytes_of, json_of, linked, put, right_run, work
from safetensors.torch import load, save
from use import try_each, use_prompts

from nanoqlora.config.errors import UserError


def named(file: str, data: bytes) -> bytes:
    return file.encode() + b"\n" + data


def split_name(data: bytes, known: list[str]) -> tuple[str, bytes]:
    name, _, body = data.partition(b"\n")
    text = name.decode("utf-8", "replace")
    return (text, body) if text in known else (known[0], data)


# ------------------------------------------------------------------------------------------------ adapters

PATTERNS = [
    *("(", "[", "a{99999999999}", "a{2,1}", "(?P<x>a)(?P<x>b)", "(" * 200 + ")" * 200, "(?i)", "\\", "*", "(?<=a+)b"),
    *("\ud800", "", "(?P=x)", "(?(1)a|b)", "\\p{L}", "[z-a]", "(?a)(?u)", "x" * 5000, "q_proj|"),
    *(
        "(" * 1500 + ")" * 1500,
        "(?R)",
        "(?|a|b)",
        "a{,9}{,9}{,9}",
        "[[a]&&[b]]",
        "(?>a*)b",
        "\\N{DIGIT ONE}",
        "(?s-i:a)",
    ),
]
SLOW = ["((a*)*)*b", ".*" * 20, "(([a-z._0-9])+)+X", "(.*a){12}", "(?:[a-z]|[a-z.]|[a-z_])+$X"]


def make_adapter_config(rng: Random) -> bytes:
    kind = rng.choice(["adapter", "adapter", "dora"])
    tree = json_of(f"{kind}/adapter_config.json")
    if rng.random() < 0.4:
        tree = tree | {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 8}}
    if rng.random() < 0.25:
        pattern = rng.choice(SLOW if rng.random() < 0.01 else PATTERNS)
        key = rng.choice(["rank_pattern", "alpha_pattern"])
        return named(kind, dump(tree | {key: {pattern: rng.choice([4, 8, 4.0])}}, rng))
    places = [(key,) for key in tree]
    places += [(key,) for key in ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern")] * 4
    return named(kind, dump(mutate_json(tree, rng, places=places), rng))


def read_adapter_config(data: bytes, rng: Random) -> None:
    kind, body = split_name(data, ["adapter", "dora"])
    folder = linked(f"config-of-{kind}", kind, "adapter_model.safetensors")
    put(folder / "adapter_config.json", body)
    use_adapter(folder, rng)


def use_adapter(folder: Any, rng: Random) -> None:
    """As a run that goes on from it, and an export of it alone, do."""
    from nanoqlora.export.gguf_model import adapter_tensors, base_of
    from nanoqlora.gguf.config import model_config
    from nanoqlora.weights.adapter import check_base, continue_adapter, read_trained, read_updates
    from nanoqlora.weights.checkpoint import open_weights
    from nanoqlora.weights.pretrained import load_model

    updates = read_updates(folder)
    read_trained(folder)
    model = load_model(base() / "hf")
    wanted = {"lora_r": None, "lora_alpha": None, "lora_target_modules": (), "peft_use_rslora": False}
    continue_adapter(model, folder, 0.0, **wanted, peft_use_dora=False)
    with suppress(UserError):  # its base is a path, which is not proven
        base_of(folder)
    try_each(
        lambda: check_base(folder, base() / "hf", open_weights(base() / "hf"), other_base=False),
        lambda: adapter_tensors(updates, model_config(json_of("hf/config.json"), folder), "F32", folder),
    )


def other_tensors(w: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
    shapes = [(), (4,), (0,), (4, 0), (2, 2, 2), (1, 4, 64)]
    kinds = [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.float64]
    return [
        *(lambda shape=shape: torch.zeros(shape) for shape in shapes),
        *(lambda kind=kind: w.to(kind) for kind in kinds),
        *(lambda factor=factor: (w.float() * factor).to(w.dtype) for factor in (math.nan, 1e38)),
        lambda: w.transpose(0, -1).contiguous() if w.ndim else w,
        lambda: w[:2].contiguous() if w.ndim else w,
    ]


def make_adapter_tensors(rng: Random) -> bytes:
    raw = bytes_of("adapter/adapter_model.safetensors")
    if rng.random() < 0.6:
        return safetensors_of(raw, rng)
    state = load(raw)
    for _ in range(rng.choice([1, 2])):
        name = rng.choice(list(state))
        other = name.replace("lora_A", "lora_C").replace("q_proj", "q_prox")
        state[name if rng.random() < 0.8 else other] = rng.choice(other_tensors(state[name]))()
    metadata = {"format": "pt", "load_in_4bit": "True", "computed_in": "float32"}
    if rng.random() < 0.3:
        metadata[rng.choice([*metadata, "base_fingerprint"])] = rng.choice(["", "x", "False", "nan", "bfloat16"])
    return save({name: w.clone() for name, w in state.items()}, metadata)


def read_adapter_tensors(data: bytes, rng: Random) -> None:
    folder = linked("adapter-tensors", "adapter", "adapter_config.json")
    put(folder / "adapter_model.safetensors", data)
    use_adapter(folder, rng)


def make_adapter_bin(rng: Random) -> bytes:
    state: Any = load(bytes_of("adapter/adapter_model.safetensors"))
    if rng.random() < 0.3:
        name = rng.choice(list(state))
        state[name] = rng.choice(other_tensors(state[name]))()
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=rng.random() < 0.85)
    kind = rng.random()
    if kind < 0.4:
        return mutate_bytes(out.getvalue(), rng, within=rng.choice([300, 3000, None]))
    return changed_zip(out.getvalue(), rng) if kind < 0.7 and out.getvalue()[:2] == b"PK" else out.getvalue()


def read_adapter_bin(data: bytes, rng: Random) -> None:
    folder = linked("adapter-bin", "adapter", "adapter_config.json")
    put(folder / "adapter_model.bin", data)
    use_adapter(folder, rng)


def make_merge_record(rng: Random) -> bytes:
    return dump(mutate_json({"adapter_sha256": "0" * 64, "merged_layers": 7, "verdict": "x"}, rng), rng)


def read_merge_record(data: bytes, rng: Random) -> None:
    from nanoqlora.weights.adapter import check_merged

    run = linked("merge-record", "adapter", "adapter_config.json", "adapter_model.safetensors")
    (run / "merged").mkdir(exist_ok=True)
    put(run / "merged" / "merge.json", data)
    check_merged(run / "merged")


# ------------------------------------------------------------------------------------------------ prompt.json

FRAME = {"format": "{instruction} {input} ", "no_input_format": None, "system_format": "{system}", "system_prompt": ""}
FRAME |= {f"field_{name}": name for name in ("system", "instruction", "input", "output")}


def make_prompt(rng: Random) -> bytes:
    tree: dict[str, Any] = {"type": rng.choice("chat_template alpaca custom completion prompt_completion".split())}
    tree |= {"chat_template": None, "train_on_inputs": False, "roles_to_train": ["assistant"], "train_on_eos": "turn"}
    tree |= {"frame": None, "field": "text", "field_messages": "messages", "field_tools": "tools"}
    tree |= {"message_property_mappings": {"role": "role", "content": "content"}, "roles": {"user": ["human"]}}
    if rng.random() < 0.4 or tree["type"] == "custom":
        tree["frame"] = FRAME
    return dump(mutate_json(tree, rng), rng)


def read_prompt(data: bytes, rng: Random) -> None:
    """As chat, evaluate, merge and export read it beside an adapter, and export beside a model."""
    from right import tokenizer

    from nanoqlora.export.gguf_model import prompt_format
    from nanoqlora.run.usable import talking

    path, wrong = put(work() / "prompt.json", data), None
    for step in (
        lambda: talking(base() / "hf", path.parent, 300),
        lambda: use_prompts(prompt_format(path.parent, tokenizer())),
    ):
        try:
            step()
        except UserError as error:
            wrong = error
    path.unlink()
    if wrong:
        raise wrong


# ------------------------------------------------------------------------------------------------ checkpoints

LOG_LINES = [b"\xff\n", b"1\n", b"[]\n", b"null\n", b'{"step": true}\n', b'{"step": 1e3}\n', b"[" * 5000 + b"\n"]
LOG_LINES += [b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": 18446744073709551616}\n']


def make_checkpoint(rng: Random) -> bytes:
    right, kind = right_run(), rng.random()
    if kind < 0.5:
        tree = json.loads(right.files["trainer_state.json"])
        return named("trainer_state.json", dump(mutate_json(tree, rng), rng))
    if kind < 0.7:
        changed = dump(mutate_json({"step": 1, "loss": 1.0}, rng), rng) + b"\n"
        return named("metrics.jsonl", rng.choice([mutate_bytes(right.metrics, rng), changed, rng.choice(LOG_LINES)]))
    if kind < 0.86:
        tree = json.loads(right.files["adapter_config.json"])
        return named("adapter_config.json", dump(mutate_json(tree, rng), rng))
    raw = right.files["adapter_model.safetensors"]
    return named("adapter_model.safetensors", safetensors_of(raw, rng))


def read_checkpoint(data: bytes, rng: Random) -> None:
    """Resume, take a step, and ask what the loop asks afterwards."""
    from nanoqlora.run.checkpoints import load_best, load_checkpoint
    from nanoqlora.run.early_stopping import Progress
    from nanoqlora.run.output_dir import describe

    right = right_run()
    run, folder = right.run, right.checkpoint
    name, body = split_name(data, [*right.files, "metrics.jsonl"])
    folder.mkdir(exist_ok=True)
    for file, text in right.files.items():
        put(folder / file, text)
    put(folder.parent / "metrics.jsonl", right.metrics)
    put((folder if name in right.files else folder.parent) / name, body)
    run.metrics.rows, run.before, run.progress = [], {}, Progress()
    run.optimizer.state.clear()
    start = load_checkpoint(run)
    check_moments(run)
    describe(folder.parent)
    run.metrics.go_on_after(start)
    run.optimizer.step()
    run.progress.evaluated(start + 1, 1.0)
    run.progress.logged(1.0, 2.0)
    run.progress.reason_to_stop(run.config)
    load_best(run, start)
    range(start, len(run.plan))


def check_moments(run: Any) -> None:
    """A fused step over moments of another shape or kind would write behind their end."""
    for state in run.optimizer.state.values():
        for key, x in state.items():
            shape = () if key == "step" else run.flat.shape
            assert x.shape == shape and x.dtype == torch.float32, f"{key} of another shape or kind is taken"


def make_optimizer(rng: Random) -> bytes:
    name, right = "optimizer.safetensors", right_run().files
    if rng.random() < 0.5:
        return named(name, safetensors_of(right[name], rng))
    state = load(right[name])
    for _ in range(rng.choice([1, 2])):
        key = rng.choice(list(state))
        w = state[key]
        if rng.random() < 0.3:
            del state[key]
        changes = [*other_tensors(w), lambda w=w: w[None], lambda w=w: torch.cat([w.flatten()] * 2)]
        state[rng.choice([key, key, key, "1.step", "0.more", "x", ".", "0", "0.0.step"])] = rng.choice(changes)()
    return named(name, save({key: w.clone() for key, w in state.items()}))


LOGGED = {"step": 1, "epoch": 0.5, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 9.0}
LOGGED |= {"memory/max_rss_gib": 1.0}
REPORT = b"Held-out loss: 2.1 before, 1.9 after\n| time, s | 9 | 1,234 |\n"


def make_run(rng: Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return named("report.md", mutate_bytes(REPORT, rng))
    if kind < 0.4:
        return named("train.yml", mutate_bytes(b"lora_r: 8\ndatasets:\n- path: x\n", rng))
    rows = [LOGGED, {"step": 2, "eval_loss": 2.0, "eval_perplexity": 7.4}, LOGGED | {"step": 2}]
    rows = mutate_json(rows, rng)
    lines = [dump(row, rng) for row in (rows if isinstance(rows, list) else [rows])]
    return named("metrics.jsonl", b"\n".join(lines) + b"\n")


def read_run(data: bytes, rng: Random) -> None:
    """Compared with itself, as a table and as a picture."""
    from nanoqlora.run.compare import plot, read_run, table
    from nanoqlora.run.figure import plot_metrics

    folder = work() / "compared"
    folder.mkdir(exist_ok=True)
    name, body = split_name(data, ["metrics.jsonl", "train.yml", "report.md"])
    put(folder / "metrics.jsonl", json.dumps(LOGGED).encode() + b"\n")
    put(folder / "train.yml", b"lora_r: 4\n")
    put(folder / "report.md", REPORT)
    put(folder / name, body)
    runs = {"a": read_run(str(folder)), "b": read_run(str(folder))}
    table(runs)
    if rng.random() < 0.02:  # it takes a second
        plot(runs, str(work() / "compared.png"))
        plot_metrics(runs["a"][1], work() / "run.png")


READERS: dict[str, tuple[Callable[[Random], bytes], Callable[[bytes, Random], None]]] = {
    "adapter_config": (make_adapter_config, read_adapter_config),
    "adapter_tensors": (make_adapter_tensors, read_adapter_tensors),
    "adapter_bin": (make_adapter_bin, read_adapter_bin),
    "merge_record": (make_merge_record, read_merge_record),
    "prompt": (make_prompt, read_prompt),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "optimizer": (make_optimizer, read_checkpoint),
    "run": (make_run, read_run),
}
