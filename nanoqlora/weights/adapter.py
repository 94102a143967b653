"""The trained part in and out, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The file holds, for each layer that learnt, `base_model.model.NAME.lora_A.weight` (r, n_in) and `.lora_B.weight`
(n_out, r), and with DoRA `.lora_magnitude_vector` (n_out,). Rank and alpha stand in the configuration; a layer may
have its own in rank_pattern and alpha_pattern, whose keys are regular expressions for the end of a layer's name.

An adapter computes something else when a part of it is left out. So a configuration key that is not understood here,
and asks for anything, is an error that names it.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from ..config.errors import UserError
from ..config.files import whole_file, write_text
from ..model import Llama
from ..qlora import ALL_LINEAR, QLoRALinear, add_update, block_linears, lora_layers, target_layers
from .adapter_files import Trained, adapter_file, rank_and_alpha, read_adapter, sort_metadata

PREFIX = "base_model.model."
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours: PEFT's
MAGNITUDE = PARTS["magnitude"]
AGAIN = "Save the adapter again."


class Update(NamedTuple):
    """What an adapter does to one layer."""

    lora_A: Tensor  # (r, n_in) float32
    lora_B: Tensor  # (n_out, r) float32
    alpha: float
    use_rslora: bool
    magnitude: Tensor | None  # (n_out,) float32 with DoRA

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(len(self.lora_A)) if self.use_rslora else len(self.lora_A))

    def to(self, device: torch.device) -> "Update":
        magnitude = None if self.magnitude is None else self.magnitude.to(device)
        return self._replace(lora_A=self.lora_A.to(device), lora_B=self.lora_B.to(device), magnitude=magnitude)

    def rows(self, rows: slice) -> "Update":
        """Of some rows of the layer's weight."""
        magnitude = None if self.magnitude is None else self.magnitude[rows]
        return self._replace(lora_B=self.lora_B[rows], magnitude=magnitude)

    def merged(self, w: Tensor) -> Tensor:
        """The weight that base and adapter together are, (n_out, n_in) float32, from the base's in float32."""
        w = w + self.scaling * (self.lora_B @ self.lora_A)
        return w if self.magnitude is None else w * (self.magnitude / w.norm(dim=1)).unsqueeze(1)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ..."""
    state = {}
    for name, layer in lora_layers(model).items():
        for ours, theirs in PARTS.items():
            if getattr(layer, ours) is not None:
                state[f"{PREFIX}{name}.{theirs}"] = getattr(layer, ours).data
    return state


def ranks_of(layers: dict[str, QLoRALinear]) -> dict[str, int]:
    return {name: layer.lora_A.shape[0] for name, layer in layers.items() if layer.lora_A is not None}


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "", trained: Trained | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them.

    Args:
        model: with LoRA injected.
        base_model: what the adapter belongs to, kept as base_model_name_or_path.
        trained: how, and on which base; kept in the file's metadata, which PEFT does not look at.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    ranks, alphas = ranks_of(layers), {name: layer.alpha for name, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kinds = {name.rpartition(".")[2] for name in layers}
    has_all = {name for name, _ in block_linears(model) if name.rpartition(".")[2] in kinds} == layers.keys()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_p,
        "use_rslora": first.use_rslora,
        "use_dora": first.magnitude is not None,
        "target_modules": sorted(kinds if has_all else layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != r},
        "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
        "modules_to_save": None,
    }
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter_state(model).items()}
    with whole_file(Path(folder) / "adapter_model.safetensors") as file:
        save_file(state, file, metadata={"format": "pt"} | (trained.metadata() if trained else {}))
        sort_metadata(file)
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_updates(folder: str | Path) -> dict[str, Update]:
    """By the name of its layer, what an adapter adds there.

    Raises:
        UserError: as `read_adapter`, or tensors that are no complete update.
    """
    config, state = read_adapter(folder)
    path = adapter_file(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, PARTS.values()))})", key)
        if not match:
            raise UserError(f"{path}: holds {key}, which is no part of a LoRA update, and would be left out. Refused.")
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
    if not layers:
        raise UserError(f"{path}: holds no update of any layer, so it is no adapter. Save it again.")
    kind, needed = ("DoRA", {*PARTS.values()}) if config.get("use_dora") else ("LoRA", {*PARTS.values()} - {MAGNITUDE})
    updates = {}
    for name, parts in layers.items():
        for wrong in sorted(parts.keys() ^ needed):
            has = "has" if wrong in parts else "lacks"
            raise UserError(f"{path}: {name} {has} {wrong}, which does not fit {kind}. Save the adapter again.")
        for part, w in parts.items():
            if w.ndim != (1 if part == MAGNITUDE else 2):
                raise UserError(f"{path}: {name} has {part} of shape {tuple(w.shape)}, so it is no update. {AGAIN}")
            if not torch.isfinite(w).all():
                raise UserError(f"{path}: {name} has {part} with NaN or infinite values. Train it again.")
        a, b = parts[PARTS["lora_A"]], parts[PARTS["lora_B"]]
        r, alpha = rank_and_alpha(config, name)
        if not len(a) == b.shape[1] == r:
            raise UserError(
                f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} where "
                f"adapter_config.json says rank {r}, so its scale would be wrong. Take both files from one adapter."
            )
        updates[name] = Update(a, b, alpha, bool(config.get("use_rslora")), parts.get(MAGNITUDE))
    return updates


def load_adapter(model: Llama, folder: str | Path, dropout: float = 0.0) -> None:
    """Inject what an adapter needs and fill it. Every tensor of the file is used and every layer filled.

    Raises:
        UserError: as `read_updates`, or the adapter does not fit the model.
    """
    updates, path = read_updates(folder), adapter_file(folder)
    linears = dict(block_linears(model))
    model.requires_grad_(False)
    for name, update in updates.items():
        if name not in linears:
            what = f"has an update of {name}, and the blocks have no such linear layer"
            raise UserError(f"{path}: {what}, so this adapter is of another model.")
        r, is_dora = len(update.lora_A), update.magnitude is not None
        add_update(model, name, r, update.alpha, dropout, update.use_rslora, is_dora)
    parts = {
        f"{PREFIX}{name}.{PARTS[part]}": getattr(update, part) for name, update in updates.items() for part in PARTS
    }
    state = {name: tensor for name, tensor in parts.items() if tensor is not None}
    fill_adapter(model, state, path)


def fill_adapter(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy tensors under PEFT's names into the injected layers; both sides have to have the same names and shapes."""
    ours = adapter_state(model)
    for name in sorted(ours.keys() ^ state.keys()):
        here, there = ("the model", "the file") if name in ours else ("the file", "the model")
        raise UserError(f"{path}: {here} has {name} and {there} has not, so this adapter is of another model or cut.")
    for name, tensor in ours.items():
        if tensor.shape != state[name].shape:
            what = f"{name} has shape {tuple(state[name].shape)} and the model needs {tuple(tensor.shape)}"
            raise UserError(f"{path}: {what}, so this adapter is of another model.")
        tensor.copy_(state[name])


