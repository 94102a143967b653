"""What a folder means is what transformers makes of it, or the folder is refused.

Each test generates folders from every combination of the ways to say one thing, and asks transformers. Where it would
drop something that a file says, nothing is read here: the error names the keys or files that contradict each other.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece_models
import small_runs
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_gguf import write_small
from tiny import CONFIG, save_random_llama
from transformers.modeling_outputs import CausalLMOutputWithPast

import nanoqlora as nq
from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export.llama_cpp import Server
from nanoqlora.export.merge import merged_config
from nanoqlora.export.tokenizer_metadata import tokenizer_metadata
from nanoqlora.model import ModelConfig, rope_frequencies
from nanoqlora.tokenizer.tokenizer import save_tokenizer
from nanoqlora.weights.checkpoint import open_weights

TOKENS = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(1))
PLAIN = {key: value for key, value in CONFIG.items() if key not in ("rope_theta", "tie_word_embeddings")}
PLAIN |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}


def their_logits(folder: Path) -> torch.Tensor | None:
    """transformers' logits, None if it would make up a tensor."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    if found["missing_keys"] or found["unexpected_keys"]:
        return None
    with torch.no_grad():
        output: CausalLMOutputWithPast = model.eval()(TOKENS)
    return output.logits


def our_logits(folder: Path) -> torch.Tensor | None:
    """Ours, None if the folder is refused."""
    try:
        model = nq.Llama.from_pretrained(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return None
    with torch.no_grad():
        return model(TOKENS)


def assert_same(theirs: torch.Tensor | None, ours: torch.Tensor | None, case: Any) -> None:
    assert (theirs is None) == (ours is None), case
    assert theirs is None or theirs.std() > 0.03 and (ours - theirs).abs().max() < 1e-4, case


def test_added_tokens_have_the_ids_that_the_tokenizers_package_gives(tmp_path):
    """It counts for itself, whatever the file says: another number in the file is refused."""
    for number, id in enumerate((300, 301, 305, 299, 3)):
        folder = small_runs.save_tiny_model(tmp_path / str(number))
        about = json.loads((folder / "tokenizer.json").read_text())
        about["added_tokens"].append(about["added_tokens"][0] | {"id": id, "content": "<|new|>"})
        write_json(folder / "tokenizer.json", about)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|new|>")
        if theirs == id:
            assert nq.load_tokenizer(folder).encode("<|new|>", special=True) == [id]
        else:
            with pytest.raises(UserError, match=f"is {id}, and Hugging Face's tokenizers give it {theirs}"):
                nq.load_tokenizer(folder)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """The tensors of two models of one shape."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save_random_llama(folder / str(seed), seed, num_hidden_layers=1)
    return [load_file(folder / str(seed) / "model.safetensors") for seed in (0, 1)]


def save_shards(state: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Two files and their index."""
    names = sorted(state)
    files = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in files.items() for name in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return list(files)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("form", ["single", "shards"])
def test_the_head_is_the_one_that_transformers_takes(tmp_path, states, form):
    """Tied or not in config.json, with or without a head in the file, equal to the embedding or not, each alone."""
    both = 0
    for tied, head, has_embedding in itertools.product((None, True, False), ("no", "equal", "other"), (True, False)):
        case = (tied, head, has_embedding)
        folder = tmp_path / "-".join(map(str, case))
        folder.mkdir()
        state = dict(states[0])
        state[HEAD] = state[EMBEDDING].clone() if head == "equal" else state[HEAD]
        if head == "no":
            del state[HEAD]
        if not has_embedding:
            del state[EMBEDDING]
        write_json(folder / "config.json", PLAIN if tied is None else PLAIN | {"tie_word_embeddings": tied})
        if form == "single":
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            save_shards(state, folder)
        theirs = their_logits(folder)
        assert_same(theirs, our_logits(folder), case)
        if theirs is None:
            continue
        both += 1
        # One rule for everybody who opens the folder: what is written from it is the same model again.
        weights = open_weights(folder)
        is_tied = weights.config["tie_word_embeddings"] if tied else False
        assert (HEAD in weights.names()) != is_tied, case
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        save_file({name: weights.load(name) for name in weights.names()}, out / "model.safetensors", {"format": "pt"})
        write_json(out / "config.json", merged_config(weights.config, torch.float32, {}))
        assert_same(theirs, their_logits(out), case)
    assert both == 9


def test_the_files_are_those_that_transformers_reads(tmp_path, states, capsys):
    """Every combination of one file, shards, shards of which one is missing, and files of other names beside them."""
    state, other = states
    read = refused = 0
    layouts = itertools.product(("", "one"), ("", "shards", "stale", "lying", "of one"), ("", "old", "mistral", "bin"))
    for single, index, beside in layouts:
        folder = tmp_path / f"{single}-{index}-{beside}"
        folder.mkdir()
        write_json(folder / "config.json", PLAIN | {"tie_word_embeddings": False})
        files = save_shards(other if single else state, folder) if index else []
        if index == "stale":
            (folder / files[1]).unlink()
        if index == "lying":
            part = load_file(folder / files[0])
            save_file(part, folder / files[1], metadata={"format": "pt"})
        if index == "of one":
            for file in files:
                (folder / file).unlink()
            weight_map = dict.fromkeys(state, "model.safetensors")
            write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
        if single:
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        for kind, name in {"old": "model_old.safetensors", "mistral": "consolidated.safetensors"}.items():
            if beside == kind:
                names = {key: w for key, w in other.items()} if kind == "old" else {"output.weight": other[HEAD]}
                save_file(names, folder / name, metadata={"format": "pt"})
        if beside == "bin":
            torch.save(other, folder / "pytorch_model.bin")
        # transformers would take the one file and drop what the index says.
        contradicts = index not in ("", "of one") if single else index != "shards"
        capsys.readouterr()
        ours = our_logits(folder)
        noted = capsys.readouterr().out
        assert (ours is None) == bool(contradicts), (single, index, beside)
        if ours is None:
            refused += 1
            continue
        read += 1
        assert_same(their_logits(folder), ours, (single, index, beside))
        for name in ("model_old.safetensors", "consolidated.safetensors", *files):
            unread = (folder / name).exists() and (name not in files or bool(single))
            assert (name in noted) == unread, (single, index, beside, noted)
    assert (read, refused) == (12, 28)


@pytest.mark.parametrize(
    ("single", "names"),
    [
        (True, ["model.safetensors", "model.safetensors.index.json"]),
        (False, ["consolidated.safetensors", "model.safetensors"]),
    ],
)
def test_a_contradiction_names_both_files(tmp_path, states, single, names):
    write_json(tmp_path / "config.json", PLAIN)
    save_file(states[0], tmp_path / ("model.safetensors" if single else "consolidated.safetensors"))
    if single:
        save_shards(states[1], tmp_path)
    with pytest.raises(UserError) as error:
        nq.Llama.from_pretrained(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_a_file_that_config_json_names(tmp_path, states):
    write_json(tmp_path / "config.json", PLAIN | {"transformers_weights": "other.safetensors"})
    for i, name in enumerate(("other.safetensors", "model.safetensors")):
        save_file(states[i], tmp_path / name, metadata={"format": "pt"})
    assert_same(their_logits(tmp_path), our_logits(tmp_path), "named")


# ------------------------------------------------------------------------------------------------ RoPE

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": LLAMA3,
}


def rope_maps() -> Iterator[dict[str, Any] | None]:
    """Every way to write one kind of RoPE as a map, and to write it wrongly."""
    yield from (None, {})
    for kind, numbers in KINDS.items():
        for names in ({"rope_type": kind}, {"type": kind}, {"type": kind, "rope_type": kind}):
            yield names | numbers
            yield names | numbers | {"rope_theta": 500000.0}
    yield from ({"rope_theta": 500000.0}, {"factor": 4.0}, {"rope_type": "linear", "factor": 2}, {"rope_type": None})
    yield from ({"rope_type": "linear"}, {"rope_type": "linear", "type": "llama3", **LLAMA3}, {"rope_theta": None})
    yield {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 32}
    yield {"rope_type": "llama3", **{key: LLAMA3[key] for key in LLAMA3 if "original" not in key}}


def what_transformers_makes(config: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor] | None:
    try:
        theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
        return theirs.rope_parameters, transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs).inv_freq
    except (TypeError, KeyError, ValueError):
        return None


