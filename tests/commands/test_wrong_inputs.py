"""What users get wrong: every command line, YAML, data, model, tokenizer, adapter and GGUF file, disk, device, ranks.

Each case ends with exit code 2 and one line that says where, what was found, why it matters, and what to do; and
every file and folder is as it was. The words that the line has to hold are the ones that lead a newcomer to the fault.
"""

# ruff: noqa: E501  # tables: a case is a line

import errno
import gzip
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft_witness import save_random_adapter
from safetensors.torch import load_file, save_file
from small_runs import Ended, alpaca_rows, run_here, save_tiny_model, snapshot, write_rows, write_run

import bench
import export_gguf
import merge
import nanoqlora.chat as chat
import nanoqlora.evaluate as evaluate
import train
from nanoqlora.export import gguf_model
from nanoqlora.run import compare

TINIEST = {"num_hidden_layers": 1, "intermediate_size": 64}


class World:
    """A folder in which everything is right; `words` are what the command gets after its name."""

    def __init__(self, root: Path) -> None:
        self.root, self.model, self.adapter, self.gguf = root, root / "model", root / "adapter", root / "model.gguf"
        self.data, self.out = root / "data.jsonl", root / "out"
        self.keys: dict[str, Any] = {"max_steps": 1}

    def run(self) -> Path:
        return write_run(self.root / "train.yml", self.model, self.data, **self.keys)

    def dataset(self, **keys: Any) -> None:
        one = {"path": str(self.data), "type": "alpaca"} | keys
        self.keys["datasets"] = [{name: value for name, value in one.items() if value is not None}]

    def json(self, file: str, **changes: Any) -> None:
        path = self.root / file
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value != "GONE"}))

    def tensors(self, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        state = load_file(self.root / file)
        change(state)
        save_file({name: w.contiguous() for name, w in state.items()}, self.root / file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("right")
    model = save_tiny_model(root / "model", **TINIEST)
    gguf_model.export_gguf(model, root / "model.gguf", "F32")
    for path in root.glob("Modelfile*"):
        path.unlink()
    save_random_adapter(model, root / "adapter")
    write_rows(root / "data.jsonl", alpaca_rows(4))
    return root


@pytest.fixture
def world(right: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    root = shutil.copytree(right, tmp_path / "world")
    monkeypatch.chdir(root)
    return World(root)


def check(world: World, main: Callable[[], None], words: list[Any], expected: str) -> None:
    """The command is refused with one helpful line that holds all the words, and nothing has changed."""
    before = snapshot(world.root)
    ended = run_here(main, *words)
    assert ended.code == 2, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.err + ended.out) and len(ended.err) < 1000, ended.err
    assert "Traceback" not in ended.err and "object at 0x" not in ended.err
    missing = [word for word in expected.split(" & ") if word not in ended.err]
    assert not missing, ended.err
    after = snapshot(world.root)
    assert after == before, sorted(name for name in after.keys() | before.keys() if after.get(name) != before.get(name))


# ------------------------------------------------------------------------------------------------ keys of the YAML

KEYS: dict[str, tuple[dict[str, Any], str]] = {
    # Values of another type, or out of range. The line of the YAML, the key, the value, and what it takes.
    "rank in words": ({"lora_r": "many"}, 'train.yml, line & lora_r is "many" & whole number >= 1'),
    "rank 0": ({"lora_r": 0}, "lora_r is 0 & >= 1"),
    "rank of a fraction": ({"lora_r": 1.5}, "lora_r is 1.5 & whole number"),
    "rank true": ({"lora_r": True}, "lora_r is true & whole number"),
    "rank as a list": ({"lora_r": [8]}, "lora_r is [8] & whole number"),
    "rank of a billion": ({"lora_r": 10**9}, "lora_r is 1000000000 & <= 65536"),
    "rank missing": ({"lora_r": None}, "lora_r is missing: an adapter has a rank & lora_r: 16"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0 & > 0"),
    "alpha missing": ({"lora_alpha": None}, "lora_alpha is missing & lora_alpha / lora_r"),
    "alpha infinite": ({"lora_alpha": 1e308}, "lora_alpha & <= 1000000"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "lora_alpha is NaN & number > 0"),
    "dropout in percent": ({"lora_dropout": 5}, "lora_dropout is 5 & <= 0.99"),
    "rate missing": ({"learning_rate": None}, "learning_rate is missing: peak"),
    "rate with a unit": ({"learning_rate": "2e-4/step"}, 'learning_rate is "2e-4/step" & number'),
    "rate negative": ({"learning_rate": -0.1}, "learning_rate is -0.1 & > 0"),
    "batch 0": ({"micro_batch_size": 0}, "micro_batch_size is 0 & >= 1"),
    "batch auto": ({"micro_batch_size": "auto"}, 'micro_batch_size is "auto" & whole number'),
    "accumulation without end": ({"gradient_accumulation_steps": 10**20}, "gradient_accumulation_steps & <= 1000000"),
    "epochs 0": ({"num_epochs": 0}, "num_epochs is 0 & > 0"),
    "steps without end": ({"max_steps": 10**12}, "max_steps is 1000000000000 & <= 100000000"),
    "length 1": ({"sequence_len": 1}, "sequence_len is 1 & >= 2"),
    "length of a book": ({"sequence_len": 10**12}, "sequence_len & <= 100000000"),
    "bf16 maybe": ({"bf16": "maybe"}, 'bf16 is "maybe" & true | false | auto'),
    "seed negative": ({"seed": -1}, "seed is -1 & >= 0"),
    "adapter of another kind": ({"adapter": "dora"}, 'adapter is "dora" & qlora | lora'),
    "adapter missing": ({"adapter": None}, "adapter is missing & qlora"),
    "optimizer of another kind": ({"optimizer": "lion_8bit"}, "optimizer & lion_8bit & adamw_torch_fused"),
    "scheduler of another kind": ({"lr_scheduler": "polynomial"}, 'lr_scheduler is "polynomial" & cosine | linear'),
    "strategy of another kind": ({"save_strategy": "best"}, 'save_strategy is "best" & no | steps | epoch'),
    "warm-up of a fraction": ({"warmup_steps": 0.1}, "warmup_steps is 0.1 & whole number"),
    "beta 1": ({"adam_beta1": 1}, "adam_beta1 is 1 & < 1"),
    "half a step": ({"save_steps": 2.5}, "save_steps are whole numbers of steps & Write a whole number"),
    "half a row": ({"val_set_size": 1.5}, "val_set_size is a whole number of rows"),
    "all rows held out": ({"val_set_size": 4}, "val_set_size is 4 & 4 of 4 samples & smaller count"),
    "base missing": ({"base_model": None}, "base_model is missing & hub name"),
    "data missing": ({"datasets": None}, "datasets is missing & training data"),
    "no data": ({"datasets": []}, "datasets & a list of maps"),
    "data as a name": ({"datasets": "data.jsonl"}, 'datasets & "data.jsonl" & list of maps'),
    "data without type": ({"datasets": [{"path": "data.jsonl"}]}, "datasets[0] & type is missing"),
    "data without path": ({"datasets": [{"type": "alpaca"}]}, "datasets[0] & path is missing"),
    # Keys that are misspelt, of other trainers, or not built in: the next spelling, or what to write instead.
    "misspelt": ({"learning_rat": 0.1}, "learning_rat is no known key & nearest one is learning_rate"),
    "in capitals": ({"LoRA_R": 8}, "LoRA_R is no known key & lora_r"),
    "of transformers, batch": (
        {"per_device_train_batch_size": 4},
        "per_device_train_batch_size & Write micro_batch_size",
    ),
    "of transformers, length": ({"max_seq_length": 512}, "max_seq_length & Write sequence_len"),
    "of transformers, epochs": ({"num_train_epochs": 3}, "num_train_epochs & Write num_epochs"),
    "of PEFT, modules to save": ({"lora_modules_to_save": ["embed_tokens"]}, "lora_modules_to_save & stay frozen"),
    "of PEFT, patterns": ({"lora_rank_pattern": {"q_proj": 8}}, "lora_rank_pattern & One rank for all layers"),
    "of PEFT, start": ({"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights & B at zero"),
    "of a data set, outside": ({"roles_to_train": ["assistant"]}, "roles_to_train belongs inside datasets"),
    "8 bits": ({"load_in_8bit": True}, "load_in_8bit is true & load_in_4bit: true"),
    "GPTQ": ({"gptq": True}, "gptq & unquantised model"),
    "fp16": ({"fp16": True}, "fp16 is true & bf16: auto"),
    "DeepSpeed": ({"deepspeed": "zero3.json"}, "deepspeed & torchrun alone"),
    "preferences": ({"rl": "dpo"}, 'rl is "dpo" & Only supervised fine-tuning'),
    "code of strangers": ({"trust_remote_code": True}, "trust_remote_code & never run"),
    "plugins": ({"plugins": ["mine.Plugin"]}, "plugins & not loaded"),
    "upload": ({"hub_model_id": "me/model"}, "hub_model_id & hf upload"),
    "sequence parallel": ({"sequence_parallel_degree": 2}, "sequence_parallel_degree & must fit one GPU"),
    "RoPE": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling & config.json"),
    "NF4 with fp4": ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, 'bnb_4bit_quant_type is "fp4" & nf4'),
    "sharegpt": ({"datasets": [{"path": "data.jsonl", "type": "sharegpt"}]}, "sharegpt & chat_template"),
    "a type of Axolotl's": ({"datasets": [{"path": "d", "type": "alpaca_chat.load_qa"}]}, "alpaca_chat.load_qa"),
    "one shard": ({"datasets": [{"path": "d", "type": "alpaca", "shards": 4}]}, "shards & ot supported yet"),
    # Two keys that do not go together.
    "4 bits off": ({"load_in_4bit": False}, "adapter: qlora trains over a 4-bit base & adapter: lora"),
    "two warm-ups": ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both given"),
    "two resumes": (
        {"resume_from_checkpoint": "a", "auto_resume_from_checkpoints": True},
        "resume_from_checkpoint and auto_resume_from_checkpoints are both given",
    ),
    "two cadences": ({"eval_steps": 5, "evals_per_epoch": 2, "val_set_size": 1}, "evals_per_epoch and eval_steps"),
    "two held-out sets": (
        {"val_set_size": 1, "test_datasets": [{"path": "data.jsonl", "type": "alpaca"}]},
        "val_set_size and test_datasets",
    ),
    "patience for nothing": ({"early_stopping_patience": 2}, "early_stopping_patience & there are none & val_set_size"),
    "minimum without cosine": ({"cosine_min_lr_ratio": 0.1, "lr_scheduler": "linear"}, "cosine_min_lr_ratio & cosine"),
    "no layers": ({"lora_target_linear": False}, "lora_target_modules names no layer"),
    "jinja without a template": ({"chat_template": "jinja"}, "chat_template is jinja & chat_template_jinja"),
    "two shardings": ({"fsdp": ["full_shard", "no_shard"]}, "fsdp asks for a replicated base & Write one"),
    "sharding of another kind": ({"fsdp": ["zero3"]}, "fsdp & zero3 & full_shard"),
    # Layers, tokens and templates that the model does not have.
    "unknown layer": ({"lora_target_modules": ["q_pro"]}, "lora_target_modules & 'q_pro' & q_proj"),
    "the embedding": ({"lora_target_modules": ["embed_tokens"]}, "lora_target_modules & embed_tokens & q_proj"),
    "layers at commas": ({"lora_target_modules": "q_proj,v_proj"}, "'q_proj,v_proj' & Give ends of names"),
    "half an expression": ({"lora_target_modules": ["(q_proj"]}, "lora_target_modules: '(q_proj'"),
    "end token that is not there": (
        {"special_tokens": {"eos_token": "<|eot|>"}},
        "special_tokens.eos_token & '<|eot|>'",
    ),
    "end token of letters": ({"special_tokens": {"eos_token": "a"}}, "an ordinary token, which texts are made of"),
    "new token": ({"tokens": ["<new>"]}, "'<new>', which is not in the vocabulary & <|im_end|>"),
    "token under another name": ({"special_tokens": {"end_token": "a"}}, "special_tokens.end_token is no known key"),
    "unknown template": (
        {"chat_template": "gemma", "datasets": [{"path": "data.jsonl", "type": "chat_template"}]},
        "chat_template is gemma; known are & chatml",
    ),
    "template at no path": (
        {"chat_template_jinja": "t.jinja", "datasets": [{"path": "data.jsonl", "type": "chat_template"}]},
        "chat_template_jinja: t.jinja: no such file & taken for a path",
    ),
    # Paths.
    "base that is not there": (
        {"base_model": "./nowhere"},
        "model nowhere: neither a folder nor a .gguf file & hub name",
    ),
    "base that is data": ({"base_model": "data.jsonl"}, "data.jsonl: neither a folder nor a .gguf file"),
    "base that is an adapter": (
        {"base_model": "adapter"},
        "adapter/tokenizer.json: no such file & holds an adapter: give its base model",
    ),
    "base with an address": (
        {"base_model": "https://hub.example/a/b"},
        "hub.example/a/b: neither a folder nor a .gguf file",
    ),
    "a name of 300 letters": ({"base_model": "x" * 300}, "base_model: xxx & more than 255 bytes & Shorten it"),
    "NUL in a name": ({"base_model": "a\0b"}, "base_model is 'a\\x00b' & not text"),
    "data that is not there": (
        {"datasets": [{"path": "absent.jsonl", "type": "alpaca"}]},
        "absent.jsonl: no such file",
    ),
    "data with a long name": ({"datasets": [{"path": "y" * 300, "type": "alpaca"}]}, "path: yyy & more than 255 bytes"),
    "data of no kind": ({"datasets": [{"path": "train.yml", "type": "alpaca"}]}, "its ending is unknown. Set ds_type"),
    "data in an empty folder": ({"datasets": [{"path": "empty", "type": "alpaca"}]}, "empty: no file found there"),
    "a split that is not there": (
        {"datasets": [{"path": "folder", "type": "alpaca", "split": "test"}]},
        "folder: no file found there & of the split test & its files are of the split train",
    ),
    "a split of words": (
        {"datasets": [{"path": "data.jsonl", "type": "alpaca", "split": "first half"}]},
        "train[:20%]",
    ),
    "start adapter not there": ({"lora_model_dir": "nowhere"}, "adapter nowhere: no such folder"),
    "start adapter is a model": ({"lora_model_dir": "model"}, "adapter_model.safetensors: no such file"),
    "start adapter of another rank": ({"lora_model_dir": "adapter", "lora_r": 16}, "adapter & 16"),
    "checkpoint not there": ({"resume_from_checkpoint": "out/checkpoint-9"}, "checkpoint-9 & is no folder"),
    "checkpoint is a model": (
        {"resume_from_checkpoint": "model"},
        "resume_from_checkpoint model: holds no trainer_state",
    ),
    "output is a file": ({"output_dir": "data.jsonl"}, "output_dir data.jsonl & is a file, not a folder"),
    "output below a file": ({"output_dir": "data.jsonl/out"}, "is a file, not a folder"),
    "prepared data below a file": (
        {"dataset_prepared_path": "data.jsonl/a"},
        "is a file, not a folder & Name another dataset_prepared_path",
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_keys_of_the_yaml(world: World, case: str):
    keys, expected = KEYS[case]
    (world.root / "empty").mkdir()
    (world.root / "folder").mkdir()
    shutil.copy(world.data, world.root / "folder" / "train.jsonl")
    world.keys |= keys
    check(world, train.main, [world.run()], expected)


YAML: dict[str, tuple[bytes, str]] = {
    "no colon": (b"lora_r 8", "train.yml: holds a str, but a run is a map & lora_r: 16"),
    "a bracket left open": (b"lora_target_modules: [q_proj", "train.yml, line"),
    "a tab": (b"fsdp_config:\n\toffload_params: true", "train.yml, line 3 & cannot start any token"),
    "a key twice": (b"lora_r: 8\nlora_r: 16", "lora_r is given twice & Correct the YAML"),
    "a list": (b"- lora_r: 8", "train.yml"),
    "text": (b"hello", "train.yml"),
    "a day that is not": (b"wandb_name: 2024-99-99", "line 2: '2024-99-99' is not a value & month must be in 1..12"),
    "a number without digits": (b"lora_r: 0b_", "line 2: '0b_' is not a value"),
    "a number of 5000 digits": (b"lora_r: " + b"9" * 5000, "line 2 & is not a value"),
    "a tag of Python's": (b"lora_r: !!python/object/apply:os.system ['true']", "line 2 & python/object/apply"),
    "a tag that does not fit": (b"lora_r: !!timestamp x", "line 2: 'x' is not a value"),
    "half a surrogate pair": (b'wandb_name: "\\ud800"', "line 2: wandb_name is '\\ud800' & not text"),
    "NUL": (b"wandb_name: a\0", "train.yml & special characters are not allowed"),
    "UTF-16": ("lora_r: 8".encode("utf-16"), "train.yml: cannot be read & utf-8"),
    "Latin-1": (b"wandb_name: M\xfcller", "train.yml: cannot be read & utf-8"),
    "2000 brackets": (b"tokens: " + b"[" * 2000, "train.yml: nested too deeply"),
    "an alias within itself": (b"tokens: &a [*a]", "more than 100000 values"),
    "aliases without end": (
        b"a: &a [x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [*%c,*%c,*%c]\n" % (i + 1, i + 1, i, i, i) for i in range(97, 110)),
        "more than 100000 values, with those of its aliases",
    ),
    "an include of another tool": (
        b"lora_r: !include other.yml",
        "could not determine a constructor for the tag '!include'",
    ),
}


@pytest.mark.parametrize("case", YAML)
def test_text_of_the_yaml(world: World, case: str):
    text, expected = YAML[case]
    (world.root / "train.yml").write_bytes(b"# mine\n" + text + b"\n")
    check(world, train.main, ["train.yml"], expected)


# ------------------------------------------------------------------------------------------------ command lines

COMMANDS = {
    **{"train": train.main, "merge": merge.main, "export": export_gguf.main, "chat": chat.main},
    **{"evaluate": evaluate.main, "bench": bench.main, "compare": compare.main},
}
BOTH = "--model model --adapter adapter"
WORDS: dict[str, str] = {
    "train absent.yml": "absent.yml: no such file. Name the YAML file",
    "train model": "model: cannot be read & directory",
    "train train.yml other.yml": "train.yml and other.yml are both files & Remove one",
    "train train.yml --lora_r": "--lora_r is true & whole number",
    "train train.yml --lora_r=": "lora_r is missing",
    "train train.yml --learning_rat 0.1": "--learning_rat is no known key & learning_rate",
    "train train.yml --datasets [{path:": "--datasets & neither YAML nor JSON",
    "train train.yml --=5": "command line: -- is no known key, so it does nothing. See --help",
    "train train.yml -x 1": "command line: --x is no known key",
    "train train.yml --plan --rehearse": "--plan and --rehearse are two commands",
    "train train.yml --plan maybe": "train.yml and maybe are both files",
    "train train.yml --plan=maybe": '--plan is "maybe" & true | false',
    "merge": "train.yml: no such file",
    "merge --model model": "train.yml: no such file",
    "merge --model model --adapter nowhere": "adapter nowhere: no such folder",
    "merge --model ./nowhere --adapter adapter": "nowhere: found nothing there",
    "merge --model adapter --adapter model": "adapter_model.safetensors: no such file",
    f"merge {BOTH} --out model": "model: exists and is no earlier merge & Name another --out",
    f"merge {BOTH} --out data.jsonl": "data.jsonl: exists and is no earlier merge",
    f"merge {BOTH} --base nf5": '--base is "nf5" & nf4 | original',
    f"merge {BOTH} --dtype int8": '--dtype is "int8" & bf16 | fp16',
    f"merge {BOTH} --max_kl nan": '--max_kl is "nan" & number',
    f"merge {BOTH} --max_shard_size 0": "--max_shard_size is 0 & > 0",
    f"merge {BOTH} --max_tokens -1": "--max_tokens is -1 & >= 0",
    f"merge {BOTH} --types q8_0;q4_k_m": "--types & q8_0;q4_k_m",
    f"merge {BOTH} --data absent.jsonl": "absent.jsonl: no such file",
    f"merge {BOTH} --lora_r 8": "--lora_r: no YAML file is read here & Name the file too",
    "export": "train.yml: no such file",
    "export --model nowhere": "nowhere: no such folder & merge.py first",
    "export --model adapter": "adapter/config.json: no such file & holds an adapter",
    "export --model data.jsonl": "data.jsonl: found a file of another kind",
    "export --model model --type q9": '--type is "q9" & q8_0',
    "export --model model --out model": "--out model: is a folder & name of a file",
    "export --model model --out data.jsonl/x.gguf": "is a file, not a folder",
    "export --adapter model --model model": "adapter_model.safetensors: no such file",
    "export --adapter adapter --model model --type q4_k_m": "--type q4_k_m: an adapter is written as f32, f16 or bf16",
    "export --adapter adapter --model model --prove": "model is no .gguf file, which llama.cpp needs",
    "chat": "--model is missing: Hugging Face folder",
    "chat --model nowhere --prompt x": "nowhere & found nothing there",
    "chat --model data.jsonl --prompt x": "data.jsonl & .gguf file",
    "chat --model model --prompt x --temperature -1": "--temperature is -1 & >= 0",
    "chat --model model --prompt x --temperature hot": '--temperature is "hot" & number',
    "chat --model model --prompt x --temperature nan": '--temperature is "nan" & number',
    "chat --model model --prompt x --max_new_tokens 0": "--max_new_tokens is 0 & >= 1",
    "chat --model model --prompt x --seed 99999999999999999999": "--seed & <= 4294967295",
    "chat --model model --prompt x --temprature 0": "--temprature is no known key & temperature",
    "chat --model model hello": "hello follows no --option & --help",
    "chat --model model --prompt x --adapter nowhere": "adapter nowhere: no such folder",
    "evaluate --model model": "--data is missing",
    "evaluate --data data.jsonl": "--model is missing",
    "evaluate --model model --data absent.jsonl": "absent.jsonl: no such file",
    "evaluate --model model --data *.csv": "*.csv: no file found there",
    "evaluate --model model --data model.gguf": "its ending is unknown",
    "evaluate --model model --data data.jsonl --split 1:2": "split is '1:2' & train[:20%]",
    "evaluate --model model --data data.jsonl --out model": "--out model: is a folder",
    "evaluate --model model --data data.jsonl --load_in_4bit=maybe": '--load_in_4bit is "maybe" & true | false',
    "evaluate --model model --adapter data.jsonl --data data.jsonl": "adapter data.jsonl & folder",
    "bench --model llama9": "llama9",
    "bench --steps 0": "--steps is 0 & >= 1",
    "bench --row_lengths 1,2": "--row_lengths",
    "compare": "runs is missing",
    "compare out": "out: no metrics.jsonl with a step",
    "compare nowhere other": "nowhere: no metrics.jsonl with a step & output_dir",
}


@pytest.mark.parametrize("line", WORDS)
def test_command_lines(world: World, line: str):
    command, *words = line.split()
    if command == "train":
        world.run()
    check(world, COMMANDS[command], words, WORDS[line])


# ------------------------------------------------------------------------------------------------ data

ROW = b'{"instruction": "x", "output": "y"}\n'
DATA: dict[str, tuple[str, bytes, str]] = {
    "a comma too many": ("a.jsonl", ROW + b'{"instruction": "x",}\n', "a.jsonl, line 2 & JSON"),
    "single quotes": ("a.jsonl", b"{'instruction': 'x'}\n", "a.jsonl, line 1 & JSON"),
    "two rows in a line": ("a.jsonl", ROW.strip() + ROW, "a.jsonl, line 1"),
    "a list in a line": ("a.jsonl", b'["x", "y"]\n[1]\n', "a.jsonl"),
    "a number": ("a.jsonl", ROW + b"5\n", "a.jsonl, line 2"),
    "no output": (
        "a.jsonl",
        ROW + b'{"instruction": "x"}\n',
        "a.jsonl, line 2: output is missing & columns instruction",
    ),
    "other columns": (
        "a.jsonl",
        b'{"question": "x", "answer": "y"}\n',
        "line 1: instruction is missing & field_instruction: question, field_output: answer",
    ),
    "chats": (
        "a.jsonl",
        b'{"conversations": [{"from": "human", "value": "x"}]}\n',
        "type: chat_template and field_messages: conversations & role: from",
    ),
    "an output of numbers": (
        "a.jsonl",
        b'{"instruction": "x", "output": 5}\n',
        "line 1: output is int 5 & must be a text",
    ),
    "an empty instruction": ("a.jsonl", b'{"instruction": " ", "output": "y"}\n', "line 1: instruction & not empty"),
    "a column twice": ("a.jsonl", b'{"output": "x", "output": "y"}\n', "line 1 & output stands twice"),
    "half a surrogate pair": ("a.jsonl", b'{"instruction": "x", "output": "\\ud83d"}\n', "line 1 & surrogate"),
    "100,000 brackets": ("a.jsonl", ROW + b"[" * 100_000, "line 2 & JSON"),
    "Latin-1": ("a.jsonl", b'{"instruction": "M\xfcller", "output": "y"}\n', "line 1 & UTF-8"),
    "UTF-16": ("a.jsonl", ROW.decode().encode("utf-16"), "a.jsonl & UTF-8"),
    "nothing": ("a.jsonl", b"", "a.jsonl: no usable row (the file has no rows)"),
    "blank lines": ("a.jsonl", b"\n\n  \n", "no usable row (the file has no rows)"),
    "not JSON but CSV": ("a.json", b"instruction,output\nx,y\n", "a.json & JSON"),
    "a text": ("a.json", b'"hello"', "a.json & str"),
    "a broken list": ("a.json", b'[{"instruction": "x", "output": "y"},]', "a.json"),
    "a table of a data frame": (
        "a.json",
        b'{"instruction": {"0": "x"}, "output": {"0": "y"}}',
        "instruction & must be a text",
    ),
    "a header alone": ("a.csv", b"instruction,output\n", "no usable row (the file has no rows)"),
    "a cell too many": ("a.csv", b"instruction,output\nx,y,z\n", "a.csv, line 2"),
    "a quote left open": ("a.csv", b'instruction,output\n"x,y\n', "a.csv"),
    "semicolons": ("a.csv", b"instruction;output\nx;y\n", "a.csv, line 1: the header is one column & with commas"),
    "not Parquet": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "a.parquet"),
    "half of Parquet": ("a.parquet", b"PAR1", "a.parquet"),
    "not gzip": ("a.jsonl.gz", ROW, "a.jsonl.gz"),
    "half of gzip": ("a.jsonl.gz", gzip.compress(ROW * 50)[:-20], "a.jsonl.gz"),
    "a model": ("a.jsonl", struct.pack("<IIQQ", 0x46554747, 3, 0, 0), "a.jsonl"),
}


@pytest.mark.parametrize("case", DATA)
def test_data(world: World, case: str):
    name, content, expected = DATA[case]
    path = world.root / name
    path.write_bytes(content)
    world.dataset(path=str(path))
    check(world, train.main, [world.run()], expected)


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
CHATS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no messages": ({"messages": []}, {}, "messages is list [] & not a list of messages"),
    "messages in a text": ({"messages": "hello"}, {}, 'messages is str "hello" & field_messages'),
    "a message of text": ({"messages": ["hello"]}, {}, 'message 1 is str "hello" & Make it an object'),
    "other keys": (
        {"messages": [{"from": "human", "value": "x"}]},
        {},
        "message_property_mappings: {role: from, content: value}",
    ),
    "an unknown role": (
        {"messages": [USER | {"role": "narrator"}, ANSWER]},
        {},
        "the role narrator is unknown & roles: {",
    ),
    "a role of numbers": ({"messages": [USER | {"role": 5}, ANSWER]}, {}, "role is int 5"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, {}, "content is missing"),
    "a picture": ({"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, {}, "type image & only text"),
    "tools in words": (
        {"messages": [USER, ANSWER], "tools": "search"},
        {},
        'tools is str "search" & not a list of objects',
    ),
    "a call in words": ({"messages": [USER, ANSWER | {"tool_calls": "search"}]}, {}, 'tool_calls is str "search"'),
    "a weight in words": (
        {"messages": [USER, ANSWER | {"weight": "high"}]},
        {},
        'weight is str "high" & true or false',
    ),
    "no answer": ({"messages": [USER]}, {}, "no message has the role assistant & Add an answer"),
    "a template with a mistake": (
        {"messages": [USER, ANSWER]},
        {"chat_template_jinja": "{% for m in messages %}{{ m.content }"},
        "the chat template stopped with TemplateSyntaxError",
    ),
    "a template that refuses": (
        {"messages": [USER, ANSWER]},
        {"chat_template_jinja": "{{ raise_exception('roles must alternate\x07') }}"},
        "roles must alternate\\x07 & Check the roles and their order",
    ),
    "a template without messages": ({"messages": [USER, ANSWER]}, {"chat_template_jinja": "{{ 'hello' }}"}, "template"),
    "a template of too many numbers": (
        {"messages": [USER, ANSWER]},
        {"chat_template_jinja": "{{ 10 ** 100000 }}"},
        "a number of more than 10000 bits",
    ),
    "a template of half characters": (
        {"messages": [USER, ANSWER]},
        {
            "chat_template_jinja": "{{ '\\ud800' }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        },
        "half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_chats(world: World, case: str):
    row, keys, expected = CHATS[case]
    write_rows(world.data, [row])
    world.dataset(type="chat_template")
    world.keys |= keys
    check(world, train.main, [world.run()], expected)


CARDS = {
    "a file outside": ("configs: [{config_name: default, data_files: '../*.jsonl'}]", "leads out of the folder"),
    "several configurations": ("configs: [{config_name: a}, {config_name: b}]", "several configurations & name: a, b"),
    "another split": (
        "configs: [{config_name: default, data_files: [{split: test, path: a}]}]",
        "no split train there, only test",
    ),
}


@pytest.mark.parametrize("case", CARDS)
def test_cards_of_data_sets(world: World, case: str):
    head, expected = CARDS[case]
    folder = world.root / "set"
    folder.mkdir()
    shutil.copy(world.data, folder / "train.jsonl")
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    world.dataset(path=str(folder))
    check(world, train.main, [world.run()], expected)


# ------------------------------------------------------------------------------------------------ models


def config(**changes: Any) -> Callable[[World], Any]:
    return lambda w: w.json("model/config.json", **changes)


def text(file: str, content: str | bytes) -> Callable[[World], Any]:
    return lambda w: (w.root / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def remove(file: str) -> Callable[[World], Any]:
    return lambda w: (w.root / file).unlink()


def as_folder(file: str) -> Callable[[World], Any]:
    return lambda w: ((w.root / file).unlink(missing_ok=True), (w.root / file).mkdir())


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[World], Any]:
    return lambda w: w.tensors("model/model.safetensors", change)


def cut(file: str, size: int) -> Callable[[World], Any]:
    return lambda w: (w.root / file).write_bytes((w.root / file).read_bytes()[:size])


UP = "model.layers.0.mlp.up_proj.weight"
MODELS: dict[str, tuple[Callable[[World], Any], str]] = {
    "no config.json": (remove("model/config.json"), "config.json: no such file"),
    "an empty config.json": (text("model/config.json", ""), "config.json: not valid JSON & copy the file again"),
    "config.json of 2000 brackets": (text("model/config.json", "[" * 2000), "config.json: not valid JSON"),
    "config.json of a list": (text("model/config.json", "[]"), "config.json is []: input should be an object"),
    "another architecture": (config(architectures=["Qwen3ForCausalLM"]), "Qwen3ForCausalLM & LlamaForCausalLM"),
    "a mixture": (config(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    "biases": (config(attention_bias=True), "attention_bias is True; only False is computed here"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "a window": (
        config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=4096),
        "sliding_window",
    ),
    "RoPE of another kind": (
        config(rope_parameters={"rope_type": "yarn", "factor": 4}),
        "rope_type is 'yarn' & linear",
    ),
    "quantised by another tool": (config(quantization_config={"quant_method": "awq"}), "'awq' & original weights"),
    "a width of words": (config(hidden_size="64"), "hidden_size is '64' & whole number"),
    "no width": (config(hidden_size="GONE"), "hidden_size is missing"),
    "layers of a billion": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "heads that do not divide": (config(num_key_value_heads=3), "has to be a multiple"),
    "a theta that is not finite": (config(rope_parameters=None, rope_theta=float("inf")), "rope_theta is inf"),
    "another width": (config(intermediate_size=128), "gate_proj.weight & (128, 64)"),
    "no weights": (remove("model/model.safetensors"), "neither model.safetensors nor"),
    "weights of no kind": (text("model/model.safetensors", b"\x80\x05" * 90), "model.safetensors: not a complete file"),
    "weights cut off": (cut("model/model.safetensors", 5000), "model.safetensors & Download or copy"),
    "weights that are a folder": (as_folder("model/model.safetensors"), "model"),
    "weights of git-lfs": (
        text("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors",
    ),
    "a tensor missing": (weights(lambda s: s.pop(UP)), "up_proj.weight of it is missing"),
    "a tensor too many": (weights(lambda s: s.update({UP[:-6] + "bias": torch.ones(1)})), "up_proj.bias has no place"),
    "NaN": (weights(lambda s: s[UP][3].fill_(float("nan"))), "up_proj.weight holds NaN"),
    "integers": (weights(lambda s: s.update({UP: s[UP].to(torch.int8)})), "is of type int8 & bfloat16"),
    "an index of nothing": (text("model/model.safetensors.index.json", "{}"), "index.json: weight_map"),
    "an index that leads out": (
        text("model/model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}'),
        "../b.safetensors, which is outside",
    ),
    "no tokenizer": (remove("model/tokenizer.json"), "tokenizer.json: no such file"),
    "an empty tokenizer": (text("model/tokenizer.json", "{}"), "tokenizer.json: the model is None & BPE"),
    "a tokenizer of 2000 brackets": (text("model/tokenizer.json", "[" * 2000 + "]" * 2000), "tokenizer.json"),
    "a tokenizer that is a folder": (as_folder("model/tokenizer.json"), "tokenizer"),
    "a tokenizer of words": (
        lambda w: w.json("model/tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}}),
        "'WordLevel'. Use one of type BPE",
    ),
    "more tokens than vectors": (
        lambda w: (
            config(vocab_size=290)(w),
            w.tensors(
                "model/model.safetensors", lambda s: [s.update({k: s[k][:290]}) for k in list(s) if len(s[k]) == 300]
            ),
        ),
        "300 tokens and the embedding 290 rows & from one model",
    ),
    "a template that is not text": (
        text("model/chat_template.jinja", b"\xff\xfe"),
        "chat_template.jinja: cannot be read & UTF-8",
    ),
    "a template of numbers": (
        lambda w: w.json("model/tokenizer_config.json", chat_template=5),
        "chat_template is 5: input should be a valid string",
    ),
    "an end token of numbers": (
        lambda w: w.json("model/tokenizer_config.json", eos_token=5),
        "tokenizer_config.json: eos_token: str is 5",
    ),
    "an end token of numbers, in the other file": (
        text("model/special_tokens_map.json", '{"eos_token": 5}'),
        "special_tokens_map.json: eos_token: str is 5",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_and_tokenizers(world: World, case: str):
    change, expected = MODELS[case]
    run = world.run()
    change(world)
    check(world, train.main, [run], expected)


def gguf(old: bytes, new: bytes) -> Callable[[World], Any]:
    return lambda w: w.gguf.write_bytes(w.gguf.read_bytes().replace(old, new))


def name_of(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


GGUF: dict[str, tuple[Callable[[World], Any], str]] = {
    "empty": (text("model.gguf", ""), "model.gguf: cannot be opened as a GGUF file"),
    "text": (text("model.gguf", "GGUF but text\n" * 10), "model.gguf: GGUF version"),
    "of git-lfs": (text("model.gguf", "version https://git-lfs.github.com/spec/v1\n" * 3), "model.gguf"),
    "cut off in the header": (cut("model.gguf", 500), "model.gguf & Download or export it again"),
    "cut off in the weights": (lambda w: cut("model.gguf", w.gguf.stat().st_size - 999)(w), "model.gguf"),
    "a folder": (as_folder("model.gguf"), "model.gguf"),
    "another version": (lambda w: w.gguf.write_bytes(b"GGUF\x09\0\0\0" + w.gguf.read_bytes()[8:]), "version"),
    "another architecture": (gguf(name_of("llama"), name_of("qwen2")), "general.architecture is 'qwen2'; only llama"),
    "an architecture of escapes": (gguf(name_of("llama"), name_of("\x1b[2J\x07")), "'\\x1b[2J\\x07'"),
    "a tensor of another name": (
        gguf(b"blk.0.attn_q.weight", b"blk.0.attn_Q.weight"),
        "blk.0.attn_q.weight of it is missing",
    ),
    "another rule of splitting": (gguf(name_of("smollm"), name_of("qwen22")), "split rule"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf_files(world: World, case: str):
    change, expected = GGUF[case]
    change(world)
    check(world, evaluate.main, ["--model", world.gguf, "--data", world.data], expected)


# ------------------------------------------------------------------------------------------------ adapters


def adapter(**changes: Any) -> Callable[[World], Any]:
    return lambda w: w.json("adapter/adapter_config.json", **changes)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[World], Any]:
    return lambda w: w.tensors("adapter/adapter_model.safetensors", change)


def each(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[World], Any]:
    return tensors(lambda s: s.update({name: change(w) for name, w in s.items() if part in name}))


def pickled(world: World) -> None:
    """A module of TorchScript, about which PyTorch has much to say."""
    (world.adapter / "adapter_model.safetensors").unlink()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), world.adapter / "adapter_model.bin")


ADAPTERS: dict[str, tuple[Callable[[World], Any], str]] = {
    "no configuration": (remove("adapter/adapter_config.json"), "adapter_config.json: no such file"),
    "half a configuration": (cut("adapter/adapter_config.json", 50), "adapter_config.json: not valid JSON"),
    "no tensors": (
        remove("adapter/adapter_model.safetensors"),
        "adapter_model.safetensors: no such file & copy the adapter",
    ),
    "tensors cut off": (
        cut("adapter/adapter_model.safetensors", 3000),
        "adapter_model.safetensors: not a complete file",
    ),
    "tensors of git-lfs": (
        text("adapter/adapter_model.safetensors", "version https://git-lfs\n"),
        "adapter_model.safetensors",
    ),
    "another kind": (adapter(peft_type="IA3"), "peft_type is 'IA3' & LoRA, rsLoRA and DoRA"),
    "biases": (adapter(bias="all"), "bias is 'all' & not built in"),
    "saved modules": (adapter(modules_to_save=["lm_head"]), "modules_to_save is ['lm_head']"),
    "tokens that were trained": (adapter(trainable_token_indices=[5]), "trainable_token_indices"),
    "a key of tomorrow": (adapter(use_tomorrow=True), "use_tomorrow is True & not built in"),
    "a key of escapes": (adapter(**{"\x1b[2J": 5}), "\\x1b[2J is 5"),
    "no rank": (adapter(r="GONE"), "adapter_config.json: r is missing"),
    "rank 0": (adapter(r=0), "r is 0"),
    "rank true": (adapter(r=True), "r is true: input should be a valid integer"),
    "alpha in words": (adapter(lora_alpha="16"), 'lora_alpha is "16"'),
    "alpha infinite": (adapter(lora_alpha=float("inf")), "lora_alpha is Infinity"),
    "DoRA in words": (adapter(use_dora="yes"), 'use_dora is "yes": input should be a valid boolean'),
    "a pattern in brackets": (adapter(rank_pattern={"(": 4}), "rank_pattern.( & not a regular expression"),
    "a pattern of a list": (adapter(rank_pattern=[4]), "rank_pattern is [4]: input should be an object"),
    "another rank than its tensors": (adapter(r=16), "rank 16 by its configuration"),
    "DoRA without lengths": (adapter(use_dora=True), "adapter"),
    "tensors of NaN": (each("lora_B", lambda w: w * float("nan")), "NaN"),
    "tensors of integers": (each("lora_A", lambda w: w.to(torch.int32)), "is of type int32"),
    "vectors": (each("lora_B", lambda w: w[:, 0]), "lora_B"),
    "another width": (each("lora_A", lambda w: w[:, :32]), "64"),
    "half a pair": (tensors(lambda s: s.pop(next(name for name in s if "lora_A" in name))), "lora_A"),
    "no layers": (tensors(lambda s: [s.pop(name) for name in list(s)]), "adapter_model.safetensors"),
    "layers of another model": (
        tensors(lambda s: [s.update({name.replace("self_attn", "attention"): s.pop(name)}) for name in list(s)]),
        "attention",
    ),
    "a format in bytes": (text("adapter/prompt.json", b"\xff\xfe{"), "prompt.json"),
    "a format of nobody's": (text("adapter/prompt.json", '{"type": "haiku"}'), "haiku"),
    "a format of a list": (text("adapter/prompt.json", "[]"), "adapter/prompt.json is []"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(world: World, case: str):
    change, expected = ADAPTERS[case]
    change(world)
    check(world, merge.main, [*BOTH.split(), "--out", "merged", "--max_tokens", 0], expected)


# ------------------------------------------------------------------------------------------------ paths


def pipe(file: str) -> Callable[[World], Any]:
    return lambda w: ((w.root / file).unlink(missing_ok=True), os.mkfifo(w.root / file))


def home(world: World) -> None:
    os.environ["HOME"] = str(world.root)


def many_files(world: World) -> None:
    (world.root / "many").mkdir()
    for i in range(20_000):
        (world.root / "many" / f"{i}.txt").touch()


NOTHING: Callable[[World], Any] = lambda w: None  # noqa: E731
PLACES: dict[str, tuple[Callable[[World], Any], str, str]] = {
    "the home folder as data": (home, "evaluate --data ~", "your home & Name its files"),
    "a folder above it": (home, "evaluate --data /", "your home & Name its files"),
    "thousands of files": (many_files, "evaluate --data many", "20,000 files & Name its files"),
    "a pipe as data": (pipe("p.jsonl"), "evaluate --data p.jsonl", "no such file"),
    "a pipe as a model": (pipe("p.gguf"), "evaluate --model p.gguf", "a file of another kind"),
    "a pipe to write": (pipe("p.jsonl"), "evaluate --out p.jsonl", "a folder, a device or a pipe"),
    "a device to write": (NOTHING, "evaluate --out /dev/full", "a folder, a device or a pipe"),
    "a device to export to": (NOTHING, "export --out /dev/full", "a folder, a device or a pipe"),
    "a pipe as a matrix": (pipe("p.dat"), "export --out x.gguf --type iq4_nl --imatrix p.dat", "is a device or a pipe"),
    "a pipe as an adapter": (pipe("p"), "evaluate --adapter p", "no such folder"),
    "a pipe as YAML": (pipe("p.yml"), "train p.yml", "p.yml: is a device or a pipe"),
    "no end of YAML": (NOTHING, "train /dev/zero", "/dev/zero: is a device or a pipe"),
    "no name of a model": (NOTHING, "merge --adapter adapter --model=", "model: & is empty"),
    **{
        f"a pipe as {file}": (pipe(f"model/{file}"), "evaluate", f"{file}: is a device or a pipe")
        for file in ("config.json", "tokenizer.json", "model.safetensors", "prompt.json")
    },
    "a pipe in an adapter": (
        pipe("adapter/adapter_config.json"),
        "evaluate --adapter adapter",
        "adapter_config.json: is a device or a pipe",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_what_is_no_file(world: World, case: str, monkeypatch: pytest.MonkeyPatch):
    """A folder of everything, devices and pipes are neither read nor replaced."""
    monkeypatch.setenv("HOME", os.environ["HOME"])
    change, line, expected = PLACES[case]
    change(world)
    name, *words = line.split()
    usual = {"evaluate": {"--model": "model", "--data": "data.jsonl"}, "export": {"--model": "model"}}.get(name, {})
    words += [word for pair in usual.items() if pair[0] not in words for word in pair]
    check(world, COMMANDS[name], words, expected)


@pytest.mark.parametrize("folder", ["model", "adapter"])
def test_links_that_lead_to_themselves(world: World, folder: str):
    """In the place of each file that may be in a downloaded folder: a line, or nothing where it is not needed."""
    names = {"tokenizer.model", "chat_template.jinja", "prompt.json", "train.yml", "generation_config.json"}
    for name in sorted(names | {path.name for path in (world.root / folder).iterdir()}):
        path, kept = world.root / folder / name, world.root / "kept"
        if is_there := path.exists():
            path.rename(kept)
        path.symlink_to(name)
        ended = run_here(evaluate.main, "--model", "model", "--adapter", "adapter", "--data", "data.jsonl")
        lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert (ended.code, len(lines)) in ((0, 0), (2, 1)), (name, ended)
        path.unlink()
        if is_there:
            kept.rename(path)


# ------------------------------------------------------------------------------------------------ surroundings

ENVIRONMENTS: dict[str, tuple[dict[str, str], str]] = {
    "ranks in words": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number & torchrun --nproc_per_node"),
    "no ranks": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
    "ranks without torchrun": ({"WORLD_SIZE": "2"}, "RANK is not set & unset WORLD_SIZE"),
    "a rank too high": (
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        "",  # the rank that does not exist is not the one to speak
    ),
    "a port in words": ({"MASTER_PORT": "http"}, "MASTER_PORT=http is not a number"),
    "a device in words": ({"LOCAL_RANK": "first"}, "LOCAL_RANK=first is not a number"),
}


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_ranks_and_devices(world: World, case: str, monkeypatch: pytest.MonkeyPatch):
    variables, expected = ENVIRONMENTS[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run, before = world.run(), snapshot(world.root)
    if expected:
        check(world, train.main, [run], expected)
    else:
        assert run_here(train.main, run) == Ended(2, "", "")
    assert {name for name in snapshot(world.root)} - {*before} <= {"train.yml"}


WRITERS = {  # every command, and every folder that it writes to: HERE. Merges and proofs do without prepared data.
    "a run": "train train.yml --output_dir HERE",
    "a run's checks": "train train.yml --plan --output_dir HERE",
    "a rehearsal": "train train.yml --rehearse --output_dir HERE",
    "prepared data": "train train.yml --dataset_prepared_path HERE",
    "prepared data of a plan": "train train.yml --plan --dataset_prepared_path HERE",
    "prepared data of a matrix": "export train.yml --model model --imatrix --type iq4_nl --out x.gguf --dataset_prepared_path HERE",
    "a merge": f"merge {BOTH} --out HERE/merged",
    "a merge of a run": f"merge train.yml {BOTH} --out HERE/merged",
    "a model's file": "export --model model --out HERE/a.gguf",
    "an adapter's file": f"export {BOTH} --out HERE/a.gguf",
    "a proof": "export --model model --out HERE/a.gguf --prove",
    "a matrix": "export --model model --out HERE/a.gguf --imatrix --data data.jsonl --type iq4_nl",
    "losses": "evaluate --model model --data data.jsonl --out HERE/nll.jsonl",
    "a picture": "compare here there --out HERE/a.png",
    "figures": "bench --model model --json HERE/a.json",
}
NO_FOLDERS: dict[str, tuple[str, str]] = {  # what is there, and what the line says of it
    "of the kernel": ("/proc", "/proc: No such file or directory"),
    "below it": ("/proc/self/x", "/proc/self: No such file or directory"),
    "read-only": ("read-only", "read-only: Read-only file system"),
    "below that": ("read-only/a/b", "read-only: Read-only file system"),
    "not this user's": ("refused/a", "refused: Permission denied"),
    "a file": ("data.jsonl", "data.jsonl: is a file, not a folder"),
    "below a file": ("data.jsonl/a", "data.jsonl: is a file, not a folder"),
    "a device": ("/dev/null", "/dev/null: is a file, not a folder"),
    "a long name": ("x" * 300, "more than 255 bytes in a part"),
    "a long path": ("x/" * 3000 + "x", "more than 255 bytes in a part, or 3500"),
    "a link to nothing": ("nothing", "is a link to nothing"),
    "below a link to nothing": ("nothing/a/b", "is a link to nothing"),
    "a link to itself": ("loop", "is a link to nothing"),
    "below a link to itself": ("loop/a", "is a link to nothing"),
}


@pytest.mark.parametrize("where", NO_FOLDERS)
def test_folders_that_cannot_be_written_to(world: World, where: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever the reason, it is found before any work, and nothing is written elsewhere.

    Root may write everywhere, so what the system would answer another user is set here, at the call itself.
    """
    folder, expected = NO_FOLDERS[where]
    real, refuse = os.mkdir, {"read-only": errno.EROFS, "refused": errno.EACCES}

    def mkdir(path: str, *mode: int) -> None:
        for name, number in refuse.items():
            if Path(path).is_relative_to(world.root / name):
                raise OSError(number, os.strerror(number), path)
        real(path, *mode)

    for name in refuse:
        (world.root / name).mkdir()
    (world.root / "nothing").symlink_to("absent/folder")
    (world.root / "loop").symlink_to("loop")
    monkeypatch.setattr(os, "mkdir", mkdir)
    world.keys["val_set_size"] = 1
    world.run()
    for line in WRITERS.values():
        name, *words = line.split()
        key = next(before for before, word in zip(words, words[1:], strict=False) if "HERE" in word).strip("-")
        words = [word.replace("HERE", folder) for word in words]
        check(world, COMMANDS[name], words, f"{key} & {expected}" + " & Name another" * ("bytes" not in expected))


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_disk_that_is_too_small(world: World, command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 999, 999))
    words = {"merge": [*BOTH.split(), "--out", "merged", "--max_tokens", 0], "export": ["--model", "model"]}[command]
    check(world, COMMANDS[command], words, "free & Free some space")


def test_an_earlier_run_in_the_folder(world: World):
    world.out.mkdir()
    (world.out / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    check(world, train.main, [world.run()], "out: holds & 3 steps of it & --overwrite_output_dir true")


def test_questions_that_are_not_text(world: World, monkeypatch: pytest.MonkeyPatch):
    read, write = os.pipe()
    os.write(write, b"\xff\xfe\n")
    os.close(write)
    with open(read, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        ended = run_here(chat.main, "--model", world.model, "--max_new_tokens", 2)
    assert ended.code == 2 and "standard input: & not text. Give it in UTF-8.".split(" & ")[0] in ended.err, ended


def test_all_is_right_without_a_mistake(world: World):
    """What the cases above change works as it is."""
    rows = [{"messages": [USER, ANSWER]}]
    write_rows(world.root / "chats.jsonl", rows)
    run = world.run()
    assert yaml.safe_load(run.read_text())["max_steps"] == 1
    for main, words in (
        (train.main, [run, "--plan"]),
        (train.main, [run, "--plan", "--datasets", '[{"path": "chats.jsonl", "type": "chat_template"}]']),
        (merge.main, [*BOTH.split(), "--out", "merged", "--max_tokens", 0]),
        (evaluate.main, ["--model", world.gguf, "--data", world.data]),
    ):
        ended = run_here(main, *words)
        assert ended.code == 0, ended
    tables = KEYS, YAML, WORDS, DATA, CHATS, CARDS, MODELS, GGUF, ADAPTERS, PLACES, ENVIRONMENTS
    assert sum(map(len, tables)) >= 300
