"""The block formats of GGUF files: how llama.cpp stores a matrix in 4 to 8 bits per weight.

A row is cut into blocks of 32 (or 256) weights. A block holds a few numbers in half precision and one small integer q
per weight, its code. Reading is one line per family:

    Q8_0              w = d * q           q in -127 .. 127
    Q4_0, Q5_0        w = d * (q - 8)     or q - 16: unsigned codes around a middle
    Q4_1, Q5_1        w = d * q + m       m is the smallest weight of the block
    Q4_K, Q5_K        w = d1 * q - m1     8 groups of 32; the d1 and m1 are themselves 6-bit codes times d and dmin
    Q6_K              w = d1 * (q - 32)   16 groups of 16; the d1 are 8-bit codes times d

and in `small_blocks.py` those of 2 and 3 bits, and those with codes that are not evenly spaced:

    Q2_K              w = d1 * q - m1     16 groups of 16; the d1 and m1 are 4-bit codes times d and dmin
    Q3_K              w = d1 * (q - 4)    16 groups of 16; the d1 are 6-bit codes times d
    IQ4_NL, IQ4_XS    w = d1 * VALUES[q]  one group of 32, or 8 of them with 6-bit codes times d

The quantizers below choose d and q exactly as llama.cpp does, bit for bit. That asks for float32 throughout, for the
reciprocal of d *before* d is rounded to half, for each format's own way of rounding, and for the first of equals when
the largest weight is looked for. So the bytes of a file can be compared, not just its perplexity.

All functions work on many blocks at once, as (num_blocks, block_bytes) uint8 <-> (num_blocks, block_size) float32, on
any device. Multi-byte numbers are little-endian, as on every machine that PyTorch runs on today.
Left out: the types of GGUF with codes for several weights at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config.errors import UserError
from ..ops.ggml import CHUNK_WEIGHTS, GPU_CHUNK_WEIGHTS, LAYOUTS, from_half, layout, places
from ..ops.ggml import dequantize as dequantize
from . import small_blocks as small
from .bits import divide, first_extreme, first_least, nearest, pack_bits, pack_nibbles, root, sum_in_order, to_half
from .k_quants import TINY, TRIALS, codes_with, search_lines, search_scales, usual_weights
from .threads import in_threads


@dataclass(frozen=True)
class BlockFormat:
    """How one GGUF tensor type cuts up a row."""

    type_id: int  # the number that stands for the type in a file
    block_size: int  # weights in a block
    block_bytes: int  # bytes that a block takes
    unpack: Callable[[Tensor], Tensor]  # bytes -> weights: these three are an `ops.ggml.Layout`
    pack: Callable[[Tensor, Tensor | None], Tensor]  # weights, weights of errors (n, block_size) -> (n, block_bytes)
    halves: tuple[int, int] = (0, 2)  # from and to: the bytes of a block that are numbers in half precision
    energy: float = 0  # an error's weight is importance * sqrt(w^2 + energy * mean of w^2); 0: importance alone
    mean_of_row: bool = False  # the mean is that of the row, not of the block

    def num_bytes(self, num_weights: int) -> int:
        return num_weights // self.block_size * self.block_bytes


def quantize(w: Tensor, ggml_type: str, importance: Tensor | None = None) -> Tensor:
    """Store a tensor in one of GGUF's formats.

    Args:
        w: (..., n_in), any float dtype and device. Its values must be finite.
        ggml_type: a key of `FORMATS`.
        importance: (n_in,), the mean square of each input of this layer, from `imatrix.py`; only formats that search
            for their scales make use of it.
    Returns:
        (..., row_bytes) uint8 on the same device, the bytes that llama.cpp would write.
    Raises:
        ValueError: the type is unknown, or its blocks do not divide n_in.
    """
    layout(ggml_type)  # raises
    fmt = FORMATS[ggml_type]
    if w.shape[-1] % fmt.block_size:
        raise ValueError(f"{ggml_type}: rows of {w.shape[-1]} weights do not split into blocks of {fmt.block_size}.")
    blocks = w.reshape(-1, fmt.block_size)
    raw = torch.empty(len(blocks), fmt.block_bytes, dtype=torch.uint8, device=w.device)
    step = (CHUNK_WEIGHTS if w.device.type == "cpu" else GPU_CHUNK_WEIGHTS) // fmt.block_size
    if importance is not None:  # complete rows
        importance, per_row = importance.to(w.device, torch.float32), w.shape[-1] // fmt.block_size
        step = max(step // per_row, 1) * per_row

    @torch.inference_mode()  # thousands of small operations, which nobody will differentiate
    def store(i: int) -> None:
        x = blocks[i : i + step].float()
        raw[i : i + step] = fmt.pack(x, None if importance is None else _error_weights(x, importance, fmt))

    pieces = [partial(store, i) for i in range(0, len(blocks), step)]
    for _ in in_threads(pieces) if w.device.type == "cpu" else (piece() for piece in pieces):
        pass
    return raw.reshape(*w.shape[:-1], -1)


def _error_weights(x: Tensor, importance: Tensor, fmt: BlockFormat) -> Tensor:
    """What an error in each weight of some complete rows counts, (n, block_size) as the weights themselves."""
    if not fmt.energy:
        return importance.repeat(x.numel() // len(importance)).view_as(x)
    squares = (x * x).view(-1, len(importance) if fmt.mean_of_row else fmt.block_size)
    energy = divide(sum_in_order(squares.T.contiguous()), squares.shape[-1]) * fmt.energy
    return (root(squares + energy[:, None]).view(-1, len(importance)) * importance).view_as(x)


def quantize_checked(w: Tensor, ggml_type: str, name: str, importance: Tensor | None = None) -> Tensor:
    """The same, of the tensor that messages call `name`.

    Raises:
        UserError: a value is NaN or infinite, or would be read back so: scales are stored in half precision.
    """
    largest = torch.stack(w.aminmax()).abs().max().item()  # NaN if there is one
    if not math.isfinite(largest):
        raise UserError(f"{name} holds NaN or infinity, which would be in every answer. Train with a lower rate.")
    if FORMATS[ggml_type].block_size == 1 or largest < 2**30:  # far above what any scale can hold
        raw = quantize(w, ggml_type, importance)
        if ggml_type == "F32" or torch.isfinite(halves(raw, ggml_type)).all():
            return raw
    raise UserError(f"{name} holds values up to {largest:.4g}, which are infinite in {ggml_type}; export as bf16.")


def halves(raw: Tensor, ggml_type: str) -> Tensor:
    """The numbers of 16 bits in the bytes of a tensor: its values, or the scales and minima of its blocks."""
    fmt = FORMATS[ggml_type]
    numbers = raw.reshape(-1, fmt.block_bytes)[:, slice(*fmt.halves)]
    return numbers.contiguous().view(torch.bfloat16 if ggml_type == "BF16" else torch.float16)


# ------------------------------------------------------------------------------------------------ blocks of 32


def _reciprocal(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0. Of a d below 3e-39 it is infinite; `nan_to_num` then takes care of the products."""
    return torch.where(d == 0, 0, 1 / d)


