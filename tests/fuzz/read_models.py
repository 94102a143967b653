"""Readers of weights and of what says how they are computed with."""

import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import torch
from mutate import SIZES, STRINGS, dump, mutate_bytes, mutate_json
from right import base, bytes_of, json_of, linked, put, work
from use import use_model, use_tokenizer

from nanoqlora.config.errors import UserError

Make = Callable[[Random], bytes]
OF_MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def folder_reader(name: str, file: str, source: str = "hf", others: tuple[str, ...] = OF_MODEL) -> Callable:
    """Reads the model of a folder in which one file is changed."""

    def read(data: bytes, rng: Random) -> None:
        folder = linked(name, source, *(other for other in others if other != file))
        put(folder / file, data)
        use_model(folder, rng)

    return read


# ------------------------------------------------------------------------------------------------ GGUF


@cache
def gguf_parts(name: str) -> dict[str, Any]:
    """A GGUF file taken apart: entries as [key, bytes of type and value], tensors, data."""
    from nanoqlora.gguf import reader

    raw = bytes_of(name)
    header = reader._Header(base() / name, raw)
    header.position = 8
    num_tensors, num_entries = header.number("u64", ""), header.number("u64", "")
    entries, tensors = [], []
    for _ in range(num_entries):
        key, start = header.string(""), header.position
        header.value("")
        entries.append([key, raw[start : header.position]])
    for _ in range(num_tensors):
        tensor = header.string("")
        dims = header.scalars("u64", header.number("u32", ""), "")
        tensors.append([tensor, dims, header.number("u32", ""), header.number("u64", "")])
    start = header.position + -header.position % 32
    return {"entries": entries, "tensors": tensors, "data": raw[start:], "header": start}


def gguf_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
FLOATS = [0.0, -1.0, 1e-5, math.nan, math.inf, -math.inf, 1e30, 1e-40]


def gguf_value(rng: Random) -> bytes:
    """A value of metadata of any type, with its type in front."""
    kind = rng.randrange(14)
    head = struct.pack("<I", kind)
    if code := CODES.get(kind):
        if code in "fd?":
            return head + struct.pack(f"<{code}", rng.choice(FLOATS if code != "?" else [True, False]))
        size = struct.calcsize(code)
        return head + (rng.choice(SIZES) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if kind == 8:
        return head + gguf_text(rng.choice([*STRINGS, "llama", "gpt2", "linear", "yarn", "adapter"]))
    if kind != 9:
        return struct.pack("<I", kind + 90)
    inner, count = rng.choice([4, 5, 6, 8, 9, 99, 0]), rng.choice([0, 1, 3, 300, 2**40])
    items = range(min(count, 300))
    if inner == 8:
        body = b"".join(gguf_text(rng.choice(STRINGS)) for _ in items)
    else:
        body = b"".join(struct.pack("<I", rng.choice(SIZES) & 0xFFFFFFFF) for _ in items)
    return head + struct.pack("<IQ", inner, count) + body


OTHER_KEYS = [
    *("llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.scale_linear", "llama.rope.dimension_count"),
    *("llama.attention.key_length", "llama.attention.value_length", "llama.expert_count", "split.count"),
    *("general.alignment", "general.type", "general.architecture", "llama.rope.freq_base"),
]
OTHER_TENSORS = ["blk.0.attn_q.bias", "blk.99999999999999999999.attn_q.weight", "rope_freqs.weight"]
OTHER_TENSORS += ["blk.\u0665.attn_q.weight"]
TYPES = [0, 1, 2, 3, 6, 7, 8, 9, 10, 12, 13, 14, 24, 30, 31, 99, 2**32 - 1]


def change_tensor(tensor: list[Any], rng: Random) -> None:
    what = rng.randrange(6)
    if what == 0:
        tensor[0] = rng.choice([*STRINGS, *OTHER_TENSORS])
    elif what == 1:
        tensor[1] = [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 2, 3, 4, 5]))]
    elif what == 2:
        tensor[1] = tensor[1][::-1]
    elif what == 3:
        tensor[2] = rng.choice(TYPES)
    elif what == 4:
        tensor[3] = rng.choice([*SIZES, rng.randrange(0, 10**6) * 32])
    else:
        tensor[1] = [int(d * rng.choice([0, 1, 2, 0.5])) for d in tensor[1]]


