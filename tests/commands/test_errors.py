"""What the user gave is wrong: exit code 2, one line on stderr that begins with "error: ", and nothing has changed.

The line names what is wrong: the file, the line of the file, the key. No traceback, whatever the command.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft_witness import save_random_adapter
from processes import run_interpreter
from safetensors.torch import load_file, save_file
from small_runs import (
    alpaca_rows,
    assert_refused,
    run_here,
    save_tiny_model,
    snapshot,
    write_rows,
    write_run,
)

import export_gguf
import merge
import nanoqlora.chat as chat
import nanoqlora.evaluate as evaluate
import train
from nanoqlora.config.errors import Failed, UserError
from nanoqlora.export import gguf_model
from nanoqlora.tokenizer.chat_template import render


class World(NamedTuple):
    """A folder in which everything is right, and whose output folder holds an earlier run."""

    root: Path
    model: Path
    gguf: Path
    data: Path
    adapter: Path
    run: Path


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("right")
    model = save_tiny_model(root / "model")
    gguf_model.export_gguf(model, root / "model.gguf", "F32")
    save_random_adapter(model, root / "out")
    for name in ("metrics.jsonl", "report.md"):
        (root / "out" / name).write_text("of an earlier run\n")
    return root


@pytest.fixture
def world(right: Path, tmp_path: Path) -> World:
    root = shutil.copytree(right, tmp_path / "world")
    model, data = root / "model", write_rows(root / "data.jsonl", alpaca_rows(4))
    run = write_run(root / "train.yml", model, data, max_steps=1)
    return World(root, model, root / "model.gguf", data, root / "out", run)


def cut(path: Path, share: float) -> None:
    """Leave only the first part of a file."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def insert(path: Path, line: str) -> None:
    """Make this the third line."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line + "\n", *lines[2:]]))


def test_no_error_steers_the_terminal():
    """What files hold reaches the terminal as escapes, whoever puts it into a message, and however often."""
    for kind in (UserError, Failed):
        assert str(kind(kind("a.jsonl: \x1b]0;title\x07 \x9b2J \u202e \ud800"))) == (
            r"a.jsonl: \x1b]0;title\x07 \x9b2J \u202e \ud800"
        )
    with pytest.raises(UserError, match=r"TemplateError: \\x1b\[2J"):
        render("{{ raise_exception('\x1b[2J') }}", [], False, {})


def test_all_is_right_without_a_mistake(world):
    """The commands of the tests below end with 0 when nothing is wrong."""
    for main, words in commands(world).items():
        ended = run_here(main, *words)
        assert ended.code == 0, ended.err


def commands(world: World, model: Path | None = None) -> dict[Callable[[], None], list[object]]:
    model = model or world.model
    return {
        evaluate.main: ["--model", model, "--data", world.data],
        chat.main: ["--model", model, "--prompt", "Who?", "--max_new_tokens", 2],
        merge.main: ["--model", model, "--adapter", world.adapter, "--out", world.root / "merged"],
        export_gguf.main: ["--model", model, "--out", world.root / "new.gguf"],
        train.main: [world.run, "--base_model", model, "--overwrite_output_dir", "true"],
    }


# ------------------------------------------------------------------------------------------------ the command line


TYPOS = {
    "misspelt key": (["--learning_rat", "0.1"], ["learning_rat", "learning_rate"]),
    "word for a number": (["--lora_r", "many"], ["lora_r", "many", "whole number"]),
    "out of range": (["--lora_dropout", "1.5"], ["lora_dropout", "1.5"]),
    "two ways to say it": (["--warmup_steps", "1", "--warmup_ratio", "0.1"], ["warmup_steps", "warmup_ratio"]),
    "not built in": (["--deepspeed", "ds.json"], ["deepspeed"]),
    "unknown layer": (["--lora_target_modules", "[q_pro]"], ["lora_target_modules", "q_pro", "q_proj"]),
    "unknown template": (["--datasets", '[{"path": "DATA", "type": "chat_template", "chat_template": "x"}]'], ["x"]),
    "unknown type": (["--datasets", '[{"path": "DATA", "type": "aplaca"}]'], ["type", "aplaca", "alpaca"]),
    "missing data": (["--datasets", '[{"path": "absent.jsonl", "type": "alpaca"}]'], ["absent.jsonl", "no such file"]),
    "other format": (["--datasets", '[{"path": "DATA", "type": "completion"}]'], ["data.jsonl, line 1", "text"]),
    "missing model": (["--base_model", "absent"], ["absent"]),
    "missing adapter": (["--lora_model_dir", "absent"], ["absent"]),
    "missing checkpoint": (["--resume_from_checkpoint", "absent"], ["resume_from_checkpoint", "absent"]),
    "all rows too long": (["--sequence_len", "16"], ["data.jsonl", "4 too long for sequence_len 16", "would keep all"]),
    "all rows held out": (["--val_set_size", "4"], ["val_set_size", "4 of 4"]),
    "two files": (["other.yml"], ["other.yml"]),
}


@pytest.mark.parametrize("case", TYPOS)
def test_mistakes_on_the_command_line(world, case):
    words, expected = TYPOS[case]
    before = snapshot(world.root)
    words = [word.replace("DATA", str(world.data)) for word in words]
    ended = run_here(train.main, world.run, "--overwrite_output_dir", "true", *words)
    assert_refused(ended, *expected)
    assert snapshot(world.root) == before


def test_mistakes_in_the_yaml_are_told_with_their_line(world):
    for line, words in {
        "learning_rat: 0.1": ["train.yml, line 3", "learning_rat"],
        "lora_dropout: [": ["train.yml, line 5"],  # the colon there is the first thing that no list has
        "lora_dropout: lots": ["train.yml, line 3", "lora_dropout", "lots"],
    }.items():
        whole = world.run.read_text("utf-8")
        insert(world.run, line)
        before = snapshot(world.root)
        assert_refused(run_here(train.main, world.run), *words)
        assert snapshot(world.root) == before
        world.run.write_text(whole)
    assert_refused(run_here(train.main, world.root / "absent.yml"), "absent.yml", "no such file")


@pytest.mark.parametrize(
    "main, words, expected",
    [
        (evaluate.main, ["--data", "DATA"], ["--model"]),
        (evaluate.main, ["--model", "MODEL", "--data", "absent.jsonl"], ["absent.jsonl"]),
        (evaluate.main, ["--model", "MODEL", "--data", "DATA", "--adapter", "absent"], ["absent"]),
        (evaluate.main, ["--model", "MODEL", "--data", "DATA", "--load_in_4bit", "maybe"], ["maybe"]),
        (chat.main, ["--model", "MODEL", "--temprature", "0"], ["--temprature"]),
        (chat.main, ["--model", "MODEL", "--prompt", "x", "--temperature", "-1"], ["--temperature"]),
        (chat.main, ["--model", "MODEL", "--prompt", "x", "--max_new_tokens", "0"], ["--max_new_tokens"]),
        (chat.main, ["--model", "DATA", "--prompt", "x"], ["data.jsonl"]),
        (merge.main, ["--model", "MODEL", "--adapter", "absent"], ["absent"]),
        (merge.main, ["--model", "absent", "--adapter", "ADAPTER"], ["absent"]),
        (merge.main, ["--model", "MODEL"], ["train.yml"]),
        (export_gguf.main, ["--model", "absent"], ["absent"]),
        (export_gguf.main, ["--model", "MODEL", "--type", "q9"], ["q9", "q8_0"]),
    ],
)
def test_mistakes_of_the_other_commands(world, monkeypatch, main, words, expected):
    monkeypatch.chdir(world.root / "model")  # where no train.yml is
    paths = {"DATA": world.data, "MODEL": world.model, "ADAPTER": world.adapter}
    before = snapshot(world.root)
    assert_refused(run_here(main, *(paths.get(word, word) for word in words)), *expected)
    assert snapshot(world.root) == before


@pytest.mark.parametrize(
    "words",
    [["train.py", "--learning_rat", "1"], ["merge.py", "absent.yml"], ["-m", "nanoqlora.chat", "--model", "absent"]],
)
def test_processes_end_with_2_and_one_line(words):
    ended = run_interpreter(*words)
    assert_refused(ended, words[-1] if words[-1] != "1" else "learning_rat")
    assert not ended.out


# ------------------------------------------------------------------------------------------------ damaged files


DATA = {
    "broken JSON": ('{"instruction": "x", "output": "y"', ["data.jsonl, line 3", "JSON"]),
    "no object": ('["instruction"]', ["data.jsonl, line 3", "list"]),
    "missing field": ('{"instruction": "x"}', ["data.jsonl, line 3", "output"]),
    "no text": ('{"instruction": "x", "output": {"a": 1}}', ["data.jsonl, line 3", "output"]),
    "half a character": ('{"instruction": "x", "output": "\\ud83d"}', ["data.jsonl, line 3", "surrogate"]),
    "too deep": ("[" * 100_000, ["data.jsonl, line 3", "JSON"]),
}


@pytest.mark.parametrize("case", DATA)
@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_damaged_data(world, main, case):
    line, words = DATA[case]
    insert(world.data, line)
    before = snapshot(world.root)
    assert_refused(run_here(main, *commands(world)[main]), *words)
    assert snapshot(world.root) == before


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EROFS])
@pytest.mark.parametrize("name", [None, "/disk/rows.jsonl"])
def test_a_disk_that_fails_is_one_line(number, name):
    """Reading has no name of a file in Python's error, opening has one."""

    def main() -> None:
        raise OSError(number, os.strerror(number), name)

    ended = run_here(main)
    assert ended.code == 1 and ended.err.count("\n") == 1
    assert ended.err.startswith(f"error: {name or 'a file'}: {os.strerror(number)}. Look at the disk"), ended.err


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_empty_data(world, main):
    world.data.write_text("\n\n")
    before = snapshot(world.root)
    assert_refused(run_here(main, *commands(world)[main]), "data.jsonl", "no usable row", "has no rows")
    assert snapshot(world.root) == before


