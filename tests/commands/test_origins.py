"""Which base, which run, whose tokenizer: what an adapter is used with, refused, or said."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft_witness import save_random_adapter
from processes import run_process
from safetensors.torch import load_file, safe_open, save_file
from small_runs import Ended, alpaca_rows, run_here, save_tiny_model, snapshot, write_rows, write_run

import export_gguf
import merge
import nanoqlora as nq
import nanoqlora.chat as chat
import nanoqlora.evaluate as evaluate
import train
from nanoqlora.export import gguf_model
from nanoqlora.weights.checkpoint import fingerprint, open_weights

CHAT = ("--prompt", "Who sails?", "--temperature", 0, "--max_new_tokens", 4)


class World(NamedTuple):
    model: Path
    other: Path  # of the same shapes
    run: Path  # the YAML of a finished run on `model`
    adapter: Path  # its output_dir
    data: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("origins")
    model, other = (save_tiny_model(folder / name, seed) for seed, name in enumerate(("model", "other")))
    data = write_rows(folder / "data.jsonl", alpaca_rows(8))
    run = write_run(folder / "run.yml", model, data, max_steps=2, save_steps=1, val_set_size=2)
    ended = run_here(train.main, run)
    assert ended.code == 0, ended.err
    return World(model, other, run, folder / "out", data)


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert all(word in ended.err for word in words), ended.err


# ------------------------------------------------------------------------------------------------ the base


def test_a_fingerprint_knows_the_same_weights_in_other_files(world, tmp_path):
    """Another file name, shards, another dtype of the same values, the hub's cache; not other weights."""
    known = fingerprint(open_weights(world.model))
    state = load_file(world.model / "model.safetensors")

    def copy(name: str, *parts: dict[str, torch.Tensor]) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        shutil.copy(world.model / "config.json", folder)
        files = {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}
        for file, part in files.items():
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"weight_map": {key: file for file, part in files.items() for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return fingerprint(open_weights(folder))

    names = sorted(state)
    assert copy("renamed", state) == known
    assert copy("models--a--b/snapshots/c0ffee", *({name: state[name]} for name in names)) == known
    half = {name: w.bfloat16() for name, w in state.items()}
    wide = {name: w.float() for name, w in half.items()}
    assert copy("bf16", half) == copy("bf16 as f32", wide) != known
    for name in names:  # a fine-tuned copy differs in every row of some tensor
        assert copy(f"changed {name}", state | {name: state[name] * 1.01}) != known, name
    assert copy("swapped", state | {names[3]: state[names[3]].flip(0)}) != known


def test_a_fingerprint_of_a_gguf_file(world, tmp_path):
    gguf_model.export_gguf(world.model, tmp_path / "a.gguf", "Q8_0")
    gguf_model.export_gguf(world.other, tmp_path / "b.gguf", "Q8_0")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "c.gguf")
    a, b, c = (fingerprint(open_weights(tmp_path / f"{name}.gguf")) for name in "abc")
    assert a == c != b


def test_a_run_keeps_how_and_on_what_it_trained(world):
    """In the adapter's own file, in checkpoints too; PEFT reads both."""
    for folder in (world.adapter, world.adapter / "checkpoint-1"):
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            about = file.metadata()
        expected = {"format": "pt", "load_in_4bit": "True", "computed_in": "float32"}
        assert about == expected | {"base_fingerprint": fingerprint(open_weights(world.model))}
        base = transformers.LlamaForCausalLM.from_pretrained(world.model, dtype=torch.float32)
        peft.PeftModel.from_pretrained(base, folder)


def commands(model: Path, adapter: Path, data: Path, out: Path) -> dict[str, tuple[Any, ...]]:
    both = ("--model", model, "--adapter", adapter)
    return {
        "merge": (merge.main, *both, "--out", out / "merged", "--max_tokens", 0),
        "export": (export_gguf.main, *both, "--out", out / "adapter.gguf"),
        "chat": (chat.main, *both, *CHAT),
        "evaluate": (evaluate.main, *both, "--data", data),
    }


