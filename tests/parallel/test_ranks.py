"""Several ranks: the base in parts or whole, the same run on any number of them, and what happens when one fails."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    LAYERS,
    SAMPLES,
    brought_blocks,
    end_of_own_run,
    end_of_run,
    end_of_run_on_full_disk,
    end_of_run_with_losses,
    end_of_run_with_nan,
    end_of_run_with_other_values,
    end_of_run_without_adapter,
    gradient,
    on_ranks,
    share_of_evaluation,
    spread_gradient,
    wait_for_the_others,
    what_is_there,
)
from safetensors.torch import load_file, save_file
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, steps_of, write_rows, write_run

import bench
import nanoqlora as nq
import train
from nanoqlora import ops
from nanoqlora.data.batches import Batch
from nanoqlora.fast.memory import base_bytes, free_host_bytes, held_bytes, keeps_for, step_bytes
from nanoqlora.fast.sharding_choice import choose_sharding
from nanoqlora.parallel.fsdp import frozen_tensors
from nanoqlora.qlora import ALL_LINEAR, inject_lora
from nanoqlora.run.scoring import mean_loss, score_samples
from nanoqlora.tokenizer.tokenizer import load_tokenizer
from nanoqlora.weights.pretrained import load_model, open_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


# ------------------------------------------------------------------------------------------------ parallel/fsdp.py


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_gathered_blocks_are_those_of_one_process_bit_for_bit(model, load_in_4bit):
    """On 3 ranks, which divide neither the blocks nor their bytes; each holds a third, padded to whole lines."""
    whole = load_model(model, load_in_4bit=load_in_4bit)
    empty, _ = open_model(model, load_in_4bit=load_in_4bit, dtype=torch.float32)
    assert held_bytes(whole) == base_bytes(empty, "replicate", 3)
    expected = [[tensor for _, _, tensor, _ in frozen_tensors(block)] for block in whole.model.layers]
    for rank in on_ranks(3, brought_blocks, model, load_in_4bit):
        for i, tensors in rank["seen"]:
            assert len(tensors) == len(expected[i])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected[i], strict=True)), i
        for name, tensor in rank["rest"].items():
            assert torch.equal(tensor, whole.get_parameter(name)), name
        assert rank["held"] == base_bytes(empty, "full_shard", 3), "what was predicted before loading"
        sizes = [sum(t.nbytes for t in tensors) for tensors in expected]
        assert all(size / 3 <= part < size / 3 + 28 * 256 for part, size in zip(rank["parts"], sizes, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [0, 2])
def test_gpus_gather_blocks_bit_for_bit(tmp_path, offload):
    """With their copy engines, where NVLink joins them; also where parts wait in host memory."""
    ranks = torch.cuda.device_count()
    if ranks < 2:
        pytest.skip("needs two CUDA devices: NCCL takes no two ranks on one")
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
    path = save_tiny_model(tmp_path / "model", num_hidden_layers=LAYERS, **wide | {"head_dim": 64})
    whole = load_model(path, load_in_4bit=True, device=torch.device("cuda"))
    expected = [[tensor.cpu() for _, _, tensor, _ in frozen_tensors(block)] for block in whole.model.layers]
    for rank in on_ranks(ranks, brought_blocks, path, True, offload):
        for i, tensors in rank["seen"]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected[i], strict=True)), i


@pytest.mark.parametrize(
    "load_in_4bit, targets, keep",
    [
        (True, ALL_LINEAR, "all"),
        (True, ALL_LINEAR, "input"),
        (True, ("q_proj", "v_proj"), ""),
        (True, ("q_proj", "v_proj"), "recompute"),
        (False, ("o_proj",), ""),
    ],
)
def test_gradient_over_gathered_blocks_is_that_of_one_process(model, load_in_4bit, targets, keep):
    """Fused blocks, and plain ones whose weights autograd asks for in the backward pass; sums in another order."""
    whole = load_model(model, load_in_4bit=load_in_4bit)
    torch.manual_seed(0)
    inject_lora(whole, 4, 8, target_modules=targets)
    whole.train()
    expected = gradient(whole, 0, 1)
    for ours, num_gathered, num_late in on_ranks(2, spread_gradient, model, load_in_4bit, targets, keep):
        assert (ours - expected).norm() < 2e-6 * expected.norm()
        micro_batches = 3  # of five rows on two ranks; the first one finds no block there
        assert num_gathered == micro_batches * (2 * LAYERS - 4) + 2
        assert num_late == 1, "all but the first are begun while the block before is computed"


# ------------------------------------------------------------------------------------------------ which mode


def test_auto_spreads_the_base_only_where_memory_asks_for_it():
    """Llama-3-8B, r = 64, 8,192 tokens, 4 ranks: 32 GiB with everything kept, 11 GiB with full recomputation."""
    config = bench.GEOMETRIES["llama3-8b"]
    empty, _ = bench.random_model(config, torch.bfloat16, torch.device("cpu"))
    inject_lora(empty, 64, 32)

    def chosen(gib: float, checkpointing: object, ranks: int = 4, **wanted: Any) -> tuple[str, int]:
        return choose_sharding(empty, 8192, ranks, int(gib * 2**30), checkpointing, **wanted)[:2]

    L = config.num_hidden_layers
    needed = {
        keep: step_bytes(empty, 8192, [keep] * L, base=base_bytes(empty, "replicate", 4)) for keep in ("all", "input")
    }
    whole, least = needed["all"] / 2**30, needed["input"] / 2**30
    assert chosen(whole + 0.1, "auto") == chosen(whole + 0.1, False) == ("replicate", 0)
    assert chosen(whole - 0.1, "auto") == chosen(whole - 0.1, False) == ("full_shard", 0)
    assert chosen(least + 0.1, True) == ("replicate", 0) and chosen(least - 0.1, True) == ("full_shard", 0)
    assert chosen(1.0, "auto", ranks=1, wanted="replicate") == ("replicate", 0)
    assert chosen(80, True, wanted="full_shard") == ("full_shard", 0)
    assert chosen(80, True, wanted="full_shard", ranks=1) == ("replicate", 0), "one rank has nobody to share with"
    assert chosen(80, True, wanted="full_shard", offload_all=True, ranks=1) == ("full_shard", L)

    # Each block whose part is in host memory leaves its part free; the first one frees the embedding too.
    block = 112_515_072
    assert base_bytes(empty, "full_shard", 4, 1) - base_bytes(empty, "full_shard", 4, 5) == block
    short = step_bytes(empty, 8192, ["input"] * L, base=base_bytes(empty, "full_shard", 4, 7, host_embedding=True))
    assert chosen(0.1, True, ranks=1, on_gpu=False) == ("replicate", 0), "a CPU's memory is the host's"
    assert chosen(short / 2**30, True) == ("full_shard", 7) and chosen((short - 2**20) / 2**30, True)[1] == 8


def test_plain_blocks_are_computed_again_where_memory_decides(model):
    """How much they keep is not known, so under `auto` they keep the least; fused ones keep all that fits."""
    kept = {}
    for dropout in (0.1, 0.0):  # of DoRA, which is fused without
        loaded = load_model(model)
        inject_lora(loaded, 4, 8, dropout=dropout, target_modules=("q_proj", "v_proj"), use_dora=True)
        kept[dropout] = keeps_for(loaded, "auto", 64, budget=1 << 40)
    assert list(kept.values()) == [["input"] * LAYERS, ["all"] * LAYERS]


def test_the_ranks_of_a_host_divide_its_free_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = free_host_bytes()
    free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    assert 0.9 * free < whole <= total, "what is only cached counts as free"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_host_bytes() == pytest.approx(whole / 4, rel=0.1)


# ------------------------------------------------------------------------------------------------ whole runs


def test_any_number_of_ranks_in_either_mode_is_the_same_run(model, tmp_path):
    """Packed rows of 40 to 140 tokens that count, with dropout; in each epoch's last step some ranks have no row.

    Logged are six digits behind the point: no number differs by more than the last of them.
    """
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(24, seed=2))
    held_out = [{"path": str(write_rows(tmp_path / "held.jsonl", alpaca_rows(1, seed=1))), "type": "alpaca"}]
    keys = {"sequence_len": 512, "sample_packing": True, "max_steps": 20, "lora_dropout": 0.05}
    keys |= {"eval_strategy": "no", "save_strategy": "no", "learning_rate": 0.0005}
    splits = {  # ranks, micro_batch_size, gradient_accumulation_steps, fsdp, gradient_checkpointing
        "one": (1, 6, 1, [], False),
        "parts on 2": (2, 1, 3, ["full_shard"], False),
        "parts on 3": (3, 2, 1, ["full_shard", "offload"], True),
    }
    said = {}
    for name, (ranks, micro, accumulation, fsdp, recompute) in splits.items():
        (tmp_path / name).mkdir()
        split = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "fsdp": fsdp}
        split |= {"gradient_checkpointing": recompute, "test_datasets": None if name == "parts on 2" else held_out}
        path = write_run(tmp_path / name / "train.yml", model, data, **keys, **split)
        ended = on_ranks(ranks, end_of_run, path) if ranks > 1 else [run_here(train.main, path)]
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
        assert all(not out for _, out, _ in ended[1:]), "only rank 0 prints"
        said[name] = ended[0][1]
    first, *others = (steps_of(tmp_path / name / "out") for name in splits)
    assert len(first) == 20
    for steps in others:
        for a, b in zip(first, steps, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert all(a[key] == b[key] for key in ("step", "epoch", "learning_rate", "supervised_tokens"))
    assert "the base is sharded over 3 ranks" in said["parts on 3"]

    # Evaluations and answers, before and after, go over all ranks too.
    scored = [name for name in splits if name != "parts on 2"]
    before = [metrics_of(tmp_path / name / "out")[0]["eval_loss"] for name in scored]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
    after = [float(said[name].partition("before, ")[2].split()[0]) for name in scored]
    assert abs(after[0] - after[1]) < 0.002
    reports = [(tmp_path / name / "out" / "report.md").read_text() for name in scored]
    answers = [text.split("**Question 1 0?**")[1].split("\n## ")[0] for text in reports]
    assert answers[0] and answers[0] == answers[1]
    adapters = [load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in splits]
    for other in adapters[1:]:
        moved = torch.cat([(other[name] - tensor).flatten() for name, tensor in adapters[0].items()])
        assert moved.abs().max() < 2e-5, "of values that 20 steps of 0.0005 have moved"


@pytest.fixture(scope="module")
def small_run(model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run on two ranks, two micro-batches of one row each."""
    folder = tmp_path_factory.mktemp("small_run")
    data = write_rows(folder / "data.jsonl", alpaca_rows(24, seed=2))
    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 2}
    return write_run(folder / "train.yml", model, data, **keys, shuffle_merged_datasets=False)


