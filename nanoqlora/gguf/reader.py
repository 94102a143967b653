"""A GGUF file in: header, metadata, table of tensors, all checked; the data is mapped, not read."""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.errors import UserError, short
from .container import ALIGNMENT, MAGIC, STRUCT_CODES, VALUE_TYPES, VERSION
from .ggml_blocks import FORMATS, dequantize
from .names import gguf_name, heads_to_permute, unpermute_rows


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
        raw, info = self.raw_hf(hf_name), self.tensors[gguf_name(hf_name)]
        return dequantize(raw, info.ggml_type, info.shape)

    def raw_hf(self, hf_name: str) -> Tensor:
        """As `raw`, by the Hugging Face name, with the rows in Hugging Face's order."""
        name = gguf_name(hf_name)
        raw = self.raw(name)
        num_heads = self.number("llama.attention.head_count", int)
        heads = heads_to_permute(name, num_heads, self.number("llama.attention.head_count_kv", int, num_heads))
        return unpermute_rows(raw, heads) if heads else raw

    def number(self, key: str, kind: type[int] | type[float], default: float | None = None) -> Any:
        """A number of the metadata that has to be there, unless there is a default, and has to be above zero."""
        value = self.metadata.get(key, default)
        if type(value) is not kind or not value > 0:
            raise UserError(f"{self.path}: {key} is {short(value)}, and not of type {kind.__name__} and above zero.")
        # 1e-5 comes back from float32 as 9.99999974e-06: take the shortest number that is the same in float32.
        return float(str(np.float32(value))) if kind is float else value


class _Header:
    """Reads the part before the data, and never believes a number that the file is too short for."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.items = path, data, 0, 0

    def wrong(self, found: str) -> UserError:
        return UserError(f"{self.path}: {found}, so this is not an intact GGUF file. Download or export it again.")

    def scalars(self, kind: str, count: int, what: str) -> list[Any]:
        code, start = f"<{count}{STRUCT_CODES[kind]}", self.position
        self.position += struct.calcsize(code)
        if self.position > len(self.data):
            raise self.wrong(f"truncated: it ends within {what}, which starts at byte {start}")
        return list(struct.unpack_from(code, self.data, start))

    def number(self, kind: str, what: str) -> int:
        return self.scalars(kind, 1, what)[0]

    def count(self, what: str, bytes_each: int) -> int:
        """A u64: how many things follow, which take at least so many bytes each."""
        count, left = self.number("u64", what), len(self.data) - self.position
        self.items += count
        if count * bytes_each > left or self.items > 1 << 24:  # vocabularies have at most a million of each
            raise self.wrong(f"truncated or damaged: {what} is {count}, and {left} bytes follow")
        return count

    def strings(self, count: int, what: str) -> list[str]:
        """Many of them at once: `count` of bytes, but fast where nothing is wrong, as a vocabulary has 100,000."""
        found, data, size, read_length = [], self.data, len(self.data), struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                start = self.position + 8
                end = start + (read_length(data, self.position)[0] if start <= size else 0)
                if end > size:
                    self.count(f"the length of {what}", bytes_each=1)  # raises
                found.append(data[start:end].decode("utf-8"))
                self.position = end
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8 text ({short(error.object)})") from error
        return found

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def value(self, what: str) -> Any:
        """A metadata value with its type in front; arrays as lists."""
        kind, count = self.kind(f"the type of {what}"), 1
        if is_list := kind == "array":
            kind = self.kind(f"the element type of {what}")
            count = self.count(f"the length of {what}", bytes_each=1)
        if kind in ("array", "unknown"):
            raise self.wrong(f"{what} has a type that does not exist or may not stand there")
        items = self.strings(count, what) if kind == "string" else self.scalars(kind, count, what)
        return items if is_list else items[0]

    def kind(self, what: str) -> str:
        return dict(enumerate(VALUE_TYPES)).get(self.number("u32", what), "unknown")


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
        raise UserError(f"{path}: cannot be opened as a GGUF file ({error}). Give another path.") from error
    header = _Header(path, data)
    if data[:4] != MAGIC:
        raise header.wrong(f"it starts with {data[:4]!r} and not with {MAGIC!r}")
    header.position = len(MAGIC)
    version = header.number("u32", "the version")
    if version not in (2, VERSION):
        raise UserError(f"{path}: GGUF version {version}; only 2 and {VERSION} are read here, and no big-endian files.")
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
        raise header.wrong(f"metadata general.alignment is {short(alignment)} and not a power of two")

    tensors: dict[str, TensorInfo] = {}
    for i in range(num_tensors):
        name = header.string(f"the name of tensor {i}")
        if name in tensors:
            raise header.wrong(f"tensor {name} appears twice")
        tensors[name] = _read_tensor_info(header, name, alignment)
    start = header.position + -header.position % alignment
    tensors = {name: info._replace(offset=start + info.offset) for name, info in tensors.items()}
    _check_data(header, tensors)
    return GGUFFile(path, metadata, tensors, data)


def _read_tensor_info(header: _Header, name: str, alignment: int) -> TensorInfo:
    """One line of the tensor table, its offset still counted from the start of the data."""
    num_dims = header.number("u32", f"the dimensions of tensor {name}")
    if not 1 <= num_dims <= 4:
        raise header.wrong(f"tensor {name} has {num_dims} dimensions, where 1 to 4 are possible")
    shape = tuple(header.scalars("u64", num_dims, f"the shape of tensor {name}"))[::-1]
    type_id = header.number("u32", f"the type of tensor {name}")
    offset = header.number("u64", f"the offset of tensor {name}")
    ggml_type = next((name for name, fmt in FORMATS.items() if fmt.type_id == type_id), None)
    if ggml_type is None:
        raise UserError(f"{header.path}: {name} is of type {type_id}. Use one with {', '.join(FORMATS)}.")
    fmt = FORMATS[ggml_type]
    if 0 in shape or shape[-1] % fmt.block_size:
        raise header.wrong(f"tensor {name} has shape {shape}, impossible for {ggml_type} blocks of {fmt.block_size}")
    if offset % alignment:
        raise header.wrong(f"tensor {name} starts at offset {offset}, which is not a multiple of {alignment}")
    return TensorInfo(shape, ggml_type, offset, fmt.num_bytes(math.prod(shape)))


def _check_data(header: _Header, tensors: dict[str, TensorInfo]) -> None:
    """Every tensor has to lie inside the file and after the one before it."""
    end, before, size = header.position, "the header", len(header.data)
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise header.wrong(f"tensor {name} starts inside {before}")
        end, before = info.offset + info.num_bytes, f"tensor {name}"
    if end > size:
        raise header.wrong(f"truncated: its tensors need {end} bytes, so {end - size} bytes are missing")