def make_gguf_fields(rng: Random) -> bytes:
    """Well-formed files with other values, keys, shapes, types, counts and divisors of RoPE."""
    parts = gguf_parts(rng.choice(["hf.gguf", "hf-q8.gguf", "hf-q8.gguf", "sp.gguf"]))
    entries, data = [list(entry) for entry in parts["entries"]], parts["data"]
    tensors = [[name, list(dims), kind, offset] for name, dims, kind, offset in parts["tensors"]]
    version, more_tensors, more_entries = 3, 0, 0
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.random()
        if kind < 0.35:
            rng.choice(entries)[1] = gguf_value(rng)
        elif kind < 0.45:
            entries.pop(rng.randrange(len(entries)))
        elif kind < 0.58:
            entries.append([rng.choice([*OTHER_KEYS, *STRINGS[:20]]), gguf_value(rng)])
        elif kind < 0.63:
            entry = rng.choice(entries)
            entry[1] = mutate_bytes(entry[1], rng)
        elif kind < 0.83:
            change_tensor(rng.choice(tensors), rng)
        elif kind < 0.9:
            divisors = [rng.choice([1.0, 1.0, 2.0, 8.0, *FLOATS]) for _ in range(rng.choice([16, 16, 16, 8, 1, 32]))]
            at = len(data) + -len(data) % 32
            data = data.ljust(at, b"\0") + struct.pack(f"<{len(divisors)}f", *divisors) + bytes(64)
            tensors.append(["rope_freqs.weight", [len(divisors)], 0, at])
        elif kind < 0.93:
            tensors.pop(rng.randrange(len(tensors)))
        elif kind < 0.95:
            tensors.append(rng.choice(tensors))
        elif kind < 0.97:
            version = rng.choice([0, 1, 2, 4, 2**31])
        else:
            more_tensors, more_entries = rng.choice([0, 1, 2**40, 2**64 - 9]), rng.choice([0, 1, 2**50])
    return write_gguf(version, tensors, entries, data, more_tensors, more_entries)


def write_gguf(version: int, tensors: list, entries: list, data: bytes, more_tensors: int = 0, more_entries: int = 0):
    clip = (1 << 64) - 1
    counts = (len(tensors) + more_tensors) & clip, (len(entries) + more_entries) & clip
    out = b"GGUF" + struct.pack("<IQQ", version, *counts)
    out += b"".join(gguf_text(key) + raw for key, raw in entries)
    for name, dims, kind, offset in tensors:
        out += gguf_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", kind & 0xFFFFFFFF, offset & clip)
    return out + bytes(-len(out) % 32) + data


TOKEN_KEYS = [f"tokenizer.ggml.{name}" for name in ("model", "pre", "tokens", "token_type", "merges", "scores")]
TOKEN_KEYS += [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "unknown", "padding", "separator")]
TOKEN_KEYS += [f"tokenizer.ggml.{name}" for name in ("add_bos_token", "add_space_prefix")] + ["tokenizer.chat_template"]


def make_gguf_tokenizer(rng: Random) -> bytes:
    """Files whose fields of the tokenizer have other values, with lists in which single items are others."""
    parts = gguf_parts(rng.choice(["hf-q8.gguf", "sp.gguf"]))
    entries = [list(entry) for entry in parts["entries"]]
    for _ in range(rng.choice([1, 1, 2, 4])):
        key = rng.choice(TOKEN_KEYS)
        entry = next((entry for entry in entries if entry[0] == key), None)
        if entry is None:
            entries.append([key, gguf_value(rng)])
        elif rng.random() < 0.5 and len(entry[1]) > 60:  # a list: change some of its bytes
            entry[1] = entry[1][:16] + mutate_bytes(entry[1][16:], rng)
        else:
            entry[1] = gguf_value(rng)
    return write_gguf(3, parts["tensors"], entries, parts["data"])


