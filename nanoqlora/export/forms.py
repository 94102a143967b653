"""The forms that a trained model can take, each as weights that are made when they are asked for, one tensor at a time.

    Merged(base, updates, ...)      base and adapter as one weight: what merge.py writes, what training computed with
    Rounded(weights, "Q4_K_M")      the same after a trip through the block formats of a GGUF file

Both have the interface of an opened checkpoint (`checkpoint.Tensors`), so a form can be written, loaded or scored
alike, and none of them is ever complete in memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config.errors import UserError
from ..gguf.config import model_config
from ..gguf.file_types import tensor_types
from ..gguf.ggml_blocks import FORMATS, dequantize, quantize_checked
from ..gguf.imatrix import Imatrix
from ..gguf.names import tensor_shapes
from ..qlora import ROWS_AT_A_TIME, QLoRALinear, check_width
from ..weights.adapter import Update, read_trained
from ..weights.checkpoint import GGUFWeights, Tensors, Weights
from .certificate import BASE_AND_ADAPTER, GGUF, ON_NF4, ON_ORIGINAL, TRAINED, Form


@dataclass
class Merged:
    """W + s B A, summed in float32 and rounded once."""

    base: Weights  # where W comes from
    updates: dict[str, Update]  # of the adapter, by the name of the layer; none leaves the base alone
    in_4bit: bool  # W of the blocks' linear layers goes through NF4 and back first, as in training
    seen: torch.dtype  # that training computed in: a weight was rounded to it before every matmul
    dtype: torch.dtype  # of the result; float32 keeps the sum as it is
    device: torch.device  # where the arithmetic is done, and where the result is

    def __post_init__(self) -> None:
        self.config, self.where = self.base.config, self.base.where
        self.shapes = tensor_shapes(model_config(self.config, self.where))
        self.changes: dict[str, float] = {}  # by layer: the norm of what was added over the norm of W
        for layer, update in self.updates.items():
            check_fits(layer, update, self.shapes.get(f"{layer}.weight"), "adapter", f"the model of {self.where}")

    def names(self) -> list[str]:
        return list(self.shapes)

    @property
    def num_bytes(self) -> int:
        return sum(map(math.prod, self.shapes.values())) * self.dtype.itemsize

    def load(self, name: str) -> Tensor:
        """One tensor of the merged model.

        Raises:
            UserError: the adapter does not fit, changes nothing there, or the result holds NaN or infinity.
        """
        w, layer = self.base.load(name).to(self.device), name.removesuffix(".weight")
        is_linear = ".layers." in name and w.ndim == 2
        merged = self._merged_linear(name, layer, w) if is_linear else w.to(self.seen).to(self.dtype)
        if not torch.isfinite(torch.stack(merged.aminmax())).all():
            raise UserError(f"{name}: holds NaN or infinite values in {self.dtype}. Choose a larger --dtype.")
        return merged

    def as_training_saw(self, name: str, w: Tensor) -> QLoRALinear:
        """A linear layer with the values that every matmul of the training had, from its weight in the file."""
        linear = QLoRALinear(w)
        if self.in_4bit:
            check_width(f"{self.where}: {name}", w)
            linear.quantize()
        return linear

    def _merged_linear(self, name: str, layer: str, w: Tensor) -> Tensor:
        """Some rows at a time, so that float32 copies stay small beside the weight."""
        linear, update = self.as_training_saw(name, w), self.updates.get(layer)
        if update:
            update = update.to(self.device)
        merged, step = torch.empty(w.shape, dtype=self.dtype, device=self.device), max(1, ROWS_AT_A_TIME // w.shape[1])
        before = after = torch.zeros((), dtype=torch.float64, device=self.device)
        is_changed = False
        for rows in (slice(i, i + step) for i in range(0, len(w), step)):
            base = linear.rebuild(self.seen, rows).float()
            merged[rows] = base
            if update:
                plain, exact = merged[rows].clone(), update.rows(rows).merged(base)
                merged[rows] = exact
                is_changed = is_changed or not torch.equal(merged[rows], plain)
                before = before + base.norm().double() ** 2
                after = after + (exact - base).norm().double() ** 2
        if update:
            is_zero = not (update.lora_A.any() and update.lora_B.any())  # as training starts
            if not is_changed and not is_zero:
                raise UserError(f"adapter: {layer}: does not change in {self.dtype}. Choose a larger --dtype.")
            self.changes[layer] = (after / before.clamp(min=1e-60)).sqrt().item()
        return merged


def check_fits(layer: str, update: Update, shape: tuple[int, ...] | None, where: str | Path, base: str) -> None:
    """Raises UserError if an update is not one of a weight of this shape; None: there is no such layer."""
    found = (update.lora_B.shape[0], update.lora_A.shape[1])
    if shape != found:
        what = f"the update of {layer} is for a weight of shape {found}, and {base} has {shape or 'no such layer'}"
        raise UserError(f"{where}: {what}: an adapter of another model. Give the base that it was trained on.")


class Rounded:
    """Weights as a GGUF file of some type holds them, float32: quantized and read back, no file needed.

    Rows of q_proj and k_proj stand in another order in a file, and blocks run along rows, so the values are the same.
    """

    def __init__(self, weights: Tensors, file_type: str, device: torch.device, imatrix: Imatrix | None = None) -> None:
        self.weights, self.device = weights, device
        self.config, self.where = weights.config, weights.where
        config = model_config(weights.config, weights.where)
        self.types, shapes = tensor_types(config, file_type, imatrix is not None), tensor_shapes(config)
        self.importance = imatrix.of_model(shapes) if imatrix else {}
        self.num_bytes = sum(FORMATS[self.types[name]].num_bytes(math.prod(shape)) for name, shape in shapes.items())

    def names(self) -> list[str]:
        return self.weights.names()

    def load(self, name: str) -> Tensor:
        w, ggml_type = self.weights.load(name).to(self.device), self.types[name]
        return dequantize(quantize_checked(w, ggml_type, name, self.importance.get(name)), ggml_type, tuple(w.shape))


def trained_form(base: Weights, updates: dict[str, Update], adapter: str | Path, device: torch.device) -> Form:
    """Base and adapter as training computed with them, in float32, and what they take: NF4 and the small update."""
    in_4bit, seen, _ = read_trained(adapter)
    weights = Merged(base, updates, in_4bit, seen, torch.float32, device)
    total = sum(4 * (update.lora_A.numel() + update.lora_B.numel()) for update in updates.values()) + 0.0
    for name, shape in weights.shapes.items():
        in_nf4 = in_4bit and ".layers." in name and len(shape) == 2
        total += math.prod(shape) * (0.5 + 1 / 64 + 4 / 64 / 256 if in_nf4 else 2)
    if is_two_files(base, updates, in_4bit):
        total += base.where.stat().st_size - 2 * sum(map(math.prod, weights.shapes.values()))
    return Form(TRAINED if in_4bit else "adapter on base", weights, round(total))


def is_two_files(base: Weights, updates: dict[str, Update], in_4bit: bool) -> bool:
    """Whether the base's .gguf file and one of the adapter are what was trained."""
    has_dora = any(update.magnitude is not None for update in updates.values())
    return isinstance(base, GGUFWeights) and not in_4bit and not has_dora


