"""A Llama from a checkpoint, tensor by tensor; its blocks quantised on the way if asked.

load_model(path)       the model: nothing is ever held in 16 bits but one tensor
open_model(path)       the same in two steps, for ranks that share the work (`parallel/fsdp.py`)
Llama                  the model of `model.py` with `from_pretrained`: what `import nanoqlora` gives
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import model as plain
from ..config.errors import UserError
from ..gguf.config import model_config
from ..model import ModelConfig, rope_frequencies
from ..qlora import QLoRALinear, quantize_model
from .checkpoint import GGUFWeights, Weights, open_weights
from .kept_blocks import kept_layer


class Llama(plain.Llama):
    """The Llama of `model.py`, which knows nothing of files, and the way to load one."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> "Llama":
        """Load a folder, a GGUF file or a hub name. Options and errors: those of `open_model`."""
        return load_model(path, **options)


Fill = Callable[[int | None], None]  # fills one block's linear layers; None: everything else
KeptLayer = Callable[[str, torch.device], QLoRALinear | None]


def no_layer(name: str, device: torch.device) -> None:
    """No weight is kept as it is."""


def load_model(path: str | Path, **options: Any) -> Llama:
    """Build a Llama from a checkpoint, tensor by tensor. Arguments and errors: as `open_model`.

    Returns:
        The model in evaluation mode, nothing of it trainable.

    Cost: host memory of about one tensor above what the model takes.
    """
    model, fill = open_model(path, **options)
    for block in (None, *range(model.config.num_hidden_layers)):
        fill(block)
    return model


def open_model(
    path: str | Path,
    *,
    load_in_4bit: bool = False,
    keep_gguf_blocks: bool = False,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    weights: Weights | None = None,
) -> tuple[Llama, Fill]:
    """A Llama that takes no memory yet, its tensors on the meta device, and the function that fills it.

    Args:
        path: Hugging Face folder, Meta's folder, .gguf file or hub name.
        load_in_4bit: quantise the linear layers of the blocks to NF4 from the values in the file, and the scales to
            8 bits.
        keep_gguf_blocks: keep them in the blocks of the .gguf file instead (`kept_blocks.py`).
        dtype: of everything else. Default: float32 on a CPU, bfloat16 on a GPU.
        device: where the model lives; each tensor is moved there, then quantised.
        weights: the opened checkpoint, if there is one.
    Raises:
        UserError: here or while it is filled: a missing or damaged file, a tensor that is missing, has another shape,
            or holds NaN or infinity; blocks are to be kept and there are none.
    """
    weights = weights or open_weights(path)
    kept: KeptLayer = no_layer
    if keep_gguf_blocks:
        if not isinstance(weights, GGUFWeights):
            raise UserError(f"{path}: is no .gguf file, so there are no blocks to keep. Leave out keep_gguf_blocks.")
        load_in_4bit, kept = False, partial(kept_layer, weights)
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    def load(name: str, shape: torch.Size) -> Tensor:
        w = weights.load(name).to(device)
        if not torch.isfinite(w).all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinite values; training on it would give NaN.")
        return w if load_in_4bit and block_of(name) is not None else w.to(dtype)

    config = model_config(weights.config, weights.where)
    try:
        return empty_model(config, load, load_in_4bit=load_in_4bit, dtype=dtype, device=device, kept=kept)
    except UserError as error:  # a width that four bits cannot split
        raise UserError(f"{path}: {error}") from error


def empty_model(
    config: ModelConfig,
    load: Callable[[str, torch.Size], Tensor],
    *,
    load_in_4bit: bool,
    dtype: torch.dtype,
    device: torch.device,
    kept: KeptLayer = no_layer,
) -> tuple[Llama, Fill]:
    """As `open_model`, from any source of tensors: `load(name, shape)` gives one on `device`.

    Args:
        kept: gives the layer of a weight that is kept as it is, on some device; None for the others.
    """
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if load_in_4bit:
        quantize_model(model)
    for name in shapes:
        if block_of(name) is not None and (layer := kept(name, torch.device("meta"))):
            model.set_submodule(name.removesuffix(".weight"), layer)
    model.model.rope_frequencies = rope_frequencies(config).to(device)

    def fill(block: int | None) -> None:
        for name, shape in shapes.items():
            if block_of(name) != block:
                continue
            module_name, _, attribute = name.rpartition(".")
            layer = None if block is None else kept(name, device)
            if load_in_4bit and block is not None and layer is None:
                layer = QLoRALinear(load(name, shape))
                layer.quantize()
            if layer is not None:
                model.set_submodule(module_name, layer.eval())
            else:
                weight = nn.Parameter(load(name, shape), requires_grad=False)
                setattr(model.get_submodule(module_name), attribute, weight)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight

    return model.requires_grad_(False).eval(), fill


def block_of(name: str) -> int | None:
    """The block whose linear layer a weight of this name is, None for embedding, head and norms."""
    parts = name.split(".")
    return int(parts[2]) if parts[-2].endswith("_proj") else None