def make_gguf_bytes(rng: Random) -> bytes:
    name = rng.choice(["hf-q8.gguf", "sp.gguf", "hf-q8.gguf"])
    end = gguf_parts(name)["header"]
    return mutate_bytes(bytes_of(name), rng, within=rng.choice([64, 600, 1500, end, end, None]))


def read_gguf(data: bytes, rng: Random) -> None:
    path, wrong = put(work() / "model.gguf", data), None
    try:
        use_model(path, rng)
    except UserError as error:
        wrong = error
    use_tokenizer(path, rng)
    if wrong:
        raise wrong


# ------------------------------------------------------------------------------------------------ safetensors

DTYPES = "F64 F32 F16 BF16 I64 I32 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 U16 U64 XX".split()
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U16": 2, "U64": 8, "C64": 8}


def change_entry(tree: dict[str, Any], data: bytes, rng: Random) -> bytes:
    """Another dtype, shape, name or place for a tensor in the header; or other data."""
    name = rng.choice([key for key in tree if key != "__metadata__"])
    entry, what = tree[name], rng.randrange(5)
    start, end = entry["data_offsets"]
    if what == 0:
        entry["dtype"] = rng.choice(DTYPES)
        if entry["shape"]:  # that fits the bytes which are there
            rest = max(1, math.prod(entry["shape"][1:]))
            entry["shape"][0] = (end - start) // WIDTHS.get(entry["dtype"], 1) // rest
    elif what == 1:
        entry["shape"] = rng.choice([[], [0], [1], entry["shape"][::-1], [*entry["shape"], 1], [2**62, 4], [-1]])
    elif what == 2:
        others = ["model.layers.0.mlp.up_proj.bias", "model.layers.7.mlp.up_proj.weight"]
        tree[rng.choice([*STRINGS, *others])] = tree.pop(name)
    elif what == 3:
        others = [[end, start], [start, start], [start + 4, end], [0, len(data)], [start, end + 8], [2**63, 2**64]]
        entry["data_offsets"] = rng.choice(others)
    elif rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    else:
        return struct.pack("<f", math.nan) * (len(data) // 4)
    return data


def safetensors_of(raw: bytes, rng: Random) -> bytes:
    """A wrong file of a right one."""
    size = struct.unpack("<Q", raw[:8])[0]
    tree, data, kind = json.loads(raw[8 : 8 + size]), raw[8 + size :], rng.random()
    if kind < 0.25:
        return mutate_bytes(raw, rng, within=8 + size)
    if kind < 0.7:
        tree = mutate_json(tree, rng)
    else:
        for _ in range(rng.choice([1, 2])):
            data = change_entry(tree, data, rng)
    text = dump(tree, rng)
    return struct.pack("<Q", len(text)) + text + data


def make_safetensors(rng: Random) -> bytes:
    return safetensors_of(bytes_of("hf/model.safetensors"), rng)


OTHER_FILES = ["../hf/model.safetensors", "/etc/passwd", "..", ".", "", "/", "model.safetensors\0", "link.safetensors"]
OTHER_FILES += ["folder.safetensors", "a" * 300, "./model.safetensors", "x/../model.safetensors", "config.json"]
OTHER_FILES += ["MODEL.safetensors", "~", "\ud800"]


def make_index(rng: Random) -> bytes:
    raw = bytes_of("hf/model.safetensors")
    names = [name for name in json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]) if name != "__metadata__"]
    tree: Any = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    for _ in range(rng.choice([1, 2, 4])):
        if rng.random() < 0.6:
            tree["weight_map"][rng.choice([*names, *STRINGS[:6]])] = rng.choice(OTHER_FILES)
            continue
        tree = mutate_json(tree, rng, times=1)
        if not isinstance(tree, dict) or not isinstance(tree.get("weight_map"), dict):
            break
    return dump(tree, rng)


