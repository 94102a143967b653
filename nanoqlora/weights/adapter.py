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
from ..qlora import ALL_LINEAR, add_update, block_linears, lora_layers, target_layers
from .adapter_files import Trained, adapter_file, rank_and_alpha, read_adapter, sort_metadata

PREFIX = "base_model.model."
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours: PEFT's


class Update(NamedTuple):
    """What an adapter does to one layer."""

    lora_A: Tensor  # (r, n_in) float32
    lora_B: Tensor  # (n_out, r) float32
    scaling: float
    magnitude: Tensor | None  # (n_out,) float32 with DoRA

    def rows(self, rows: slice) -> "Update":
        """Of some rows of the layer's weight."""
        return self._replace(
            lora_B=self.lora_B[rows], magnitude=None if self.magnitude is None else self.magnitude[rows]
        )

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


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "", trained: Trained | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them.

    Args:
        model: with LoRA injected.
        base_model: what the adapter belongs to, kept as base_model_name_or_path.
        trained: how, and on which base; kept in the file's metadata, which PEFT does not look at.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    r = Counter(layer.lora_A.shape[0] for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    kinds = {name.rpartition(".")[2] for name in layers}
    whole = {name for name, _ in block_linears(model) if name.rpartition(".")[2] in kinds} == layers.keys()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": first.dropout_p,
        "use_rslora": first.use_rslora,
        "use_dora": first.magnitude is not None,
        "target_modules": sorted(kinds if whole else layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {re.escape(k): v.lora_A.shape[0] for k, v in layers.items() if v.lora_A.shape[0] != r},
        "alpha_pattern": {re.escape(k): v.alpha for k, v in layers.items() if v.alpha != alpha},
        "modules_to_save": None,
    }
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter_state(model).items()}
    with whole_file(Path(folder) / "adapter_model.safetensors") as file:
        save_file(state, file, metadata={"format": "pt"} | (trained.metadata() if trained else {}))
        sort_metadata(file)
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_updates(folder: str | Path) -> tuple[dict[str, Any], dict[str, Update]]:
    """adapter_config.json and, by the name of its layer, what the adapter adds there.

    Raises:
        UserError: as `read_adapter`, or tensors that are no whole update.
    """
    config, state = read_adapter(folder)
    path = adapter_file(folder)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.({'|'.join(map(re.escape, PARTS.values()))})", key)
        if not match:
            raise UserError(f"{path}: holds {key}, which is no part of a LoRA update, so it would be lost. Refused.")
        layers.setdefault(match[1], {})[match[2]] = tensor.float()
    if not layers:
        raise UserError(f"{path}: holds no update of any layer, so it is no adapter. Save it again.")
    updates = {}
    for name, parts in layers.items():
        needed = [part for part in PARTS.values() if part != PARTS["magnitude"] or config.get("use_dora")]
        if parts.keys() != set(needed):
            wrong = sorted(parts.keys() ^ set(needed))[0]
            raise UserError(
                f"{path}: {name} {'has' if wrong in parts else 'lacks'} {wrong}, which does not fit "
                f"{'DoRA' if config.get('use_dora') else 'LoRA'}, so the adapter is cut or mixed up. Save it again."
            )
        a, b = parts[PARTS["lora_A"]], parts[PARTS["lora_B"]]
        for part, w in parts.items():
            if w.ndim != (1 if part == PARTS["magnitude"] else 2):
                raise UserError(
                    f"{path}: {name} has {part} of shape {tuple(w.shape)}, so it is no update. Save it again."
                )
            if not torch.isfinite(w).all():
                raise UserError(
                    f"{path}: {name} has {part} with NaN or infinite values, so every answer would be. Train it again."
                )
        r, alpha = rank_and_alpha(config, name)
        if not len(a) == b.shape[1] == r:
            raise UserError(
                f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} where "
                f"adapter_config.json says rank {r}, so its scale would be wrong. Take both files from one adapter."
            )
        scaling = alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
        updates[name] = Update(a, b, scaling, parts.get(PARTS["magnitude"]))
    return config, updates


def load_adapter(model: Llama, folder: str | Path, dropout: float = 0.0) -> None:
    """Inject what an adapter needs and fill it. Every tensor of the file is used and every layer filled.

    Raises:
        UserError: as `read_updates`, or the adapter does not fit the model.
    """
    config, updates = read_updates(folder)
    path = adapter_file(folder)
    linears = dict(block_linears(model))
    model.requires_grad_(False)
    for name, update in updates.items():
        if name not in linears:
            raise UserError(
                f"{path}: has an update of {name}, and the model has no such linear layer in its blocks, so this "
                f"adapter is of another model."
            )
        r, alpha = rank_and_alpha(config, name)
        add_update(model, name, r, alpha, dropout, config.get("use_rslora", False), update.magnitude is not None)
    state = {}
    for name, update in updates.items():
        parts = ((theirs, getattr(update, ours)) for ours, theirs in PARTS.items())
        state |= {f"{PREFIX}{name}.{part}": tensor for part, tensor in parts if tensor is not None}
    fill_adapter(model, state, path)


def fill_adapter(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy tensors under PEFT's names into the injected layers; both sides have to have the same names and shapes."""
    ours = adapter_state(model)
    for name in sorted(ours.keys() ^ state.keys()):
        here, there = ("the model", "the file") if name in ours else ("the file", "the model")
        raise UserError(f"{path}: {here} has {name} and {there} has not, so this adapter is of another model or cut.")
    for name, tensor in ours.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(state[name].shape)} and the model needs {tuple(tensor.shape)}, "
                f"so this adapter is of another model."
            )
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
    found = {
        "lora_r": sorted({layer.lora_A.shape[0] for layer in layers.values()}),
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
