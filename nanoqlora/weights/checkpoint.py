"""Weights in and out, one tensor at a time.

    open_weights(path)     a Hugging Face folder, Meta's or a GGUF file, with one interface: config, names, load(name)
    write_shards           the files of a merged model

Every error names its file. Files are written atomically. Read next: `pretrained.py`, a Llama from these tensors.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.errors import UserError, note
from ..config.files import read_json, write_text
from ..gguf.config import hf_config, model_config
from ..gguf.names import check_tensors, gguf_name, tensor_shapes
from ..gguf.reader import read_gguf
from .hub import local_path
from .meta import MetaWeights, is_meta_folder

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
    kinds = "a folder with config.json and *.safetensors, or a .gguf file"
    raise UserError(f"model {path}: found {found} there. A model is {kinds}; give the path of one.")


def fingerprint(weights: Weights) -> str:
    """A hash that knows a checkpoint again wherever it lies, and however its files are called and cut.

    Of each tensor: name, shape, and up to 8 rows as float32, the first and the last among them; of a GGUF file the
    stored bytes of such rows. Of a 70B model that is 100 MB.
    """
    digests = {}
    for name in weights.names():
        if not name.endswith("rotary_emb.inv_freq"):  # which only some files have
            digest = hashlib.sha256()
            for part, shape in weights.stored(name):
                digest.update(str(list(shape)).encode())
                last = (shape[0] if shape else 0) - 1
                for row in sorted({i * last // 7 for i in range(8 if last >= 0 else 0)}):
                    digest.update(part[row : row + 1].float().numpy().tobytes())
            digests[name] = digest.hexdigest()
    if digests.get("lm_head.weight") == digests.get("model.embed_tokens.weight"):  # tied: some files have both
        digests.pop("lm_head.weight", None)
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


class FolderWeights:
    """A Hugging Face folder: config.json and one or more safetensors files, which are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.where = folder, folder / "config.json"
        self.config = read_json(self.where)
        if about := self.config.get("quantization_config"):
            method = about.get("quant_method") if isinstance(about, dict) else about
            what = f"quantization_config.quant_method is {method!r}, which is not read here"
            raise UserError(f"{self.where}: {what}. Use the folder of the original weights, or a GGUF file.")
        self.handles: dict[str, Any] = {}
        self.places = self._places()  # of every tensor, the file that it is in and its name there
        if self.config.get("tie_word_embeddings") is True and HEAD in self.places:
            self.places.setdefault(EMBEDDING, self.places[HEAD])
            if equal_tensors(self.load(HEAD), self.load(EMBEDDING)):
                del self.places[HEAD]
            else:  # as in transformers: a head of its own in the file is the head
                self.config["tie_word_embeddings"] = False
        shapes = {name: self.stored(name)[0][1] for name in self.places}
        check_tensors(self.where, model_config(self.config, self.where), shapes)

    def _places(self) -> dict[str, tuple[str, str]]:
        """Those files that transformers reads. Others beside them are named, and what contradicts is refused."""
        folder, single = self.folder, Path(str(self.config.get("transformers_weights") or "model.safetensors")).name
        index = folder / (single if single.endswith(".index.json") else "model.safetensors.index.json")
        weight_map = self._read_index(index) if index.is_file() else {}
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if single != index.name and (folder / single).is_file():
            if other := [file for file in files if file != single]:
                raise UserError(
                    f"{folder}: holds {single}, and {index.name} beside it names other files, {other[0]} first"
                    f"{', which is not there' if missing else ''}: two checkpoints in one folder. Remove the wrong one."
                )
            files, missing = [single], []
        if missing:
            raise UserError(f"{folder / missing[0]}: {index.name} names this file, and it is missing. {AGAIN}")
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        if not files:
            found = others or sorted(path.name for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}"))
            advice = "rename the file if it is the model" if others else "get the weights as safetensors"
            raise UserError(
                f"{folder}: has config.json but neither {single} nor {index.name}; it holds "
                f"{', '.join(found[:3]) or 'no weights'}. Only these names are read, as in transformers: {advice}."
            )
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
            if places.get(name, ("", ""))[0] != file:
                raise UserError(
                    f"{folder / file}: tensor {name} cannot be read: {index.name} places it in this file, and it is "
                    f"not there. {AGAIN}"
                )
        return places

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index}: weight_map is no map from tensors to files. {AGAIN}")
        for file in weight_map.values():
            if Path(file).name != file:
                raise UserError(f"{index}: weight_map names {file}, which is outside of the folder. Refused.")
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


@contextmanager
def reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}). {AGAIN}") from error


def equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Equal in every value; of two that differ, little is read."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


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


# ------------------------------------------------------------------------------------------------ writing models

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write_shards(
    folder: Path, weights: Tensors, tensors: Mapping[str, tuple[Sequence[int], torch.dtype]], max_shard_bytes: int
) -> None:
    """Write model.safetensors, or several files with an index; memory holds one tensor at a time.

    A file is the length of its header (u64), the header, and the values of all tensors. The header has the place of
    each one, so it is made of their shapes before the first of them is loaded.

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
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            (shape, dtype), start, end = tensors[name], end, end + sizes[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that values stand where their processor wants them
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                w = weights.load(name).cpu()
                assert (tuple(w.shape), w.dtype) == (tuple(tensors[name][0]), tensors[name][1]), name
                out.write(w.contiguous().view(-1).view(torch.uint8).numpy().data)
                del w  # else it would be held while the next one is loaded
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