def read_index(data: bytes, rng: Random) -> None:
    folder = linked("index", "hf", *OF_MODEL)
    (folder / "folder.safetensors").mkdir(exist_ok=True)
    (folder / "link.safetensors").unlink(missing_ok=True)
    if b"link.safetensors" in data:  # else all would be refused for it
        (folder / "link.safetensors").symlink_to("/etc/passwd")
    put(folder / "model.safetensors.index.json", data)
    use_model(folder, rng)


# ------------------------------------------------------------------------------------------------ settings

CONFIG_KEYS = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size rope_theta "
CONFIG_KEYS += "intermediate_size max_position_embeddings rms_norm_eps rope_parameters architectures model_type "
CONFIG_KEYS += "tie_word_embeddings quantization_config sliding_window transformers_weights rope_scaling eos_token_id"
ROPE_KEYS = "factor rope_theta original_max_position_embeddings low_freq_factor high_freq_factor rope_type type"


def make_config(rng: Random) -> bytes:
    tree = json_of("hf/config.json") | {"rope_scaling": None}
    if rng.random() < 0.3:
        rope = {"rope_type": rng.choice(["llama3", "linear", "default"]), "rope_theta": 1e4, "factor": 8.0}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
        tree["rope_parameters"] = rope
    places = [(key,) for key in CONFIG_KEYS.split()] + [("rope_parameters", key) for key in ROPE_KEYS.split()]
    return dump(mutate_json(tree, rng, places=places if rng.random() < 0.8 else None), rng)


def make_generation(rng: Random) -> bytes:
    tree = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 2, "do_sample": True, "temperature": 0.6}
    tree |= {"top_p": 0.9, "top_k": 40, "min_p": 0.1, "typical_p": 1.0, "repetition_penalty": 1.1}
    return dump(mutate_json(tree, rng), rng)


def read_generation(data: bytes, rng: Random) -> None:
    from nanoqlora.weights.checkpoint import end_ids, ollama_parameters, open_weights, read_generation

    folder = linked("generation", "hf", *OF_MODEL)
    put(folder / "generation_config.json", data)
    found = read_generation(open_weights(folder))
    end_ids(found, first=[2])
    ollama_parameters(found)


def make_params(rng: Random) -> bytes:
    tree = json_of("meta/params.json") | {"head_dim": 32, "rope_theta": 1e4, "use_scaled_rope": False}
    tree |= {"rope_scaling_factor": 8.0, "multiple_of": 32, "ffn_dim_multiplier": 1.3}
    return dump(mutate_json(tree, rng), rng)


# ------------------------------------------------------------------------------------------------ Meta's weights

PICKLES = [
    *(
        b"",
        b"\x80\x02.",
        b"\x80\x02]q\x00.",
        b"cos\nsystem\n(S'echo run'\ntR.",
        pickle.dumps({1: 2}),
        pickle.dumps({3}),
    ),
    *(b"\x80\x02" + b"]" * 2000 + b"a" * 1999 + b".", pickle.dumps({"x": 1}, 5), b"\x80\x04\x95" + b"\xff" * 8),
    *(b"\x80\x02h\x05.", b"\x80\x02R."),
]
TENSORS: list[Callable[[], Any]] = [
    *(lambda: torch.zeros(3), lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.zeros(2, 2, 2)),
    *(lambda kind=kind: torch.zeros(64, 64).to(kind) for kind in (torch.int8, torch.bool, torch.complex64)),
    *(lambda kind=kind: torch.zeros(64, 64).to(kind) for kind in (torch.float64, torch.float8_e4m3fn)),
    *(lambda: torch.zeros(64, 64).to_sparse(), lambda: torch.zeros(64, 64, device="meta")),
    *(lambda: torch.zeros(1).expand(64, 64), lambda: torch.zeros(1).expand(2**20, 2**20)),
    *(lambda: torch.zeros(64, 64).t(), lambda: torch.full((64, 64), math.nan)),
    lambda: torch.nn.Parameter(torch.zeros(64, 64)),
    *(lambda value=value: value for value in ("text", 5, None, [1], {"a": {}})),
]
OTHER_NAMES = [1, None, (1, 2), "", "rope.freqs", "\ud800", b"x", 2.5, "layers.0.attention.wq.bias"]