def is_all_used(config: dict[str, Any], used: dict[str, Any]) -> bool:
    """Whether nothing that config.json says of RoPE differs from what transformers took.

    Plain RoPE beside a scaled one counts as nothing said: that is what people leave there when they add a scaling.
    """
    given = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    kinds = [rope[name] for rope in given for name in ("rope_type", "type") if name in rope]
    if {kind for kind in kinds if kind != "default"} - {used["rope_type"]}:
        return False
    thetas = [rope["rope_theta"] for rope in (config, *given) if "rope_theta" in rope]
    numbers = [(key, value) for rope in given for key, value in rope.items() if key not in ("rope_type", "type")]
    numbers += [("original_max_position_embeddings", config[key]) for key in config if key.startswith("original")]
    for rope in given:
        own = rope.get("rope_type", rope.get("type", "default"))
        needed = KINDS.get(own, {}).keys() - {"original_max_position_embeddings"}
        if needed - rope.keys() or rope.keys() - {"rope_type", "type", "rope_theta", *KINDS.get(own, ())}:
            return False
    scaled = [rope for rope in given if rope.get("rope_type", rope.get("type")) == "llama3"]
    if len({"original_max_position_embeddings" in rope for rope in scaled}) > 1:  # what the one leaves out is not said
        return False
    known = {"rope_theta", *KINDS[used["rope_type"]]}
    return {used["rope_theta"], *thetas} == {used["rope_theta"]} and all(
        key in known and used[key] == value for key, value in numbers
    )


