"""GGUF, the one-file format of llama.cpp and Ollama, in and out.

A GGUF file is a small header, a dictionary, a table of tensors, and then the tensors themselves:

    "GGUF"                                     4 bytes
    version, tensor count, metadata count      u32, u64, u64, little-endian like everything below
    metadata                                   per entry: key, type of the value, value
    tensor table                               per tensor: name, dimensions, type, offset into the data
    zeros up to a multiple of 32
    data                                       each tensor, then zeros up to a multiple of 32

Strings are their length as u64 and their bytes. Names and sizes stand before the data, so a writer has to know them
all before the first weight, but never needs more than a few tensors in memory: see `write_gguf`.

Three things differ from a Hugging Face folder, and this is the only file that knows of them:

names        `model.layers.3.self_attn.q_proj.weight` is `blk.3.attn_q.weight`. A tied head is left out.
shapes       are written fastest dimension first, so the reverse of PyTorch's.
row order    RoPE turns pairs of dimensions. Hugging Face pairs dimension i of a head with i + hd / 2, llama.cpp pairs
             neighbours. So the rows of q_proj and k_proj are shuffled inside each head: `permute_rows`. Without it the
             file loads and the model talks nonsense.

The tokenizer travels in the metadata too; so do all numbers of config.json, as `llama.*`, except the llama3 kind of
RoPE scaling, which is a tensor of divisors, `rope_freqs.weight`.

Read next: `ggml_blocks.py` for what is inside the tensors, `export_gguf.py` for who calls this.
"""

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cli import UserError, whole_file
from .file_types import FILE_TYPES
from .ggml_blocks import FORMATS, dequantize
from .model import ModelConfig, rope_frequencies
from .threads import in_threads

MAGIC = b"GGUF"
VERSION = 3  # version 2 is the same for what we use
ALIGNMENT = 32  # of a file that does not say otherwise; ours never does

