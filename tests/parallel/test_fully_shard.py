"""PyTorch's `fully_shard` and the project's own store train the same model as one process."""

import json
from pathlib import Path

import pytest
import torch
from ranks import LAYERS, add_lora, end_of_run, on_ranks, steps, steps_in_both_stores
from safetensors.torch import load_file
from small_runs import alpaca_rows, metrics_of, save_tiny_model, steps_of, write_rows, write_run

from nanoqlora.parallel.fsdp import block_bytes
from nanoqlora.qlora import ALL_LINEAR
from nanoqlora.weights.pretrained import load_model

CASES = {  # load_in_4bit, target_modules, what blocks keep
    "fused": (True, ALL_LINEAR, "all"),
    "fused, inputs in host memory": (True, ALL_LINEAR, "offload"),
    "plain, recomputed": (True, ("q_proj", "v_proj"), "recompute"),
    "plain, 16 bits": (False, ("o_proj",), ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)


@pytest.mark.parametrize("ranks", [2, 3])
def test_both_stores_and_one_process_have_the_same_losses(model, ranks):
    """Float32, four steps with an evaluation after each; the ranks have 5 rows of uneven length to share."""
    ended = on_ranks(ranks, steps_in_both_stores, model, CASES)
    for case, (load_in_4bit, *rest) in CASES.items():
        whole = load_model(model, load_in_4bit=load_in_4bit)
        add_lora(whole, *rest)
        expected = steps(whole, 0, 1)
        assert expected[0] - expected[6] > 0.01, "it learns"
        for losses in ended:
            for store in ("BlockStore", "FullyShardStore"):
                assert losses[f"{case}, {store}"] == pytest.approx(expected, rel=1e-6), (case, store)
            num_bytes = block_bytes(whole.model.layers, ranks)
            assert losses[f"{case}, views"] == 0 and losses[f"{case}, shards"] == LAYERS * num_bytes // ranks


def test_a_run_is_the_same_in_either_store(model, tmp_path):
    """Bit for bit, on 2 ranks, with DoRA, which starts from the base; also resumed from the other's checkpoint."""
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(24, seed=2))
    held_out = write_rows(tmp_path / "held.jsonl", alpaca_rows(1, seed=1))
    keys = {"micro_batch_size": 1, "max_steps": 3, "save_steps": 2, "eval_steps": 1, "peft_use_dora": True}
    keys |= {"test_datasets": [{"path": str(held_out), "type": "alpaca"}], "lora_dropout": 0.05}
    path = write_run(tmp_path / "train.yml", model, data, **keys)
    resume = ("--fsdp_version", 2, "--resume_from_checkpoint", tmp_path / "ours" / "checkpoint-2")
    runs = {"ours": ("--fsdp", "full_shard"), "theirs": ("--fsdp_version", 2), "resumed": resume}
    for name, words in runs.items():
        ended = on_ranks(2, end_of_run, path, "--output_dir", tmp_path / name, *words)
        assert all(code == 0 for code, _, _ in ended), ended[0][2]
        assert ("fully_shard" in ended[0][1]) == (name != "ours") and "FSDP2" not in ended[0][2], ended[0][2]
    ours, *others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in runs)
    assert all(torch.equal(ours[name], other[name]) for other in others for name in ours)
    logs = [[row.get("loss", row.get("eval_loss")) for row in metrics_of(tmp_path / name)] for name in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 7
    answers = [(tmp_path / name / "report.md").read_text().split("**Question 1 0?**")[1] for name in runs]
    assert answers[0].split("\n## ")[0] == answers[1].split("\n## ")[0]


@pytest.mark.gpu
@pytest.mark.parametrize("offload", [False, True])
def test_one_gpu_is_a_rank_of_nccl(tmp_path, offload):
    """Float32, so that no graph is recorded; PyTorch keeps the base on the GPU, or in host memory."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = save_tiny_model(tmp_path / "model", num_hidden_layers=LAYERS, **wide | {"head_dim": 64})
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(12, seed=2))
    path = write_run(tmp_path / "train.yml", model, data, max_steps=5, val_set_size=2)
    words = ("--fsdp_version", 2, "--fsdp_config", json.dumps({"offload_params": offload}))
    logs = []
    for name, more in (("one", ()), ("sharded", words)):
        code, out, err = on_ranks(1, end_of_run, path, "--output_dir", tmp_path / name, *more)[0]
        assert code == 0 and ("fully_shard" in out) == (name == "sharded"), err
        logs.append([row["loss"] for row in steps_of(tmp_path / name)])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6) and len(logs[0]) == 5
