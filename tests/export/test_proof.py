"""export_gguf.py --prove: a good file passes, here and in real llama.cpp, and every kind of wrong one is named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_witness import save_random_adapter, trained_in_float32
from processes import run_process
from safetensors.torch import load_file, save_file
from small_runs import CHATML, merged, run_here, save_tiny_model, write_rows, write_run

import export_gguf
import merge
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export import gguf_model, llama_cpp, proof
from nanoqlora.export import merge as merge_module
from nanoqlora.weights import adapter as adapter_module


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    """A merged folder with its certificate; the YAML of the run beside it."""
    ended = merged(run, tmp_path / "merged", "--max_tokens", 0)
    assert ended.code == 0, ended.err
    shutil.copytree(run / "out", tmp_path / "out")
    shutil.copy(run / "run.yml", tmp_path / "run.yml")
    return tmp_path / "merged"


def proved(model: Path, *words: object):
    more = (model.parent / "run.yml", "--out", model / f"model-{words[1]}.gguf", "--output_dir", model.parent / "out")
    return run_here(export_gguf.main, *more, "--model", model, "--prove", "--max_tokens", 2000, *words)


def proof_of(model: Path, name: str) -> dict:
    return json.loads((model / "merge.json").read_text())["gguf"][name]


def verdict_of(ended) -> str:
    """The last line, and the only verdict."""
    (found,) = [line for line in ended.out.splitlines() if line.startswith("verdict:")]
    assert ended.out.splitlines()[-1] == found
    return found


def test_good_file_passes_and_the_certificate_says_so(model: Path):
    pytest.importorskip("llama_cpp")
    ended = proved(model, "--type", "f32")
    assert ended.code == 0, ended.out + ended.err
    found = proof_of(model, "model-f32.gguf")
    assert found["tensors"] == 21 and found["largest_relative_error"] == 0 and found["type"] == "f32"
    (trained, folder, file), theirs = found["forms"], found["llama_cpp"]
    assert file["mean_kl"] < 1e-6 and file["top1_agreement"] == 1.0 and folder["mean_kl"] < 1e-6
    assert trained["perplexity"] == pytest.approx(file["perplexity"], rel=1e-4)
    assert theirs["mean_kl"] < 1e-6 and theirs["kl_of_file"] < 1e-6
    assert theirs["perplexity"] == pytest.approx(file["perplexity"], rel=1e-5)
    assert theirs["texts"] == len(proof.WORDS) and theirs["conversations"] == 1
    assert verdict_of(ended).startswith("verdict: model-f32.gguf is what was trained: base and adapter, merged, as f32")
    assert found["verdict"] == verdict_of(ended) and found["wrong"] == []
    adapter, file = (
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (model.parent / "out" / "adapter_model.safetensors", model / "model-f32.gguf")
    )
    assert (found["adapter_sha256"], found["file_sha256"]) == (adapter, file)
    assert proved(model, "--type", "q4_0").code == 0
    after = json.loads((model / "merge.json").read_text())
    assert after["gguf"].keys() == {"model-f32.gguf", "model-q4_0.gguf"}
    assert after["gguf"]["model-q4_0.gguf"]["largest_relative_error"] > 0.05


def test_folder_without_certificate_gets_a_file_of_its_own(run: Path, tmp_path: Path):
    """It is compared with itself once, and the verdict claims no more."""
    model = shutil.copytree(run / "model", tmp_path / "model")
    words = ("--model", model, "--prove", "--type", "q8_0", "--data")
    ended = run_here(export_gguf.main, *words, run / "held.jsonl")
    assert ended.code == 2 and "held.jsonl, line 1: messages is missing" in ended.err
    assert not (model / "model-q8_0.gguf").exists()
    shutil.copy(run / "out" / "prompt.json", model)
    ended = run_here(export_gguf.main, *words, run / "held.jsonl")
    assert ended.code == 0, ended.out + ended.err
    found = json.loads((model / "model-q8_0.proof.json").read_text())
    assert found["tensors"] == 21 and [form["form"] for form in found["forms"]] == ["exported", "GGUF model-q8_0.gguf"]
    assert ended.out.count("\nexported ") == 1 and "\nmerged " not in ended.out
    line = verdict_of(ended)
    assert line.startswith(f"verdict: not proven: model-q8_0.gguf is the model in {model}, as q8_0; not asked: ")
    assert "the trained model (give the YAML file of its run first)" in line


# ------------------------------------------------------------------------------------------------ wrong files


def change_metadata(monkeypatch: pytest.MonkeyPatch, **changes: tuple[str, object]) -> None:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    good = gguf_model.tokenizer_metadata
    monkeypatch.setattr(gguf_model, "tokenizer_metadata", lambda *args: good(*args) | changes)


def worse(w: torch.Tensor, *how: object, good=gguf_model.quantize_checked) -> torch.Tensor:
    return good(w * 1.0001 if w.ndim == 2 else w, *how)


def change_model(monkeypatch: pytest.MonkeyPatch, **changes: tuple[str, object]) -> None:
    good, changes = gguf_model.model_metadata, {key.replace("__", "."): value for key, value in changes.items()}
    monkeypatch.setattr(gguf_model, "model_metadata", lambda *args: good(*args) | changes)


def another_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp knows names such as <|im_end|> by itself, so the end of training has to be another one."""
    monkeypatch.setattr(PromptFormat, "end_id", lambda self, tok: tok.encode("b")[0])
    change_metadata(monkeypatch, **{f"tokenizer__ggml__{name}_token_id": ("u32", 2) for name in ("eos", "eot")})