# Types of metadata values, each with its number in a file. An array of u32 is called "u32[]" below.
VALUE_TYPES = {
    **{"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7},
    **{"string": 8, "array": 9, "u64": 10, "i64": 11, "f64": 12},
}
TYPE_NAMES = {number: kind for kind, number in VALUE_TYPES.items()}
STRUCT_CODES = {  # how `struct` packs those of a fixed size
    **{"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?"},
    **{"u64": "Q", "i64": "q", "f64": "d"},
}
Metadata = dict[str, tuple[str, Any]]  # key -> (type, value): ("u32", 32), ("string", "llama"), ("i32[]", [1, 3, 3])

# ------------------------------------------------------------------------------------------------ names and rows

MODEL_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_DIVISORS = "rope_freqs.weight"  # not a weight: it stands for config.json's llama3 rope_scaling


def gguf_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if hf_name in MODEL_NAMES:
        return MODEL_NAMES[hf_name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", hf_name)
    if match and match[2] in BLOCK_NAMES:
        return f"blk.{match[1]}.{BLOCK_NAMES[match[2]]}.weight"
    raise UserError(
        f"tensor {hf_name}: not a part of a plain Llama, so a GGUF file of architecture llama has no place for it and "
        f"the model would be wrong without it. Export a LlamaForCausalLM without biases and extra layers."
    )


def hf_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    for hf, name in MODEL_NAMES.items():
        if name == gguf_name:
            return hf
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", gguf_name)
    for hf, name in BLOCK_NAMES.items():
        if match and name == match[2]:
            return f"model.layers.{match[1]}.{hf}.weight"
    raise UserError(
        f"tensor {gguf_name}: not a part of a plain Llama, and leaving it out would give another model. "
        f"Use a GGUF file of a Llama without biases, experts or other extras."
    )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a Llama is made of, by Hugging Face's names and in the order of the model."""
    D, FF, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    block = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (q_rows, D),
        "self_attn.k_proj": (kv_rows, D),
        "self_attn.v_proj": (kv_rows, D),
        "self_attn.o_proj": (D, q_rows),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (FF, D),
        "mlp.up_proj": (FF, D),
        "mlp.down_proj": (D, FF),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def permute_rows(w: Tensor, num_heads: int) -> Tensor:
    """q_proj or k_proj from Hugging Face's row order to llama.cpp's: row i + hd / 2 of a head goes next to row i.

    Args:
        w: (num_heads * hd, ...).
        num_heads: query heads for q_proj, key/value heads for k_proj.
    """
    return w.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(w.shape)


def unpermute_rows(w: Tensor, num_heads: int) -> Tensor:
    """The way back: `unpermute_rows(permute_rows(w, n), n)` is w."""
    return w.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(w.shape)


def heads_to_permute(gguf_name: str, num_heads: int, num_kv_heads: int) -> int | None:
    """How many heads the rows of this tensor are shuffled in; None for the tensors that stay as they are."""
    if gguf_name.endswith(".attn_q.weight"):
        return num_heads
    if gguf_name.endswith(".attn_k.weight"):
        return num_kv_heads
    return None


# ------------------------------------------------------------------------------------------------ reading


class TensorInfo(NamedTuple):
    """One line of the tensor table."""

    shape: tuple[int, ...]  # in PyTorch's order
    ggml_type: str  # a key of ggml_blocks.FORMATS
    offset: int  # of its first byte, from the start of the file
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An open GGUF file. The weights stay on disk until `load` asks for one of them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def load(self, name: str) -> Tensor:
        """One tensor by its GGUF name, as float32, with its rows as they lie in the file."""
        info = self.tensors[name]
        return dequantize(self.raw(name).flatten(), info.ggml_type, info.shape)  # a copy, whatever the type

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor, mapped, row by row: (n_out, bytes of a row) uint8; of a vector one row."""
        info = self.tensors[name]
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)
        return raw.view(math.prod(info.shape[:-1]), -1)

    def load_hf(self, hf_name: str) -> Tensor:
        """One tensor by its Hugging Face name, as float32, with its rows in Hugging Face's order."""
        name = gguf_name(hf_name)
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor {name}, which is {hf_name} of the model. Get a whole file.")
        w = self.load(name)
        num_heads = self.number("llama.attention.head_count", int)
        heads = heads_to_permute(name, num_heads, self.number("llama.attention.head_count_kv", int, num_heads))
        return unpermute_rows(w, heads) if heads else w

    def number(self, key: str, kind: type[int] | type[float], default: float | None = None) -> Any:
        """A number of the metadata that has to be there, unless there is a default, and has to be above zero."""
        value = self.metadata.get(key, default)
        if type(value) is not kind or not value > 0:
            raise UserError(
                f"{self.path}: metadata {key} is {_short(value)}, and a Llama cannot be built without a number of type "
                f"{kind.__name__} above zero there. Convert the model again with a current converter."
            )
        # 1e-5 comes back from float32 as 9.99999974e-06: take the shortest number that is the same in float32.
        return float(str(np.float32(value))) if kind is float else value


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Header:
    """Reads the part before the data, and never believes a number that the file is too short for."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def wrong(self, found: str) -> UserError:
        return UserError(
            f"{self.path}: {found}, so this is not an intact GGUF file. Download or export it again, and compare "
            f"its size or checksum with the source."
        )

    def take(self, count: int, what: str) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.data):
            raise self.wrong(
                f"truncated: it ends after {len(self.data)} bytes, {self.position - len(self.data)} bytes short of "
                f"the end of {what} at byte {start}"
            )
        return self.data[start : self.position]

    def scalars(self, kind: str, count: int, what: str) -> list[Any]:
        code = f"<{count}{STRUCT_CODES[kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code), what)))

    def u32(self, what: str) -> int:
        return self.scalars("u32", 1, what)[0]

    def u64(self, what: str) -> int:
        return self.scalars("u64", 1, what)[0]

    def count(self, what: str, bytes_each: int) -> int:
        """A u64 that says how many things follow, which take at least so many bytes each."""
        count, left = self.u64(what), len(self.data) - self.position
        if count * bytes_each > left:
            raise self.wrong(f"truncated or damaged: {what} is {count}, and only {left} bytes follow")
        return count

    def string(self, what: str) -> str:
        data = self.take(self.count(f"the length of {what}", bytes_each=1), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 text ({_short(data)})") from error

    def strings(self, count: int, what: str) -> list[str]:
        """Many of them: `string` without its checks wherever nothing is wrong, since a vocabulary has 100,000."""
        found, data, read_length = [], self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            try:
                start = self.position + 8
                end = start + read_length(data, self.position)[0]
                found.append(data[start:end].decode("utf-8"))
            except (struct.error, UnicodeDecodeError, OverflowError, IndexError):
                end = math.inf
            if end > len(data):
                self.string(what)  # says what is wrong
            self.position = end
        return found

    def value(self, what: str) -> Any:
        """A metadata value with its type in front; arrays as lists."""
        kind = TYPE_NAMES.get(self.u32(f"the type of {what}"))
        if kind != "array":
            return self.items(kind, 1, what)[0]
        kind = TYPE_NAMES.get(self.u32(f"the element type of {what}"))
        return self.items(kind, self.count(f"the length of {what}", bytes_each=1), what)

    def items(self, kind: str | None, count: int, what: str) -> list[Any]:
        if kind == "string":
            return self.strings(count, what)
        if kind not in STRUCT_CODES:
            raise self.wrong(f"{what} has a type that does not exist or may not stand there")
        return self.scalars(kind, count, what)


def read_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file: read its metadata and its tensor table, and check that all of the data is there.

    Cost: no weights are read. The token lists of a big vocabulary take about half a second.
    Raises:
        UserError: the file is missing, damaged, cut short, or has a tensor type that cannot be read here.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch asks for a map it could write to
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise UserError(f"{path}: cannot be opened as a GGUF file ({error}). Give the path of a .gguf file.") from error
    header = _Header(path, data)
    if data[:4] != MAGIC:
        raise header.wrong(f"it starts with {data[:4]!r} and not with {MAGIC!r}")
    header.take(len(MAGIC), "the magic")
    version = header.u32("the version")
    if version not in (2, VERSION):
        raise UserError(
            f"{path}: GGUF version {version}; only 2 and {VERSION} can be read here (a version with many digits is a "
            f"file for big-endian machines). Convert the model again with a current, little-endian converter."
        )
    num_tensors = header.count("the number of tensors", bytes_each=8 + 4 + 8 + 4 + 8)
    num_entries = header.count("the number of metadata entries", bytes_each=8 + 4 + 1)

    metadata: dict[str, Any] = {}
    for i in range(num_entries):
        key = header.string(f"metadata key {i}")
        if key in metadata:
            raise header.wrong(f"metadata {key} appears twice")
        metadata[key] = header.value(f"metadata {key}")
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise header.wrong(f"metadata general.alignment is {_short(alignment)} and not a power of two")

    tensors: dict[str, TensorInfo] = {}
    for i in range(num_tensors):
        name = header.string(f"the name of tensor {i}")
        if name in tensors:
            raise header.wrong(f"tensor {name} appears twice")
        tensors[name] = _read_tensor_info(header, name, alignment)

    start = _align(header.position, alignment)
    tensors = {name: info._replace(offset=start + info.offset) for name, info in tensors.items()}
    _check_data(header, tensors)
    return GGUFFile(path, metadata, tensors, data)


def _align(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def _read_tensor_info(header: _Header, name: str, alignment: int) -> TensorInfo:
    """One line of the tensor table, its offset still counted from the start of the data."""
    num_dims = header.u32(f"the dimensions of tensor {name}")
    if not 1 <= num_dims <= 4:
        raise header.wrong(f"tensor {name} has {num_dims} dimensions, where 1 to 4 are possible")
    shape = tuple(header.u64(f"the shape of tensor {name}") for _ in range(num_dims))[::-1]
    type_id = header.u32(f"the type of tensor {name}")
    offset = header.u64(f"the offset of tensor {name}")
    ggml_type = next((name for name, fmt in FORMATS.items() if fmt.type_id == type_id), None)
    if ggml_type is None:
        raise UserError(
            f"{header.path}: tensor {name} is of type {type_id}, which cannot be read here. "
            f"Use a file whose tensors are {', '.join(FORMATS)}."
        )
    fmt = FORMATS[ggml_type]
    if 0 in shape or shape[-1] % fmt.block_size:
        raise header.wrong(f"tensor {name} has shape {shape}, impossible for {ggml_type} blocks of {fmt.block_size}")
    if offset % alignment:
        raise header.wrong(f"tensor {name} starts at offset {offset}, which is not a multiple of {alignment}")
    return TensorInfo(shape, ggml_type, offset, fmt.num_bytes(math.prod(shape)))


def _check_data(header: _Header, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor has to lie inside the file and after the one before it."""
    end, before = header.position, "the header"
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise header.wrong(f"tensor {name} starts inside {before}")
        end, before = info.offset + info.num_bytes, f"tensor {name}"
    if end > len(header.data):
        broken = [name for name, info in tensors.items() if info.offset + info.num_bytes > len(header.data)]
        raise header.wrong(
            f"truncated: it has {len(header.data)} bytes and its tensors need {end}, so {end - len(header.data)} "
            f"bytes are missing and {len(broken)} of {len(tensors)} tensors are incomplete, {broken[0]} first"
        )


# ------------------------------------------------------------------------------------------------ config.json


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """What config.json would say of this model, with the older RoPE keys that every reader knows.

    Raises:
        UserError: not a plain Llama, or numbers or tensors of it are missing.
    """
    meta = gguf.metadata
    _refuse_other_models(gguf)
    num_layers, num_heads = gguf.number("llama.block_count", int), gguf.number("llama.attention.head_count", int)
    hidden_size = gguf.number("llama.embedding_length", int)
    head_dim = gguf.number("llama.attention.key_length", int, hidden_size // num_heads)
    is_tied = "output.weight" not in gguf.tensors

    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.number("llama.feed_forward_length", int),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.number("llama.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in gguf.tensors else 1,
        "max_position_embeddings": gguf.number("llama.context_length", int),
        "rms_norm_eps": gguf.number("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": gguf.number("llama.rope.freq_base", float, 10000.0),
        "rope_scaling": None,
        "tie_word_embeddings": is_tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    ends = dict.fromkeys(meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    if len(ends := [id for id in ends if id is not None]) > 1:
        config["eos_token_id"] = ends
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if gguf.number(key, int, head_dim) != head_dim:
            raise UserError(
                f"{gguf.path}: metadata {key} is {meta[key]} where a head has {head_dim} dimensions, and in a Llama "
                f"these are equal. Use another model."
            )
    _check_tensors(gguf, config)
    kind = meta.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in meta else "none")
    if kind == "linear":
        factor = gguf.number("llama.rope.scaling.factor", float, meta.get("llama.rope.scale_linear"))
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind != "none":
        raise UserError(f"{gguf.path}: RoPE scaling {_short(kind)} is not supported; known are linear and llama3.")
    if ROPE_DIVISORS in gguf.tensors:
        config["rope_scaling"] = _llama3_scaling(gguf, config)
    return config


def _refuse_other_models(gguf: GGUFFile) -> None:
    meta = gguf.metadata
    if meta.get("general.architecture") != "llama":
        raise UserError(
            f"{gguf.path}: metadata general.architecture is {_short(meta.get('general.architecture'))}; only llama can "
            f"be read here, because other architectures compute something else. Use a Llama, Mistral or SmolLM file."
        )
    if meta.get("general.type", "model") != "model":
        raise UserError(f"{gguf.path}: holds a {_short(meta['general.type'])}, not a model. Give the model's file.")
    if meta.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{gguf.path}: is one of {meta['split.count']} parts of a model, and only whole files can be read here. "
            f"Join them with llama.cpp's gguf-split --merge."
        )
    if meta.get("llama.expert_count", 0):
        raise UserError(f"{gguf.path}: a mixture of {meta['llama.expert_count']} experts; only dense Llamas are read.")


def _check_tensors(gguf: GGUFFile, config: dict[str, Any]) -> None:
    """The tensors have to be those of this Llama: none missing, none left over, each of the right shape."""
    num_layers = min(config["num_hidden_layers"], len(gguf.tensors))  # a damaged count would keep us busy for hours
    try:
        shapes = tensor_shapes(ModelConfig.from_hf(config | {"num_hidden_layers": num_layers}))
    except ValueError as error:
        raise UserError(f"{gguf.path}: by its metadata {error}.") from error
    expected = {gguf_name(name): shape for name, shape in shapes.items()}
    missing = [name for name in expected if name not in gguf.tensors]
    if missing:
        raise UserError(
            f"{gguf.path}: {len(missing)} tensors of a Llama with {config['num_hidden_layers']} layers are missing, "
            f"{missing[0]} first, and the model cannot be built without them. Get a whole file."
        )
    for name, info in gguf.tensors.items():
        if name == ROPE_DIVISORS:
            continue
        hf_name(name)  # raises for a tensor that no Llama has
        if info.shape != expected.get(name):
            raise UserError(
                f"{gguf.path}: tensor {name} has shape {info.shape}, and by the metadata it should have "
                f"{expected.get(name, 'no place in the model')}. The file contradicts itself: get another one."
            )


def _llama3_scaling(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """Find the llama3 rope_scaling whose divisors are those in the file.

    The divisor of a pair goes from 1 to `factor` as its turns within the original context go from `high_freq_factor`
    down to `low_freq_factor`, on a straight line in 1 / divisor. Only the ratios of the context and of these two
    factors can be seen, so low_freq_factor is taken to be 1, as in every published model.
    """
    divisors = gguf.load(ROPE_DIVISORS).double()
    plain = ModelConfig.from_hf(config | {"rope_scaling": None})
    factor = float(str(np.float32(divisors.max())))
    if divisors.shape == (plain.head_dim // 2,) and torch.equal(divisors, torch.ones_like(divisors)):
        return None
    candidates = [(4.0, 8192)]  # Llama 3.1 to 3.3: tried first, since small heads may have no pair on the line
    frequencies = rope_frequencies(plain).double()
    on_line = (divisors > 1) & (divisors < factor)
    if divisors.shape == frequencies.shape and on_line.sum() >= 2:
        height = (1 / divisors[on_line] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(frequencies[on_line] / (2 * math.pi), height, deg=1)
        if start < -1e-6:  # the line is (context * frequency / 2 pi - 1) / (high - 1)
            candidates.append((round(float(1 - 1 / start), 4), round(float(slope * -1 / start))))
    for high, context in candidates:
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        rebuilt = rope_divisors(replace(plain, rope_scaling=scaling)).double()
        if rebuilt.shape == divisors.shape and torch.allclose(rebuilt, divisors, rtol=1e-4, atol=0):
            return scaling
    raise UserError(
        f"{gguf.path}: {ROPE_DIVISORS} is not what the llama3 kind of RoPE scaling gives for any original context, and "
        f"config.json knows no other that fits. Take the model from its Hugging Face folder instead."
    )


def rope_divisors(config: ModelConfig) -> Tensor:
    """By what llama3 scaling slows the rotation of each pair, (hd / 2,) float32: between 1 and the factor."""
    return rope_frequencies(replace(config, rope_scaling={})) / rope_frequencies(config)


def model_metadata(config: ModelConfig, name: str, file_type: str) -> Metadata:
    """The way back: what a GGUF file says of a model, without its tokenizer.

    Args:
        file_type: a key of `FILE_TYPES`.
    """
    metadata: Metadata = {
        "general.architecture": ("string", "llama"),
        "general.type": ("string", "model"),
        "general.name": ("string", name),
        "general.file_type": ("u32", FILE_TYPES[file_type]),
        "general.quantization_version": ("u32", 2),
        "llama.block_count": ("u32", config.num_hidden_layers),
        "llama.context_length": ("u32", config.max_position_embeddings),
        "llama.embedding_length": ("u32", config.hidden_size),
        "llama.feed_forward_length": ("u32", config.intermediate_size),
        "llama.vocab_size": ("u32", config.vocab_size),
        "llama.attention.head_count": ("u32", config.num_attention_heads),
        "llama.attention.head_count_kv": ("u32", config.num_key_value_heads),
        "llama.attention.key_length": ("u32", config.head_dim),
        "llama.attention.value_length": ("u32", config.head_dim),
        "llama.attention.layer_norm_rms_epsilon": ("f32", config.rms_norm_eps),
        "llama.rope.dimension_count": ("u32", config.head_dim),
        "llama.rope.freq_base": ("f32", config.rope_theta),  # without it readers take 10000
    }
    if config.rope_scaling.get("rope_type") == "linear":
        metadata["llama.rope.scaling.type"] = ("string", "linear")
        metadata["llama.rope.scaling.factor"] = ("f32", config.rope_scaling["factor"])
    return metadata


# ------------------------------------------------------------------------------------------------ writing


class NewTensor(NamedTuple):
    """A tensor to be written. Its bytes are made when their turn comes."""

    name: str  # GGUF's
    shape: tuple[int, ...]  # in PyTorch's order
    ggml_type: str  # a key of ggml_blocks.FORMATS
    produce: Callable[[], Tensor]  # -> uint8, the bytes of `ggml_blocks.quantize`


def write_gguf(path: str | Path, metadata: Metadata, tensors: list[NewTensor]) -> None:
    """Write a GGUF file, whole or not at all.

    The table of tensors comes first, from the shapes and types alone. Then each tensor is produced, written and
    forgotten, so the peak memory is one tensor, or on a CPU one for each thread, however large the model.

    Args:
        metadata: values with their types spelled out, because readers are strict: llama.cpp refuses a u64 where it
            expects a u32.
        tensors: written in this order.
    """
    table, offset = b"", 0
    for tensor in tensors:
        fmt, num_dims = FORMATS[tensor.ggml_type], len(tensor.shape)
        table += _encode_string(tensor.name)
        table += struct.pack(f"<I{num_dims}Q", num_dims, *reversed(tensor.shape))
        table += struct.pack("<IQ", fmt.type_id, offset)
        offset = _align(offset + fmt.num_bytes(math.prod(tensor.shape)), ALIGNMENT)

    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    header += b"".join(_encode_string(key) + _encode_value(*value) for key, value in metadata.items())

    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(header + table)
        _pad(file)
        pieces = [tensor.produce for tensor in tensors]
        made = (piece() for piece in pieces) if torch.cuda.is_available() else in_threads(pieces)
        for tensor, raw in zip(tensors, made, strict=True):
            num_bytes = FORMATS[tensor.ggml_type].num_bytes(math.prod(tensor.shape))
            assert raw.numel() == num_bytes, f"{tensor.name}: {raw.numel()} bytes, but the table says {num_bytes}"
            file.write(raw.cpu().contiguous().numpy())
            _pad(file)  # the last one too: older readers insist


def _pad(file: BinaryIO) -> None:
    """Zeros up to the next multiple of the alignment."""
    file.write(bytes(-file.tell() % ALIGNMENT))


def _encode_string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _encode_value(kind: str, value: Any) -> bytes:
    """A metadata value with its type in front. Of an array: that it is one, its elements' type, their count."""
    if not kind.endswith("[]"):
        return struct.pack("<I", VALUE_TYPES[kind]) + _encode_items(kind, [value])
    kind = kind.removesuffix("[]")
    return struct.pack("<IIQ", VALUE_TYPES["array"], VALUE_TYPES[kind], len(value)) + _encode_items(kind, value)


def _encode_items(kind: str, items: list[Any]) -> bytes:
    if kind == "string":
        return b"".join(_encode_string(item) for item in items)
    return struct.pack(f"<{len(items)}{STRUCT_CODES[kind]}", *items)
