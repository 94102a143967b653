"""Weights in and out, one tensor at a time.

    open_weights(path)     a Hugging Face folder, Meta's or a GGUF file, behind one face: config, names, load(name)
    ShardWriter            the files of a merged model

Every error names its file. Files are written atomically. Read next: `pretrained.py`, a Llama from these tensors.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.errors import UserError, note
from ..config.files import read_json, write_text
from ..gguf.config import hf_config
from ..gguf.names import gguf_name, tensor_shapes
from ..gguf.reader import read_gguf
from ..model import ModelConfig
from .hub import local_path
from .meta import MetaWeights, is_meta_folder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Weights(Protocol):
    """A checkpoint on disk; names are Hugging Face's.

    `config` is config.json as a dict, and `where` its file. Of it, tie_word_embeddings is what the weights are.
    """

    config: dict[str, Any]
    where: Path

    def names(self) -> list[str]: ...

    def load(self, name: str) -> Tensor: ...

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        """The parts of a tensor as the files hold them, mapped, to be sliced by rows; each with its shape."""
        ...


def open_weights(path: str | Path) -> Weights:
    """Open a Hugging Face or Meta folder, a .gguf file, or a model by its hub name, without reading its weights.

    Raises:
        UserError: nothing of these, or by configuration and names of tensors no Llama that can be built here.
    """
    path = local_path(path)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        kind = GGUFWeights if path.is_file() else MetaWeights if is_meta_folder(path) else FolderWeights
        weights = kind(path)
        check_names(weights, model_config(weights.config, weights.where), path)
        return weights
    found = "a file of another kind" if path.exists() else "nothing"
    raise UserError(
        f"model {path}: found {found} there. A model is a folder with config.json and *.safetensors, or a .gguf file; "
        f"give the path of one."
    )


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
            raise UserError(
                f"{self.where}: quantization_config.quant_method is {method!r}, so the weights are quantised "
                f"already in a way that is not read here. Use the folder of the original weights, or a GGUF file."
            )
        self.handles: dict[str, Any] = {}
        self.places = self._places()
        tied = self.config.get("tie_word_embeddings")
        if tied is True and HEAD in self.places:  # as in transformers: a head of its own in the file is the head
            self.places.setdefault(EMBEDDING, self.places[HEAD])
            if equal_tensors(self.load(HEAD), self.load(EMBEDDING)):
                del self.places[HEAD]
            else:
                self.config["tie_word_embeddings"] = False

    def _places(self) -> dict[str, tuple[str, str]]:
        """Of every tensor of the checkpoint, the file that it is in and its name there.

        The files are those that transformers reads. Others beside them are named, and what contradicts is refused.
        """
        folder, single = self.folder, Path(str(self.config.get("transformers_weights") or "model.safetensors")).name
        index = folder / (single if single.endswith(".index.json") else "model.safetensors.index.json")
        weight_map = self._read_index(index) if index.is_file() else {}
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (folder / file).is_file()]
        if single != index.name and (folder / single).is_file():
            if other := [file for file in files if file != single]:
                raise UserError(
                    f"{folder}: holds {single}, and {index.name} beside it names other files, {other[0]} first"
                    f"{', which is not there' if missing else ''}: two checkpoints in one folder, and nothing tells "
                    f"which one is meant. Remove the one that is not."
                )
            files = [single]
        if missing:
            raise UserError(
                f"{folder / missing[0]}: {index.name} names this file and it is not in the folder, so weights are "
                f"missing. Download the checkpoint again."
            )
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        if not files:
            found = others or sorted(path.name for end in ("bin", "pth", "pt") for path in folder.glob(f"*.{end}"))
            raise UserError(
                f"{folder}: has config.json but neither {single} nor {index.name}"
                + (f"; it holds {', '.join(found[:3])}" if found else "")
                + ". Only safetensors files of these names are read, as in transformers: "
                + (
                    "rename the file if it is the model."
                    if others
                    else "convert the weights, or get them as safetensors."
                )
            )
        if others:
            read = index.name if weight_map else single
            note(f"{folder}: the weights are those of {read}; not read: {', '.join(others)}.")
        places: dict[str, tuple[str, str]] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118
                if name in places:
                    raise UserError(
                        f"{folder}: tensor {name} is in {places[name][0]} and in {file}, and nothing tells which one "
                        f"is meant. Download the checkpoint again."
                    )
                places[name] = file, name
        for name, file in weight_map.items():
            if places.get(name, ("", ""))[0] != file:
                raise UserError(
                    f"{folder / file}: tensor {name} cannot be read: {index.name} says that it is in this file, and "
                    f"it is not. Download the checkpoint again."
                )
        return places

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index}: weight_map is no map from tensors to files. Download the checkpoint again.")
        for file in weight_map.values():
            if Path(file).name != file:
                raise UserError(f"{index}: weight_map names {file}, which is outside of the folder. Refused.")
        return weight_map

    def _open(self, file: str) -> Any:
        if file not in self.handles:
            try:
                self.handles[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{self.folder / file}: not a complete safetensors file ({error}). Download or copy it again."
                ) from error
        return self.handles[file]

    def names(self) -> list[str]:
        return list(self.places)

    def load(self, name: str) -> Tensor:
        if name not in self.places:
            raise UserError(f"{self.folder}: has no tensor {name}, which the model of its config.json needs.")
        file, in_file = self.places[name]
        with self._reading(name):
            w = self._open(file).get_tensor(in_file)
        if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(
                f"{self.folder / file}: tensor {name} is of type {str(w.dtype).removeprefix('torch.')}; float32, "
                f"float16 and bfloat16 are read. Use the folder of the original weights."
            )
        return w

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        with self._reading(name):
            file, in_file = self.places[name]
            part = self._open(file).get_slice(in_file)
            return [(part, part.get_shape())]

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise UserError(f"{self.folder / self.places[name][0]}: tensor {name} cannot be read ({error}).") from error


def equal_tensors(a: Tensor, b: Tensor) -> bool:
    """Equal in every value; of two that differ, little is read."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a[:1], b[:1]) and torch.equal(a, b)