LAST = "{{ messages[-1]['content'] }}"
WRONG = {
    "rows in another order": (lambda m: m.setattr(gguf_model, "permute_rows", lambda w, n: w), "q_proj"),
    "another rounding": (lambda m: m.setattr(gguf_model, "quantize_checked", worse), "is not the merged model's"),
    "another norm": (
        lambda m: change_model(m, llama__attention__layer_norm_rms_epsilon=("f32", 1e-3)),
        "rms_norm_eps is 0.001",
    ),
    "other angles": (lambda m: change_model(m, llama__rope__freq_base=("f32", 1e6)), "rotary embeddings"),
    "another template": (
        lambda m: change_metadata(m, tokenizer__chat_template=("string", LAST)),
        "where training has 'Below is an instruct' of a question",
    ),
    "a BOS too many": (
        lambda m: change_metadata(m, tokenizer__ggml__add_bos_token=("bool", False)),
        "other token ids of a question",
    ),
    "another split of words": (
        lambda m: change_metadata(m, tokenizer__ggml__pre=("string", "llama-bpe")),
        "its vocabulary splits text by the rule 'llama-bpe'",
    ),
    "another end": (another_end, "does not stop at 'b', which ends an answer in training"),
    "a list of scores of another length": (
        lambda m: change_metadata(m, tokenizer__ggml__token_type=("i32[]", [1] * 10)),
        "verdict: NOT what was trained",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(case: str, model: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp")
    change, message = WRONG[case]
    change(monkeypatch)
    ended = proved(model, "--type", "f16")
    line = verdict_of(ended)
    assert ended.code == 1 and line.startswith("verdict: NOT what was trained: "), ended
    assert message in line and "Do not serve it" in line
    assert proof_of(model, "model-f16.gguf")["verdict"] == line


def change_json(folder: Path, name: str, **changes: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = 1.0
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def swap_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text = json.loads(path.read_text())
    vocab = text["model"]["vocab"]
    one, two = (next(piece for piece, id in vocab.items() if id == wanted) for wanted in (150, 151))
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(text))


EDITED = {
    "one weight": (change_weight, "tensor model.layers.1.mlp.up_proj.weight of"),
    "angles": (lambda m: change_json(m, "config.json", rope_theta=20000.0), "than those of the trained model"),
    "positions": (lambda m: change_json(m, "config.json", max_position_embeddings=99), "max_position_embeddings is 99"),
    "an end token more": (
        lambda m: change_json(m, "generation_config.json", eos_token_id=[2, 40]),
        "tokenizer.ggml.eom_token_id is not that of the run",
    ),
    "two tokens": (swap_tokens, "other token ids than in training"),
    "another prompt": (lambda m: (m / "prompt.json").write_text('{"type": "completion"}'), "where training has"),
}


@pytest.mark.parametrize("case", EDITED)
def test_folders_that_were_edited_after_the_merge_are_not_what_was_trained(case: str, model: Path):
    """Base and run decide what was trained, not the exported folder."""
    change, message = EDITED[case]
    change(model)
    ended = proved(model, "--type", "q8_0")
    assert ended.code == 1 and message in str(proof_of(model, "model-q8_0.gguf")["wrong"]), ended
    assert verdict_of(ended).startswith("verdict: NOT what was trained: ")


def test_missing_base_is_found_before_a_file_is_written(run: Path, model: Path):
    ended = proved(model, "--type", "q8_0", "--base_model", model / "nowhere")
    assert ended.code == 2 and "found nothing there" in ended.err and not (model / "model-q8_0.gguf").exists()


def change_adapter(folder: Path, factor: float) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: w * (factor if "lora_B" in name else 1) for name, w in load_file(path).items()}, path)
    trained_in_float32(folder)


@pytest.mark.parametrize("factor", [1.01, -1.0])
def test_merge_of_another_adapter_is_not_what_was_trained(factor: float, model: Path):
    """By its hash, and where merge.json has none or an invented one, by its values: also when answers hardly differ."""
    change_adapter(model.parent / "out", factor)
    record = json.loads((model / "merge.json").read_text())
    (model / "merge.json").write_text(json.dumps(record | {"adapter_sha256": proof.adapter_hash(model.parent / "out")}))
    ended = proved(model, "--type", "q8_0")
    assert ended.code == 1 and "is not that of base and adapter" in verdict_of(ended), ended
    asked = proof.Proof(model / "model-q8_0.gguf", "Q8_0", model, None, None, None)
    asked.record, asked.config = (
        record,
        type("Config", (), {"output_dir": model.parent / "out", "base_model": record["base_model"]}),
    )
    proof.trained_model(asked)
    assert asked.wrong[0].startswith(f"{model} was merged from another adapter than the one in {model.parent / 'out'}.")


def test_merge_on_the_original_base_is_not_called_what_was_trained(run: Path, model: Path):
    assert merged(run, model, "--base", "original", "--max_tokens", 0).code == 0
    ended = proved(model, "--type", "f32")
    assert ended.code == 0, ended.out + ended.err
    assert "is what --base original merged, which is not the model that was trained: " in verdict_of(ended)


def test_merge_onto_another_base_is_not_called_what_was_trained(run: Path, model: Path, monkeypatch):
    trained_on = lambda folder, good=proof.read_trained: good(folder)._replace(base="0" * 64)  # noqa: E731
    for module in (proof, merge_module, adapter_module):
        monkeypatch.setattr(module, "read_trained", trained_on)
    ended = merged(run, model, "--max_tokens", 0)
    assert ended.code == 2 and "--other_base" in ended.err
    ended = merged(run, model, "--max_tokens", 0, "--other_base", "true")
    assert ended.code == 0 and "is what --other_base asks for" in verdict_of(ended)
    ended = proved(model, "--type", "f32")
    assert ended.code == 0 and "is what --other_base merged, which is not the model that was" in verdict_of(ended), (
        ended
    )


# ------------------------------------------------------------------------------------------------ templates and tools

TOOLS_CHATML = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH = "{% for message in messages %}TURN{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TURN = "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
TEMPLATES = {  # what real llama.cpp makes of it: None: the same as training, else a part of what is said
    "plain": (CHATML, None),
    "generation": (
        WITH.replace(
            "TURN", TURN.replace("{{ message['content'] }}", "{% generation %}{{ message.content }}{% endgeneration %}")
        ),
        None,
    ),
    "trim and strip": (
        WITH.replace("TURN", TURN.replace("message['content']", "message['content'].strip() | trim")),
        None,
    ),
    "a date that llama.cpp gives": (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
        "<|im_start|>{{ date_string }}{{ datetime }}<|im_end|>\n" + CHATML,
        None,
    ),
    "percent": (
        WITH.replace("TURN", "{{ '<|im_start|>%s\n%s<|im_end|>\n' % (message['role'], message['content']) }}"),
        'Unknown operator "%"',
    ),
    "cycle": (WITH.replace("TURN", "{{ loop.cycle('', ' ') }}" + TURN), "cycle"),
    "raw": (WITH.replace("TURN", "{% raw %}{{}}{% endraw %}" + TURN), "Unknown statement: raw"),
    "get": (
        WITH.replace("TURN", "<|im_start|>{{ message.get('role') }}\n{{ message.get('content') }}<|im_end|>\n"),
        "of a system message",
    ),
    "format": (
        WITH.replace("TURN", "{{ '<|im_start|>{}\n'.format(message.role) }}{{ message.content }}<|im_end|>\n"),
        None,
    ),
    "tools": (TOOLS_CHATML, None),
    "tools, in another form": (TOOLS_CHATML.replace("tool | tojson }}", "tool.function | tojson(indent=2) }}"), None),
}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_engine_of_llama_cpp_is_asked(case: str, chat_model: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    template, refusal = TEMPLATES[case]
    model = shutil.copytree(chat_model, tmp_path / "model")
    (model / "prompt.json").write_text(PromptFormat(type="chat_template", chat_template=template).to_json())
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "f32")
    line = verdict_of(ended)
    if refusal is None:
        assert ended.code == 0 and line.startswith("verdict: not proven: ") and "llama.cpp (" not in line, line
    else:
        assert ended.code == 1 and refusal in line and line.startswith("verdict: NOT what was trained"), line
    found = json.loads((model / "model-f32.proof.json").read_text())
    if refusal is None:
        asked = 8 if "tools" in case else 5
        assert found["llama_cpp"]["conversations"] == asked
        assert ("a complete tool turn" in line) == (asked == 5)


def test_tools_that_llama_cpp_writes_in_another_way_are_found(chat_model, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    model = shutil.copytree(chat_model, tmp_path / "model")
    (model / "prompt.json").write_text(PromptFormat(type="chat_template", chat_template=TOOLS_CHATML).to_json())
    other = TOOLS_CHATML.replace("arguments | tojson", "arguments | tojson | tojson")
    change_metadata(monkeypatch, tokenizer__chat_template=("string", other))
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "f32")
    assert ended.code == 1 and "of a tool's result" in verdict_of(ended)


def test_what_trainings_template_refuses_is_listed(chat_model: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    model = shutil.copytree(chat_model, tmp_path / "model")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    (model / "prompt.json").write_text(PromptFormat(type="chat_template", chat_template=template).to_json())
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "f32")
    assert ended.code == 0, ended
    assert "a system message, several turns behind a system message, tools" in verdict_of(ended)
    assert "(training's own template refuses it)" in verdict_of(ended)


def test_conversations_of_the_run_are_asked(chat_model: Path, tmp_path: Path):
    """With their tools; the trained model is the run's, and its answers in llama.cpp are compared too."""
    pytest.importorskip("llama_cpp")
    call = {
        "type": "function",
        "function": {"name": "look_up", "arguments": '{"word": "caf\u00e9 <b>", "n": [1, null]}'},
    }
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "found"},
                {"role": "assistant", "content": f"answer {i}"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}},
                }
            ],
        }
        for i in range(3)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    dataset = {"path": str(data), "type": "chat_template"}
    trained_in_float32(save_random_adapter(chat_model, tmp_path / "out"))
    keys = {"datasets": [dataset], "test_datasets": [dataset], "chat_template_jinja": str(tmp_path / "chat.jinja")}
    (tmp_path / "chat.jinja").write_text(TOOLS_CHATML)
    config = write_run(tmp_path / "run.yml", chat_model, data, **keys)
    fmt = PromptFormat(type="chat_template", chat_template=TOOLS_CHATML)
    (tmp_path / "out" / "prompt.json").write_text(fmt.to_json())
    assert run_here(merge.main, config).code == 0
    ended = run_here(export_gguf.main, config, "--prove", "--type", "bf16")
    assert ended.code == 0, ended.out + ended.err
    found = proof_of(tmp_path / "out" / "merged", "model-bf16.gguf")
    assert found["llama_cpp"]["conversations"] == 8 + 3
    assert [gap for gap in found["not_asked"] if "has no fingerprint" not in gap] == []
    assert verdict_of(ended).startswith(
        "verdict: model-bf16.gguf is what was trained: base and adapter, merged, as bf16, "
    )


