"""export_gguf.py, judged by llama.cpp: it loads the file, and agrees with transformers on logits and on tokens."""

import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chats import llama3_tokenizer
from go_text import go_write, needs_go
from modelfiles import parse, read_modelfile
from names_of_gguf import hf_name
from paths import ROOT
from safetensors.torch import load_file, save_file
from small_runs import write_run
from tiny import save_random_llama

import export_gguf
from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.data.row_format import Frame
from nanoqlora.export import gguf_model
from nanoqlora.export.llama_cpp import Server
from nanoqlora.gguf.config import hf_config
from nanoqlora.gguf.file_types import FILE_TYPES, tensor_type
from nanoqlora.gguf.ggml_blocks import FORMATS, dequantize, quantize, quantize_checked
from nanoqlora.gguf.modelfile import NO_GUESS
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.model import ModelConfig
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from nanoqlora.weights.checkpoint import open_weights

LlamaCpp = pytest.importorskip("llama_cpp").LlamaCpp

VOCAB = 49152  # of the real SmolLM2, whose tokenizer the models here have
TOKENS = torch.randint(0, VOCAB, (1, 50), generator=torch.Generator().manual_seed(0))
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so short that it matters within 50 tokens
}
MODELS: dict[str, dict[str, Any]] = {
    "llama3": {"rope": LLAMA3_ROPE, "hidden_size": 64, "head_dim": 64},  # untied; wider heads than hidden / heads
    "linear": {"rope": {"rope_type": "linear", "factor": 4.0}, "tie_word_embeddings": True, "hidden_size": 64},
    "llama2": {"hidden_size": 64, "num_key_value_heads": 4},  # every head has its own keys; plain RoPE
    "llama3.2": {"rope": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "hidden_size": 64},
}
CHAT, CHATML = PromptFormat(type="chat_template"), CHAT_TEMPLATES["chatml"]
QUESTION = [{"role": "user", "content": "Who are you?"}]
CHATS = [
    QUESTION,
    [{"role": "system", "content": "Be brief.\n\nBe kind."}, *QUESTION],
    [*QUESTION, {"role": "assistant", "content": "A pirate."}, {"role": "user", "content": "12 \u00fc\U0001f642?"}],
]


