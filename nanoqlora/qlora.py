"""QLoRA: linear layers with a frozen 4-bit weight and a trained low-rank update.

    load_in_4bit      nn.Linear -> QLoRALinear with W in NF4               a quarter of the memory
    inject_lora       adds lora_A and lora_B to the target layers          the only parameters with a gradient

`model.py` does not know of this file: a layer is replaced by one with the same name, so
`model.layers.0.self_attn.q_proj` has the name that it has in Hugging Face's checkpoints and in PEFT's adapters.
Read next: `../train.py`.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .config.errors import UserError
from .model import Llama
from .ops.nf4 import BLOCKSIZE

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
INPUT_OF = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
# Layers with the same number in INPUT_OF read the same input and share its dropout mask.

ROWS_AT_A_TIME = 2**20  # weights in the rows that are quantized at a time


class QLoRALinear(nn.Module):
    """y = x W^T + s * dropout(x) A^T B^T with W frozen, in NF4 or as it came; without A and B just y = x W^T.

    Buffers in NF4: packed (n_out, n_in / 2) uint8; absmax (n_out, n_in / 64) uint8, the scales' 8-bit codes, with
    nested_absmax (ceil(n / 256),) and nested_offset () float32.
    Parameters: lora_A (r, n_in) and lora_B (n_out, r), float32; with DoRA also magnitude (n_out,).
    """

    weight: nn.Parameter  # there until `quantize`; the four buffers after it
    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor
    lora_A: nn.Parameter  # registered as None until `add_lora`
    lora_B: nn.Parameter
    magnitude: nn.Parameter | None  # (n_out,) float32, DoRA's norm of each row of W

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name in ("lora_A", "lora_B", "magnitude"):
            self.register_parameter(name, None)
        self.scaling = self.alpha = self.dropout_p = 0.0
        self.use_rslora = False
        self.layer_seed = 0
        self.resident = True  # False: the frozen tensors are views of a buffer that all blocks use in turn
        self.dense: Tensor | None = None  # the dequantized W, where it is kept
        self.row_seeds: Tensor | None = None  # set for each batch by `set_dropout_rows`, as in `ops.Dropout`
        self.places: Tensor | None = None
        self.row_scale: Tensor | None = None  # (n_out,) DoRA's c, where a fused block keeps it for a step

    @property
    def has_lora(self) -> bool:
        return self.lora_A is not None

    @property
    def device(self) -> torch.device:
        return self.weight.device if hasattr(self, "weight") else self.packed.device

    def quantize(self) -> None:
        """Replace W by its NF4 form."""
        w = self.weight.data
        step = max(1, ROWS_AT_A_TIME // w.shape[1])  # rows; all at once would take several float32 copies of W
        parts = [ops.quantize_nf4(w[i : i + step]) for i in range(0, len(w), step)]
        packed, absmax = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        del self.weight
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_offset", nested_offset)
        self.register_buffer("absmax", absmax)

    def rebuild(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """W (n_out, n_in), or some of its rows, dequantized to `dtype`."""
        if hasattr(self, "weight"):
            return self.weight[rows].to(dtype)
        if self.dense is not None:
            return self.dense[rows].to(dtype)
        absmax = ops.dequantize_absmax(self.absmax, self.nested_absmax, self.nested_offset)
        return ops.dequantize_nf4(self.packed[rows], absmax[rows], dtype)

    def rebuild_into(
        self, out: Tensor, update: tuple[Tensor, Tensor] | None = None, row_scale: Tensor | None = None
    ) -> None:
        """Dequantize W into `out`, in its dtype; `out` may be rows of a larger buffer.

        Args:
            update: A (r, n_in) and s B (n_out, r) in that dtype: W + s B A is written, summed in float32 and rounded
                once.
            row_scale: (n_out,) float32, with an update only: W's rows are multiplied by it.
        """
        if not hasattr(self, "weight"):
            codes = self.packed, self.absmax, self.nested_absmax, self.nested_offset
            ops.dequantize_into(*codes, out, update and (*update, 1.0), row_scale)
        elif update is None:
            out.copy_(self.weight)
        else:
            w = self.weight.float() if row_scale is None else self.weight.float() * row_scale[:, None]
            out.copy_(torch.addmm(w, update[1].float(), update[0].float()))

    def add_lora(
        self, r: int, alpha: float, dropout: float, use_rslora: bool, layer_seed: int, use_dora: bool = False
    ) -> None:
        """Add an update that starts at zero: A uniform as in PEFT (Kaiming with a = sqrt(5)), B zero.

        DoRA's magnitudes are ones until `start_magnitudes` sets them or they are loaded.
        """
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=self.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=self.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.alpha, self.use_rslora = alpha, use_rslora
        self.scaling = alpha / math.sqrt(r) if use_rslora else alpha / r
        self.dropout_p, self.layer_seed = dropout, layer_seed
        if use_dora:
            self.magnitude = nn.Parameter(torch.ones(self.out_features, device=self.device))

    def delta(self) -> Tensor:
        """The update s B A, (n_out, n_in) float32."""
        return self.scaling * (self.lora_B @ self.lora_A)

    def frozen(self, x: Tensor) -> Tensor:
        """x W^T without gradients, (..., n_in) -> (..., n_out); few rows multiply the 4 bits themselves."""
        if hasattr(self, "weight") or self.dense is not None:
            return F.linear(x, self.rebuild(x.dtype))
        return ops.nf4_linear(x, self.packed, self.absmax, self.nested_absmax, self.nested_offset)

    @torch.no_grad()
    def measure_rows(self, dtype: torch.dtype) -> None:
        """Set `row_scale`, DoRA's c = magnitude / norm of the rows of W + s B A, with A and s B cast to `dtype`."""
        assert self.magnitude is not None
        w = torch.empty(self.out_features, self.in_features, device=self.device)
        self.rebuild_into(w, (self.lora_A.to(dtype), (self.scaling * self.lora_B).to(dtype)))
        c = self.magnitude / w.norm(dim=1)
        self.row_scale = c if self.row_scale is None else self.row_scale.copy_(c)  # its address is in CUDA graphs

    def forward(self, x: Tensor) -> Tensor:
        if not self.has_lora:
            return ops.frozen_linear(x, self.rebuild)
        dropout = None
        if self.training and self.dropout_p > 0:
            assert self.row_seeds is not None, "set_dropout_rows comes before the forward pass"
            dropout = ops.Dropout(self.dropout_p, self.row_seeds ^ self.layer_seed, self.places)
        if self.magnitude is not None:
            return self.dora(x, self.magnitude, dropout)
        return ops.lora_linear(x, self.rebuild, self.lora_A, self.lora_B, self.scaling, dropout)

    def dora(self, x: Tensor, magnitude: Tensor, dropout: ops.Dropout | None) -> Tensor:
        """y = c * (x (W + s B A)^T), c (n_out,) scaling every row of W + s B A to its learned norm `magnitude`.

        The row's present norm is a constant in the backward pass, as section 4.3 of the paper proposes. With dropout
        the inputs that remain go through W + s B A, and those that were dropped through W alone.
        Source: DoRA (arXiv:2402.09353). Cost: W is dequantized once more, in float32, for the norms.
        """
        c = self.row_scale
        if c is None:
            with torch.no_grad():
                norm = (self.rebuild(torch.float32) + self.delta()).norm(dim=1)
            c = magnitude / norm
        dropped = x if dropout is None else (x * dropout.mask(x)).to(x.dtype)
        y = c * ops.lora_linear(dropped, self.rebuild, self.lora_A, self.lora_B, self.scaling, None)  # float32
        return y.to(x.dtype) if dropout is None else (y + ops.frozen_linear(x - dropped, self.rebuild)).to(x.dtype)