NAMES = ["evaluate", "chat", "merge", "export", "train"]


@pytest.mark.parametrize("command", range(5), ids=NAMES)
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_truncated_safetensors(world, command, share):
    cut(world.model / "model.safetensors", share)
    before = snapshot(world.root)
    main, words = list(commands(world).items())[command]
    assert_refused(run_here(main, *words), "model.safetensors")
    assert snapshot(world.root) == before


@pytest.mark.parametrize("command", range(5), ids=NAMES)
@pytest.mark.parametrize("share", [0, 0.0002, 0.02, 0.5, 0.999])
def test_truncated_gguf(world, command, share):
    cut(world.gguf, share)
    before = snapshot(world.root)
    main, words = list(commands(world, world.gguf).items())[command]
    assert_refused(run_here(main, *words), "model.gguf")
    assert snapshot(world.root) == before


@pytest.mark.parametrize("command", range(3), ids=["evaluate", "merge", "train"])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("share", [0, 0.5, None])
def test_damaged_adapter(world, command, file, share):
    cut(world.adapter / file, share) if share is not None else (world.adapter / file).unlink()
    main = [evaluate.main, merge.main, train.main][command]
    more = ["--lora_model_dir", world.adapter, "--output_dir", world.root / "new"]
    more = {evaluate.main: ["--adapter", world.adapter], merge.main: []}.get(main, more)
    before = snapshot(world.root)
    assert_refused(run_here(main, *commands(world)[main], *more), file)
    assert snapshot(world.root) == before


