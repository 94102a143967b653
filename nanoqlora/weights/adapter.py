"""Adapters, in and out, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

The file holds, for each layer that learnt, `base_model.model.NAME.lora_A.weight` (r, n_in) and `.lora_B.weight`
(n_out, r), and with DoRA `.lora_magnitude_vector` (n_out,). Rank and alpha stand in the configuration; a layer may
have its own in rank_pattern and alpha_pattern, whose keys are regular expressions for the end of a layer's name.
adapter_model.bin, a pickle, is read too, and nothing but tensors of it.

The metadata of the tensors have what our training adds, and PEFT does not look at: how the base was computed with, and
a fingerprint of its weights.

An adapter computes something else when a part of it is left out. So a configuration key that is not understood here,
and asks for anything, is an error that names it. The files may come from anybody: every value is checked before it is
used, regular expressions end after a while, and nothing here names a file to read or to write.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pydantic
import regex
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..config.errors import UserError, short, visible
from ..config.files import read_json, real, sha256_of, whole_file, write_text
from ..config.scripts import script_command
from ..model import Llama
from ..qlora import ALL_LINEAR, QLoRALinear, add_update, block_linears, lora_layers, target_layers
from .checkpoint import Weights, fingerprint, write_tensors
from .hub import ADAPTER_FILES, local_path
from .tensor_files import load_tensors, reading

NOT_COMPUTED = {  # of no effect here: the tensors show which layers learnt
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
LARGEST = 1e6  # rank or alpha
LARGEST_PATTERN = 1000  # characters or repetitions; also how many patterns there may be
PATTERN_S, PATTERNS_S = 0.2, 20  # seconds for one name, where 0.00001 are usual, and for all of an adapter

IN_4BIT, COMPUTED_IN, BASE = "load_in_4bit", "computed_in", "base_fingerprint"  # keys of our metadata
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trained(NamedTuple):
    """What an adapter's own files report of its training; of a stranger's adapter, the usual."""

    in_4bit: bool = True  # the base's linear layers were in NF4
    computed_in: torch.dtype = torch.bfloat16
    base: str | None = None  # `fingerprint` of the base's weights

    def metadata(self) -> dict[str, str]:
        """As it is kept in the safetensors file."""
        found = {IN_4BIT: str(self.in_4bit), COMPUTED_IN: str(self.computed_in).removeprefix("torch.")}
        return found | ({BASE: self.base} if self.base else {})


def adapter_file(folder: str | Path) -> Path:
    """The file with the tensors of an adapter, by its folder or hub name.

    Raises:
        UserError: no such folder, or no such file in it.
    """
    path = local_path(folder, ADAPTER_FILES) / "adapter_model.safetensors"
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise UserError(f"adapter {folder}: no such folder. Give the folder with adapter_model.safetensors.")
    pickled = local_path(folder, (*ADAPTER_FILES, "adapter_model.bin")) / "adapter_model.bin"
    if pickled.is_file():
        return pickled
    raise UserError(f"{path}: no such file, so the adapter has no tensors. Save or copy the adapter again.")


def adapter_hash(folder: str | Path) -> str | None:
    """SHA-256 of the file with an adapter's tensors, by which a certificate names it; None without an adapter."""
    with suppress(UserError):
        return sha256_of(adapter_file(folder))
    return None


