"""TensorBoard and W&B get every row of metrics.jsonl, as their own readers see it, and only when keys ask for it."""

import builtins
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, write_rows, write_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from nanoqlora.config.errors import UserError
from nanoqlora.config.load import make_config
from nanoqlora.run import trackers
from nanoqlora.run.trackers import make_trackers, named

LEAST = {"base_model": "m", "adapter": "qlora", "lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-4}
LEAST |= {"datasets": [{"path": "d.jsonl", "type": "alpaca"}]}
ROW = {"step": 3, "loss": 2.5, "grad_norm": 0.5, "memory/max_rss_gib": 1.25}


def test_names_are_those_of_hugging_face():
    assert named(ROW) == {"train/loss": 2.5, "train/grad_norm": 0.5, "memory/max_rss_gib": 1.25}
    assert named({"step": 3, "eval_loss": 1.0, "eval_perplexity": 2.7}) == {"eval/loss": 1.0, "eval/perplexity": 2.7}
    assert named({"step": 3, "skipped": "step 3: the loss is nan"}) == {}


def test_tensorboard_reads_what_metrics_jsonl_has(tmp_path):
    """Through a whole run with evaluations, and nothing of it without the key."""
    model, data = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "data.jsonl", alpaca_rows(6))
    path = write_run(tmp_path / "train.yml", model, data, num_epochs=1, val_set_size=2)
    assert run_here(train.main, path, "--use_tensorboard", "true").code == 0
    read = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    read.Reload()
    rows = metrics_of(tmp_path / "out")
    expected = {(tag, row["step"]): value for row in rows for tag, value in named(row).items()}
    got = {(tag, event.step): event.value for tag in read.Tags()["scalars"] for event in read.Scalars(tag)}
    assert got.keys() == expected.keys()
    assert all(abs(got[key] - value) <= 1e-6 * abs(value) for key, value in expected.items())  # it keeps float32


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format behind 7 bytes of W&B's own.

    Blocks of 32 KiB hold pieces: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for another header in this block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_wandb_offline_keeps_every_value(tmp_path, monkeypatch):
    """Read back from the file that W&B syncs later; no network is touched."""
    from wandb.proto import wandb_internal_pb2

    keys = {"wandb_project": "p", "wandb_name": "n", "wandb_mode": "offline", "output_dir": str(tmp_path)}
    monkeypatch.setenv("WANDB_SILENT", "true")
    (track,) = make_trackers(make_config(LEAST | keys).plain())
    track(ROW)
    track(ROW | {"step": 4, "loss": 2.25})
    sys.modules["wandb"].finish()
    seen, settings = [], {}
    path = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    deadline, records = time.monotonic() + 240, []
    while not (records and records[-1].HasField("exit")):  # its writer is a process of its own, which may lag behind
        assert time.monotonic() < deadline
        time.sleep(0.05)
        records = [wandb_internal_pb2.Record.FromString(data) for data in records_of(path)]
    for record in records:
        if record.HasField("run"):
            settings |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ("p", "n")
        if record.HasField("history"):
            items = record.history.item
            seen.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert [row["train/loss"] for row in seen] == [2.5, 2.25] and [row["_step"] for row in seen] == [3, 4]
    assert seen[0]["memory/max_rss_gib"] == 1.25 and settings["lora_r"] == 8


def test_nothing_is_imported_without_the_keys(monkeypatch):
    """And with a key, a missing package is said in one line, before anything is loaded."""
    real = builtins.__import__

    def refuse(name, *rest):
        if "wandb" in name or "tensorboard" in name:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for keys in ({}, {"wandb_project": "p", "use_wandb": False}):
        assert make_trackers(make_config(LEAST | keys).plain()) == []
        trackers.check_trackers(make_config(LEAST | keys).plain())
    for keys, package in (({"use_tensorboard": True}, "tensorboard"), ({"wandb_project": "p"}, "wandb")):
        with pytest.raises(UserError, match=f"pip install {package}"):
            trackers.check_trackers(make_config(LEAST | keys).plain())