def test_the_optimizer_s_state_in_parts_is_the_same_training(small_run, tmp_path):
    """On 2 ranks, in parts or whole; gone on from a checkpoint, in parts or whole.

    Steps of 0.002 and less: other ends of the parts, so sums in another order, move no value by more than 2e-6.
    """
    words = (small_run, "--max_steps", "4", "--output_dir")
    in_parts = ("--shard_optimizer_state", "true")
    resume = ("--resume_from_checkpoint", tmp_path / "parts" / "checkpoint-2")
    runs = {"whole": (2, ()), "parts": (2, in_parts), "again": (2, in_parts + resume), "mixed": (2, resume)}
    adapters = {}
    for name, (ranks, options) in runs.items():
        ended = on_ranks(ranks, end_of_run, *words, tmp_path / name, *options)
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
        state = load_file(tmp_path / name / "adapter_model.safetensors")
        adapters[name] = torch.cat([state[key].flatten() for key in sorted(state)])
    assert torch.equal(adapters["parts"], adapters["again"])
    assert (adapters["parts"] - adapters["whole"]).abs().max() < 2e-6
    assert (adapters["parts"] - adapters["mixed"]).abs().max() < 2e-6
    norms = [[row["grad_norm"] for row in steps_of(tmp_path / name)] for name in ("whole", "parts")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5), "the norm is that of the whole gradient, not of a part"
    saved = [load_file(tmp_path / name / "checkpoint-4" / "optimizer.safetensors") for name in ("whole", "parts")]
    assert saved[0].keys() == saved[1].keys() and saved[0]["0.exp_avg"].shape == saved[1]["0.exp_avg"].shape


