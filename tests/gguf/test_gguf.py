"""The GGUF container, names and rows, config.json and back, and what damaged files do. llama.cpp: test_export.py."""

import math
import random
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from names_of_gguf import hf_name

from nanoqlora.config.errors import UserError
from nanoqlora.config.files import whole_file
from nanoqlora.gguf.config import hf_config, model_metadata, rope_divisors
from nanoqlora.gguf.ggml_blocks import FORMATS, quantize
from nanoqlora.gguf.names import gguf_name, heads_to_permute, meta_name, permute_rows, tensor_shapes, unpermute_rows
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.gguf.writer import NewTensor, write_gguf
from nanoqlora.model import Llama, ModelConfig

METADATA = {
    "general.architecture": ("string", "llama"),
    "one.string": ("string", "\u0120caf\u00e9 \u3053\n"),
    "empty.string": ("string", ""),
    "a.bool": ("bool", True),
    **{f"a.{kind}": (kind, 200) for kind in ("u8", "u16", "u32", "u64")},
    **{f"an.{kind}": (kind, -100) for kind in ("i8", "i16", "i32", "i64")},
    **{f"a.{kind}": (kind, 0.5) for kind in ("f32", "f64")},
    "some.strings": ("string[]", ["\u0120a", "", "b"]),
    "some.ints": ("i32[]", [1, 3, -3]),
    "some.floats": ("f32[]", [0.25, -1000.0]),
    "some.bools": ("bool[]", [True, False]),
    "no.strings": ("string[]", []),
}


def new_tensor(name: str, w: torch.Tensor, ggml_type: str = "F32") -> NewTensor:
    return NewTensor(name, tuple(w.shape), ggml_type, lambda: quantize(w, ggml_type))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """One tensor of each type that can be written, some of a size that leaves padding behind."""
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 256, generator=g) for name in FORMATS} | {"odd": torch.randn(5, generator=g)}


@pytest.fixture
def small_file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    tensors = [new_tensor(name, w, name if name in FORMATS else "F32") for name, w in weights.items()]
    write_gguf(tmp_path / "small.gguf", METADATA, tensors)
    return tmp_path / "small.gguf"


# ------------------------------------------------------------------------------------------------ the container


def test_what_is_written_is_read_back(small_file: Path, weights: dict[str, torch.Tensor]):
    gguf = read_gguf(small_file)
    assert gguf.metadata == {key: value for key, (_, value) in METADATA.items()}
    assert {key: type(value) for key, value in gguf.metadata.items()} == {
        key: type(value) for key, (_, value) in METADATA.items()
    }
    assert list(gguf.tensors) == list(weights)
    for name, w in weights.items():
        info = gguf.tensors[name]
        assert info.shape == w.shape
        stored = torch.frombuffer(bytearray(gguf.data[info.offset : info.offset + info.num_bytes]), dtype=torch.uint8)
        assert torch.equal(stored, quantize(w, info.ggml_type).flatten())
        assert info.offset % 32 == 0
    assert torch.equal(gguf.load("F32"), weights["F32"]) and torch.equal(gguf.load("odd"), weights["odd"])
    assert small_file.stat().st_size % 32 == 0, "the end of the last tensor is not padded"


def test_gguf_package_reads_what_is_written(small_file: Path, weights: dict[str, torch.Tensor]):
    package = pytest.importorskip("gguf")
    reader = package.GGUFReader(small_file)
    for key, (kind, value) in METADATA.items():
        names = {"string": "STRING", "u": "UINT", "i": "INT", "f": "FLOAT", "bool": "BOOL"}
        item = kind.removesuffix("[]")
        expected = names[item] if item in names else names[item[0]] + item[1:]
        types = [t.name for t in reader.fields[key].types]
        assert types == (["ARRAY"] if kind != item else []) + ([expected] if value != [] else []), key
        assert reader.fields[key].contents() == value, key
    assert [tensor.name for tensor in reader.tensors] == list(weights)
    for tensor in reader.tensors:
        assert list(tensor.shape) == list(weights[tensor.name].shape)[::-1]
        expected = package.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(read_gguf(small_file).load(tensor.name).numpy(), expected)