# ------------------------------------------------------------------------------------------------ the witness


def stub(folder: Path, text: str) -> Path:
    """A package xllamacpp of another kind, in front of the real one."""
    (folder / "xllamacpp").mkdir(parents=True)
    (folder / "xllamacpp" / "__init__.py").write_text(text)
    return folder


FAILS = {
    "cannot be imported": "raise ImportError('libstdc++.so.6: version not found')",
    "has other names": "class CommonParams: pass",
    "is killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "needs other instructions": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "has another server": "from importlib import import_module\nclass Any:\n"
    "    def __getattr__(self, name): return Any()\n    def __setattr__(self, *_): pass\n"
    "def CommonParams(): return Any()\nggml_type = llama_flash_attn_type = llama_pooling_type = Any()\n"
    "def Server(params): raise TypeError('takes 2 arguments')",
    "has no memory": "import sys; sys.exit('std::bad_alloc')",
}


@pytest.mark.parametrize("case", FAILS)
def test_witness_that_does_not_start_is_not_the_files_fault(case, chat_model, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setenv("PYTHONPATH", str(stub(tmp_path / "stub", FAILS[case])))
    model = shutil.copytree(chat_model, tmp_path / "model")
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "f32")
    assert ended.code == 0 and "not asked: " in verdict_of(ended) and "llama.cpp (" in verdict_of(ended), ended
    assert "NOT" not in verdict_of(ended) and "llama.cpp was not asked" in ended.out
    assert json.loads((model / "model-f32.proof.json").read_text())["wrong"] == []