@pytest.mark.parametrize("name", ["merge", "export", "chat", "evaluate"])
def test_another_base_is_refused_and_can_be_asked_for(world, tmp_path, name):
    """The same shapes, other weights. The base in another place passes without a word."""
    elsewhere = shutil.copytree(world.model, tmp_path / "elsewhere")
    (elsewhere / "model.safetensors").rename(elsewhere / "model-00001-of-00001.safetensors")
    index = {
        "weight_map": dict.fromkeys(load_file(world.model / "model.safetensors"), "model-00001-of-00001.safetensors")
    }
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps(index))
    before = snapshot(tmp_path)
    command = commands(world.other, world.adapter, world.data, tmp_path)[name]
    refused(run_here(*command), str(world.other), "other weights", "--other_base true")
    assert snapshot(tmp_path) == before
    ended = run_here(*command, "--other_base", "true")
    assert ended.code == 0 and (ended.out + ended.err).count("other weights") == 1, ended
    ended = run_here(*commands(elsewhere, world.adapter, world.data, tmp_path)[name])
    assert ended.code == 0 and "note" not in ended.out + ended.err, ended


def test_going_on_over_another_base_is_warned_of(world, tmp_path):
    for model, is_warned in ((world.model, False), (world.other, True)):
        words = ("--base_model", model, "--lora_model_dir", world.adapter, "--output_dir", tmp_path / "new", "--plan")
        ended = run_here(train.main, world.run, *words)
        assert ended.code == 0 and ("trained on other weights" in ended.out) == is_warned, ended


@pytest.mark.parametrize("name", ["merge", "export", "chat", "evaluate"])
def test_the_base_of_a_strangers_adapter_is_compared_by_name(world, tmp_path, name):
    """Nothing else is known of it: one note where the names differ, none where they are the same."""
    adapter = save_random_adapter(world.model, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    about = json.loads(path.read_text())
    cached = shutil.copytree(world.model, tmp_path / "models--owner--base" / "snapshots" / "c0ffee")
    for its_base, base, notes in (
        (str(world.model), world.model, 0),
        ("owner/base", cached, 0),
        ("owner/another", cached, 1),
        ("owner/model", world.model, 0),
        (None, world.model, 0),
        (["owner"], world.model, 0),
        ("owner/\x1b[2J", world.model, 1),
        ("owner/\0" + "x" * 5000, world.model, 1),
    ):
        path.write_text(json.dumps(about | {"base_model_name_or_path": its_base}))
        ended = run_here(*commands(base, adapter, world.data, tmp_path / "results")[name])
        assert ended.code == 0 and (ended.out + ended.err).count("note: ") == notes, ended
        assert "\x1b" not in ended.out + ended.err


# ------------------------------------------------------------------------------------------------ the run


def test_the_result_of_an_earlier_run_is_refused(world, tmp_path):
    """Train, merge, train again: export, proof, chat and evaluate refuse `merged`, and name a command that works."""
    shutil.copytree(world.adapter, tmp_path / "out")
    run = write_run(tmp_path / "run.yml", world.model, world.data, max_steps=2, val_set_size=2)
    shutil.copy(run, tmp_path / "out" / "train.yml")
    assert run_here(merge.main, run).code == 0
    merged = tmp_path / "out" / "merged"
    uses = {
        "export": (export_gguf.main, run, "--type", "q8_0"),
        "prove": (export_gguf.main, run, "--type", "q8_0", "--prove"),
        "export by name": (export_gguf.main, "--model", merged, "--out", tmp_path / "out" / "model.gguf"),
        "chat": (chat.main, "--model", merged, *CHAT),
        "evaluate": (evaluate.main, "--model", merged, "--data", world.data),
    }
    for name, words in uses.items():
        assert run_here(*words).code == 0, name
    assert "adapter on 4-bit base" in run_here(*uses["prove"]).out
    assert f"--data {world.data}: without effect" in run_here(*uses["export"], "--data", world.data).out
    assert "--other_base True: without effect" in run_here(*uses["export"], "--other_base", "true").out
    alone = (export_gguf.main, "--adapter", tmp_path / "out", "--model", world.model, "--out", tmp_path / "lora.gguf")
    assert f"--data {world.data}: without effect" in run_here(*alone, "--data", world.data).out
    shutil.copytree(merged, tmp_path / "moved")
    of_a_copy = (export_gguf.main, run, "--model", tmp_path / "moved")
    assert run_here(*of_a_copy).code == 0
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in state:
        state[key] += 0.01
    save_file(state, tmp_path / "out" / "adapter_model.safetensors", metadata={"format": "pt"})
    before = snapshot(tmp_path)
    for words in uses.values():
        ended = run_here(*words)
        refused(ended, str(merged), "earlier run", "merge.py")
    refused(run_here(*of_a_copy), str(tmp_path / "moved"), "earlier run", "--model alone")
    assert snapshot(tmp_path) == before
    command = ended.err.partition("python ")[2].partition(";")[0].split()
    assert run_process(*command).code == 0
    for name, words in uses.items():
        assert run_here(*words).code == 0, name
    shutil.move(merged, tmp_path / "out" / "of august")
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"another one")
    assert run_here(chat.main, "--model", tmp_path / "out" / "of august", *CHAT).code == 0, "kept by name"


