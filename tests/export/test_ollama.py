"""Ollama itself, where one is on the PATH: what `ollama create` makes of a written Modelfile prompts as training did.

It is asked for the prompt of conversations (`_debug_render_only`), which must be training's, and where its tokenizer
puts no BOS in front, for the same text without one.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from chats import CHAT, DATED, llama3_tokenizer, with_default
from modelfiles import Ollama, needs_ollama
from peft_witness import save_random_adapter
from small_runs import run_here
from tiny import save_random_llama

import export_gguf
import nanoqlora as nq
from nanoqlora.data.messages import say
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.data.row_format import Frame
from nanoqlora.export import gguf_model
from nanoqlora.qlora import lora_layers
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from nanoqlora.weights.adapter import Trained, save_adapter
from nanoqlora.weights.checkpoint import fingerprint, open_weights

pytestmark = needs_ollama
CHATML = CHAT_TEMPLATES["chatml"]
CHATS = [
    say("user", "Who are you?"),
    say("system", "Be brief.\n\nBe kind.", "user", '12 \u00fc\U0001f642 "quoted" {{ .Role }} {% if %}?'),
    say("user", "one", "assistant", "two\u200d\u00a0.", "user", "three <b>&amp;</b> \\n"),
    say("system", "s", "user", "u", "assistant", "a", "user", "v", "assistant", "b", "user", "w"),
]
ODD = "\u200c\u200d\u00a0\u202f\u3000\ufeff\u00ad\x1b\u2028\U0001fae8"
EVIL = '"""\nADAPTER ./evil\nFROM /etc/passwd\nPARAMETER stop a\nSYSTEM """'
TOOLS = (  # in the way of Llama-3.1's
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n{% for tool in tools %}"
    "{{ tool | tojson }}\n\n{% endfor %}<|eot_id|>{% endif %}" + CHAT_TEMPLATES["llama3"].replace("{{ bos_token }}", "")
)
FORMATS = {
    "SmolLM2": (False, CHAT),
    **{name: (name == "llama3", replace(CHAT, chat_template=text)) for name, text in CHAT_TEMPLATES.items()},
    "dated": (True, replace(CHAT, chat_template=DATED)),
    "tools": (True, replace(CHAT, chat_template=TOOLS)),
    "thinking": (False, replace(CHAT, chat_template=CHATML + "{{ '<think>' if false }}{{ '</think>' if false }}")),
    "Stanford's alpaca": (False, PromptFormat(type="alpaca")),
    "completion": (False, PromptFormat(type="completion")),
    "frame": (True, PromptFormat(type="custom", frame=Frame(format=f'{ODD}{{{{ "{{instruction}}"\n{EVIL}\n{{{{'))),
    "no Go": (False, replace(CHAT, chat_template=CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}"))),
    "no Go, llama3": (True, replace(CHAT, chat_template="{{ '' if strftime_now('%Y') }}" + CHAT_TEMPLATES["llama3"])),
    "odd": (False, replace(CHAT, chat_template=CHATML.replace("<|im_end|>", f"{ODD}<|im_end|>"))),
    "quotes": (False, replace(CHAT, chat_template=CHATML.replace("<|im_end|>", f'"{EVIL}"<|im_end|>'))),
    "odd system": (False, replace(CHAT, chat_template=with_default(f"You{ODD}are"))),
    "evil system": (False, replace(CHAT, chat_template=with_default(EVIL))),
    "plain system": (False, replace(CHAT, chat_template=with_default('A "pirate",\n\\n\t# two lines.'))),
    "odd system and tools": (True, replace(CHAT, chat_template="{{ '' if tools }}" + with_default(" You ").strip())),
}


@pytest.fixture(scope="module")
def ollama() -> Iterator[Ollama]:
    with Ollama() as server:
        yield server


@pytest.fixture(scope="module")
def tok(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_random_llama(folder, vocab_size=49152, num_hidden_layers=1, hidden_size=64, tie_word_embeddings=True)
    return folder


def model_of(folder: Path, weights: Path, tok: Tokenizer, fmt: PromptFormat) -> Path:
    """A folder as merge.py leaves it."""
    shutil.copytree(weights, folder)
    save_tokenizer(tok, folder)
    (folder / "prompt.json").write_text(fmt.to_json())
    return folder


def created(ollama: Ollama, said: str) -> None:
    """Run the command that a program has printed, as it stands there."""
    (command,) = [line.partition(": ")[2] for line in said.splitlines() if ": ollama create" in line]
    ollama.command(*shlex.split(command))


def assert_prompts(ollama: Ollama, fmt: PromptFormat, tok: Tokenizer) -> None:
    for chat in CHATS:
        text = fmt.render(tok, chat, add_generation_prompt=True)
        bos = tok.vocab[tok.bos_id] if tok.add_bos else ""  # the tokenizer puts it there, and a Jinja may write it
        assert ollama.prompt("NAME", chat).removeprefix(bos) == text.removeprefix(bos)


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_are_those_of_training(name, ollama, weights, tok, tmp_path, capsys):
    """Also from a folder and a file whose names need quotes."""
    is_llama3, fmt = FORMATS[name]
    tok = llama3_tokenizer(tok) if is_llama3 else tok
    model = model_of(tmp_path / "my model", weights, tok, fmt)
    gguf_model.export_gguf(model, model / 'a "b" c.gguf', "F16")
    said = capsys.readouterr().out
    created(ollama, said)
    assert ("no TEMPLATE" in said) == name.startswith("no Go")
    if name.startswith("no Go"):
        assert ollama.post("/api/show", model="NAME")["template"].endswith(fmt.chat_template)  # no other was guessed
    assert_prompts(ollama, fmt, tok)
    if name == "tools":
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
        assert '{"type": "function", ' in ollama.prompt("NAME", CHATS[0], tools=tools).replace('":"', '": "')


def test_ends_and_sampling_are_ollamas(ollama, weights, tok, tmp_path, capsys):
    model = model_of(tmp_path / "model", weights, tok, CHAT)
    settings = {"eos_token_id": [0, 2], "do_sample": True, "temperature": 0.25, "top_k": 7, "repetition_penalty": 1.5}
    (model / "generation_config.json").write_text(json.dumps(settings))
    gguf_model.export_gguf(model, tmp_path / "model.gguf", "F16")
    created(ollama, capsys.readouterr().out)
    shown = ollama.post("/api/show", model="NAME")
    found = [tuple(line.split(None, 1)) for line in shown["parameters"].splitlines()]
    expected = [("repeat_last_n", "-1"), ("repeat_penalty", "1.5"), ("temperature", "0.25"), ("top_k", "7")]
    assert sorted(found) == sorted([*expected, ("stop", '"<|endoftext|>"'), ("stop", '"<|im_end|>"')])
    assert shown["system"] == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.mark.parametrize("base_has_tools", [False, True])
def test_an_adapter_on_its_base(base_has_tools, ollama, weights, tok, tmp_path, monkeypatch):
    """By the printed commands, in the folder in which they were printed: the base's file, then ollama create.

    Where the base's own Jinja has tools, Ollama runs that, and the export has reported it.
    """
    tok = llama3_tokenizer(tok)
    base = model_of(tmp_path / "the base", weights, tok, replace(CHAT, chat_template=TOOLS) if base_has_tools else CHAT)
    adapter, fmt = save_random_adapter(base, tmp_path / "run"), replace(CHAT, chat_template=CHAT_TEMPLATES["mistral"])
    (adapter / "prompt.json").write_text(fmt.to_json())
    monkeypatch.chdir(tmp_path)
    ended = run_here(export_gguf.main, "--adapter", "run", "--model", "the base")
    assert ended.code == 0, ended.err
    (command,) = re.findall("The base is needed too: (.*)", ended.out)
    assert shlex.split(command)[0] == "python"
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    created(ollama, ended.out)
    assert ("instead of TEMPLATE" in ended.out) == base_has_tools
    if base_has_tools:
        assert ollama.prompt("NAME", CHATS[0]).startswith("<|start_header_id|>user")
    else:
        assert_prompts(ollama, fmt, tok)


def test_base_and_adapter_answer_as_trained(ollama, weights, tok, tmp_path, capsys):
    """What was trained over a file's own blocks, by ADAPTER: the likeliest next tokens have our probabilities.

    llama.cpp rounds activations to 8 bits; measured: their logarithms are 0.0025 off, and 0.13 without the adapter.
    """
    gguf_model.export_gguf(model_of(tmp_path / "base", weights, tok, CHAT), base := tmp_path / "base.gguf", "Q8_0")
    model = nq.Llama.from_pretrained(base, keep_gguf_blocks=True)
    alone = nq.Llama.from_pretrained(base)
    nq.inject_lora(model, 8, 16)
    g = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) / 20
    save_adapter(model, tmp_path / "out", str(base), Trained(False, torch.float32, fingerprint(open_weights(base))))
    capsys.readouterr()
    ended = run_here(export_gguf.main, "--adapter", tmp_path / "out", "--model", base)
    assert ended.code == 0, ended.err
    created(ollama, ended.out)
    assert f"-m {base} --lora {tmp_path / 'out' / 'adapter-f32.gguf'} --jinja" in ended.out
    errors, changes = [], []
    for chat in CHATS:
        asked = {"logprobs": True, "top_logprobs": 20, "options": {"temperature": 0, "num_predict": 1}}
        (first,) = ollama.post("/api/chat", model="NAME", messages=chat, **asked)["logprobs"]
        ids = torch.tensor([CHAT.encode_prompt(tok, chat)])
        ours, without = (torch.log_softmax(m(ids)[0, -1].detach(), -1) for m in (model, alone))
        for each in first["top_logprobs"]:
            (id,) = [i for i, text in enumerate(tok.vocab) if text == each["token"]] or [None]
            if id is not None:
                errors.append(abs(each["logprob"] - ours[id].item()))
                changes.append(abs(each["logprob"] - without[id].item()))
    assert len(errors) >= 20
    error, change = (sum(x) / len(x) for x in (errors, changes))
    assert error < 0.02 and change > 0.06, (error, change)
