"""An importance matrix: how large each input of each layer is, measured on texts. In llama.cpp's two file formats.

What a quantized weight w + e does wrong in a layer's output is e times its input. So where an input is large on average
an error matters more, and the search for scales in `k_quants.py` can weigh it by the mean square of the input:

    importance[j] = mean over tokens of x[j] ** 2       for each layer y = W x, one number for each column of W

A GGUF file holds for each layer NAME.in_sum2, the sums of squares, and NAME.counts, the number of tokens. The older
format, usually imatrix.dat, is a list of (name, chunks, numbers), the numbers being means times chunks; a chunk is a
part of the text of some fixed length.

Measured by `export/importance.py`; used by `ggml_blocks.quantize`.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..config.errors import UserError, check_regular, short
from .container import MAGIC, Metadata
from .ggml_blocks import quantize
from .names import gguf_name
from .reader import read_gguf
from .writer import NewTensor, write_gguf

NOTE = "quantize.imatrix"
SUMS, COUNTS = ".in_sum2", ".counts"
CHUNKS, CHUNK_SIZE, DATASETS = "imatrix.chunk_count", "imatrix.chunk_size", "imatrix.datasets"


class Imatrix(NamedTuple):
    """The sums of squares of each layer's inputs, by GGUF's name of the weight, and over how many tokens they are."""

    sums: dict[str, Tensor]  # (n_in,) float32
    counts: dict[str, int]  # of a file in the older format, chunks, and the sums are means times chunks
    datasets: list[str]  # names of the texts
    chunks: int
    chunk_size: int  # tokens; 0: not known
    where: str = "the importance matrix"  # for messages

    def of_model(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The importance of each input, (n_in,), for the weights of which it was measured, by Hugging Face's names.

        Args:
            shapes: of all weights of the model, by Hugging Face's names.
        Raises:
            UserError: it was measured on another model.
        """
        found = dict[str, Tensor]()
        for hf_name, shape in shapes.items():
            name = gguf_name(hf_name)
            if name in self.sums and len(shape) == 2:
                sums, count = self.sums[name], self.counts[name]
                if len(sums) != shape[1]:
                    why = f"{name} has {len(sums)} numbers, and the layer {shape[1]} inputs"
                    raise UserError(f"{self.where}: is of another model: {why}. Measure it on this one.")
                found[hf_name] = sums / count if count else torch.ones_like(sums)
        if not found:
            raise UserError(f"{self.where}: names no layer of this model. Measure it on this one.")
        return found

    def note(self, path: Path) -> Metadata:
        """What llama-quantize writes about it into a file that was made with it."""
        texts: Metadata = {f"{NOTE}.dataset": ("string", self.datasets[0])} if self.datasets else {}
        texts |= {f"{NOTE}.entries_count": ("u32", len(self.sums)), f"{NOTE}.chunks_count": ("u32", self.chunks)}
        return {f"{NOTE}.file": ("string", path.name)} | texts


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix in either format.

    Raises:
        UserError: the file is missing, damaged, of several experts, or holds NaN, infinity or negative numbers.
    """
    check_regular(path := Path(path))
    try:
        with open(path, "rb") as file:
            imatrix = _read_gguf(path) if file.read(4) == MAGIC else _read_older(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as an importance matrix ({error}). Give another path.") from error
    if not imatrix.sums:
        raise UserError(f"{path}: holds no importance matrix. Give a file that llama-imatrix or --imatrix wrote.")
    for name, sums in imatrix.sums.items():
        if not (sums.isfinite() & (sums >= 0)).all():
            raise UserError(f"{path}: {name} has numbers that are no mean squares. Measure it again.")
    return imatrix._replace(where=str(path))


def _read_gguf(path: Path) -> Imatrix:
    file = read_gguf(path)
    sums, counts = dict[str, Tensor](), dict[str, int]()
    for full, info in file.tensors.items():
        name = full.removesuffix(SUMS)
        if name == full:
            continue
        count = file.load(name + COUNTS) if name + COUNTS in file.tensors else torch.empty(0)
        if count.numel() != 1 or not 0 <= count.item() < 2**53 or info.ggml_type != "F32":
            raise UserError(f"{path}: {name} has {short(count.tolist())} as counts; one is needed, and no experts.")
        sums[name], counts[name] = file.load(full).flatten(), round(count.item())
    datasets, chunks, chunk_size = (file.metadata.get(key, -1) for key in (DATASETS, CHUNKS, CHUNK_SIZE))
    if not isinstance(datasets, list) or not all(isinstance(n, int) and 0 <= n < 2**32 for n in (chunks, chunk_size)):
        raise UserError(f"{path}: lacks {DATASETS}, {CHUNKS} or {CHUNK_SIZE}, which llama.cpp needs. Measure it again.")
    return Imatrix(sums, counts, [str(name) for name in datasets], chunks, chunk_size)


def _read_older(file: BinaryIO, path: Path) -> Imatrix:
    size = path.stat().st_size
    file.seek(0)

    def take(num_bytes: int, least: int = 0) -> bytes:
        if not least <= num_bytes <= size - file.tell():
            raise UserError(f"{path}: is no importance matrix, or cut short at byte {file.tell()}. Give another file.")
        return file.read(num_bytes)

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    def text() -> str:
        return take(number()).decode("utf-8", "replace")

    sums, counts = dict[str, Tensor](), dict[str, int]()
    for _ in range(number()):
        name = text()
        counts[name] = max(number(), 1)  # of none llama.cpp takes the numbers as they are
        sums[name] = torch.frombuffer(bytearray(take(4 * number(), least=4)), dtype=torch.float32)
    chunks = max(number(), 0) if file.tell() < size else 0
    return Imatrix(sums, counts, [text()] if file.tell() < size else [], chunks, 0)


def write_imatrix(path: Path, imatrix: Imatrix, older: bool = False) -> None:
    """Write the bytes that llama-imatrix writes for the same numbers."""
    names = sorted(imatrix.sums)
    if not older:
        metadata: Metadata = {"general.type": ("string", "imatrix"), DATASETS: ("string[]", imatrix.datasets)}
        metadata |= {CHUNKS: ("u32", imatrix.chunks), CHUNK_SIZE: ("u32", imatrix.chunk_size)}
        tensors = list[NewTensor]()
        for name in names:
            count = torch.tensor([float(imatrix.counts[name])])
            tensors += [_new_tensor(name + SUMS, imatrix.sums[name]), _new_tensor(name + COUNTS, count)]
        write_gguf(path, metadata, tensors)
        return
    data = struct.pack("<i", len(names))
    for name in names:
        chunks = math.ceil(imatrix.counts[name] / max(imatrix.chunk_size, 1))
        numbers = imatrix.sums[name] / imatrix.counts[name] * chunks
        data += _with_length(name) + struct.pack("<ii", chunks, len(numbers)) + numbers.numpy().tobytes()
    path.write_bytes(data + struct.pack("<i", imatrix.chunks) + _with_length(", ".join(imatrix.datasets)))


def _with_length(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<i", len(data)) + data


def _new_tensor(name: str, x: Tensor) -> NewTensor:
    return NewTensor(name, tuple(x.shape), "F32", lambda: quantize(x, "F32"))
