"""Weights in and out, one tensor at a time.

    open_weights(path)     a Hugging Face folder, Meta's or a GGUF file, with one interface: config, names, load(name)
    read_generation        generation_config.json: at which tokens answers end, and how its author would draw them
    write_shards           the files of a merged model

Every error names its file. Files are written atomically. Read next: `pretrained.py`, a Llama from these tensors.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from ..config.errors import UserError, note
from ..config.files import expect, read_json, write_text
from ..gguf.config import hf_config, model_config
from ..gguf.names import check_tensors, gguf_name, tensor_shapes
from ..gguf.reader import read_gguf
from .hub import local_path
from .meta import MetaWeights, is_meta_folder
from .tensor_files import reading

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
AGAIN = "Download or copy the checkpoint again."


class Tensors(Protocol):
    """Weights by Hugging Face's names, each made when it is asked for.

    `config` is config.json as a dict, and `where` its file. Of it, tie_word_embeddings is what the weights are.
    """

    config: dict[str, Any]
    where: Path

    def names(self) -> list[str]: ...

    def load(self, name: str) -> Tensor: ...


class Weights(Tensors, Protocol):
    """A checkpoint on disk."""

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        """The parts of a tensor as the files hold them, mapped, to be sliced by rows; each with its shape."""
        ...


def open_weights(path: str | Path) -> Weights:
    """Open a Hugging Face or Meta folder, a .gguf file, or a model by its hub name, without reading its weights.

    Raises:
        UserError: nothing of these, or by configuration and tensors no Llama that can be built here.
    """
    path = local_path(path)
    if path.is_dir():
        return MetaWeights(path) if is_meta_folder(path) else FolderWeights(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFWeights(path)
    found = "a file of another kind" if path.exists() else "nothing"
    advice = "Give the path of a folder with config.json and *.safetensors, or of a .gguf file"
    raise UserError(f"model {path}: found {found} there. {advice}.")


def fingerprint(weights: Weights) -> str:
    """A hash that knows a checkpoint again wherever it lies, and however its files are called and cut.

    Of each tensor: name, shape, and up to 8 rows as float32, the first and the last among them; of a GGUF file the
    stored bytes of such rows. Of a 70B model that is 100 MB.
    """
    digests = {}
    for name in weights.names():
        if name.endswith("rotary_emb.inv_freq"):  # which only some files have
            continue
        digest = hashlib.sha256()
        for part, shape in weights.stored(name):
            digest.update(str(list(shape)).encode())
            for row in sorted({i * (shape[0] - 1) // 7 for i in range(8)}) if shape and shape[0] else ():
                digest.update(part[row : row + 1].float().numpy().tobytes())
        digests[name] = digest.hexdigest()
    if digests.get(HEAD) == digests.get(EMBEDDING):  # tied: some files have both
        digests.pop(HEAD, None)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def check_name(where: str, name: str) -> None:
    """Raises UserError where a file names one that cannot lie beside it."""
    if Path(name).name != name or "\0" in name or len(name.encode()) > 255:
        raise UserError(f"{where} names {name}, which is outside of the folder or no name of a file. Refused.")


class FolderWeights:
    """A Hugging Face folder: config.json and one or more safetensors files, which are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, folder / "config.json"
        self.config = read_json(self.where)
        if about := self.config.get("quantization_config"):
            method = about.get("quant_method") if isinstance(about, dict) else about
            raise UserError(f"{self.where}: quantization_config.quant_method is {method!r}. Use the original weights.")
        self.handles: dict[str, Any] = {}
        self.places = self._places()  # of every tensor, the file that it is in and its name there
        if self.config.get("tie_word_embeddings") is True and HEAD in self.places:
            self.places.setdefault(EMBEDDING, self.places[HEAD])
            head, embedding = self.load(HEAD), self.load(EMBEDDING)
            if head.dtype == embedding.dtype and torch.equal(head[:1], embedding[:1]) and torch.equal(head, embedding):
                del self.places[HEAD]
            else:  # as in transformers: a head of its own in the file is the head
                self.config["tie_word_embeddings"] = False
        shapes = {name: self.stored(name)[0][1] for name in self.places}
        check_tensors(self.where, model_config(self.config, self.where), shapes)

    def _places(self) -> dict[str, tuple[str, str]]:
        """Those files that transformers reads. Others beside them are named, and what contradicts is refused."""
        folder, key = self.folder, "transformers_weights"
        single = expect(f"{self.where}: {key}", self.config.get(key), str | None) or "model.safetensors"
        check_name(f"{self.where}: {key}", single)
        index = folder / (single if single.endswith(".index.json") else "model.safetensors.index.json")
        weight_map = self._read_index(index) if index.is_file() else {}
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if single != index.name and (folder / single).is_file():
            if other := [file for file in files if file != single]:
                is_there = ", which is not there" if missing else ""
                what = f"holds {single}, and {index.name} beside it names other files, {other[0]} first{is_there}"
                raise UserError(f"{folder}: {what}: two checkpoints in one folder. Remove the wrong one.")
            files, missing = [single], []
        if missing:
            raise UserError(f"{folder / missing[0]}: {index.name} names this file, and it is missing. {AGAIN}")
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        if not files:
            found = others or sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt"))
            what = f"has config.json but neither {single} nor {index.name}; it holds {found[:3] or 'no weights'}"
            advice = "rename the file if it is the model" if others else "get the weights as safetensors"
            raise UserError(f"{folder}: {what}. Only these names are read, as in transformers: {advice}.")
        if others:
            read = index.name if weight_map else single
            note(f"{folder}: the weights are those of {read}; not read: {', '.join(others)}.")
        places: dict[str, tuple[str, str]] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118
                if name in places:
                    raise UserError(f"{folder}: tensor {name} is in {places[name][0]} and in {file}. {AGAIN}")
                places[name] = file, name
        for name, file in weight_map.items():
            if places.get(name) != (file, name):
                raise UserError(f"{folder / file}: tensor {name} cannot be read: it is not there. {AGAIN}")
        return places

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = expect(f"{index}: weight_map", read_json(index).get("weight_map"), dict[str, str])
        for file in {*weight_map.values()}:
            check_name(f"{index}: weight_map", file)
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self.handles:
            with reading(self.folder / file):
                self.handles[file] = safe_open(self.folder / file, framework="pt")
        return self.handles[file]

    def names(self) -> list[str]:
        return list(self.places)

    def load(self, name: str) -> Tensor:
        file, in_file = self.places[name]
        with reading(self.folder / file):
            w = self._open(file).get_tensor(in_file)
        if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            what = f"tensor {name} is of type {str(w.dtype).removeprefix('torch.')}"
            raise UserError(f"{self.folder / file}: {what}; float32, float16 and bfloat16 are read. Use another copy.")
        return w

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        file, in_file = self.places[name]
        with reading(self.folder / file):
            part = self._open(file).get_slice(in_file)
            return [(part, part.get_shape())]