def quantize_model(model: Llama) -> None:
    """Replace every linear layer of the blocks by its 4-bit form, one at a time. Embedding, head and norms stay."""
    for name, linear in list(block_linears(model)):
        check_width(f"tensor {name}.weight", linear.weight)
        layer = QLoRALinear(linear.weight.data)
        layer.quantize()
        model.set_submodule(name, layer)


def check_width(where: str, weight: Tensor) -> None:
    """Raises UserError if the rows of a weight (n_out, n_in) do not split into groups of 64."""
    if weight.shape[1] % BLOCKSIZE:
        raise UserError(
            f"{where} has rows of {weight.shape[1]} values, and NF4 keeps one scale for {BLOCKSIZE} of them, so a row "
            f"must split evenly. Keep the base in 16 bits (adapter: lora, load_in_4bit: false)."
        )


def inject_lora(
    model: Llama,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> None:
    """Freeze the model and add an update of rank r to the named linear layers of its blocks.

    Args:
        model: plain or 4-bit. Changed in place.
        alpha: the update is scaled by alpha / r, or by alpha / sqrt(r) with `use_rslora` (arXiv:2312.03732).
        dropout: probability with which an input of the update's path is dropped in training.
        target_modules: as in `target_layers`.
        use_dora: learn the norm of each row of W apart from its direction (arXiv:2402.09353).
    Raises:
        UserError: as `target_layers`.
    """
    names = target_layers(model, target_modules)
    model.requires_grad_(False)
    for name in names:
        add_update(model, name, r, alpha, dropout, use_rslora, use_dora)
    start_magnitudes(model)


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The linear layers of the blocks that `targets` name, in model order.

    Args:
        targets: as in PEFT: full names; ends of names (`q_proj`, `layers.0.mlp.up_proj`); `all-linear`; or, where no
            name ends so, a regular expression for full names (`model.layers.[0-3].self_attn.(q|v)_proj`).
    Raises:
        UserError: one of them matches no layer, or a module that is not a linear layer of a block.
    """
    every = [name for name, _ in model.named_modules() if name]
    linears = [name for name, _ in block_linears(model)]
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else targets or [""]:
        found = [name for name in every if name == target or name.endswith(f".{target}")]
        try:
            found = linears if target == "all-linear" else found or [x for x in every if re.fullmatch(target, x)]
            problem = "no layer's name ends so"
        except re.error as error:
            problem = f"no layer's name ends so, and it is no regular expression ({error})"
        if others := [name for name in found if name not in linears]:
            problem = f"{others[0]} is no linear layer of a block, and others are not trained"
        if others or not found:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            near = difflib.get_close_matches(target.rpartition(".")[2], kinds, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near and not others else ""
            raise UserError(
                f"lora_target_modules: {target!r}: {problem}.{hint} Give ends of names ({', '.join(kinds)}), full "
                f"names such as {linears[0]}, or a regular expression for full names."
            )
        chosen.update(found)
    return [name for name in linears if name in chosen]


def start_magnitudes(module: nn.Module) -> None:
    """Set DoRA's magnitudes of the layers in `module` to the norms of the rows of W, where W is loaded."""
    for layer in module.modules():
        if isinstance(layer, QLoRALinear) and layer.magnitude is not None and not layer.magnitude.is_meta:
            layer.magnitude.data = layer.rebuild(torch.float32).norm(dim=1)


def add_update(model: Llama, name: str, r: int, alpha: float, dropout: float, use_rslora: bool, use_dora: bool) -> None:
    """Add an update to one linear layer of a block, by its full name. Arguments as in `inject_lora`."""
    path, _, kind = name.rpartition(".")
    layer_input = 4 * int(path.split(".")[2]) + INPUT_OF[kind]
    qlora_linear(model, name).add_lora(r, alpha, dropout, use_rslora, layer_input * 0x9E3779B97F4A7C1 % 2**62, use_dora)


def qlora_linear(model: nn.Module, name: str) -> QLoRALinear:
    """The linear layer of that name; a plain one is replaced, over the same weight."""
    linear = model.get_submodule(name)
    if isinstance(linear, nn.Linear):
        layer = QLoRALinear(linear.weight.data)
        layer.resident = getattr(linear, "resident", True)
        model.set_submodule(name, layer)
        return layer
    assert isinstance(linear, QLoRALinear)
    return linear


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | QLoRALinear]]:
    """(name, layer) of the linear layers inside the blocks, in model order: `model.layers.0.self_attn.q_proj`, ..."""
    for name, module in model.named_modules():
        if ".layers." in name and isinstance(module, nn.Linear | QLoRALinear):
            yield name, module