ONE = torch.ones(1)
MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no configuration": (lambda model: (model / "config.json").unlink(), ["config.json"]),
    "half a configuration": (lambda model: cut(model / "config.json", 0.5), ["config.json", "JSON"]),
    "no tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "half a tokenizer": (lambda model: cut(model / "tokenizer.json", 0.5), ["tokenizer.json", "JSON"]),
    "other architecture": (
        lambda model: change_json(model / "config.json", architectures=["Qwen3ForCausalLM"]),
        ["Qwen3ForCausalLM"],
    ),
    "RoPE type": (
        lambda model: change_json(model / "config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        ["config.json", "rope_parameters.rope_type", "yarn"],
    ),
    "quantised already": (
        lambda model: change_json(model / "config.json", quantization_config={"quant_method": "awq"}),
        ["config.json", "quantization_config.quant_method", "awq"],
    ),
    "a part missing": (
        lambda model: write_index(model, {"model.norm.weight": "model-00002-of-00002.safetensors"}),
        ["model-00002-of-00002.safetensors", "index.json"],
    ),
    "an index that leads out": (
        lambda model: write_index(model, {"model.norm.weight": "../secret.safetensors"}),
        ["index.json", "../secret.safetensors"],
    ),
    "a bias": (
        lambda model: change_weights(model, lambda s: s.update({"model.layers.0.mlp.up_proj.bias": ONE})),
        ["up_proj.bias", "no place"],
    ),
    "other shape": (lambda model: change_json(model / "config.json", intermediate_size=64), ["gate_proj", "64"]),
    "more tokens than vectors": (lambda model: shrink_embedding(model, 290), ["300", "290"]),
    "not a number": (lambda model: spoil(model, "model.layers.1.mlp.up_proj.weight"), ["up_proj", "NaN"]),
}