def test_loaded_tensors_are_our_own(small_file: Path):
    """Writing into one must neither crash nor reach the file, and PyTorch must have nothing to warn about."""
    before = small_file.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gguf = read_gguf(small_file)
        gguf.load("F32").zero_()
    assert gguf.load("F32").any() and small_file.read_bytes() == before


def test_few_tensors_are_made_ahead_and_a_failure_leaves_the_old_file(tmp_path: Path):
    made = []

    def produce(i: int) -> torch.Tensor:
        made.append(i)
        assert len(list(tmp_path.glob(".new.gguf.*.tmp/new.gguf"))) == 1  # the ones before are in the file by now
        if i == 2:
            raise KeyboardInterrupt
        return quantize(torch.ones(4), "F32")

    path = tmp_path / "new.gguf"
    path.write_text("old")
    tensors = [NewTensor(f"t{i}", (4,), "F32", lambda i=i: produce(i)) for i in range(20)]
    assert made == []
    with pytest.raises(KeyboardInterrupt), whole_file(path) as new:
        write_gguf(new, {}, tensors)
    assert {0, 1, 2} <= set(made) <= set(range(3 + torch.get_num_threads()))  # one more for each thread at most
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_alignment_of_the_file_is_respected(tmp_path: Path):
    """64 in place of 32 moves the data."""
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    header += struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 64)
    header += struct.pack("<Q", 1) + b"w" + struct.pack("<IQIQ", 1, 2, 0, 64)
    path = tmp_path / "aligned.gguf"
    path.write_bytes(header + bytes(-len(header) % 64 + 64) + struct.pack("<ff", 1.5, -2.0))
    assert (-len(header) % 64) != (-len(header) % 32), "the test would prove nothing"
    assert read_gguf(path).load("w").tolist() == [1.5, -2.0]


# ------------------------------------------------------------------------------------------------ damaged files


def test_every_truncation_is_noticed(small_file: Path):
    data = small_file.read_bytes()
    gguf = read_gguf(small_file)
    data_starts = min(info.offset for info in gguf.tensors.values())
    path = small_file.with_name("cut.gguf")
    last = max(info.offset + info.num_bytes for info in gguf.tensors.values())
    for size in [*range(data_starts), *range(data_starts, last, 61), last - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="cut.gguf") as error:
            read_gguf(path)
        if size >= data_starts:
            assert f"so {last - size} bytes are missing" in str(error.value)


@pytest.mark.parametrize("kind", ["small", "llama"])
def test_damaged_headers_end_in_a_user_error_or_not_at_all(kind: str, small_file: Path):
    """One byte changed at random: whatever that byte meant, nothing worse than a UserError may come of it."""
    source = small_file if kind == "small" else write_model(small_file.with_name("llama.gguf"), CONFIGS["Llama-3.1"])
    data, g = source.read_bytes(), random.Random(0)
    data_starts = min(info.offset for info in read_gguf(source).tensors.values())
    path, num_refused = small_file.with_name("damaged.gguf"), 0
    for _ in range(500):
        damaged = bytearray(data)
        damaged[g.randrange(data_starts)] = g.choice([0, 1, 127, 128, 255, g.randrange(256)])
        path.write_bytes(damaged)
        try:
            gguf = read_gguf(path)
            for name in gguf.tensors:
                gguf.load(name)
            config = hf_config(gguf)
            for name in tensor_shapes(ModelConfig.from_hf(config)):
                gguf.load_hf(name)
        except UserError:
            num_refused += 1
    assert num_refused == 500 if kind == "small" else num_refused > 200  # much of the other one is free text


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1 and len(old) == len(new)
    return data.replace(old, new)