def continue_adapter(model: Llama, folder: str | Path, dropout: float, **wanted: Any) -> str:
    """Load the adapter that a run goes on from, and say in a line what it is.

    Args:
        wanted: what the run's configuration asks for by its keys: lora_r, lora_alpha, lora_target_modules,
            peft_use_rslora, peft_use_dora. What is not set there comes from the adapter.
    Raises:
        UserError: as `load_adapter`, or the configuration asks for another adapter than this one.
    """
    load_adapter(model, folder, dropout)
    layers = lora_layers(model)
    kinds = [kind for kind in ALL_LINEAR if any(name.endswith(kind) for name in layers)]
    found: dict[str, list[Any]] = {
        "lora_r": sorted(set(ranks_of(layers).values())),
        "lora_alpha": sorted({layer.alpha for layer in layers.values()}),
        "lora_target_modules": [tuple(kinds)],
        "peft_use_rslora": [next(iter(layers.values())).use_rslora],
        "peft_use_dora": [next(iter(layers.values())).magnitude is not None],
    }
    for key, value in wanted.items():
        is_target = key == "lora_target_modules"
        if value and (target_layers(model, value) != [*layers] if is_target else [value] != found[key]):
            raise UserError(
                f"{key} is {value!r} and the adapter in {folder}, from which lora_model_dir goes on, has "
                f"{', '.join(map(str, found[key]))}. An adapter keeps its own: remove {key}, or start a new adapter."
            )
    ranks, alphas = (", ".join(f"{value:g}" for value in found[key]) for key in ("lora_r", "lora_alpha"))
    return f"going on from {folder}: rank {ranks}, alpha {alphas}, on {len(layers)} layers ({' '.join(kinds)})"