def test_missing_witness_is_listed(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model = shutil.copytree(chat_model, tmp_path / "model")
    ended = run_here(export_gguf.main, "--model", model, "--prove", "--type", "f32")
    assert ended.code == 0 and "llama.cpp (the package xllamacpp is not installed)" in verdict_of(ended)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-5000],
    "no model at all": lambda data: b"GGUF" + bytes(100),
    "a tensor of another name": lambda data: data.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"),
    "tokens without merges": lambda data: data.replace(b"tokenizer.ggml.merges", b"tokenizer.ggml.mergez"),
    "another architecture": lambda data: data.replace(
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
        b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llamx",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_llama_cpp_refuses_are_at_fault(case: str, model: Path):
    pytest.importorskip("llama_cpp")
    gguf_model.export_gguf(model, model / "good.gguf", "F32")
    good = (model / "good.gguf").read_bytes()
    broken = BROKEN[case](good)
    assert broken != good
    (model / "broken.gguf").write_bytes(broken)
    with pytest.raises(llama_cpp.Refused) as error:
        llama_cpp.Server(model / "broken.gguf")
    assert "exit code" not in str(error.value) and "\n" not in str(error.value)


def test_process_that_is_killed_while_it_answers_is_not_the_files_fault(smollm2_path: Path):
    pytest.importorskip("llama_cpp")
    with llama_cpp.Server(smollm2_path) as llama:
        assert llama.tokenize("a")
        llama.process.kill()
        with pytest.raises(llama_cpp.NotAsked, match="SIGKILL"):
            llama.tokenize("a")


def test_command_answers_alone_on_stdout(smollm2_path: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    command = ("-m", "nanoqlora.export.llama_cpp")
    ended = run_process(*command, smollm2_path, "Who are you?", "--max_tokens", 10)
    with llama_cpp.Server(smollm2_path) as llama:
        expected = llama.complete(llama.prompt([{"role": "user", "content": "Who are you?"}]), 10)["content"]
    assert ended.code == 0 and ended.out.strip() == expected.strip() != "", ended
    ended = run_process(*command, tmp_path / "none.gguf", "?")
    assert ended.code == 2 and ended.err.startswith("error: ") and "no such file" in ended.err and not ended.out
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    ended = run_process(*command, tmp_path / "broken.gguf", "?")
    assert ended.code == 2 and "llama.cpp refuses it" in ended.err and len(ended.err.splitlines()) == 1, ended