def tensor_line(name: str, shape: tuple[int, ...], type_id: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return struct.pack("<Q", len(name)) + name.encode() + dims + struct.pack("<IQ", type_id, offset)


LINE = tensor_line("first", (2, 32), 0, 0)
DEFECTS = {
    "magic": (b"GGUF", b"GGML", r"starts with b'GGML'"),
    "version": (b"GGUF\3\0\0\0", b"GGUF\1\0\0\0", "version 1; only 2 and 3"),
    "other endian": (b"GGUF\3\0\0\0", b"GGUF\0\0\0\3", "version 50331648.*big-endian"),
    "tensor count": (struct.pack("<IQ", 3, 2), struct.pack("<IQ", 3, 2**60), f"number of tensors is {2**60}"),
    "entry count": (struct.pack("<QQ", 2, 1), struct.pack("<QQ", 2, 2**40), f"metadata entries is {2**40}"),
    "string length": (struct.pack("<Q", 3) + b"key", struct.pack("<Q", 2**50) + b"key", f"is {2**50}"),
    "not UTF-8": (b"key", b"k\xff\xfe", "not UTF-8"),
    "value type": (b"key" + struct.pack("<I", 9), b"key" + struct.pack("<I", 13), "metadata key has a type"),
    "nested array": (struct.pack("<IIQ", 9, 4, 3), struct.pack("<IIQ", 9, 9, 3), "metadata key has a type"),
    "array length": (struct.pack("<IIQ", 9, 4, 3), struct.pack("<IIQ", 9, 4, 2**62), f"is {2**62}"),
    "no dimensions": (LINE, tensor_line("first", (2, 32), 0, 0)[:13] + bytes(4) + LINE[17:], "has 0 dimensions"),
    "zero rows": (LINE, tensor_line("first", (0, 32), 0, 0), r"shape \(0, 32\)"),
    "unknown type": (
        LINE,
        tensor_line("first", (2, 32), 21, 0),
        "first is of type 21.*Use one with F32",
    ),
    "half a block": (LINE, tensor_line("first", (32, 2), 8, 0), "Q8_0 blocks of 32"),
    "huge tensor": (LINE, tensor_line("first", (2**60, 32), 0, 0), "bytes are missing|starts inside"),
    "crooked offset": (LINE, tensor_line("first", (2, 32), 0, 8), "offset 8, which is not a multiple of 32"),
    "overlap": (LINE, tensor_line("first", (2, 32), 0, 128), "starts inside tensor"),
    "twice": (LINE, tensor_line("other", (2, 32), 0, 0), "tensor other appears twice"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_named(defect: str, tmp_path: Path):
    old, new, message = DEFECTS[defect]
    path = tmp_path / "broken.gguf"
    tensors = [new_tensor(name, torch.ones(2, 32)) for name in ("first", "other")]
    write_gguf(path, {"key": ("u32[]", [1, 2, 3])}, tensors)
    read_gguf(path)
    path.write_bytes(replaced(path.read_bytes(), old, new))
    with pytest.raises(UserError, match=message) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_lists_that_fill_the_memory_are_refused(tmp_path: Path):
    """In memory a list takes ten times its bytes or more; whether one is long or many are."""
    entry = struct.pack("<IIQ", 9, 0, 9_000_000) + bytes(9_000_000)
    keys = [struct.pack("<Q", 1) + name + entry for name in (b"a", b"b")]
    for num_keys, is_right in ((1, True), (2, False)):
        path = tmp_path / "a.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, num_keys) + b"".join(keys[:num_keys]) + bytes(64))
        if is_right:
            assert len(read_gguf(path).metadata["a"]) == 9_000_000
        else:
            with pytest.raises(UserError, match="the length of metadata b is 9000000"):
                read_gguf(path)


def test_metadata_defects_are_named(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    write_gguf(path, {"general.alignment": ("u32", 24)}, [])
    with pytest.raises(UserError, match="general.alignment is 24 and not a power of two"):
        read_gguf(path)
    write_gguf(path, {"a": ("u8", 1), "b": ("u8", 2)}, [])
    path.write_bytes(replaced(path.read_bytes(), b"b", b"a"))
    with pytest.raises(UserError, match="metadata a appears twice"):
        read_gguf(path)


def test_files_that_are_not_there(tmp_path: Path):
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path / "missing.gguf", tmp_path, tmp_path / "empty.gguf"):
        with pytest.raises(UserError, match="cannot be opened as a GGUF file"):
            read_gguf(path)


# ------------------------------------------------------------------------------------------------ names and rows


def test_names_go_there_and_back():
    assert gguf_name("model.layers.17.self_attn.o_proj.weight") == "blk.17.attn_output.weight"
    assert gguf_name("model.layers.0.post_attention_layernorm.weight") == "blk.0.ffn_norm.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "input_layernorm"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
    names = [f"model.layers.{i}.{part}.weight" for i in (0, 9, 127) for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert len({gguf_name(name) for name in names}) == len(names)
    assert [hf_name(gguf_name(name)) for name in names] == names
    for unknown in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.experts.weight", "score.weight"):
        with pytest.raises(UserError, match="not a part of a plain Llama"):
            gguf_name(unknown)
    assert meta_name("model.layers.17.self_attn.o_proj.weight") == "layers.17.attention.wo.weight"
    assert len({meta_name(name) for name in names}) == len(names)


def test_shapes_are_those_of_the_model():
    for config in (PLAIN, replace(PLAIN, tie_word_embeddings=True)):
        with torch.device("meta"):
            expected = {name: tuple(parameter.shape) for name, parameter in Llama(config).named_parameters()}
        assert list(tensor_shapes(config).items()) == list(expected.items())


def test_permute_puts_partners_side_by_side():
    num_heads, hd = 3, 8
    w = torch.arange(num_heads * hd * 5).view(num_heads * hd, 5)
    permuted = permute_rows(w, num_heads)
    for head in range(num_heads):
        for i in range(hd // 2):
            assert torch.equal(permuted[head * hd + 2 * i], w[head * hd + i])
            assert torch.equal(permuted[head * hd + 2 * i + 1], w[head * hd + i + hd // 2])
    assert torch.equal(unpermute_rows(permuted, num_heads), w)
    assert torch.equal(unpermute_rows(permute_rows(w[:, 0], num_heads), num_heads), w[:, 0])


def test_which_tensors_are_permuted():
    heads = {f"blk.1.{part}.weight": heads_to_permute(f"blk.1.{part}.weight", 8, 2) for part in BLOCK_PARTS}
    assert {name: n for name, n in heads.items() if n} == {"blk.1.attn_q.weight": 8, "blk.1.attn_k.weight": 2}


# ------------------------------------------------------------------------------------------------ config.json

BLOCK_PARTS = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
PLAIN = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,  # as in Llama-3, and not hidden_size / num_attention_heads
    vocab_size=7,
    max_position_embeddings=1000,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
)
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {
    "plain": PLAIN,
    "tied": replace(PLAIN, tie_word_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-6),
    "linear": replace(PLAIN, rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "Llama-3.1": replace(PLAIN, rope_scaling=LLAMA31),
    "Llama-3.2": replace(PLAIN, head_dim=64, tie_word_embeddings=True, rope_scaling=LLAMA31 | {"factor": 32.0}),
    "other context": replace(
        PLAIN, rope_scaling=LLAMA31 | {"original_max_position_embeddings": 1000, "high_freq_factor": 8.0}
    ),
}


def model_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * hd, config.num_key_value_heads * hd
    block = [(D,), (q_rows, D), (kv_rows, D), (kv_rows, D), (D, q_rows), (D,), (FF, D), (FF, D), (D, FF)]
    shapes = {"token_embd.weight": (config.vocab_size, D), "output_norm.weight": (D,)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in zip(BLOCK_PARTS, block, strict=True)}
    if not config.tie_word_embeddings:
        shapes["output.weight"] = (config.vocab_size, D)
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    if config.rope_scaling.get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = rope_divisors(config)
    return tensors


def write_model(path: Path, config: ModelConfig, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """A whole model as F32, with `metadata` and `tensors` changed, or taken out where they are None."""
    entries = model_metadata(config, "test", "F32") | (metadata or {})
    new = model_tensors(config) | (tensors or {})
    entries = {key: entry for key, entry in entries.items() if entry is not None}
    write_gguf(path, entries, [new_tensor(name, w) for name, w in new.items() if w is not None])
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_config_goes_there_and_back(name: str, tmp_path: Path):
    gguf = read_gguf(write_model(tmp_path / "model.gguf", CONFIGS[name]))
    config = hf_config(gguf)
    assert ModelConfig.from_hf(config) == CONFIGS[name]
    assert config["architectures"] == ["LlamaForCausalLM"] and "rope_parameters" not in config
    for tensor, w in model_tensors(CONFIGS[name]).items():
        if tensor == "rope_freqs.weight":
            continue
        loaded = gguf.load_hf(hf_name(tensor))
        heads = heads_to_permute(tensor, 4, 2)
        assert torch.equal(loaded, unpermute_rows(w, heads) if heads else w)


def test_rope_divisors_are_llama3s():
    """The definition, pair by pair, in float64."""
    divisors = rope_divisors(CONFIGS["Llama-3.1"])
    for i, divisor in enumerate(divisors.tolist()):
        wavelength = 2 * math.pi * 500000 ** (2 * i / 128)
        if wavelength < 8192 / 4:
            expected = 1.0
        elif wavelength > 8192 / 1:
            expected = 8.0
        else:
            keep = (8192 / wavelength - 1) / (4 - 1)
            expected = 1 / ((1 - keep) / 8 + keep)
        assert divisor == pytest.approx(expected, rel=1e-5)
    assert ((divisors > 1) & (divisors < 8)).sum() >= 5


REFUSED = {  # changes of the metadata, changes of the tensors, what is said
    "another architecture": ({"general.architecture": ("string", "gemma3")}, {}, "is 'gemma3'; only llama"),
    "an adapter": ({"general.type": ("string", "adapter")}, {}, "'adapter', not a model"),
    "a part": ({"split.count": ("u16", 3)}, {}, "one of 3 parts"),
    "a strange part": ({"split.count": ("string", "3")}, {}, "one of 3 parts"),
    "experts": ({"llama.expert_count": ("u32", 8)}, {}, "mixture of 8 experts"),
    "yarn": ({"llama.rope.scaling.type": ("string", "yarn")}, {}, "RoPE scaling 'yarn' is not supported"),
    "partial RoPE": ({"llama.rope.dimension_count": ("u32", 64)}, {}, "dimension_count is 64.*128 dimensions"),
    "odd values": ({"llama.attention.value_length": ("u32", 64)}, {}, "value_length is 64.*128 dimensions"),
    "no layers": ({"llama.block_count": None}, {}, "llama.block_count is missing"),
    "zero heads": ({"llama.attention.head_count": ("u32", 0)}, {}, "llama.attention.head_count is 0"),
    "float": ({"llama.block_count": ("f32", 2.0)}, {}, "llama.block_count is 2.0.*type int"),
    "heads by layer": ({"llama.attention.head_count_kv": ("u32[]", [2, 1])}, {}, r"head_count_kv is \[2, 1\]"),
    "more layers": ({"llama.block_count": ("u32", 3)}, {}, "3 layers, and tensor blk.2.attn_norm.* missing, 9 in all"),
    "absurd layers": ({"llama.block_count": ("u32", 2**24)}, {}, "blk.2.attn_norm.* missing"),
    "fewer layers": ({"llama.block_count": ("u32", 1)}, {}, "blk.1.*no place in the model"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight .*missing, 1 in all"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight .*missing"),
    "bias": ({}, {"blk.0.attn_q.bias": torch.zeros(512)}, "blk.0.attn_q.bias has no place in the model"),
    "wrong shape": ({}, {"blk.0.attn_k.weight": torch.zeros(512, 32)}, r"\(512, 32\).*should have \(256, 32\)"),
    "strange RoPE": ({}, {"rope_freqs.weight": torch.rand(64) + 1}, "not what the llama3 kind"),
    "broken RoPE": (
        {},
        {"rope_freqs.weight": torch.tensor([1.0, torch.inf, torch.nan, 0.0] * 16)},
        "not what the llama3",
    ),
    "flat RoPE": ({}, {"rope_freqs.weight": torch.tensor([1.0, 2.0, 2.0, 8.0] * 16)}, "not what the llama3 kind"),
    "short RoPE": ({}, {"rope_freqs.weight": torch.ones(32)}, "not what the llama3 kind"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_we_cannot_build_are_refused(case: str, tmp_path: Path):
    metadata, tensors, message = REFUSED[case]
    path = write_model(tmp_path / "model.gguf", PLAIN, metadata, tensors)
    with pytest.raises(UserError, match=message) as error:
        hf_config(read_gguf(path))
    assert str(path) in str(error.value)


def test_older_spellings_of_linear_scaling_and_divisors_of_one(tmp_path: Path):
    path = write_model(tmp_path / "model.gguf", PLAIN, {"llama.rope.scale_linear": ("f32", 4.0)})
    assert hf_config(read_gguf(path))["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    path = write_model(tmp_path / "model.gguf", PLAIN, {}, {"rope_freqs.weight": torch.ones(64)})
    assert hf_config(read_gguf(path))["rope_scaling"] is None


# ------------------------------------------------------------------------------------------------ a real file


@pytest.mark.slow
def test_real_file(smollm2_path: Path):
    """SmolLM2-135M-Instruct as published: its config, and every value as the gguf package reads it."""
    gguf = read_gguf(smollm2_path)
    config = hf_config(gguf)
    expected = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    expected |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}
    expected |= {"rope_theta": 100000.0, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "rope_scaling": None}
    expected |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert {key: config[key] for key in expected} == expected
    assert sum(math.prod(info.shape) for info in gguf.tensors.values()) == 134_515_008

    package = pytest.importorskip("gguf")
    reader = package.GGUFReader(smollm2_path)
    assert list(gguf.metadata) == [key for key in reader.fields if not key.startswith("GGUF.")]
    for key, value in gguf.metadata.items():
        field = reader.fields[key]
        if not isinstance(value, list):
            assert value == field.contents(), key
            continue
        assert len(value) == len(field.data), key
        for i in (*range(min(100, len(value))), len(value) // 2, -1):
            assert value[i] == field.contents(i), key
    assert [tensor.name for tensor in reader.tensors] == list(gguf.tensors)
    for tensor in reader.tensors:
        if tensor.name.startswith(("blk.0.", "blk.17.", "output")):
            values = package.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(gguf.load(tensor.name).numpy(), values), tensor.name
        elif tensor.name == "token_embd.weight":  # a quarter of the model: every 64th row will do
            values = package.dequantize(tensor.data[::64], tensor.tensor_type)
            assert np.array_equal(gguf.load(tensor.name).numpy()[::64], values)


def test_transformers_reads_the_same(tmp_path: Path):
    """Its own GGUF reader, names and row order included."""
    transformers = pytest.importorskip("transformers")
    path = write_model(tmp_path / "model.gguf", PLAIN)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    state, gguf = model.state_dict(), read_gguf(path)
    assert state.keys() == tensor_shapes(PLAIN).keys()
    for name, w in state.items():
        assert torch.equal(gguf.load_hf(name), w), name
    assert ModelConfig.from_hf(model.config.to_dict()) == replace(PLAIN, rms_norm_eps=float(np.float32(1e-5)))
