"""What only Linux has is asked only of Linux: a run as on macOS, whose calls are missing here or count otherwise.

This shows that nothing is called that is not there. Whether PyTorch, bitsandbytes and llama.cpp compute the same on a
Mac can only be tried on one.
"""

import os
import resource
import sys
from pathlib import Path

import pytest
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, write_rows, write_run

import train
from nanoqlora.data import prepare
from nanoqlora.fast.memory import free_host_bytes


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """No /proc, no affinity, no count of free pages, no calls that only glibc and Linux have."""
    is_file, exists, names = Path.is_file, Path.exists, os.sysconf_names
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and not str(path).startswith("/proc"))
    monkeypatch.setattr(Path, "is_file", lambda path: is_file(path) and not str(path).startswith("/proc"))
    monkeypatch.setattr(os, "sysconf_names", {name: n for name, n in names.items() if name != "SC_AVPHYS_PAGES"})
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    monkeypatch.setattr(sys, "platform", "darwin")


def test_free_memory_is_all_there_is(mac):
    assert free_host_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_run_ends_well(mac, monkeypatch, tmp_path):
    """With data that would be tokenised by several processes; ru_maxrss is in bytes there."""
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 100)
    model, data = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", alpaca_rows(6))
    keys = {"num_epochs": 1, "dataset_prepared_path": str(tmp_path / "prepared"), "load_in_4bit": True}
    ended = run_here(train.main, write_run(tmp_path / "train.yml", model, data, **keys))
    assert ended.code == 0, ended.err
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # this is Linux: as if its unit were bytes
    assert metrics_of(tmp_path / "out")[-1]["memory/max_rss_gib"] == round(peak, 2)