def _is_pattern(pattern: str) -> str:
    counts = [int(count[:9]) for count in re.findall(r"[{,] *(\d+)", pattern)]
    try:
        if max(len(pattern), math.prod(count or 1 for count in counts)) > LARGEST_PATTERN:
            raise ValueError(f"more than {LARGEST_PATTERN} characters or repetitions")
        re.compile(pattern)
        re.compile(_of_ends(pattern))
    except (re.error, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression ({error})") from error
    return pattern


Positive = Annotated[int | float, pydantic.Field(gt=1 / LARGEST, lt=LARGEST)]
Pattern = Annotated[str, pydantic.AfterValidator(_is_pattern)]
Patterns = Annotated[dict[Pattern, Positive], pydantic.Field(max_length=LARGEST_PATTERN)] | None


class AdapterConfig(pydantic.BaseModel):
    """adapter_config.json: the keys that are computed with."""

    model_config = pydantic.ConfigDict(extra="allow")
    r: Positive
    lora_alpha: Positive
    use_rslora: bool | None = None
    use_dora: bool | None = None
    rank_pattern: Patterns = None
    alpha_pattern: Patterns = None


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of an adapter's folder, or of an adapter by its hub name.

    Raises:
        UserError: files missing or damaged, or a kind of adapter that is more than LoRA or DoRA.
    """
    path = adapter_file(folder)
    where = path.with_name("adapter_config.json")
    config = read_json(where, AdapterConfig)
    for key, value in (config.model_extra or {}).items():
        if value not in (None, False, [], {}) and key not in NOT_COMPUTED and value not in ONLY.get(key, ()):
            what = f"{key} is {short(value)}, which is not built in"
            raise UserError(f"{where}: {what}. LoRA, rsLoRA and DoRA on linear layers of the blocks are read.")
    return config.model_dump(), load_tensors(path)


def _of_ends(pattern: str) -> str:
    """PEFT's use of a pattern: it has to fit the end of a layer's name."""
    return rf"(.*\.)?({pattern})$"


_compiled = cache(regex.compile)  # whose own cache is too small for a pattern for each layer


def rank_and_alpha(config: dict[str, Any], name: str, end: float) -> tuple[int, float]:
    """What adapter_config.json asks of one layer: of the patterns that fit the end of its name, the first.

    Args:
        end: by `time.process_time`, of all layers together.
    """

    def fits(key: str, pattern: str) -> bool:
        try:
            left = max(min(PATTERN_S, end - time.process_time()), 1e-6)
            return _compiled(_of_ends(pattern)).match(name, timeout=left) is not None
        except (TimeoutError, regex.error) as error:
            what = f"{key} has {short(pattern)}, and whether {name} fits it was not found in {PATTERN_S} s ({error})"
            raise UserError(f"adapter_config.json: {what}. Write the names of layers.") from error

    def first(key: str, usual: str) -> Any:
        return next((own for pattern, own in (config.get(key) or {}).items() if fits(key, pattern)), config[usual])

    return first("rank_pattern", "r"), first("alpha_pattern", "lora_alpha")


# ------------------------------------------------------------------------------------------------ where it comes from


def read_trained(folder: str | Path) -> Trained:
    """What the metadata of an adapter's tensors report of its training.

    Raises:
        UserError: they are there and cannot be understood.
    """
    path, about = adapter_file(folder), dict[str, str]()
    if path.suffix == ".safetensors":
        with reading(path), safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    usual = Trained().metadata() | about
    if usual[IN_4BIT] not in ("True", "False") or usual[COMPUTED_IN] not in DTYPES:
        raise UserError(f"{path}: its metadata have {about}, so it is not known how it was trained. Copy it again.")
    return Trained(usual[IN_4BIT] == "True", DTYPES[usual[COMPUTED_IN]], about.get(BASE))


def check_base(folder: str | Path, base: str | Path, weights: Weights, other_base: bool) -> str | None:
    """Refuse a base that an adapter was not trained on, by the fingerprint of its weights.

    Args:
        base: what the user calls it; `weights`: it, opened.
        other_base: the user asks for another one.
    Returns:
        A line for the user, if there is something to be known.
    Raises:
        UserError: another base, and nobody asked for it.
    """
    path = adapter_file(folder)
    trained_on = read_trained(folder).base
    name = read_json(path.with_name("adapter_config.json")).get("base_model_name_or_path")
    name = visible(name) if name and isinstance(name, str) else None
    if trained_on is None:
        if name is None or real(name) == real(base) or Path(name).name == hub_or_last_name(base):
            return None
        return f"note: {folder} names {name} as its base; used on {base}. Whether they are the same is not known."
    if trained_on == fingerprint(weights):
        return None
    its_name = f" (its base is called {name})" if name else ""
    of = f"{folder}: was trained on other weights than those of {base}{its_name}"
    if other_base:
        return f"note: {of}; used on them, as --other_base asks."
    raise UserError(f"{of}. Give the base that it was trained on, or --other_base true to use it on this one.")


def hub_or_last_name(path: str | Path) -> str:
    """The last part of a path, or of the hub name that the path of the hub's cache stands for."""
    cached = [part for part in Path(path).absolute().parts if part.startswith("models--")]
    return cached[-1].split("--")[-1] if cached else Path(path).name


def check_merged(model: str | Path, run: str | Path | None = None) -> None:
    """Refuse `merged` in the folder of a run that has another adapter by now: it is the result of an earlier run.

    Args:
        run: the folder of the run that the user named, for models in any place.
    """
    folder = Path(model).absolute()
    record, named, run = folder / "merge.json", run is not None, Path(run or folder.parent).absolute()
    if not (named or folder.name == "merged") or not record.is_file() or adapter_hash(run) is None:
        return
    merged = read_json(record).get("adapter_sha256")
    if merged is not None and merged != adapter_hash(run):
        again = script_command("merge.py", *[run / "train.yml"] * (run / "train.yml").is_file())
        as_it_is = "or name the folder with --model alone" if named else "or give the folder another name"
        raise UserError(f"{model}: holds the adapter of an earlier run than {run}. Merge again: {again}; {as_it_is}.")


# ------------------------------------------------------------------------------------------------ in and out of a model

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


def adapter_state(layers: Mapping[str, QLoRALinear | Update]) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ..."""
    found = {f"{PREFIX}{name}.{PARTS[part]}": getattr(layer, part) for name, layer in layers.items() for part in PARTS}
    return {name: w.detach() for name, w in found.items() if w is not None}


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
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    config |= {"base_model_name_or_path": str(base_model), "r": r, "lora_alpha": alpha}
    config |= {"lora_dropout": first.dropout_p, "use_rslora": first.use_rslora, "use_dora": first.magnitude is not None}
    config |= {"target_modules": sorted(kinds if has_all else layers), "bias": "none", "fan_in_fan_out": False}
    config |= {"inference_mode": True, "init_lora_weights": True}
    for key, values, usual in (("rank_pattern", ranks, r), ("alpha_pattern", alphas, alpha)):
        config[key] = {re.escape(name): own for name, own in values.items() if own != usual}
    config["modules_to_save"] = None
    state = dict(sorted(adapter_state(layers).items()))
    shapes = {name: (w.shape, w.dtype) for name, w in state.items()}
    with whole_file(Path(folder) / "adapter_model.safetensors") as file:
        write_tensors(file, shapes, state.__getitem__, {"format": "pt"} | (trained.metadata() if trained else {}))
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
        raise UserError(f"{path}: holds no update of any layer, so it is no adapter. {AGAIN}")
    kind, needed = ("DoRA", {*PARTS.values()}) if config.get("use_dora") else ("LoRA", {*PARTS.values()} - {MAGNITUDE})
    updates, end = dict[str, Update](), time.process_time() + PATTERNS_S
    for name, parts in layers.items():
        for wrong in sorted(parts.keys() ^ needed):
            has = "has" if wrong in parts else "lacks"
            raise UserError(f"{path}: {name} {has} {wrong}, which does not fit {kind}. {AGAIN}")
        for part, w in parts.items():
            if w.ndim != (1 if part == MAGNITUDE else 2):
                raise UserError(f"{path}: {name} has {part} of shape {tuple(w.shape)}, so it is no update. {AGAIN}")
            if not torch.isfinite(w).all():
                raise UserError(f"{path}: {name} has {part} with NaN or infinite values. Train it again.")
        a, b = parts[PARTS["lora_A"]], parts[PARTS["lora_B"]]
        r, alpha = rank_and_alpha(config, name, end)
        if not len(a) == b.shape[1] == r:
            what = f"{name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, and rank {r} by its configuration"
            raise UserError(f"{path}: {what}. Take both files from one adapter.")
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
            raise UserError(f"{path}: has an update of {name}, so this adapter is of another model.")
        is_dora = update.magnitude is not None
        add_update(model, name, len(update.lora_A), update.alpha, dropout, update.use_rslora, is_dora)
    fill_adapter(model, adapter_state(updates), path)


def fill_adapter(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Copy tensors under PEFT's names into the injected layers; both sides have to have the same names and shapes."""
    ours = adapter_state(lora_layers(model))
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
    first = next(iter(layers.values()))
    found: dict[str, list[Any]] = {"lora_r": sorted({*ranks_of(layers).values()})}
    found |= {"lora_alpha": sorted({layer.alpha for layer in layers.values()}), "lora_target_modules": [tuple(kinds)]}
    found |= {"peft_use_rslora": [first.use_rslora], "peft_use_dora": [first.magnitude is not None]}
    for key, value in wanted.items():
        is_target = key == "lora_target_modules"
        if value and (target_layers(model, value) != [*layers] if is_target else [value] != found[key]):
            has = ", ".join(map(str, found[key]))
            what = f"{key} is {value!r} and the adapter in {folder}, from which lora_model_dir goes on, has {has}"
            raise UserError(f"{what}. An adapter keeps its own: remove {key}, or start a new adapter.")
    ranks, alphas = (", ".join(f"{value:g}" for value in found[key]) for key in ("lora_r", "lora_alpha"))
    return f"going on from {folder}: rank {ranks}, alpha {alphas}, on {len(layers)} layers ({' '.join(kinds)})"