# ------------------------------------------------------------------------------------------------ tokenizers


TEMPLATE = (
    "{% for m in messages %}{{ 'you' if m.role == 'assistant' else 'they' }}: {{ m.content }}<|im_start|>{% endfor %}"
    "{% if add_generation_prompt %}you: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "Who sails?"}]


def save_tokenizer_as_peft_users_do(model: Path, adapter: Path) -> Any:
    """transformers' save_pretrained, with another template and end token than the base's."""
    tok = transformers.AutoTokenizer.from_pretrained(model)
    tok.chat_template = TEMPLATE
    tok.eos_token = "<|im_start|>"
    tok.save_pretrained(adapter)
    return tok


@pytest.fixture
def strangers(world, tmp_path) -> Path:
    """An adapter with a tokenizer, over a base without a template."""
    base = shutil.copytree(world.model, tmp_path / "base")
    about = json.loads((base / "tokenizer_config.json").read_text())
    about.pop("chat_template")
    (base / "tokenizer_config.json").write_text(json.dumps(about))
    save_random_adapter(base, tmp_path / "adapter")
    save_tokenizer_as_peft_users_do(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_strangers_tokenizer_is_used_everywhere_and_said(strangers, tmp_path):
    """merge_and_unload and apply_chat_template as witnesses; merged, exported and chatted with as its author did."""
    base, words = tmp_path / "base", ("--model", tmp_path / "base", "--adapter", strangers)
    said = f"{strangers}: its own tokenizer and chat template are used; the end token is '<|im_start|>'."
    ended = run_here(merge.main, *words, "--out", tmp_path / "out", "--base", "original", "--dtype", "fp32")
    assert ended.code == 0 and ended.out.count(said) == 1, ended
    theirs = transformers.AutoTokenizer.from_pretrained(strangers)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ours.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == expected
    assert nq.load_tokenizer(tmp_path / "out").encode_chat(MESSAGES, add_generation_prompt=True) == expected
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends[0] == theirs.eos_token_id == 1  # then the base's
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, strangers).merge_and_unload().eval()
    merged = nq.Llama.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.tensor([expected])).logits
        assert (merged(torch.tensor([expected])) - logits).abs().max() < 1e-4
    new = model.generate(torch.tensor([expected]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=1)
    answer = theirs.decode([id for id in new[0, len(expected) :].tolist() if id != 1])
    words = (*words, "--prompt", MESSAGES[0]["content"], "--temperature", 0, "--max_new_tokens", 8, "--bf16", "false")
    ended = run_here(chat.main, *words)
    assert ended.code == 0 and said in ended.err, ended
    assert ended.out.rstrip("\n") == nq.load_tokenizer(base).decode(
        theirs(answer, add_special_tokens=False)["input_ids"]
    )

    ended = run_here(export_gguf.main, *words[:4], "--out", tmp_path / "adapter.gguf")
    assert ended.code == 0 and ended.out.count(said) == 1, ended
    recipe = (tmp_path / "Modelfile-adapter").read_text()
    assert 'PARAMETER stop "<|im_start|>"' in recipe and "you: " in recipe
    assert run_here(export_gguf.main, "--model", tmp_path / "out", "--out", tmp_path / "model.gguf").code == 0
    read = nq.load_tokenizer(tmp_path / "model.gguf")
    assert read.eos_id == 1 and read.encode_chat(MESSAGES, add_generation_prompt=True) == expected
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": [*MESSAGES, {"role": "assistant", "content": "I."}]}])
    ended = run_here(evaluate.main, *words[:4], "--data", chats)
    assert ended.code == 0 and said in ended.err, ended


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_strangers_template_alone_is_used_with_the_tokenizer_of_the_base(strangers, tmp_path, file):
    about = json.loads((strangers / "tokenizer_config.json").read_text())
    for path in (*strangers.glob("*token*"), strangers / "chat_template.jinja"):
        path.unlink(missing_ok=True)
    text = TEMPLATE if file.endswith("jinja") else json.dumps(about | {"chat_template": TEMPLATE})
    (strangers / file).write_text(text)
    ended = run_here(merge.main, "--model", tmp_path / "base", "--adapter", strangers, "--out", tmp_path / "out")
    assert ended.code == 0 and "its own chat template is used, with the tokenizer of" in ended.out, ended
    ours = nq.load_tokenizer(tmp_path / "out")
    assert ours.chat_template == TEMPLATE and ours.eos_id == nq.load_tokenizer(tmp_path / "base").eos_id


def test_a_strangers_vocabulary_without_its_configuration_is_named(strangers, tmp_path):
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (strangers / name).unlink()
    ended = run_here(merge.main, "--model", tmp_path / "base", "--adapter", strangers, "--out", tmp_path / "out")
    assert ended.code == 0 and "tokenizer.json is not used without tokenizer_config.json" in ended.out, ended


def test_a_strangers_template_and_a_vocabulary_without_its_configuration_are_both_named(strangers, tmp_path):
    (strangers / "tokenizer_config.json").unlink()
    (strangers / "chat_template.jinja").write_text(TEMPLATE)
    ended = run_here(merge.main, "--model", tmp_path / "base", "--adapter", strangers, "--out", tmp_path / "out")
    assert ended.code == 0 and "tokenizer.json is not used without tokenizer_config.json" in ended.out, ended
    assert "with the chat template of the adapter" in ended.out
    assert nq.load_tokenizer(tmp_path / "out").chat_template == TEMPLATE


def test_a_strangers_tokenizer_with_more_tokens_than_the_embedding_is_refused(strangers, tmp_path):
    tok = transformers.AutoTokenizer.from_pretrained(strangers)
    tok.add_tokens([f"<new{i}>" for i in range(3)])
    tok.save_pretrained(strangers)
    before = snapshot(tmp_path)
    for command in commands(tmp_path / "base", strangers, tmp_path / "absent", tmp_path).values():
        refused(run_here(*command), str(strangers), "303 tokens", "300 rows")
    assert snapshot(tmp_path) == before


def test_the_prompt_format_of_the_base_is_used_where_the_adapter_has_none(world, tmp_path):
    """An adapter over a model that we merged: its prompt.json is the next merge's too, but for a template's sake."""
    base = shutil.copytree(world.model, tmp_path / "base")
    shutil.copy(world.adapter / "prompt.json", base)
    adapter = save_random_adapter(base, tmp_path / "adapter")
    words = ("--model", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert run_here(merge.main, *words).code == 0
    assert (tmp_path / "out" / "prompt.json").read_bytes() == (base / "prompt.json").read_bytes()
    save_tokenizer_as_peft_users_do(base, adapter)
    assert run_here(merge.main, *words).code == 0
    assert not (tmp_path / "out" / "prompt.json").exists() and nq.load_tokenizer(tmp_path / "out").eos_id == 1


# ------------------------------------------------------------------------------------------------ other files


def test_tensors_in_a_pickle_are_read_as_peft_reads_them(world, tmp_path):
    """adapter_model.bin, as PEFT wrote it until 2023, merges to the same; of a pickle nothing but tensors is read."""
    adapter = save_random_adapter(world.model, tmp_path / "adapter")
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    state = load_file(pickled / "adapter_model.safetensors")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save(state, pickled / "adapter_model.bin")
    files = []
    for folder in (adapter, pickled):
        out = tmp_path / f"{folder.name} merged"
        ended = run_here(merge.main, "--model", world.model, "--adapter", folder, "--out", out)
        assert ended.code == 0, ended.err
        files.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (Evil(), [1], {"a": 1}, {1: torch.ones(1)}):
        torch.save(content, pickled / "adapter_model.bin")
        ended = run_here(merge.main, "--model", world.model, "--adapter", pickled, "--out", tmp_path / "out")
        refused(ended, "adapter_model.bin")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    (pickled / "adapter_model.bin").unlink()
    ended = run_here(merge.main, "--model", world.model, "--adapter", pickled, "--out", tmp_path / "out")
    refused(ended, "adapter_model.safetensors", "no such file")