@pytest.fixture(scope="module")
def tok(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def models(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, transformers.LlamaForCausalLM]:
    """Random models in folders such as merge.py leaves behind; `model.folder` is where."""
    found = {}
    for name, changes in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        model = save_random_llama(folder, vocab_size=VOCAB, num_hidden_layers=2, **changes)
        with torch.no_grad():  # look sharply at few tokens: an attention that averages over all would hide mistakes
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 5
                layer.self_attn.k_proj.weight *= 5
            model.model.embed_tokens.weight *= 5
        model.save_pretrained(folder)
        save_tokenizer(tok, folder)
        (folder / "prompt.json").write_text(CHAT.to_json())
        model.folder = folder
        found[name] = model
    return found


@pytest.fixture
def known_tokenizer(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most models here have the same tokenizer, and reading it takes most of an export's time."""
    monkeypatch.setattr(gguf_model, "load_tokenizer", lambda path: tok)


@pytest.fixture
def folder(models: dict[str, transformers.LlamaForCausalLM], tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return shutil.copytree(models["llama3"].folder, tmp_path / "model")


def reference_logits(model: transformers.LlamaForCausalLM) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits[0].numpy()


def llama_cpp_logits(path: Path) -> np.ndarray:
    with LlamaCpp(path, n_ctx=64) as llama:
        return llama.logits(TOKENS[0].tolist())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): w for name, w in changes.items()}
    save_file({name: w for name, w in tensors.items() if w is not None}, path)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("name", MODELS)
def test_f32_logits_equal_transformers(name: str, models: dict, tmp_path: Path):
    """Both compute in float32 and differ in the order of sums. Measured: 4e-5 on logits of deviation 0.8."""
    gguf_model.export_gguf(models[name].folder, tmp_path / "model.gguf", "F32")
    expected = reference_logits(models[name])
    assert expected.std() > 0.3
    error = np.abs(llama_cpp_logits(tmp_path / "model.gguf") - expected).max()
    assert error < 1e-4


def identity(w: torch.Tensor, num_heads: int) -> torch.Tensor:
    return w


MISTAKES = {
    "rows not permuted": ("permute_rows", identity),
    "permuted the wrong way": (
        "permute_rows",
        lambda w, n: w.unflatten(0, (n, -1, 2)).transpose(1, 2).reshape(w.shape),
    ),
    "k permuted by query heads": (
        "heads_to_permute",
        lambda name, heads, kv: heads if "_q" in name or "_k" in name else 0,
    ),
    "v permuted as well": ("heads_to_permute", lambda name, heads, kv: {"q": heads, "k": kv, "v": kv}.get(name[-8])),
    "no rope_freqs": ("rope_divisors", lambda config: torch.ones(config.head_dim // 2)),
    "theta left out": ("model_metadata", lambda *args: {**GOOD(*args), "llama.rope.freq_base": ("f32", 10000.0)}),
    "wrong epsilon": (
        "model_metadata",
        lambda *args: {**GOOD(*args), "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-2)},
    ),
}
GOOD = gguf_model.model_metadata


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_would_notice(mistake: str, models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All of these load without a word, so the comparison above has to see them: by far, not just."""
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(gguf_model, name, wrong)
    gguf_model.export_gguf(models["llama3"].folder, tmp_path / "model.gguf", "F32")
    error = np.abs(llama_cpp_logits(tmp_path / "model.gguf") - reference_logits(models["llama3"])).max()
    assert error > 100 * 1e-4, f"only {error}"


@pytest.mark.usefixtures("known_tokenizer")
def test_rows_of_whole_big_blocks(tok: Tokenizer, tmp_path: Path):
    """A model whose rows are multiples of 256 has K types throughout; llama.cpp computes with what is in the file."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    save_random_llama(tmp_path, vocab_size=VOCAB, **sizes)
    save_tokenizer(tok, tmp_path)
    for file_type, bound in {"Q4_K_M": 0.1, "Q5_K_S": 0.1, "Q6_K": 0.1}.items():
        gguf_model.export_gguf(tmp_path, tmp_path / "model.gguf", file_type)
        gguf = read_gguf(tmp_path / "model.gguf")
        kinds = {info.ggml_type for info in gguf.tensors.values()}
        assert kinds == {"F32", "Q6_K", file_type[:4]}
        rounded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
        rounded.load_state_dict({hf_name(name): gguf.load_hf(hf_name(name)) for name in gguf.tensors})
        expected = reference_logits(rounded.eval())
        assert np.abs(llama_cpp_logits(tmp_path / "model.gguf") - expected).mean() < bound * expected.std()


@pytest.mark.usefixtures("known_tokenizer")
def test_no_space_is_noticed_before(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(UserError, match=r": takes \d+.\d\d MB and its disk has 1.00 MB free"):
        gguf_model.export_gguf(folder, tmp_path / "model.gguf", "Q8_0")
    assert not (tmp_path / "model.gguf").exists() and not (tmp_path / "Modelfile").exists()


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_weights_of_every_type(file_type: str, models: dict, tmp_path: Path):
    """In the file is each weight, rounded once, and llama.cpp computes with what is in the file."""
    path = tmp_path / "model.gguf"
    gguf_model.export_gguf(models["linear"].folder, path, file_type)
    gguf = read_gguf(path)
    state = {name: w for name, w in models["linear"].state_dict().items() if name != "lm_head.weight"}
    assert {hf_name(name) for name in gguf.tensors} == state.keys()
    stored = {}
    for name, info in gguf.tensors.items():
        w = state[hf_name(name)]
        assert info.ggml_type == tensor_type(name, info.shape, file_type, ModelConfig.from_hf(hf_config(gguf)))
        stored[hf_name(name)] = gguf.load_hf(hf_name(name))
        assert torch.equal(stored[hf_name(name)], dequantize(quantize(w, info.ggml_type), info.ggml_type, w.shape))
    rounded = transformers.LlamaForCausalLM(models["linear"].config).eval()
    rounded.load_state_dict(stored | {"lm_head.weight": stored["model.embed_tokens.weight"]})
    expected = reference_logits(rounded)
    # llama.cpp rounds activations as well: to the type of the weights, or to 8 bits for the quantized types. In units
    # of the logits' deviation the mean error was 1.5e-6, 1.3e-3, 1.2e-2 and 0.037 to 0.047; the bounds are twice that.
    bound = {"F32": 3e-6, "F16": 3e-3, "BF16": 2.5e-2}.get(file_type, 0.1)
    assert np.abs(llama_cpp_logits(path) - expected).mean() < bound * expected.std()


def test_what_is_exported_opens_as_the_same_model(models: dict, tmp_path: Path):
    """The file is a model like any other: our own reader gives back config, weights and tokenizer."""
    for name, model in models.items():
        gguf_model.export_gguf(model.folder, tmp_path / "model.gguf", "F32")
        weights, source = open_weights(tmp_path / "model.gguf"), open_weights(model.folder)
        assert ModelConfig.from_hf(weights.config) == replace(
            ModelConfig.from_hf(source.config), rope_scaling=ModelConfig.from_hf(weights.config).rope_scaling
        )
        assert ModelConfig.from_hf(weights.config).rope_scaling.items() <= MODELS[name].get("rope", {}).items()
        assert set(weights.names()) == set(source.names())
        assert all(torch.equal(weights.load(name), source.load(name)) for name in source.names())
        assert load_tokenizer(tmp_path / "model.gguf") == load_tokenizer(model.folder)


@pytest.mark.usefixtures("known_tokenizer")
def test_a_gguf_file_can_be_exported_too(models: dict, tmp_path: Path):
    gguf_model.export_gguf(models["llama3"].folder, tmp_path / "model.gguf", "Q8_0")
    gguf_model.export_gguf(tmp_path / "model.gguf", tmp_path / "again.gguf", "Q8_0")
    first, again = read_gguf(tmp_path / "model.gguf"), read_gguf(tmp_path / "again.gguf")
    assert hf_config(first) == hf_config(again) and first.tensors.keys() == again.tensors.keys()


# ------------------------------------------------------------------------------------------------ metadata


def test_metadata_as_the_gguf_package_reads_it(models: dict, tok: Tokenizer, tmp_path: Path):
    """Names, values and types: llama.cpp takes no u64 for a u32."""
    package = pytest.importorskip("gguf")
    gguf_model.export_gguf(models["linear"].folder, tmp_path / "model.gguf", "Q8_0")
    fields = package.GGUFReader(tmp_path / "model.gguf").fields
    expected = {
        "general.architecture": ("STRING", "llama"),
        "general.type": ("STRING", "model"),
        "general.name": ("STRING", models["linear"].folder.name),
        "general.file_type": ("UINT32", 7),
        "general.quantization_version": ("UINT32", 2),
        "llama.block_count": ("UINT32", 2),
        "llama.context_length": ("UINT32", 512),
        "llama.embedding_length": ("UINT32", 64),
        "llama.feed_forward_length": ("UINT32", 192),
        "llama.vocab_size": ("UINT32", VOCAB),
        "llama.attention.head_count": ("UINT32", 4),
        "llama.attention.head_count_kv": ("UINT32", 2),
        "llama.attention.key_length": ("UINT32", 32),
        "llama.attention.value_length": ("UINT32", 32),
        "llama.attention.layer_norm_rms_epsilon": ("FLOAT32", np.float32(1e-5)),
        "llama.rope.dimension_count": ("UINT32", 32),
        "llama.rope.freq_base": ("FLOAT32", 10000.0),
        "llama.rope.scaling.type": ("STRING", "linear"),
        "llama.rope.scaling.factor": ("FLOAT32", 4.0),
        "tokenizer.ggml.model": ("STRING", "gpt2"),
        "tokenizer.ggml.pre": ("STRING", "smollm"),
        "tokenizer.ggml.tokens": ("ARRAY STRING", tok.vocab),
        "tokenizer.ggml.token_type": ("ARRAY INT32", tok.kinds),
        "tokenizer.ggml.merges": ("ARRAY STRING", tok.merges),
        "tokenizer.ggml.bos_token_id": ("UINT32", 1),
        "tokenizer.ggml.eos_token_id": ("UINT32", 2),
        "tokenizer.ggml.eot_token_id": ("UINT32", 2),
        "tokenizer.ggml.padding_token_id": ("UINT32", 2),
        "tokenizer.ggml.unknown_token_id": ("UINT32", 0),
        "tokenizer.ggml.add_bos_token": ("BOOL", False),
        "tokenizer.ggml.add_eos_token": ("BOOL", False),
        "tokenizer.ggml.add_space_prefix": ("BOOL", False),
        "tokenizer.chat_template": ("STRING", tok.chat_template),
    }
    found = {
        key: (" ".join(kind.name for kind in field.types), field.contents())
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }
    assert found == expected


# ------------------------------------------------------------------------------------------------ tokens and prompts

HARD_TEXTS = [
    "Hello world",
    "a  5  b\n\n  c\t\r\n d",
    " leading and trailing ",
    "It's we'll they'VE I'm",
    "12345 3.14 \u0663\u0664 \u2167",
    "na\u00efve caf\u00e9 \u00dcber \u4f60\u597d \u3053\u3093 \U0001f642\U0001f469\u200d\U0001f680",
    "x = {'a': [1, 2]}  # <tag> &amp; \\n",
    "<|im_start|>user\nhi<|im_end|><|endoftext|> <|im_ end|>",
    "\u00a0\u3000\u2028 odd spaces",
    "",
]


# The author's own text: its markers are special tokens. The second begins with the BOS that the tokenizer adds.
MARKED = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
MARKED_LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>Answer: "
MARKED_SYSTEM = "{% set messages = [{'role': 'system', 'content': 'Be <file_sep>brief.'}] + messages %}"
MARKED_SYSTEM += CHAT_TEMPLATES["chatml"]
PROMPTS = {  # tokenizer, format, end of an answer
    "own template": (lambda tok: tok, CHAT, 2),
    "chatml": (lambda tok: tok, replace(CHAT, chat_template=CHAT_TEMPLATES["chatml"]), 2),
    "alpaca": (lambda tok: tok, PromptFormat(type="alpaca"), 2),
    "completion": (lambda tok: tok, PromptFormat(type="completion"), 2),
    "BOS in plain text only": (lambda tok: replace(tok, bos_id=0, add_bos=True), CHAT, 2),
    "llama3": (llama3_tokenizer, CHAT, 2),
    "llama3 alpaca": (llama3_tokenizer, PromptFormat(type="alpaca"), 0),
    "markers in a frame": (lambda tok: tok, PromptFormat(type="custom", frame=Frame(format=MARKED)), 2),
    "BOS in a frame": (llama3_tokenizer, PromptFormat(type="custom", frame=Frame(format=MARKED_LLAMA3)), 0),
    "a frame behind BOS": (llama3_tokenizer, PromptFormat(type="custom", frame=Frame(format=MARKED_LLAMA3[17:])), 0),
    "markers in a system text": (lambda tok: tok, replace(CHAT, chat_template=MARKED_SYSTEM), 2),
}


@pytest.mark.parametrize("by", ["llama.cpp", pytest.param("Ollama", marks=needs_go)])
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_are_those_of_training(case: str, by: str, folder: Path, tok: Tokenizer, tmp_path: Path):
    """llama.cpp with the Jinja, and Ollama with the Modelfile, see the very tokens that the model was trained on."""
    make, fmt, end = PROMPTS[case]
    tok = make(tok)
    save_tokenizer(tok, folder)
    (folder / "prompt.json").write_text(fmt.to_json())
    gguf_model.export_gguf(folder, tmp_path / "model.gguf", "F16")
    recipe = read_modelfile(tmp_path / "Modelfile")
    assert recipe["FROM"] == ["./model.gguf"]
    folders = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]  # of transformers: 2
    assert recipe["PARAMETER stop"] == [tok.vocab[id] for id in dict.fromkeys([end, tok.eos_id, folders])]
    with LlamaCpp(tmp_path / "model.gguf", vocab_only=True) as llama:
        assert llama.is_eog(end) and llama.meta()["tokenizer.ggml.eos_token_id"] == str(end)
    with Server(tmp_path / "model.gguf") as llama:
        for messages in CHATS:
            expected = fmt.encode_prompt(tok, messages)
            if by == "llama.cpp":
                if fmt.type != "chat_template" and messages[0]["role"] == "system":
                    continue  # these formats have none, and llama.cpp joins it to the question
                text = llama.prompt(messages)
            else:
                default = [{"role": "system", "content": text} for text in recipe.get("SYSTEM", [])]
                given = default + messages if messages[0]["role"] != "system" else messages
                (text,) = go_write(recipe["TEMPLATE"][0], [given])
            assert llama.tokenize(text, add_special=True, parse_special=True) == expected
            if fmt.type not in ("completion", "chat_template") and len(messages) == 1:  # and the answer follows them
                ids, mask = fmt.encode_row(tok, {"instruction": messages[0]["content"], "output": "x"})
                assert ids[: mask.index(True)] == expected


def test_llama_cpp_tokenizes_as_we_do(models: dict, tok: Tokenizer, tmp_path: Path):
    gguf_model.export_gguf(models["linear"].folder, tmp_path / "model.gguf", "Q8_0")
    with LlamaCpp(tmp_path / "model.gguf", vocab_only=True) as llama:
        for text in HARD_TEXTS:
            for special in (False, True):
                assert llama.tokenize(text, parse_special=special) == tok.encode(text, special=special), text
            assert llama.detokenize(tok.encode(text)) == text
        assert llama.tokenize("hi", add_special=True) == tok.encode("hi")  # SmolLM2 puts nothing in front


@pytest.mark.usefixtures("known_tokenizer")
def test_padded_embedding(folder: Path, tok: Tokenizer, tmp_path: Path):
    """llama.cpp wants a token for every row, also for those that only fill up a round number."""
    w = load_file(folder / "model.safetensors")["lm_head.weight"]
    more = torch.cat([w, torch.zeros(64, w.shape[1])])
    change_tensors(folder, lm_head__weight=more, model__embed_tokens__weight=more.clone())
    change_config(folder, vocab_size=VOCAB + 64)
    gguf_model.export_gguf(folder, tmp_path / "model.gguf", "F16")
    metadata = read_gguf(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][VOCAB:] == [f"[PAD{id}]" for id in range(VOCAB, VOCAB + 64)]
    assert metadata["tokenizer.ggml.token_type"][VOCAB:] == [5] * 64
    assert llama_cpp_logits(tmp_path / "model.gguf").shape == (50, VOCAB + 64)


@pytest.mark.usefixtures("known_tokenizer")
def test_a_template_that_go_cannot_write(folder: Path, tmp_path: Path, capsys):
    """The Modelfile leaves it to Ollama to run the Jinja, which stands in the file so that Ollama guesses no other."""
    fmt = replace(CHAT, chat_template=CHAT_TEMPLATES["chatml"].replace("<|im_end|>", "<|im_end|>{{ loop.index }}"))
    (folder / "prompt.json").write_text(fmt.to_json())
    gguf_model.export_gguf(folder, tmp_path / "model.gguf", "F16")
    said = capsys.readouterr().out
    assert "no TEMPLATE, so it needs Ollama 0.30 or newer, which runs the Jinja in the file" in said
    assert "depends on more than the message before" in said
    stops = ("stop", "<|im_end|>")
    assert parse((tmp_path / "Modelfile").read_text()) == [("from", "./model.gguf"), stops]
    jinja = read_gguf(tmp_path / "model.gguf").metadata["tokenizer.chat_template"]
    assert jinja.endswith(fmt.chat_template) and NO_GUESS in jinja


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("spelling", ["\ud83d", "{{ '\\ud83d' }}"])
def test_half_of_a_surrogate_pair_in_a_template(spelling: str, folder: Path, tmp_path: Path):
    """In the template itself, or only in what it writes."""
    (folder / "prompt.json").write_text(json.dumps({"type": "chat_template", "chat_template": spelling + CHATML}))
    with pytest.raises(UserError, match="half of a surrogate pair"):
        gguf_model.export_gguf(folder, tmp_path / "new" / "model.gguf", "F16")
    assert not (tmp_path / "new").exists()


def test_what_a_model_is_called():
    assert gguf_model.name_of("nowhere/Llama-3.2-1B") == "Llama-3.2-1B"
    assert gguf_model.name_of(Path("runs/v1.5/merged")) == "v1.5"
    assert gguf_model.name_of("a/SmolLM2.Q4_1.gguf") == "SmolLM2.Q4_1"
    assert gguf_model.name_of("a/\udcff") == "?"  # a name that is not UTF-8


# ------------------------------------------------------------------------------------------------ what can be wrong


@pytest.mark.usefixtures("known_tokenizer")
def test_tied_head_that_is_in_the_files_too(models: dict, tmp_path: Path):
    """The same values again are left out; other values are a head of its own, whatever config.json says."""
    folder = shutil.copytree(models["linear"].folder, tmp_path / "model")
    w = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=w.clone())
    gguf_model.export_gguf(folder, tmp_path / "model.gguf", "F16")
    assert "output.weight" not in read_gguf(tmp_path / "model.gguf").tensors
    change_tensors(folder, lm_head__weight=2 * w)
    gguf_model.export_gguf(folder, tmp_path / "model.gguf", "F32")
    assert torch.equal(read_gguf(tmp_path / "model.gguf").load("output.weight"), 2 * w)


HUGE = torch.cat([torch.zeros(191, 64), torch.full((1, 64), 1e6)])
FEW_ROWS = {f"{name}__weight": torch.zeros(1000, 64) for name in ("model__embed_tokens", "lm_head")}
WRONG = {
    "NaN": ({"model__norm__weight": torch.full((64,), torch.nan)}, {}, "Q8_0", "model.norm.weight holds NaN"),
    "too large": ({"lm_head__weight": torch.full((VOCAB, 64), 7e4)}, {}, "F16", "lm_head.weight holds.*export as bf16"),
    "a scale": ({"model__layers__0__mlp__up_proj__weight": HUGE}, {}, "Q4_0", "0.mlp.up_proj.weight holds.*in Q4_0"),
    "missing": ({"lm_head__weight": None}, {}, "Q8_0", "lm_head.weight of it is missing"),
    "more": (
        {"model__layers__0__mlp__up_proj__bias": torch.zeros(192)},
        {},
        "Q8_0",
        "up_proj.bias has no place in the model",
    ),
    "layers": ({}, {"num_hidden_layers": 1}, "Q8_0", r"model.layers.1.*has no place in the model"),
    "shape": ({}, {"intermediate_size": 96}, "Q8_0", r"has shape \(192, 64\) and should have \(96, 64\)"),
    "vocabulary": (FEW_ROWS, {"vocab_size": 1000}, "Q8_0", "49152 tokens and the embedding 1000 rows"),
    "activation": ({}, {"hidden_act": "gelu"}, "Q8_0", "hidden_act is .gelu."),
}


@pytest.mark.parametrize("ggml_type", FORMATS)
def test_what_a_type_cannot_hold_is_refused(ggml_type: str, rng: torch.Generator):
    """The largest value that is read back finite is written, and one above is refused by the tensor's name."""
    for width, sign, exponent in itertools.product((1, 192), (1, -1), (0, *range(13, 33), 40, 64, 126)):
        w = torch.randn(3, 256, generator=rng)
        w[2, 64 : 64 + width] = sign * 1.5 * 2.0**exponent
        back = dequantize(quantize(w, ggml_type), ggml_type, tuple(w.shape))
        is_right = torch.isfinite(back).all() and (back[2, 64] - w[2, 64]).abs() < w[2, 64].abs()
        if is_right:
            assert quantize_checked(w, ggml_type, "x").shape[0] == 3, exponent
        else:
            with pytest.raises(UserError, match=f"model: tensor y holds values up to .* infinite in {ggml_type}"):
                quantize_checked(w, ggml_type, "model: tensor y")
    assert is_right == (ggml_type in ("F32", "BF16"))


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_models_are_refused_and_nothing_changes(case: str, folder: Path, tmp_path: Path):
    tensors, config, file_type, message = WRONG[case]
    change_tensors(folder, **tensors)
    change_config(folder, **config)
    for name in ("model.gguf", "Modelfile"):
        (tmp_path / name).write_text("old")
    with pytest.raises(UserError, match=message):
        gguf_model.export_gguf(folder, tmp_path / "model.gguf", file_type)
    assert [(tmp_path / name).read_text() for name in ("model.gguf", "Modelfile")] == ["old", "old"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("known_tokenizer")
def test_a_file_of_the_users_own_is_kept(folder: Path, smollm2_path: Path, tmp_path: Path, capsys):
    """Also one of another program's, while ours are replaced, and a Modelfile under a name that would be ours."""
    out, kept = tmp_path / "model.gguf", tmp_path / "model.gguf.old"
    out.write_text("my notes")
    gguf_model.export_gguf(folder, out, "F16")
    assert f"is kept as {kept}" in capsys.readouterr().out and kept.read_text() == "my notes"
    gguf_model.export_gguf(folder, out, "Q8_0")
    assert "kept" not in capsys.readouterr().out and read_gguf(out).metadata["general.file_type"] == 7
    shutil.copy(smollm2_path, out)
    gguf_model.export_gguf(folder, out, "Q8_0")
    assert (tmp_path / "model.gguf.old1").read_bytes() == smollm2_path.read_bytes()
    with pytest.raises(UserError, match="is a folder"):
        gguf_model.export_gguf(folder, tmp_path, "F16")
    (tmp_path / "Modelfile-x").write_text("FROM llama3\n")
    with pytest.raises(UserError, match="Modelfile-x: is not one that export_gguf.py wrote.*Rename it"):
        gguf_model.export_gguf(folder, tmp_path / "x.gguf", "F16")
    assert not (tmp_path / "x.gguf").exists() and (tmp_path / "Modelfile-x").read_text() == "FROM llama3\n"


# ------------------------------------------------------------------------------------------------ the command


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["export_gguf.py", *words])
    try:
        run_command(export_gguf.main)
    except SystemExit as stop:
        return stop.code
    return 0


def test_command_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "--model", str(folder)) == 0
    assert read_gguf(folder / "model-q8_0.gguf").metadata["general.file_type"] == 7
    assert read_modelfile(folder / "Modelfile")["FROM"] == ["./model-q8_0.gguf"]
    assert run(monkeypatch, "--model", str(folder), "--out=some/where/x.gguf", "--type", "BF16") == 0
    assert read_gguf(tmp_path / "some/where/x.gguf").metadata["general.file_type"] == 32
    assert (tmp_path / "some/where/Modelfile").exists()

    source = ROOT / "train.yml"
    shutil.copytree(folder, tmp_path / "run" / "merged")
    capsys.readouterr()
    assert run(monkeypatch, str(source), "--output_dir", "run", "--type", "f16") == 0
    out = capsys.readouterr().out
    metadata = read_gguf(tmp_path / "run" / "model-f16.gguf").metadata
    assert metadata["general.file_type"] == 1 and metadata["general.name"] == "run"
    assert "run/model-f16.gguf" in out and "run/Modelfile" in out


def test_a_run_that_is_not_merged_names_the_command_for_its_own_file(tmp_path, monkeypatch, capsys):
    file = write_run(tmp_path / "my run.yml", tmp_path / "model", tmp_path / "a.jsonl")
    assert run(monkeypatch, str(file)) == 2
    assert f"merge.py {shlex.quote(str(file))} first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "model", "--type", "q3_x"], r'--type is "q3_x", but it takes f32 \| f16 \| bf16 \| q8_0'),
        (["--model", "nowhere"], "nowhere: no such folder.*merge.py"),
        (["--model", "."], "config.json: no such file"),
        (["--model", "model", "--typo", "f16"], "typo"),
    ],
)
def test_wrong_commands_end_with_2(words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
