"""Several ranks: the base in parts or whole, the same run on any number of them, and what happens when one fails."""

from pathlib import Path

import pytest
import torch
from ranks import LAYERS, brought_blocks, end_of_run, gradient, on_ranks, spread_gradient
from safetensors.torch import load_file
from test_train import alpaca_rows, metrics_of, run_here, save_tiny_model, steps_of, write_rows, write_run

import train
from nanoqlora.checkpoint import load_model
from nanoqlora.qlora import ALL_LINEAR, inject_lora
from nanoqlora.sharding import frozen_tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


# ------------------------------------------------------------------------------------------------ sharding.py


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_gathered_blocks_are_those_of_one_process_bit_for_bit(model, load_in_4bit):
    """On 3 ranks, which divide neither the blocks nor their bytes; each holds a third, padded to whole lines."""
    whole = load_model(model, load_in_4bit=load_in_4bit)
    expected = [[tensor for _, _, tensor, _ in frozen_tensors(block)] for block in whole.model.layers]
    for rank in on_ranks(3, brought_blocks, model, load_in_4bit):
        for i, tensors in rank["seen"]:
            assert len(tensors) == len(expected[i])
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected[i], strict=True)), i
        for name, tensor in rank["rest"].items():
            assert torch.equal(tensor, whole.get_parameter(name)), name
        sizes = [sum(t.nbytes for t in tensors) for tensors in expected]
        assert all(size / 3 <= part < size / 3 + 28 * 256 for part, size in zip(rank["parts"], sizes, strict=True))


@pytest.mark.parametrize(
    "load_in_4bit, targets, keep",
    [
        (True, ALL_LINEAR, "all"),
        (True, ALL_LINEAR, "input"),
        (True, ("q_proj", "v_proj"), ""),
        (False, ("o_proj",), ""),
    ],
)
def test_gradient_over_gathered_blocks_is_that_of_one_process(model, load_in_4bit, targets, keep):
    """Fused blocks, and plain ones whose weights autograd asks for in the backward pass; sums in another order."""
    whole = load_model(model, load_in_4bit=load_in_4bit)
    torch.manual_seed(0)
    inject_lora(whole, 4, 8, target_modules=targets)
    whole.train()
    expected = gradient(whole, None, 0, 1)
    for ours in on_ranks(2, spread_gradient, model, load_in_4bit, targets, keep):
        assert (ours - expected).norm() < 2e-6 * expected.norm()


# ------------------------------------------------------------------------------------------------ whole runs


def test_any_number_of_ranks_in_either_mode_is_the_same_run(model, tmp_path):
    """Packed rows of 40 to 140 tokens that count, with dropout; in each epoch's last step some ranks have no row.

    Logged are six digits behind the point: no number differs by more than the last of them.
    """
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(24, seed=2))
    held_out = [{"path": str(write_rows(tmp_path / "held.jsonl", alpaca_rows(1, seed=1))), "type": "alpaca"}]
    keys = {"sequence_len": 512, "sample_packing": True, "max_steps": 20, "lora_dropout": 0.05}
    keys |= {"test_datasets": held_out, "eval_strategy": "no", "save_strategy": "no", "learning_rate": 0.0005}
    splits = {  # ranks, micro_batch_size, gradient_accumulation_steps, fsdp, gradient_checkpointing
        "one": (1, 6, 1, [], False),
        "parts on 2": (2, 1, 3, ["full_shard"], False),
        "parts on 3": (3, 2, 1, ["full_shard", "offload"], True),
    }
    said = {}
    for name, (ranks, micro, accumulation, fsdp, recompute) in splits.items():
        (tmp_path / name).mkdir()
        split = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation, "fsdp": fsdp}
        path = write_run(tmp_path / name / "train.yml", model, data, **keys, **split, gradient_checkpointing=recompute)
        ended = on_ranks(ranks, end_of_run, path) if ranks > 1 else [run_here(train.main, path)]
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
        assert all(not out for _, out, _ in ended[1:]), "only rank 0 prints"
        said[name] = ended[0][1]
    first, *others = ((steps_of(tmp_path / name / "out"), metrics_of(tmp_path / name / "out")[0]) for name in splits)
    assert len(first[0]) == 20
    for steps, before in others:
        assert before["eval_loss"] == pytest.approx(first[1]["eval_loss"], rel=1e-6)
        for a, b in zip(first[0], steps, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert all(a[key] == b[key] for key in ("step", "epoch", "learning_rate", "supervised_tokens"))
    perplexities = [float(text.partition("before, ")[2].split()[0]) for text in said.values()]
    assert max(perplexities) - min(perplexities) < 0.002, "the last evaluation goes over all ranks too"
    assert "each of 3 ranks holds its part" in said["parts on 3"]
    reports = [(tmp_path / name / "out" / "report.md").read_text() for name in splits]
    answers = [text.split("**Question 1 0?**")[1].split("\n## ")[0] for text in reports]
    assert answers[0] and answers[1] == answers[2]
    adapters = [load_file(tmp_path / name / "out" / "adapter_model.safetensors") for name in splits]
    for other in adapters[1:]:
        moved = torch.cat([(other[name] - tensor).flatten() for name, tensor in adapters[0].items()])
        assert moved.abs().max() < 2e-5, "of values that 20 steps of 0.0005 have moved"