def changed_zip(raw: bytes, rng: Random) -> bytes:
    """A zip of PyTorch's with another pickle, other bytes, or without a part."""
    source, out = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(out, "w") as changed:
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("data.pkl"):
                body = mutate_bytes(body, rng) if rng.random() < 0.8 else rng.choice(PICKLES)
            elif rng.random() < 0.05:
                body = mutate_bytes(body, rng)
            if rng.random() < 0.98:
                changed.writestr(name, body)
    return out.getvalue()


def make_pth(rng: Random) -> bytes:
    raw, kind = bytes_of("meta/consolidated.00.pth"), rng.random()
    if kind < 0.25:
        return mutate_bytes(raw, rng, within=rng.choice([300, 3000, None]))
    if kind < 0.35:
        return raw[: rng.randrange(len(raw))]
    if kind < 0.75:
        return changed_zip(raw, rng)
    state: Any = torch.load(io.BytesIO(raw), weights_only=True)
    for _ in range(rng.choice([1, 2])):
        name = rng.choice(list(state) if rng.random() < 0.7 else OTHER_NAMES)
        state[name] = rng.choice(TENSORS)()
    if rng.random() < 0.1:
        state = rng.choice([[], 5, None, {"a": {"b": 1}}, torch.zeros(3)])
    out = io.BytesIO()
    torch.save(state, out, _use_new_zipfile_serialization=rng.random() < 0.85)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ importance matrices


@cache
def imatrices() -> list[bytes]:
    """Right ones, in both formats of llama.cpp."""
    from nanoqlora.gguf.config import model_config
    from nanoqlora.gguf.imatrix import Imatrix, write_imatrix
    from nanoqlora.gguf.names import gguf_name, tensor_shapes

    shapes = tensor_shapes(model_config(json_of("hf/config.json"), base()))
    sums = {gguf_name(name): torch.rand(shape[1]) for name, shape in shapes.items() if len(shape) == 2}
    right, found = Imatrix(sums, dict.fromkeys(sums, 512), ["texts"], 1, 512), []
    for older in (False, True):
        write_imatrix(path := work() / "right.imatrix", right, older)
        found.append(path.read_bytes())
    return found


def make_imatrix(rng: Random) -> bytes:
    raw = rng.choice(imatrices())
    return mutate_bytes(raw, rng, within=rng.choice([64, 600, 2000, None]))


def read_imatrix(data: bytes, rng: Random) -> None:
    """A layer is quantised with what is taken."""
    from nanoqlora.gguf.config import model_config
    from nanoqlora.gguf.ggml_blocks import quantize
    from nanoqlora.gguf.imatrix import read_imatrix
    from nanoqlora.gguf.names import tensor_shapes

    measured = read_imatrix(path := put(work() / "imatrix", data))
    measured.note(path)
    importance = measured.of_model(tensor_shapes(model_config(json_of("hf/config.json"), base())))
    if rng.random() < 0.2:
        quantize(torch.ones(1, 64), "IQ4_NL", next(x for x in importance.values() if len(x) == 64))


OF_META = ("params.json", "consolidated.00.pth", "tokenizer.model")
READERS: dict[str, tuple[Make, Callable[[bytes, Random], None]]] = {
    "gguf_bytes": (make_gguf_bytes, read_gguf),
    "gguf_fields": (make_gguf_fields, read_gguf),
    "gguf_tokenizer": (make_gguf_tokenizer, read_gguf),
    "safetensors": (make_safetensors, folder_reader("safetensors", "model.safetensors")),
    "index": (make_index, read_index),
    "config": (make_config, folder_reader("config", "config.json")),
    "generation_config": (make_generation, read_generation),
    "params": (make_params, folder_reader("params", "params.json", "meta", OF_META)),
    "imatrix": (make_imatrix, read_imatrix),
    "pth": (make_pth, folder_reader("pth", "consolidated.00.pth", "meta", OF_META)),
}