def lora_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """The layers with an update, by name, in model order."""
    return {name: m for name, m in block_linears(model) if isinstance(m, QLoRALinear) and m.has_lora}


def set_dropout_rows(model: nn.Module, row_seeds: Tensor, places: Tensor | None = None) -> None:
    """Set what decides the dropout masks of the next batch.

    Args:
        row_seeds: (B,) int64, a number for each row made of (run, step, row); with `places` (B, T), for each token.
        places: (B, T) int64, the place of each token in its row, where several rows were laid into one.
    """
    for layer in lora_layers(model).values():
        layer.row_seeds, layer.places = row_seeds, places


def flatten_trainable(model: nn.Module, multiple: int = 1) -> nn.Parameter:
    """Concatenate all trained parameters, and their gradients, in one float32 buffer each.

    Every lora_A and lora_B becomes a view of the buffer. The optimizer, the norm, the clip, the sum over ranks and the
    checkpoint then handle one tensor. Zero its gradient in place: setting it to None would break the views.

    Args:
        multiple: the length is padded with zeros to a multiple of it.
    Returns:
        The buffer as a parameter with its `.grad`, (number of trained values,), in the order of the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    values = torch.cat([p.data.flatten() for p in parameters])
    flat = nn.Parameter(F.pad(values, (0, -len(values) % multiple)))
    flat.grad = gradient = torch.zeros_like(flat)
    end = 0
    for p in parameters:
        start, end = end, end + p.numel()
        p.data = flat.data[start:end].view_as(p)
        p.grad = gradient[start:end].view_as(p)
    return flat