def all_forms(merged: Merged, written: Weights, adapter: str | Path, types: list[str], num_bytes: int) -> list[Form]:
    """The trained model first; then what was written, what `--base` could have been instead, and the GGUF types.

    Args:
        merged: what was written, as it was made; `written`: as it is read back; `num_bytes`: of its files.
        types: keys of FILE_TYPES.
    """
    base, updates, device = merged.base, merged.updates, merged.device
    in_4bit, seen, _ = read_trained(adapter)
    trained = trained_form(base, updates, adapter, device)
    without = Merged(base, {}, in_4bit, seen, torch.float32, device)
    forms = [trained, Form("base without adapter", without, trained.num_bytes)]
    for name, on_nf4 in ((ON_NF4, True), (ON_ORIGINAL, False)):
        if on_nf4 == merged.in_4bit:
            forms.append(Form(name, written, num_bytes))
        elif in_4bit:
            other = Merged(base, updates, on_nf4, seen if on_nf4 else torch.float32, merged.dtype, device)
            forms.append(Form(name, other, num_bytes))
    if is_two_files(base, updates, in_4bit):
        both = Merged(base, updates, False, torch.float32, torch.float32, device)
        forms.append(Form(BASE_AND_ADAPTER, both, trained.num_bytes))
    for name in types:
        rounded = Rounded(written, name, device)
        forms.append(Form(GGUF + name.lower(), rounded, rounded.num_bytes))
    return forms


def bytes_on_disk(folder: Path) -> int:
    """Of the weights in a Hugging Face folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
