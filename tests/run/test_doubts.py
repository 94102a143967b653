"""Plans that cannot be meant and options without effect: each is warned of, with its numbers, and nothing else is."""

import json
from pathlib import Path

import pytest
from small_runs import alpaca_rows, run_here, save_tiny_model, write_rows, write_run

import train
from nanoqlora.config.load import load_config
from nanoqlora.config.rules import without_effect
from nanoqlora.run.doubts import doubts
from nanoqlora.run.optim import learning_rate_at
from nanoqlora.weights.pretrained import open_model

ROWS = alpaca_rows(20)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run of 20 steps: 20 rows, two by two, twice."""
    folder = tmp_path_factory.mktemp("doubts")
    return write_run(folder / "train.yml", save_tiny_model(folder / "model"), write_rows(folder / "d.jsonl", ROWS))


def found(world: Path, *words: object) -> list[str]:
    config = load_config([str(world), *map(str, words)])
    tokenizer, data = train.read_inputs(config, 0, 1)
    model = open_model(config.base_model)[0].config
    return [*without_effect(config, 1, on_gpu=False), *doubts(config, data, tokenizer, model)]


HELD = {"held": ROWS[:3] + alpaca_rows(2, seed=7), "apart": alpaca_rows(5, seed=7)}
DOUBTS = {
    "warm-up": (["--warmup_steps", 100], ["warm-up takes 100 steps", "has 20", "0.00038", "0.002"]),
    "warm-up of all": (["--warmup_ratio", 1.0], ["warm-up takes 20 steps", "has 20"]),
    "only step": (["--max_steps", 1, "--warmup_steps", 1], ["only step has learning rate 0"]),
    "evaluation": (["held", "--eval_steps", 21], ["eval_steps is 21", "20 steps"]),
    "saves": (["--save_steps", 500], ["save_steps is 500", "20 steps", "no checkpoint"]),
    "patience": (["apart", "--early_stopping_patience", 2], ["early_stopping_patience is 2", "2 evaluations"]),
    "leak": (["held"], ["3 of 5 evaluation samples are in the training data"]),
    "no warm-up": (["--lr_scheduler", "constant", "--warmup_ratio", 0.1], ["constant_with_warmup"]),
    "targets": (["--lora_target_linear", "true", "--lora_target_modules", "[q_proj]"], ["lora_target_linear: false"]),
    "no evaluation": (["apart", "--eval_strategy", "no", "--eval_steps", 5], ["eval_strategy is no"]),
    "no save": (["--save_strategy", "no", "--save_steps", 5], ["save_strategy is no"]),
    "no limit": (["--save_strategy", "no", "--save_total_limit", 2], ["save_total_limit does nothing"]),
    "watchdog": (["--loss_watchdog_patience", 5], ["loss_watchdog_threshold"]),
    "wandb": (["--wandb_name", "x"], ["wandb_project"]),
    "system": (["--default_system_message", "x"], ["chat_template"]),
    "fsdp": (["--fsdp", "full_shard"], ["fsdp does nothing with one process", "torchrun --nproc_per_node"]),
    "fsdp_config": (["--fsdp_config", "{reshard_after_forward: true}"], ["fsdp_config does nothing with one process"]),
    "fsdp_version": (["--fsdp_version", "2"], ["fsdp_version: 2 shards nothing with one process"]),
    "kept gathered": (
        ["--fsdp_version", "2", "--fsdp", "shard_grad_op"],
        ["fsdp_version: 2 shards nothing where gathered weights are kept"],
    ),
    "optimizer parts": (["--shard_optimizer_state", "true"], ["shard_optimizer_state does nothing with one process"]),
    "paged": (["--optimizer", "paged_adamw_8bit"], ["paged_adamw_8bit pages nothing on a CPU"]),
}
RIGHT = [
    ["--warmup_steps", 19],
    ["--warmup_ratio", 0.1, "--lr_scheduler", "constant_with_warmup"],
    ["apart", "--eval_steps", 20, "--save_steps", 20],
    ["apart", "--early_stopping_patience", 1],
    ["--lora_target_modules", "[q_proj]"],
    ["--fsdp", "replicate"],
    ["--max_steps", 1],
    ["--save_strategy", "no"],
]


def words_of(world: Path, words: list) -> list:
    for name in words:
        if name in HELD:
            file = write_rows(world.parent / f"{name}.jsonl", HELD[name])
            return [*words[1:], "--test_datasets", json.dumps([{"path": str(file), "type": "alpaca"}])]
    return words


def test_samples_of_several_data_sets_are_counted(world):
    files = [write_rows(world.parent / f"{i}.jsonl", rows) for i, rows in enumerate((ROWS[3:9], ROWS[5:12]))]
    sets = json.dumps([{"path": str(file), "type": "alpaca"} for file in files])
    assert found(world, "--datasets", sets) == [
        f"4 samples of {files[1]} are in an earlier data set too, so they are learnt more than once"
    ]


@pytest.mark.parametrize("case", DOUBTS)
def test_what_cannot_be_meant_is_said_once_with_its_numbers(world, case):
    words, expected = DOUBTS[case]
    lines = found(world, *words_of(world, words))
    fitting = [line for line in lines if all(text in line for text in expected)]
    assert len(fitting) == 1, lines
    assert len(lines) == 1 or case == "evaluation", lines  # whose file shares rows too


@pytest.mark.parametrize("words", RIGHT)
def test_what_can_be_meant_is_not_warned_of(world, words):
    assert found(world, *words_of(world, words)) == []


def test_the_rate_that_is_named_is_the_highest_of_all_steps(world):
    rates = [learning_rate_at(step, 20, 100, 0.002, "cosine", 0.0) for step in range(20)]
    assert f"{max(rates):.3g}" in found(world, "--warmup_steps", 100)[0]


def test_samples_beyond_the_positions_of_the_model(world, tmp_path):
    """Counted among training and held-out samples; linear RoPE has more positions than config.json says."""
    for factor, count in ((None, 20), (8.0, 0)):
        rope = {"rope": {"rope_type": "linear", "factor": factor}} if factor else {}
        model = save_tiny_model(tmp_path / f"model{factor}", max_position_embeddings=32, **rope)
        lines = found(world, "--base_model", model)
        assert len(lines) == bool(count)
        assert not count or f"{count} of 20 samples are longer than the 32 positions" in lines[0]


def test_an_end_token_that_no_sample_teaches(world, tmp_path):
    """Rows that are all cut; one whole row is enough. Whoever asks for no end tokens is not warned."""
    rows = write_rows(tmp_path / "long.jsonl", [{"text": "So long a text, again and again. " * 9}] * 4)
    cut = ["--excess_length_strategy", "truncate"]
    alpaca = [row | {"output": "Arr " * 300} for row in ROWS]
    data = [{"path": str(write_rows(tmp_path / "cut.jsonl", alpaca)), "type": "alpaca"}]
    lines = found(world, "--datasets", json.dumps(data), *cut, "--sequence_len", 400)
    assert len(lines) == 1 and "no sample teaches the end token (<|im_end|>)" in lines[0], lines
    data = [{"path": str(write_rows(tmp_path / "cut.jsonl", [*alpaca, ROWS[0]])), "type": "alpaca"}]
    assert found(world, "--datasets", json.dumps(data), *cut, "--sequence_len", 400) == []
    assert found(world, "--datasets", json.dumps([{"path": str(rows), "type": "completion"}])) == []


def test_warnings_stand_in_the_plan_and_at_the_start(world, tmp_path):
    for words in (["--plan"], ["--max_steps", 2]):
        ended = run_here(train.main, world, "--warmup_steps", 100, "--output_dir", tmp_path / "out", *words)
        assert ended.code == 0 and ended.out.count("warning: the warm-up takes 100 steps") == 1, ended


def test_a_warning_of_a_library_does_not_stand_in_the_bar(world, tmp_path, monkeypatch):
    """bitsandbytes has one about paging on a CPU; others become lines of their own."""
    real = train.sum_and_clip

    def warns(*words):
        import warnings

        warnings.warn("something else", UserWarning, stacklevel=1)
        return real(*words)

    monkeypatch.setattr(train, "sum_and_clip", warns)
    words = ("--optimizer", "paged_adamw_8bit", "--max_steps", 2, "--output_dir", tmp_path / "out")
    ended = run_here(train.main, world, *words, terminal=True)
    assert ended.code == 0 and "Paged optimizers" not in ended.err and "UserWarning" not in ended.err
    assert ended.err.count("\nwarning: something else\n") + ended.err.count("\rwarning: something else\n") >= 1, (
        ended.err
    )
