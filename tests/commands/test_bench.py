"""What bench.py prints, and what its figures count."""

import dataclasses
import json
import sys

import pytest
import torch
from processes import run_process
from tiny import save_random_llama
from torch.utils.flop_counter import FlopCounterMode

import bench
from nanoqlora.config.errors import UserError
from nanoqlora.config.load import load_options
from nanoqlora.config.options import BenchOptions
from nanoqlora.fast import stats


def test_useful_operations_of_8b_are_those_of_its_shapes():
    """A token of 8B: 6.979 G weights in the blocks, 0.525 G in the head, r 64 trains 167.8 M, rows of 2,048."""
    attention = 3 * 32 * 4 * 4096 * 1024  # three forward passes' worth, 4 operations a pair and channel, 1,024 pairs
    expected = 4 * (6.979e9 + 0.5253e9) + 6 * 167.77e6 + attention
    given = bench.useful_flops(bench.GEOMETRIES["llama3-8b"], 167_772_160, 4, 2048) / 8192
    assert given == pytest.approx(expected, rel=1e-3)


def test_the_floor_is_all_of_a_step_s_products_and_attention(monkeypatch):
    """Counted by PyTorch: 4 a weight of blocks and head for each token, and at least the causal half of attention."""
    counted: list[int] = []

    def count(work, steps, warmup, device):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
        return [-counted[-1]]  # the attention that PyTorch can count is then the one that is taken

    monkeypatch.setattr(bench, "timed", count)
    config = dataclasses.replace(bench.llama3(64, 96, 3, 4, 2, 16), vocab_size=1000)
    B, T = 3, 500  # 1,500 tokens: more than one piece of logits, the last one shorter
    bench.floor_ms(config, B, T, torch.float32, torch.device("cpu"))
    weights = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96) + 64 * 1000
    attention = 3 * B * 3 * 4 * (4 * 16) * T * T / 2
    assert 4 * weights * B * T + attention <= counted[-1] <= 4 * weights * B * T + 3 * attention


def test_the_line_of_json_and_a_peer_beside_it(tmp_path):
    save_random_llama(tmp_path / "model")
    peer = f"{sys.executable} -c 'print({json.dumps(json.dumps({'tokens_per_second': 1.0}))})'"
    command = ["bench.py", "--model", tmp_path / "model", "--micro_batch_size", 2, "--sequence_len", 16]
    command += ["--lora_r", 4, "--steps", 3, "--json", tmp_path / "figures.json", "--peer", peer]
    done = run_process(*command)
    assert done.code == 0, done.err[-2000:]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures == json.loads(done.out.splitlines()[-1])
    assert figures["tokens_per_step"] == 32 and figures["ranks"] == 1
    assert figures["step_ms_min"] <= figures["step_ms"] <= figures["step_ms_max"]
    assert figures["tokens_per_second"] == pytest.approx(32e3 / figures["step_ms"], rel=0.02)  # of a rounded step
    assert f"{figures['tokens_per_second']:.2f} times" in done.out, "the ratio to a peer that makes 1 token a second"
    kinds = figures["breakdown_ms"]
    assert kinds["matrix products"] > 0 and kinds["attention"] > 0 and kinds["optimizer"] > 0


def test_what_recorded_graphs_hold_is_added(monkeypatch):
    """The allocator does not see what a replay uses: 2 GiB between its parts beside 3 seen, or 7 while recording."""
    seen = dict.fromkeys((f"{kind}_bytes.all.peak" for kind in ("active", "allocated", "reserved")), 3 * stats.GIB)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: seen)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(stats, "_graphs", {"held": 0, "peak": 0})
    device, name = torch.device("cuda"), "memory/max_mem_active_gib"
    assert stats.memory_figures(device)[name] == 3
    stats.count_graph(held=2 * stats.GIB, peak=4 * stats.GIB)
    assert stats.memory_figures(device)[name] == 5
    stats.count_graph(held=1 * stats.GIB, peak=7 * stats.GIB)
    assert stats.memory_figures(device)[name] == 7


def test_what_recorded_graphs_hold_is_not_free(monkeypatch):
    """Answers may take what lies between what is in use, graphs included, and the peak of the steps: 8 - 3 - 2 GiB."""
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: {"active_bytes.all.current": 3 * stats.GIB})
    monkeypatch.setattr(stats, "_graphs", {"held": 2 * stats.GIB, "peak": 0})
    monkeypatch.setattr(stats, "_most", {"active": 0})
    assert stats.free_below_peak(torch.device("cuda")) is None, "before any step"
    stats._most["active"] = 8 * stats.GIB
    assert stats.free_below_peak(torch.device("cuda")) == 3 * stats.GIB


def test_decode_measures_merged_weights_and_those_that_are_held(tmp_path, capsys):
    save_random_llama(tmp_path / "model")
    options = BenchOptions(model=str(tmp_path / "model"), lora_r=4, sequence_len=16, micro_batch_size=1)
    rows = bench.bench_decode(options, prompt_tokens=20, new_tokens=5)
    assert [row["weights"] for row in rows] == ["merged", "as held"]
    assert all(row["prefill"] > row["decode"] > 0 for row in rows)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows


@pytest.mark.parametrize("lengths", ["0", "1", "-5", "9999999999999", "[100, x]"])
def test_row_lengths_that_are_refused(lengths):
    with pytest.raises(UserError, match="row_lengths"):
        load_options(BenchOptions, ["--row_lengths", lengths])


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ("--decode true --row_lengths 5,7 --steps 3", "--decode does not use --row_lengths, --steps"),
        ("--row_lengths 5,7 --packed true", "--row_lengths does not use --packed"),
        ("--deploy outputs --model llama3-8b", "--deploy does not use --model"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(given, unused):
    with pytest.raises(UserError, match=unused):
        load_options(BenchOptions, given.split())


def test_lists_at_commas_or_as_json():
    for words in ("q_proj,v_proj", '["q_proj", "v_proj"]'):
        assert load_options(BenchOptions, ["--lora_target_modules", words]).lora_target_modules == ("q_proj", "v_proj")
    assert load_options(BenchOptions, ["--row_lengths", "[100, 50]"]).row_lengths == (100, 50)
