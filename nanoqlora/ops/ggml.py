"""The block formats of GGUF files, read: bytes to weights, as ggml computes them. The reference, in plain PyTorch.

A base may stay in the blocks of its file (`keep_gguf_blocks`): a weight (n_out, n_in) is then (n_out, bytes of a row)
uint8, its rows whole. So rows can be sliced, sharded and put in another order without touching a block, as llama.cpp
does with those of q_proj and k_proj. What the bytes of each format are is in `../gguf/ggml_blocks.py`.

All arithmetic is in float32, in ggml's order: a product, then a sum, each rounded. So the weights are llama.cpp's, bit
for bit. `triton/ggml.py` has the twin for the formats of 4 to 8 bits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_WEIGHTS = 1 << 18  # worked on at a time: 1 MB of float32 and its temporaries stay near the processor
GPU_CHUNK_WEIGHTS = 1 << 24  # there the start of each operation is what costs
VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # of the codes of IQ4_NL and IQ4_XS


class Layout(NamedTuple):
    """How one GGUF tensor type cuts up a row."""

    block_size: int  # weights in a block
    block_bytes: int  # bytes that a block takes
    unpack: Callable[[Tensor], Tensor]  # (n, block_bytes) uint8 -> (n, block_size) float32


def dequantize(raw: Tensor, ggml_type: str, shape: tuple[int, ...]) -> Tensor:
    """Read the bytes of a GGUF tensor back into float32.

    Args:
        raw: uint8, (rows, row_bytes) or flat.
        ggml_type: a key of `LAYOUTS`.
        shape: of the result, in PyTorch's order: the last dimension is the one that blocks run along.
    Raises:
        ValueError: the type is unknown, or the bytes are not those of such a tensor.
    """
    size, num_bytes, unpack = layout(ggml_type)
    needed = math.prod(shape) // size * num_bytes
    if shape[-1] % size or raw.numel() != needed:
        what = f"which takes {needed} bytes in complete blocks of {size}"
        raise ValueError(f"GGUF type {ggml_type}: {raw.numel()} bytes cannot hold a tensor of shape {shape}, {what}.")
    blocks = raw.reshape(-1, num_bytes)
    w = torch.empty(len(blocks), size, dtype=torch.float32, device=raw.device)
    step = (CHUNK_WEIGHTS if raw.device.type == "cpu" else GPU_CHUNK_WEIGHTS) // size
    for i in range(0, len(blocks), step):
        w[i : i + step] = unpack(blocks[i : i + step])
    return w.reshape(shape)


def layout(ggml_type: str) -> Layout:
    if ggml_type not in LAYOUTS:
        raise ValueError(f"GGUF type {ggml_type}: unknown here. Use one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[ggml_type]


def from_half(raw: Tensor) -> Tensor:
    """(n, 2k) bytes -> the k half-precision numbers in them, as (n, k) float32."""
    return raw.contiguous().view(torch.float16).float()


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(..., k) bytes -> (..., 2k) codes. The low halves come first: byte j holds elements j and j + k."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def unpack_bits(packed: Tensor) -> Tensor:
    """(n, 4) bytes -> (n, 32) zeros and ones, lowest bit first."""
    return (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).flatten(1)


def places(of: Tensor, *numbers: int) -> Tensor:
    """Shifts, a row of each."""
    return torch.tensor(numbers, dtype=torch.uint8, device=of.device)[:, None]


def unpack_q8_0(raw: Tensor) -> Tensor:
    return from_half(raw[:, :2]) * raw[:, 2:].view(torch.int8)


def unpack_32(raw: Tensor, bits: int, has_minimum: bool) -> Tensor:
    d, codes = from_half(raw[:, :2]), unpack_nibbles(raw[:, -16:])
    if bits == 5:
        codes = codes | unpack_bits(raw[:, -20:-16]) << 4
    return d * codes + from_half(raw[:, 2:4]) if has_minimum else d * (codes.float() - 2 ** (bits - 1))


def unpack_k(raw: Tensor, bits: int) -> Tensor:
    scale, minimum, rest = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    d = from_half(raw[:, 0:2]) * torch.cat([scale & 63, rest & 15 | scale >> 6 << 4], dim=-1)  # (n, 8)
    m = from_half(raw[:, 2:4]) * torch.cat([minimum & 63, rest >> 4 | minimum >> 6 << 4], dim=-1)
    codes = unpack_nibbles(raw[:, -128:].reshape(-1, 4, 32)).view(-1, 8, 32)  # 32 bytes hold two groups of 32
    if bits == 5:
        codes = codes | (raw[:, None, 16:48] >> places(raw, *range(8)) & 1) << 4
    return (d[:, :, None] * codes - m[:, :, None]).flatten(1)


def unpack_q6_k(raw: Tensor) -> Tensor:
    low = unpack_nibbles(raw[:, :128].reshape(-1, 2, 64))  # (n, 2, 128): each half of the block on its own
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> places(raw, 0, 2, 4, 6) & 3  # (n, 2, 4, 32)
    codes = (low | high.flatten(2) << 4).view(-1, 16, 16).float() - 32
    scales = from_half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8)  # (n, 16)
    return (scales[:, :, None] * codes).flatten(1)


def unpack_pairs(packed: Tensor) -> Tensor:
    return (packed.reshape(-1, 2, 1, 32) >> places(packed, 0, 2, 4, 6) & 3).flatten(1)


def unpack_q2_k(raw: Tensor) -> Tensor:
    scale, minimum = from_half(raw[:, 80:82]) * (raw[:, :16] & 15), from_half(raw[:, 82:]) * (raw[:, :16] >> 4)
    codes = unpack_pairs(raw[:, 16:80]).view(-1, 16, 16)
    return (scale[:, :, None] * codes - minimum[:, :, None]).flatten(1)


def unpack_q3_k(raw: Tensor) -> Tensor:
    tops = (raw[:, None, 104:108] >> places(raw, 0, 2, 4, 6) & 3).flatten(1)
    scale = from_half(raw[:, 108:]) * ((unpack_nibbles(raw[:, 96:104]) | tops << 4).float() - 32)  # (n, 16)
    third = (raw[:, None, :32] >> places(raw, *range(8)) & 1).flatten(1)
    codes = (unpack_pairs(raw[:, 32:96]) | third << 2).view(-1, 16, 16).float() - 4
    return (scale[:, :, None] * codes).flatten(1)


def unpack_iq4_nl(raw: Tensor) -> Tensor:
    values = torch.tensor(VALUES, dtype=torch.float32, device=raw.device)
    return from_half(raw[:, :2]) * values[unpack_nibbles(raw[:, 2:]).int()]


def unpack_iq4_xs(raw: Tensor) -> Tensor:
    high = raw[:, 2:4, None] >> places(raw, 0, 2, 4, 6)[:, 0] & 3  # (n, 2, 4)
    low = raw[:, 4:8, None] >> places(raw, 0, 4)[:, 0] & 15  # (n, 4, 2)
    scale = from_half(raw[:, :2]) * ((low.flatten(1) | high.flatten(1) << 4).float() - 32)  # (n, 8)
    values = torch.tensor(VALUES, dtype=torch.float32, device=raw.device)
    codes = unpack_nibbles(raw[:, 8:].reshape(-1, 8, 16)).int()
    return (scale[:, :, None] * values[codes]).flatten(1)


def _plain(dtype: torch.dtype) -> Layout:
    return Layout(1, dtype.itemsize, lambda raw: raw.contiguous().view(dtype).float())


def _of_32(bits: int, has_minimum: bool) -> Layout:
    num_bytes = 4 * bits + (4 if has_minimum else 2)
    return Layout(32, num_bytes, partial(unpack_32, bits=bits, has_minimum=has_minimum))


LAYOUTS = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": _of_32(bits=4, has_minimum=False),  # d, codes
    "Q4_1": _of_32(bits=4, has_minimum=True),  # d, m, codes
    "Q5_0": _of_32(bits=5, has_minimum=False),  # d, fifth bits, low four bits
    "Q5_1": _of_32(bits=5, has_minimum=True),  # d, m, fifth bits, low four bits
    "Q8_0": Layout(32, 2 + 32, unpack_q8_0),  # d, codes
    "Q2_K": Layout(256, 16 + 64 + 4, unpack_q2_k),  # 16 pairs of 4 bits, codes, d, dmin
    "Q3_K": Layout(256, 32 + 64 + 12 + 2, unpack_q3_k),  # third bits, low two bits, 16 scales of 6 bits, d
    "Q4_K": Layout(256, 4 + 12 + 128, partial(unpack_k, bits=4)),  # d, dmin, 8 pairs of 6 bits, codes
    "Q5_K": Layout(256, 4 + 12 + 32 + 128, partial(unpack_k, bits=5)),  # the same, fifth bits before the low four
    "Q6_K": Layout(256, 128 + 64 + 16 + 2, unpack_q6_k),  # low 4 bits, top 2, scales, d
    "IQ4_NL": Layout(32, 2 + 16, unpack_iq4_nl),  # d, codes
    "IQ4_XS": Layout(256, 2 + 6 + 128, unpack_iq4_xs),  # d, scales, codes
}