class GGUFWeights:
    """A GGUF file of the llama architecture, dequantised to float32 tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.file, self.where = read_gguf(path), path
        self.config = hf_config(self.file)

    def names(self) -> list[str]:
        return list(tensor_shapes(model_config(self.config, self.where)))

    def load(self, name: str) -> Tensor:
        return self.file.load_hf(name)

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        raw = self.file.raw(gguf_name(name))
        return [(raw, raw.shape)]


# ------------------------------------------------------------------------------------------------ how it answers

# What Ollama calls transformers' settings. The first acts on every answer, the others where tokens are drawn.
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty", "temperature": "temperature"}
OLLAMA_NAMES |= {name: name for name in ("top_k", "top_p", "min_p", "typical_p")}
NAMED_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(weights: Weights) -> dict[str, Any]:
    """generation_config.json beside a model's weights, with config.json's tokens where it names none.

    As transformers does. A merge keeps the base's end tokens and puts the one that training ended answers with first;
    the export writes them all.

    Raises:
        UserError: an end token that is no token, or a setting of `OLLAMA_NAMES` that is not a number.
    """
    path, num_tokens = weights.where.with_name("generation_config.json"), weights.config["vocab_size"]
    found = read_json(path) if path.is_file() and weights.where.name == "config.json" else {}
    where = path if "eos_token_id" in found else weights.where
    found = {name: weights.config[name] for name in NAMED_IDS if weights.config.get(name) is not None} | found
    for id in end_ids(found):
        if type(id) is not int or not 0 <= id < num_tokens:
            raise UserError(f"{where}: eos_token_id holds {json.dumps(id)}, and tokens are 0 to {num_tokens - 1}.")
    for name in OLLAMA_NAMES:
        value = found.get(name)
        if value is not None and not (type(value) in (int, float) and abs(value) < 1e9):
            shown = json.dumps(value)[:40]
            raise UserError(f"{path}: {name} is {shown}, not a number that it can be. Correct or remove it.")
    return found


def end_ids(generation: dict[str, Any], first: Iterable[int | None] = ()) -> list[int]:
    """Every end token once, those of `first` in front."""
    ends, found = generation.get("eos_token_id"), list[Any]()
    for id in [*first, *(ends if isinstance(ends, list) else [ends])]:
        if id is not None and id not in found:  # a file may hold what has no hash
            found.append(id)
    return found


def ollama_parameters(generation: dict[str, Any]) -> list[tuple[str, int | float]]:
    """The same settings as PARAMETERs of a Modelfile, which has no other names for them than Ollama's options."""
    given = {name: generation[name] for name in OLLAMA_NAMES if generation.get(name) is not None}
    if generation.get("do_sample") is False:  # then transformers takes the likeliest token
        given = {name: given[name] for name in given if name == "repetition_penalty"} | {"temperature": 0}
    parameters = [(OLLAMA_NAMES[name], int(value) if name == "top_k" else value) for name, value in given.items()]
    # Transformers looks back on everything, Ollama by itself on 64 tokens.
    return parameters + [("repeat_last_n", -1)] * ("repetition_penalty" in given)


# ------------------------------------------------------------------------------------------------ writing models

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_shards(
    folder: Path, weights: Tensors, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or several files with an index; memory holds one tensor at a time.

    Args:
        weights: each tensor is loaded when its turn to be written has come.
        tensors: shape and dtype of those to write, in this order.
    """
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    shards: list[list[str]] = []
    for name, size in sizes.items():
        if not shards or sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count, places = len(shards), dict[str, str]()
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        places |= dict.fromkeys(names, file)
        write_tensors(folder / file, {name: tensors[name] for name in names}, weights.load, {"format": "pt"})
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def write_tensors(
    path: Path,
    tensors: Mapping[str, tuple[Sequence[int], torch.dtype]],
    load: Callable[[str], Tensor],
    metadata: dict[str, str],
) -> None:
    """Write a safetensors file; equal tensors make equal bytes, which the library does not promise.

    A file is the length of its header (u64), the header, and the values of all tensors. The header has the place of
    each one, so it is made of their shapes before the first of them is loaded.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that values stand where their processor wants them
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in tensors.items():
            w = load(name).cpu()
            assert (tuple(w.shape), w.dtype) == (tuple(shape), dtype), name
            out.write(w.contiguous().view(-1).view(torch.uint8).numpy().data)
            del w  # else it would be held while the next one is loaded