class GGUFWeights:
    """A GGUF file of the llama architecture, dequantised to float32 tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.file, self.where = read_gguf(path), path
        self.config = hf_config(self.file)

    def names(self) -> list[str]:
        return [name for name in tensor_shapes(model_config(self.config, self.file.path)) if self._has(name)]

    def _has(self, name: str) -> bool:
        return gguf_name(name) in self.file.tensors

    def load(self, name: str) -> Tensor:
        return self.file.load_hf(name)

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        raw = self.file.raw(gguf_name(name))
        return [(raw, raw.shape)]


def model_config(config: dict[str, Any], where: str | Path) -> ModelConfig:
    """config.json as ModelConfig; what does not fit is told with the name of the checkpoint."""
    try:
        return ModelConfig.from_hf(config)
    except ValueError as error:
        raise UserError(f"{where}: {error}. Use a plain Llama or Mistral, and a whole copy of its files.") from error


def check_names(weights: Weights, config: ModelConfig, path: str | Path) -> None:
    """Before anything is read: the tensors have to be those of this Llama, none missing and none left over."""
    here = set(weights.names())
    num_layers = min(config.num_hidden_layers, len(here))  # a damaged count would keep us busy for hours
    expected = list(tensor_shapes(replace(config, num_hidden_layers=num_layers)))
    missing = [name for name in expected if name not in here]
    if missing:
        raise UserError(
            f"{path}: tensor {missing[0]} is missing, {len(missing)} in all, of the model that {weights.where.name} "
            f"describes, and it cannot be built without them. Get a whole checkpoint."
        )
    left = sorted(name for name in here - set(expected) if not name.endswith("rotary_emb.inv_freq"))  # is computed
    if left:
        raise UserError(
            f"{path}: tensor {left[0]} has no place in the model that {weights.where.name} describes, {len(left)} in "
            f"all, and it would compute something else without them. Only a Llama without biases and extras is read."
        )


# ------------------------------------------------------------------------------------------------ writing models


class ShardWriter:
    """Writes model.safetensors, or several of them with an index, tensor by tensor: memory holds the one at hand.

    A file is the length of its header (u64), the header, and the values of all tensors. The header says where each one
    lies, so it is made of their shapes before the first of them is there.
    """

    def __init__(
        self, folder: Path, tensors: dict[str, tuple[Sequence[int], torch.dtype]], max_shard_bytes: int
    ) -> None:
        """tensors: shape and dtype of everything that will be added, in that order."""
        self.folder, self.tensors, self.file = folder, tensors, None
        self.sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()}
        self.total_bytes = sum(self.sizes.values())
        shards: list[list[str]] = []
        for name, size in self.sizes.items():
            if not shards or sum(self.sizes[other] for other in shards[-1]) + size > max_shard_bytes:
                shards.append([])
            shards[-1].append(name)
        count = len(shards)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self.shards = dict(zip(files if count > 1 else ["model.safetensors"], shards, strict=True))
        self.waiting = [(file, names, name) for file, names in self.shards.items() for name in names][::-1]

    def add(self, name: str, tensor: Tensor) -> None:
        file, names, expected = self.waiting.pop()
        shape, dtype = self.tensors[expected]
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, tuple(shape), dtype)
        if name == names[0]:
            self._begin(file, names)
        self.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def _begin(self, file: str, names: list[str]) -> None:
        if self.file:
            self.file.close()
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            (shape, dtype), start, end = self.tensors[name], end, end + self.sizes[name]
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that values stand where their processor wants them
        self.file = open(self.folder / file, "wb")  # noqa: SIM115
        self.file.write(struct.pack("<Q", len(text)) + text)

    def close(self) -> None:
        """End the last file, and write the index if there are several."""
        assert not self.waiting
        self.file.close()
        if len(self.shards) > 1:
            weight_map = {name: file for file, names in self.shards.items() for name in names}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
