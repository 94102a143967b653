"""The trained part in and out, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The file holds, for each layer that learnt, `base_model.model.NAME.lora_A.weight` (r, n_in) and `.lora_B.weight`
(n_out, r), and with DoRA `.lora_magnitude_vector` (n_out,). Rank and alpha stand in the configuration; a layer may
have its own in rank_pattern and alpha_pattern, whose keys are regular expressions for the end of a layer's name.

An adapter computes something else when a part of it is left out. So a configuration key that is not understood here,
and asks for anything, is an error that names it.
"""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cli import UserError, read_json, whole_file, write_text
from .hub import ADAPTER_FILES, local_path
from .model import Llama
from .qlora import ALL_LINEAR, add_update, block_linears, lora_layers, target_layers

PREFIX = "base_model.model."
PARTS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}  # ours: PEFT's

HANDLED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
SAYS_NOTHING = {  # about what is computed: the file itself says which layers learnt
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}


class Update(NamedTuple):
    """What an adapter does to one layer."""

    lora_A: Tensor  # (r, n_in) float32
    lora_B: Tensor  # (n_out, r) float32
    scaling: float
    magnitude: Tensor | None  # (n_out,) float32 with DoRA

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


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them.

    Args:
        model: with LoRA injected.
        base_model: what the adapter belongs to, kept as base_model_name_or_path.
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
        save_file(state, file, metadata={"format": "pt"})
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of an adapter's folder, or of an adapter by its hub name.

    Raises:
        UserError: files missing or damaged, or a kind of adapter that is more than LoRA or DoRA.
    """
    folder = local_path(folder, ADAPTER_FILES)
    if not folder.is_dir():
        raise UserError(f"adapter {folder}: no such folder. Give the folder with adapter_model.safetensors.")
    where = folder / "adapter_config.json"
    config = read_json(where)
    for key, value in config.items():
        if value in (None, False, [], {}) or key in HANDLED | SAYS_NOTHING or value in ONLY.get(key, ()):
            continue
        raise UserError(
            f"{where}: {key} is {value!r}, which is not built in; without it the adapter would compute something else. "
            f"LoRA on linear layers of the blocks is read, with rank_pattern, alpha_pattern, rsLoRA and DoRA."
        )
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            raise UserError(f"{where}: {key} is {config.get(key)!r}, and the update's scale needs a number above zero.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            raise UserError(
                f"{where}: {key} is {patterns!r}, where a map from names to numbers above zero is expected."
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{where}: {key} has {pattern!r}, no regular expression ({error}).") from error
    path = folder / "adapter_model.safetensors"
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Save or copy the adapter again.") from error


def adapter_hash(folder: str | Path) -> str | None:
    """SHA-256 of an adapter's tensors, by which a certificate names it; None without such a file."""
    path = local_path(folder, ADAPTER_FILES) / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def rank_and_alpha(config: dict[str, Any], name: str) -> tuple[int, float]:
    """What adapter_config.json says of one layer: of the patterns that fit the end of its name, the first counts."""
    found = []
    for key, pattern_key in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        patterns = config.get(pattern_key) or {}
        fitting = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
        found.append((fitting or [config[key]])[0])
    return found[0], found[1]


def read_updates(folder: str | Path) -> tuple[dict[str, Any], dict[str, Update]]:
    """adapter_config.json and, by the name of its layer, what the adapter adds there.

    Raises:
        UserError: as `read_adapter`, or tensors that are no whole update.
    """
    config, state = read_adapter(folder)
    path = local_path(folder, ADAPTER_FILES) / "adapter_model.safetensors"
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
    path = local_path(folder, ADAPTER_FILES) / "adapter_model.safetensors"
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