@pytest.mark.slow
def test_rope_is_the_one_that_transformers_takes():
    """Every map as rope_scaling, as rope_parameters and both, with and without rope_theta on top."""
    read = refused = 0
    maps = list(rope_maps())
    for theta, scaling, parameters in itertools.product((..., 500000.0, 10000.0, None), maps, maps):
        config = PLAIN | {"rope_scaling": scaling, "rope_parameters": parameters}
        config |= {} if theta is ... else {"rope_theta": theta}
        theirs = what_transformers_makes(config)
        wanted = theirs is not None and is_all_used(config, theirs[0])
        try:
            ours = ModelConfig.from_hf(json.loads(json.dumps(config)))
        except ValueError as error:
            assert not wanted, (theta, scaling, parameters, error)
            refused += 1
            continue
        assert wanted, (theta, scaling, parameters, theirs)
        assert torch.allclose(rope_frequencies(ours), theirs[1], rtol=1e-6), (theta, scaling, parameters)
        written = merged_config(config, torch.float32, {})
        assert "rope_parameters" not in written and written["rope_theta"] == ours.rope_theta
        assert torch.allclose(what_transformers_makes(written)[1], theirs[1], rtol=1e-6), written
        read += 1
    assert read > 150 and refused > 1000


@pytest.mark.parametrize("outside", [32, 64])
def test_a_first_context_outside_of_the_map(outside):
    """`original_max_position_embeddings` on top of config.json, which transformers prefers to that of the map."""
    whole = {"rope_type": "llama3", **LLAMA3}
    without = {key: value for key, value in whole.items() if not key.startswith("original")}
    config = PLAIN | {"original_max_position_embeddings": outside, "rope_scaling": without}
    assert torch.allclose(rope_frequencies(ModelConfig.from_hf(config)), what_transformers_makes(config)[1], rtol=1e-6)
    config["rope_scaling"] = whole
    if outside == 64:
        assert ModelConfig.from_hf(config).rope_scaling == whole
    else:
        with pytest.raises(ValueError, match="original_max_position_embeddings is 32 and .* is 64, which contradict"):
            ModelConfig.from_hf(config)


# ------------------------------------------------------------------------------------------------ tokens