def test_a_whole_state_of_8_bits_is_taken_up_in_parts(small_run, tmp_path):
    """Steps of 0.002 and less, as above."""
    words = (small_run, "--optimizer", "adamw_8bit", "--max_steps", "4", "--output_dir")
    resume = ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2", "--shard_optimizer_state", "true")
    states = []
    for name, options in (("whole", ()), ("parts", resume)):
        ended = on_ranks(2, end_of_run, *words, tmp_path / name, *options)
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
        states.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    assert all((states[0][key] - states[1][key]).abs().max() < 2e-6 for key in states[0])


def test_an_end_token_that_was_never_trained_ends_all_ranks(tmp_path):
    """Rank 0 alone looks at the rows of embedding and head; the others hear of it."""
    model = save_tiny_model(tmp_path / "model")
    (path,) = model.glob("*.safetensors")
    tensors, end = load_file(path), load_tokenizer(model).eos_id
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        tensors[name][end] *= 1e-6
    save_file(tensors, path, metadata={"format": "pt"})
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(8))
    run = write_run(tmp_path / "train.yml", model, data)
    ended = on_ranks(2, end_of_run, run)
    assert [code for code, _, _ in ended] == [2, 2] and "were never trained" in ended[0][2], ended[0][2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_no_number_is_traced_and_stops_the_run(small_run, tmp_path, where):
    """Rank 1's second row in step 4 is row 3 of 4: sample 3 * 4 + 3. Of a gradient only the rank is known."""
    ended = on_ranks(2, end_of_run_with_nan, 1, 4, where, small_run, "--output_dir", tmp_path)
    assert [code for code, _, _ in ended] == [1, 1]
    what = {"loss": "the loss is nan on rank 1, in samples 15 ("}
    what["gradient"] = "the norm of the gradient is nan on rank 1, in samples 13, 15 ("
    assert f"error: step 4: {what[where]}" in ended[0][2], ended[0][2]
    assert "Traceback" not in ended[0][2] and not ended[1][2], "all ranks know it, and one tells"
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3]
    again = on_ranks(2, end_of_run, small_run, "--output_dir", tmp_path, "--auto_resume_from_checkpoints", "true")
    assert again[0][0] == 0 and [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_step_without_a_number_can_be_left_out(small_run, tmp_path):
    words = ["--output_dir", tmp_path, "--skip_nonfinite_steps", "true"]
    ended = on_ranks(2, end_of_run_with_nan, 0, 4, "gradient", small_run, *words)
    assert all(code == 0 for code, _, _ in ended), ended[0][2]
    lines = metrics_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and "rank 0" in lines[3]["skipped"]
    adapter = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    saved = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert "checkpoint-4" in saved, "what comes after a step comes after this one too"


def test_a_run_that_learns_nothing_ends_with_a_report(small_run, tmp_path, monkeypatch):
    """Every step is left out. Ctrl-C works between them too, as after any other."""
    loss, collate = ops.linear_cross_entropy, train.Run.collate
    monkeypatch.setattr(ops, "linear_cross_entropy", lambda *words: loss(*words) * float("nan"))
    words = (small_run, "--skip_nonfinite_steps", "true", "--output_dir")
    assert run_here(train.main, *words, tmp_path / "all").code == 0
    assert all("skipped" in line for line in metrics_of(tmp_path / "all"))
    assert (tmp_path / "all" / "report.md").exists()

    def interrupted(run: train.Run, rows: list[list[int]], number: int, first: int) -> Batch:
        if number == 2 and first == 0:  # once: a second one would end the run at once
            os.kill(os.getpid(), signal.SIGINT)
        return collate(run, rows, number, first)

    monkeypatch.setattr(train.Run, "collate", interrupted)
    ended = run_here(train.main, *words, tmp_path / "stopped")
    assert ended.code == 130 and "stopped after step 3 of 6" in ended.err


def test_rank_0_decides_what_is_best_and_when_to_stop(small_run, tmp_path):
    """The ranks disagree, as on GPUs of two kinds: best is step 2 for rank 0, step 1 for rank 1, which would stop."""
    held_out = [{"path": str(write_rows(tmp_path / "held.jsonl", alpaca_rows(3, seed=1))), "type": "alpaca"}]
    words = ["--test_datasets", json.dumps(held_out), "--eval_steps", 1, "--save_strategy", "no", "--max_steps", 4]
    words += ["--load_best_model_at_end", "true", "--early_stopping_patience", 2, "--output_dir", tmp_path / "out"]
    losses = [[9, 3, 1, 2, 1.5], [9, 1, 2, 3, 4]]
    ended = on_ranks(2, end_of_run_with_losses, losses, small_run, *words)
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    saved = {
        path.name: load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out").glob("checkpoint-*")
    }
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in saved["checkpoint-2"].items())
    assert steps_of(tmp_path / "out")[-1]["step"] == 4


