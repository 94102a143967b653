"""A GGUF file out: a few tensors in memory at a time."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .container import ALIGNMENT, MAGIC, STRUCT_CODES, VALUE_TYPES, VERSION, Metadata
from .ggml_blocks import FORMATS
from .threads import in_threads


class NewTensor(NamedTuple):
    """A tensor to be written. Its bytes are made when their turn comes."""

    name: str  # GGUF's
    shape: tuple[int, ...]  # in PyTorch's order
    ggml_type: str  # a key of ggml_blocks.FORMATS
    produce: Callable[[], Tensor]  # -> uint8, the bytes of `ggml_blocks.quantize`


def write_gguf(path: str | Path, metadata: Metadata, tensors: list[NewTensor]) -> None:
    """Write a GGUF file.

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
        table += _encode("string", tensor.name)
        table += struct.pack(f"<I{num_dims}QIQ", num_dims, *reversed(tensor.shape), fmt.type_id, offset)
        offset += fmt.num_bytes(math.prod(tensor.shape))
        offset += -offset % ALIGNMENT

    header = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    header += b"".join(_encode("string", key) + _encode_value(*value) for key, value in metadata.items())

    with open(path, "wb") as file:
        file.write(header + table)
        _pad(file)
        pieces = [tensor.produce for tensor in tensors]
        made = (piece() for piece in pieces) if torch.cuda.is_available() else in_threads(pieces)
        for tensor, raw in zip(tensors, made, strict=True):
            num_bytes = FORMATS[tensor.ggml_type].num_bytes(math.prod(tensor.shape))
            assert raw.numel() == num_bytes, f"{tensor.name}: {raw.numel()} bytes, but the table says {num_bytes}"
            file.write(raw.cpu().contiguous().numpy().data)
            _pad(file)  # the last one too: older readers insist


def _pad(file: BinaryIO) -> None:
    """Zeros up to the next multiple of the alignment."""
    file.write(bytes(-file.tell() % ALIGNMENT))


def _encode_value(kind: str, value: Any) -> bytes:
    """A metadata value with its type in front. Of an array: that it is one, its elements' type, their count."""
    item = kind.removesuffix("[]")
    if item == kind:
        return struct.pack("<I", VALUE_TYPES.index(kind)) + _encode(kind, value)
    return struct.pack("<IIQ", VALUE_TYPES.index("array"), VALUE_TYPES.index(item), len(value)) + _encode(item, *value)


def _encode(kind: str, *items: Any) -> bytes:
    if kind != "string":
        return struct.pack(f"<{len(items)}{STRUCT_CODES[kind]}", *items)
    return b"".join(struct.pack("<Q", len(data)) + data for data in (text.encode("utf-8") for text in items))