def _quantize_q8_0(x: Tensor, w: Tensor | None) -> Tensor:
    d = divide(x.abs().amax(dim=-1, keepdim=True), 127)
    y = (x * _reciprocal(d)).nan_to_num(nan=0, posinf=0, neginf=0)
    # Halves go away from zero: add almost a half and cut. torch.round would send them to the even neighbour, and adding
    # exactly a half would send 0.49999997 to 1, because that sum rounds up to 1.
    codes = y + torch.copysign(y.new_tensor(0.49999997), y)
    return torch.cat([to_half(d), codes.to(torch.int8).view(torch.uint8)], dim=-1)


def _quantize_32(x: Tensor, w: Tensor | None, bits: int, has_minimum: bool) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1: d, of the _1 types m, of the Q5 types the fifth bits, then the low four bits.

    Of the _0 types the weight of largest magnitude, with its sign, lands exactly on code 0; of the _1 types the
    smallest weight is code 0 and the largest the highest code. With weights of errors, scales are searched for.
    """
    middle, highest = 2 ** (bits - 1), 2**bits - 1
    if w is not None:
        groups, w = x.T.contiguous(), w.T.contiguous()
        if has_minimum:
            scale, minimum, inverse, its_minimum = search_lines(groups, w, highest, TRIALS)
            head, y = [to_half(scale[:, None]), to_half(minimum[:, None])], nearest((groups - its_minimum) * inverse)
        else:
            scale, inverse = search_scales(groups, w, middle)
            head, y = [to_half(scale[:, None])], codes_with(groups, inverse, middle) + middle
        y = y.clamp_(min=0).T.contiguous()
    elif has_minimum:
        m = first_least(x, dim=1)
        d = divide((x.amax(dim=-1, keepdim=True) - m).abs(), highest)  # abs: -0.0 - 0.0 would be -0.0
        head, y = [to_half(d), to_half(m)], (x - m) * _reciprocal(d) + 0.5
    else:
        extreme = first_extreme(x, dim=1)
        extreme = torch.where(extreme == 0, 0, extreme)  # never -0.0: the sign of d would flip with it
        d = divide(extreme, -middle)
        head, y = [to_half(d)], x * _reciprocal(d) + (middle + 0.5)
    # Blocks whose weights are all below about 1e-37 arrive as infinities and NaN. Their scale is 0 in half precision,
    # so any code reads as 0; 0 is also what C's conversion gives on x86.
    codes = y.nan_to_num(nan=0, posinf=0, neginf=0).clamp(max=highest).to(torch.uint8)
    fifth = [pack_bits(codes >> 4)] if bits == 5 else []
    return torch.cat([*head, *fifth, pack_nibbles(codes)], dim=-1)


# ------------------------------------------------------------------------------------------------ blocks of 256


def _quantize_k(x: Tensor, w: Tensor | None, bits: int) -> Tensor:
    """Q4_K, Q5_K: d, dmin, 8 pairs of 6 bits, of Q5_K the fifth bits, then the low four bits.

    Each group of 32 has a scale and a minimum: 6-bit numbers, times d and dmin. The 8 pairs take 12 bytes. The low four
    groups have a byte each, whose two spare bits keep the top of the high four groups' numbers:

        bytes 0-3    scale of group g, and above it the top 2 bits of the scale of group g + 4
        bytes 4-7    the same for the minimum
        bytes 8-11   group g + 4: low 4 bits of the scale, then low 4 bits of the minimum
    """
    highest, trials = (15, (-1.0, 0.1, 21)) if bits == 4 else (31, (-0.5, 0.1, 16))
    groups = x.view(-1, 32).T.contiguous()  # (32, n * 8)
    w = None if w is None else w.view(-1, 32).T.contiguous()
    trials, w_of_lines = (trials, usual_weights(groups)) if w is None else (TRIALS, w)
    scale, minimum, inverse, its_minimum = search_lines(groups, w_of_lines, highest, trials)
    w = None if w is None else sum_in_order(w).view(-1, 8)
    d, scales, rough_scale = small.round_to_codes(scale.view(-1, 8), w, 63)
    dmin, minima, rough_minimum = small.round_to_codes(-minimum.view(-1, 8), w, 63)
    codes = nearest((groups + rough_minimum).div_(rough_scale))
    if (is_zero := rough_scale == 0).any():  # read as 0 times code, and C leaves the codes of the search there
        codes = torch.where(is_zero, nearest((groups - its_minimum).mul_(inverse)), codes)
    codes = codes.clamp_(0, highest).to(torch.uint8).T.contiguous().view(-1, 8, 32)
    tops = [numbers[:, :4] | numbers[:, 4:] >> 4 << 6 for numbers in (scales, minima)]
    head = [d, dmin, *tops, scales[:, 4:] & 15 | minima[:, 4:] << 4]
    # Byte j of the fifth bits: element j of 8 groups.
    fifth = [(codes >> 4 << places(codes, *range(8))).sum(dim=1, dtype=torch.uint8)] if bits == 5 else []
    return torch.cat([*head, *fifth, pack_nibbles(codes.view(-1, 4, 64)).flatten(1)], dim=-1)


def _quantize_q6_k(x: Tensor, w: Tensor | None) -> Tensor:
    groups = x.view(-1, 16).T.contiguous()  # (16, n * 16)
    w = groups * groups if w is None else w.view(-1, 16).T.contiguous()
    scale, inverse = search_scales(groups, w, middle=32)
    scale = scale.view(-1, 16)
    largest = first_extreme(scale, dim=1)
    is_zero = largest.abs() < TINY
    inverse_d = x.new_tensor(-128) / largest.masked_fill_(is_zero, 1)
    d = to_half(1 / inverse_d)
    scales = nearest(inverse_d * scale).clamp_(max=127)
    rough_scale = (from_half(d) * scales).flatten()  # what a reader will see
    codes = nearest(groups / rough_scale)
    if (is_lost := rough_scale == 0).any():  # read as 0 times code, and C leaves the codes of the search there
        codes = torch.where(is_lost, codes_with(groups, inverse, 32), codes)
    codes = (codes.clamp_(-32, 31) + 32).to(torch.uint8).T.contiguous().view(-1, 2, 128)
    high = (codes.view(-1, 2, 4, 32) >> 4 << places(codes, 0, 2, 4, 6)).sum(dim=2, dtype=torch.uint8)  # (n, 2, 32)
    scales = scales.to(torch.int8).view(torch.uint8)
    return torch.cat([pack_nibbles(codes).flatten(1), high.flatten(1), scales, d], dim=-1).masked_fill_(is_zero, 0)


def _plain(dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    return lambda x, w: x.to(dtype).contiguous().view(torch.uint8)


def _of_32(type_id: int, ggml_type: str, bits: int, has_minimum: bool) -> BlockFormat:
    pack = partial(_quantize_32, bits=bits, has_minimum=has_minimum)
    halves = (0, 4 if has_minimum else 2)
    return BlockFormat(type_id, *LAYOUTS[ggml_type], pack, halves, energy=1, mean_of_row=True)


FORMATS = {
    "F32": BlockFormat(0, *LAYOUTS["F32"], _plain(torch.float32)),
    "F16": BlockFormat(1, *LAYOUTS["F16"], _plain(torch.float16)),
    "BF16": BlockFormat(30, *LAYOUTS["BF16"], _plain(torch.bfloat16)),
    "Q4_0": _of_32(2, "Q4_0", bits=4, has_minimum=False),
    "Q4_1": _of_32(3, "Q4_1", bits=4, has_minimum=True),
    "Q5_0": _of_32(6, "Q5_0", bits=5, has_minimum=False),
    "Q5_1": _of_32(7, "Q5_1", bits=5, has_minimum=True),
    "Q8_0": BlockFormat(8, *LAYOUTS["Q8_0"], _quantize_q8_0),
    "Q2_K": BlockFormat(10, *LAYOUTS["Q2_K"], small.quantize_q2_k, (80, 84), energy=1),
    "Q3_K": BlockFormat(11, *LAYOUTS["Q3_K"], small.quantize_q3_k, (108, 110), energy=2),
    "Q4_K": BlockFormat(12, *LAYOUTS["Q4_K"], partial(_quantize_k, bits=4), (0, 4), energy=2),
    "Q5_K": BlockFormat(13, *LAYOUTS["Q5_K"], partial(_quantize_k, bits=5), (0, 4), energy=2),
    "Q6_K": BlockFormat(14, *LAYOUTS["Q6_K"], _quantize_q6_k, (208, 210)),
    "IQ4_NL": BlockFormat(20, *LAYOUTS["IQ4_NL"], small.quantize_iq4_nl, energy=2),
    "IQ4_XS": BlockFormat(23, *LAYOUTS["IQ4_XS"], small.quantize_iq4_xs, energy=2),
}