@pytest.mark.parametrize(
    ("too_large", "said", "whole"),
    [
        ("optimizer.safetensors", "checkpoint-4 cannot", 2),
        ("metrics.jsonl", "metrics.jsonl cannot", 2),
        ("adapter_model.safetensors", "adapter_model.safetensors cannot", 4),
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(small_run, tmp_path, too_large, said, whole):
    """After the first checkpoint no file may be as large as this one; the results come after the last."""
    words = (small_run, "--save_steps", whole, "--output_dir", tmp_path)
    assert on_ranks(1, end_of_run, *words)[0][0] == 0
    space = 50 if too_large == "metrics.jsonl" else (tmp_path / f"checkpoint-{whole}" / too_large).stat().st_size - 1000
    ((code, _, err),) = on_ranks(1, end_of_run_on_full_disk, space, *words[:-1], tmp_path / "full")
    assert code == 1 and "Traceback" not in err and said in err and err.count("\nerror: ") == 1, err
    left = {path.name for path in (tmp_path / "full").iterdir()}
    assert f"checkpoint-{whole} is saved" in err and left == {f"checkpoint-{whole}", "metrics.jsonl"}
    again = (*words[:-1], tmp_path / "full", "--auto_resume_from_checkpoints", "true")
    assert on_ranks(1, end_of_run, *again)[0][0] == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "full" / name).read_bytes()


def differently(case: str, small_run: Path, folder: Path) -> list:
    """Words that only rank 1 gets."""
    if case == "configuration":
        return ["--learning_rate", "0.001"]
    if case == "data":
        rows = [*alpaca_rows(23, seed=2), {"instruction": "Who?", "input": "", "output": "Me."}]
        return ["--datasets", f'[{{"path": "{write_rows(folder / "other.jsonl", rows)}", "type": "alpaca"}}]']
    if case == "no data":
        return ["--datasets", f'[{{"path": "{folder / "nothing.jsonl"}", "type": "alpaca"}}]']
    return ["--base_model", save_tiny_model(folder / "other", seed=1, num_hidden_layers=LAYERS)]


@pytest.mark.parametrize("case", ["configuration", "no configuration", "data", "no data", "model files"])
def test_another_input_on_one_rank_stops_all_before_the_first_step(small_run, tmp_path, case):
    same = (small_run, "--output_dir", tmp_path / "out")
    other = ["nothing.yml"] if case == "no configuration" else [*same, *differently(case, small_run, tmp_path)]
    ended = on_ranks(2, end_of_own_run, [same, other])
    assert [code for code, _, _ in ended] == [2, 2]
    message = ended[0][2]
    assert message.startswith("error: rank 1") and message.count("\n") == 1 and not ended[1][2]
    assert {"no data": "nothing.jsonl", "no configuration": "nothing.yml"}.get(case, f"other {case}") in message
    assert not (tmp_path / "out").exists()


def test_ranks_that_never_come_are_named():
    """A host whose processes do not even begin, while torchrun waits there: PyTorch alone would wait for a day."""
    said, *_ = on_ranks(3, wait_for_the_others)
    assert said.startswith("rank 0 has waited 1 s for rank 1, 2, which has not begun"), said


def test_help_is_said_once():
    ended = on_ranks(2, end_of_run, "--help")
    assert [code for code, _, _ in ended] == [0, 0] and "--micro_batch_size" in ended[0][1] and not ended[1][1]


def test_an_adapter_that_one_host_lacks_stops_all(model, small_run, tmp_path):
    base = load_model(model)
    nq.inject_lora(base, r=4, alpha=8)
    nq.save_adapter(base, tmp_path / "adapter")
    words = (small_run, "--output_dir", tmp_path / "out", "--lora_model_dir", tmp_path / "adapter")
    ended = on_ranks(2, end_of_run_without_adapter, 1, *words)
    assert [code for code, _, _ in ended] == [2, 2] and not ended[1][2]
    assert ended[0][2] == "error: rank 1: lora_model_dir: no such folder\n"


def test_all_ranks_begin_with_the_values_of_rank_0(small_run, tmp_path):
    for name, work in (("same", end_of_run), ("other", end_of_run_with_other_values)):
        ended = on_ranks(2, work, small_run, "--output_dir", tmp_path / name)
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
    file = "adapter_model.safetensors"
    assert (tmp_path / "same" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_ranks_share_an_evaluation(model):
    """Four packed rows on three ranks: those with one row less score the first once more, for nothing."""
    ended = on_ranks(3, share_of_evaluation, model, 40)
    assert sorted(len(scored) for _, scored in ended) == [3, 3, 3]
    longest = max(range(len(SAMPLES)), key=lambda i: len(SAMPLES[i]))
    assert sorted(i for _, scored in ended for i in scored) == sorted([*range(len(SAMPLES)), longest, longest])
    scores = score_samples(load_model(model), SAMPLES)
    assert [loss for loss, _ in ended] == pytest.approx([mean_loss(scores)] * 3, rel=1e-6)


def test_what_one_process_of_a_host_has_prepared_the_others_find(tmp_path):
    assert on_ranks(3, what_is_there, tmp_path / "file") == [False, True, True]


def test_a_tensor_that_one_rank_alone_reads_stops_all(model, small_run, tmp_path):
    """Block 1 is read by rank 1."""
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    ended = on_ranks(2, end_of_run, small_run, "--output_dir", tmp_path / "out", "--base_model", broken)
    assert [code for code, _, _ in ended] == [2, 2]
    assert ended[0][2].startswith("error: rank 1: ") and "layers.1.mlp.up_proj" in ended[0][2]