NEW = {"content": "<new>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TEXT = "Ahoy <s> there</s><new>, <|im_end|>matey<pad>! <extra><img>the<w>"


def byte_level(added: list[str]) -> dict[str, Any]:
    """A small byte-level tokenizer.json whose vocabulary has "<s>", "</s>" and "the"; `added` are special."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    part = tokenizers.pre_tokenizers
    trained.pre_tokenizer = part.Sequence([part.Digits(individual_digits=True), part.ByteLevel(add_prefix_space=False)])
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=part.ByteLevel.alphabet(), show_progress=False, special_tokens=["<s>", "</s>"]
    )
    trained.train_from_iterator([TEXT * 3, *small_runs.PIRATE[:200]], trainer)
    data = json.loads(trained.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in added]
    return data


def spellings(size: int) -> Iterator[dict[str, Any]]:
    """Ways to name tokens, as the files beside tokenizer.json; `size` is the next free id."""
    config: list[dict[str, Any]] = [
        {},
        {"bos_token": None, "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<pad>"},
        {"bos_token": NEW | {"__type": "AddedToken"}, "eos_token": "</s>", "img_token": "<img>"},
    ]
    extra: list[dict[str, Any]] = [
        {},
        {"additional_special_tokens": ["<extra>", "<|im_end|>"]},
        {"extra_special_tokens": ["<extra>", NEW | {"__type": "AddedToken"}]},
        {"extra_special_tokens": {"img_token": "<img>", "other": "<extra>"}},
        {"extra_special_tokens": ["<img>"], "additional_special_tokens": ["<extra>"]},
    ]
    word = NEW | {"content": "<w>", "special": False}
    decoder: list[dict[str, Any]] = [
        {},
        {"added_tokens_decoder": {str(size): NEW | {"special": True}, str(size + 1): word}},
        {"added_tokens_decoder": {str(size + 7): NEW | {"special": True}}},
    ]
    added: list[Any] = [None, {"<new>": size, "<w>": size + 1}, {"<|im_end|>": size + 3}]
    named: list[Any] = [
        None,
        {"bos_token": "<s>", "pad_token": "<pad>"},
        {"bos_token": dict(NEW), "eos_token": "</s>", "additional_special_tokens": ["<extra>"]},
        {"eos_token": "<|im_end|>", "extra_special_tokens": ["<img>", dict(NEW)]},
    ]
    for a, b, c, d, e in itertools.product(config, extra, decoder, added, named):
        yield {"tokenizer_config": a | b | c, "added_tokens": d, "special_tokens_map": e}


TEMPLATE = "{{ bos_token }}|{{ eos_token }}|{% for m in messages %}{{ m.content }}{{ pad_token }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Ahoy"}]


@pytest.mark.parametrize("kind", ["bare", "with added tokens", "sentencepiece"])
def test_tokens_have_the_ids_that_transformers_gives(tmp_path, kind):
    """Named, extra and added tokens in every file that may name them: ids, named ids, chats, and what is saved."""
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    saved.mkdir()
    config = {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    text = TEXT if kind != "sentencepiece" else TEXT.replace("<s>", "").replace("</s>", "")  # there always special
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(sentencepiece_models.train(vocab_size=700))
        config["tokenizer_class"], size = "LlamaTokenizer", 700
    else:
        data = byte_level([] if kind == "bare" else ["<s>", "</s>"])
        write_json(folder / "tokenizer.json", data)
        size = len(data["model"]["vocab"])
    equal = refused = 0
    for number, files in enumerate(spellings(size)):
        if number % 3 != len(kind) % 3:  # a third for each kind, another one each
            continue
        for name, content in files.items():
            (folder / f"{name}.json").unlink(missing_ok=True)
            if content is not None:
                write_json(folder / f"{name}.json", config | content if name == "tokenizer_config" else content)
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
        except (TypeError, ValueError, AttributeError):
            theirs = None
        try:
            ours = nq.load_tokenizer(folder)
        except UserError as error:
            wrong = (f"{size + 7}", f"{size + 3}", f"{size + 1}", f"{size}")
            assert theirs is None or "cannot have the id" in str(error) and any(id in str(error) for id in wrong), files
            refused += 1
            continue
        assert theirs is not None, files
        assert ours.vocab_size == len(theirs), files
        assert ours.encode(text, special=True) == theirs(text, add_special_tokens=False)["input_ids"], files
        for name in ("bos", "eos", "pad"):
            assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id"), (name, files)
        chat = theirs.apply_chat_template(MESSAGES, tokenize=False)
        assert ours.render_chat(MESSAGES) == chat, files
        special = {theirs.convert_ids_to_tokens(id) for id in theirs.all_special_ids}
        assert special <= set(ours.special_tokens), files
        equal += 1
        if equal % 5 == 0:
            save_tokenizer(ours, saved)
            assert nq.load_tokenizer(saved) == ours, files
            again = transformers.AutoTokenizer.from_pretrained(saved)
            assert again(text, add_special_tokens=False)["input_ids"] == ours.encode(text, special=True), files
    assert equal > 60 and refused > 20, (equal, refused)


NAMES = (
    "\n  {% for m in messages %}{{ bos_token }}{{ pad_token }}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}"
    "<|im_end|>\n{% endfor %}{{ unk_token }}<|im_start|>assistant\n"
)


@pytest.mark.parametrize(("bos", "eos", "pad"), [(None, 0, None), (1, 2, 17), (None, 2, 17), (1, None, None)])
def test_named_tokens_have_their_texts_in_llama_cpp(tmp_path, smollm2_path, bos, eos, pad):
    """A GGUF file has to name some BOS and the trained end: neither may show where training had another or none."""
    tok = replace(nq.load_tokenizer(smollm2_path), bos_id=bos, eos_id=eos, pad_id=pad, chat_template=NAMES)
    chat = PromptFormat(type="chat_template")
    with Server(write_small(tmp_path / "x.gguf", tokenizer_metadata(tok, chat, tok.vocab_size, tmp_path))) as llama_cpp:
        text = llama_cpp.prompt(MESSAGES)
        assert text == chat.render(tok, MESSAGES, add_generation_prompt=True)
        assert llama_cpp.tokenize(text, True, True) == chat.encode_prompt(tok, MESSAGES)
        assert llama_cpp.tokenize("plain", True) == tok.encode("plain")


# ------------------------------------------------------------------------------------------------ numbers

BAD = [0, -1, 2**40, 10**400, -(10**400), 1e30, 1e400, float("nan"), -0.5, "7", True, [], {}, None]


def test_no_number_of_config_json_ends_in_a_traceback(tmp_path, states):
    """Huge, negative, NaN, of another type: refused when config.json is read, before anything is built of it."""
    save_file(states[0], tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = PLAIN | {
        "rope_theta": 1e4,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
        "tie_word_embeddings": False,
    }
    numbers = [(key,) for key, value in config.items() if type(value) in (int, float)]
    numbers += [("rope_scaling", key) for key in LLAMA3]
    defaults = {"num_key_value_heads", "head_dim", "rms_norm_eps"}
    for path, value in itertools.product(numbers, BAD):
        changed = json.loads(json.dumps(config))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        write_json(tmp_path / "config.json", changed)
        if value is None and path[-1] in defaults - {"rms_norm_eps"}:
            continue
        if type(value) is int and value > 0 and path[0] == "rope_scaling" and value == 2**40:
            continue  # absurd, but a number
        if value == 2**40 and path[-1] in ("rms_norm_eps", "rope_theta"):
            continue
        with pytest.raises(UserError, match=path[-1]) as error:
            nq.Llama.from_pretrained(tmp_path)
        assert len(str(error.value)) < 700, (path, value)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", "{", b"\xff"]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_json_that_cannot_be_read_is_one_line(tmp_path, name, text):
    for file in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        write_json(tmp_path / file, PLAIN if file == "config.json" else {})
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    read = nq.load_tokenizer if name == "tokenizer.json" else nq.Llama.from_pretrained
    with pytest.raises(UserError, match="not valid JSON|cannot be read .* in UTF-8") as error:
        read(tmp_path)
    assert str(tmp_path / name) in str(error.value) and len(str(error.value)) < 500