def change_weights(model: Path, change: Callable[[dict], object]) -> None:
    state = load_file(model / "model.safetensors")
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})


def write_index(model: Path, weight_map: dict[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shrink_embedding(model: Path, rows: int) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(model, lambda state: state.update({name: state[name][:rows].clone() for name in names}))
    change_json(model / "config.json", vocab_size=rows)


def spoil(model: Path, name: str) -> None:
    change_weights(model, lambda state: state[name].view(-1)[7].fill_(float("nan")))


@pytest.mark.parametrize("command", range(5), ids=NAMES)
@pytest.mark.parametrize("case", MODELS)
def test_damaged_model(world, command, case):
    change, expected = MODELS[case]
    change(world.model)
    before = snapshot(world.root)
    main, words = list(commands(world).items())[command]
    assert_refused(run_here(main, *words), *expected)
    assert snapshot(world.root) == before


@pytest.mark.parametrize("command", [0, 2, 4], ids=["evaluate", "merge", "train"])
def test_width_that_four_bits_cannot_split(world, tmp_path, command):
    """NF4 keeps a scale for 64 weights of a row; a row of 96 does not split evenly."""
    odd = save_tiny_model(tmp_path / "odd", hidden_size=96)
    save_random_adapter(odd, world.adapter)
    before = snapshot(world.root)
    main, words = list(commands(world, odd).items())[command]
    more = ["--load_in_4bit", "true"] if main is evaluate.main else []
    assert_refused(run_here(main, *words, *more), "96", "64")
    assert snapshot(world.root) == before


def test_the_merge_that_a_run_lacks_is_no_hub_name(world, monkeypatch):
    """Where there is no output_dir either, as in another folder than the run's, out/merged looks like owner/name."""
    monkeypatch.chdir(world.root / "model")
    ended = run_here(export_gguf.main, world.run, "--output_dir", "runs")
    assert_refused(ended, "runs/merged: no such folder", f"/merge.py {world.run} first")


@pytest.mark.parametrize("kind", ["under a file", "a folder"])
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(world, kind):
    """`--out` of each command."""
    there = world.root / "there"
    place = {"under a file": world.data / "new", "a folder": there}[kind]
    there.mkdir()
    (there / "kept").touch()
    data = write_rows(world.root / "texts.jsonl", [{"text": "a text"}])
    evaluate_words = ["--model", world.model, "--data", data, "--out", place]
    export_words = ["--model", world.model, "--out", place]
    merge_words = ["--model", world.model, "--adapter", world.adapter, "--out", place]
    runs = [(evaluate.main, evaluate_words), (export_gguf.main, export_words), (merge.main, merge_words)]
    before = snapshot(world.root)
    for main, words in runs:
        assert_refused(run_here(main, *words), str(place.parent if kind != "a folder" else place))
    assert snapshot(world.root) == before
