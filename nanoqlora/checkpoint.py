"""Weights in and out, one tensor at a time.

    open_weights(path)     a Hugging Face folder or a GGUF file, behind one face: config, names, load(name)
    load_model(path)       a Llama filled from it, its blocks quantised on the way if asked: nothing is ever held in
                           16 bits but the tensor at hand
    open_model(path)       the same in two steps, for ranks that share the work (`sharding.py`)
    save_adapter, load_adapter    the trained part, in PEFT's layout
    ShardWriter            the files of a merged model

Every fault of a file is told with the file's name. Files appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cli import UserError, whole_file, write_text
from .gguf import gguf_name, hf_config, read_gguf
from .hub import local_path
from .model import Llama, ModelConfig, rope_frequencies
from .qlora import QLoRALinear, inject_lora, lora_layers, quantize_model


class Weights(Protocol):
    """A checkpoint on disk. `config` is config.json as a dict; names are Hugging Face's."""

    config: dict[str, Any]

    def names(self) -> list[str]: ...

    def load(self, name: str) -> Tensor: ...


def open_weights(path: str | Path) -> Weights:
    """Open a Hugging Face folder, a .gguf file, or a model by its hub name, without reading its weights."""
    path = local_path(path)
    if path.is_dir():
        return FolderWeights(path)
    if path.is_file() and path.suffix == ".gguf":
        return GGUFWeights(path)
    found = "a file of another kind" if path.exists() else "nothing"
    raise UserError(
        f"model {path}: found {found} there. A model is a folder with config.json and *.safetensors, or a .gguf file; "
        f"give the path of one."
    )


def fingerprint(path: str | Path) -> str:
    """A hash of the names, sizes and both ends of a checkpoint's files: cheap, and another one for another model."""
    path, digest = local_path(path), hashlib.sha256()
    suffixes = {".json", ".safetensors", ".pth", ".gguf", ".model"}
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in suffixes)
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with open(file, "rb") as opened:
            digest.update(opened.read(2**20))
            opened.seek(max(0, file.stat().st_size - 2**20))
            digest.update(opened.read(2**20))
    return digest.hexdigest()


class FolderWeights:
    """A Hugging Face folder: config.json and one or more safetensors files, which are mapped, not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.files: dict[str, str] = read_json(index).get("weight_map", {})
        else:
            files = sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("adapter"))
            if not files:
                raise UserError(
                    f"{folder}: has config.json but no *.safetensors file, so there are no weights to load. "
                    f"Give the folder of a whole checkpoint."
                )
            self.files = {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118
        self.handles: dict[str, Any] = {}

    def _open(self, file: str) -> Any:
        path = self.folder / file
        if Path(file).name != file or not path.exists():
            raise UserError(
                f"{path}: the index names this file and it is not in the folder, so weights are missing. "
                f"Download the checkpoint again."
            )
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}). Download or copy it again.") from error

    def names(self) -> list[str]:
        return list(self.files)

    def load(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.folder}: has no tensor {name}, which the model of its config.json needs.")
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = self._open(file)
        try:
            return self.handles[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{self.folder / file}: tensor {name} cannot be read ({error}).") from error


class GGUFWeights:
    """A GGUF file of the llama architecture, dequantised to float32 tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self.file = read_gguf(path)
        self.config = hf_config(self.file)

    def names(self) -> list[str]:
        return [name for name in expected_names(model_config(self.config, self.file.path)) if self._has(name)]

    def _has(self, name: str) -> bool:
        return gguf_name(name) in self.file.tensors

    def load(self, name: str) -> Tensor:
        return self.file.load_hf(name)


def model_config(config: dict[str, Any], where: str | Path) -> ModelConfig:
    """config.json as ModelConfig; what does not fit is told with the name of the checkpoint."""
    try:
        return ModelConfig.from_hf(config)
    except KeyError as error:
        raise UserError(f"{where}: the configuration has no {error}, which a Llama needs.") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def expected_names(config: ModelConfig) -> list[str]:
    """The tensors that a model of this configuration is made of, in model order; a tied head is not one."""
    with torch.device("meta"):
        return list(dict(Llama(config).named_parameters()))


Fill = Callable[[int | None], None]  # fills one block's linear layers; None: everything else


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
    double_quant: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    weights: Weights | None = None,
) -> tuple[Llama, Fill]:
    """A Llama that takes no memory yet, its tensors on the meta device, and the function that fills it.

    Args:
        path: Hugging Face folder or .gguf file.
        load_in_4bit: quantise the linear layers of the blocks to NF4 from the values in the file.
        double_quant: and their scales to 8 bits.
        dtype: of everything else. Default: float32 on a CPU, bfloat16 on a GPU.
        device: where the model lives; each tensor is moved there, then quantised.
        weights: the opened checkpoint, if there is one.
    Raises:
        UserError: here or while it is filled: a missing or damaged file, a tensor that is missing, has another shape,
            or holds NaN or infinity.
    """
    weights = weights or open_weights(path)
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)

    def load(name: str, shape: torch.Size) -> Tensor:
        w = weights.load(name)
        if w.shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(w.shape)} where the configuration says "
                f"{tuple(shape)}, so file and configuration are of different models."
            )
        w = w.to(device)
        if not torch.isfinite(w).all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinite values; training on it would give NaN.")
        return w if load_in_4bit and block_of(name) is not None else w.to(dtype)

    config = model_config(weights.config, path)
    return empty_model(config, load, load_in_4bit=load_in_4bit, double_quant=double_quant, dtype=dtype, device=device)


def empty_model(
    config: ModelConfig,
    load: Callable[[str, torch.Size], Tensor],
    *,
    load_in_4bit: bool,
    double_quant: bool = True,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Llama, Fill]:
    """As `open_model`, from any source of tensors: `load(name, shape)` gives one on `device`."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    if load_in_4bit:
        quantize_model(model, double_quant)
    model.model.rope_frequencies = rope_frequencies(config).to(device)

    def fill(block: int | None) -> None:
        for name, shape in shapes.items():
            if block_of(name) != block:
                continue
            w = load(name, shape)
            module_name, _, attribute = name.rpartition(".")
            if load_in_4bit and block is not None:
                layer = QLoRALinear(w)
                layer.quantize(double_quant)
                model.set_submodule(module_name, layer.eval())
            else:
                setattr(model.get_submodule(module_name), attribute, nn.Parameter(w, requires_grad=False))
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight

    return model.requires_grad_(False).eval(), fill


def block_of(name: str) -> int | None:
    """The block whose linear layer a weight of this name is, None for embedding, head and norms."""
    parts = name.split(".")
    return int(parts[2]) if parts[-2].endswith("_proj") else None


# ------------------------------------------------------------------------------------------------ adapters

PEFT_PREFIX = "base_model.model."


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, ..."""
    state = {}
    for name, layer in lora_layers(model).items():
        state[f"{PEFT_PREFIX}{name}.lora_A.weight"] = layer.lora_A.data
        state[f"{PEFT_PREFIX}{name}.lora_B.weight"] = layer.lora_B.data
    return state


def save_adapter(model: nn.Module, folder: str | Path, base_model: str = "") -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them.

    Args:
        model: with LoRA injected.
        base_model: what the adapter belongs to, kept as base_model_name_or_path.
    """
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": first.lora_A.shape[0],
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout_p,
        "use_rslora": first.use_rslora,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in adapter_state(model).items()}
    with whole_file(Path(folder) / "adapter_model.safetensors") as file:
        save_file(state, file, metadata={"format": "pt"})
    write_text(Path(folder) / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of an adapter's folder.

    Raises:
        UserError: files missing or damaged, or a kind of adapter that is more than plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"adapter {folder}: no such folder. Give the folder with adapter_model.safetensors.")
    config = read_json(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    only = {"peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}}
    only |= {"modules_to_save": None, "fan_in_fan_out": False, "layers_to_transform": None}
    for key, value in only.items():
        if config.get(key, value) not in (value, None, []):
            raise UserError(
                f"{folder / 'adapter_config.json'}: {key} is {config[key]!r}. Only plain LoRA with {key}={value!r} is "
                f"read; without that part the adapter would compute something else."
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise UserError(f"{folder / 'adapter_config.json'}: {key} is missing, and the update's scale needs it.")
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Save or copy the adapter again.") from error


def load_adapter(model: Llama, folder: str | Path, dropout: float = 0.0) -> None:
    """Inject what an adapter needs and fill it. Every tensor of the file is used and every layer filled.

    Raises:
        UserError: as `read_adapter`, or the adapter does not fit the model.
    """
    config, state = read_adapter(folder)
    targets = tuple(dict.fromkeys(name.split(".")[-3] for name in state))
    try:
        inject_lora(model, config["r"], config["lora_alpha"], dropout, targets, config.get("use_rslora", False))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    fill_adapter(model, state, Path(folder) / "adapter_model.safetensors")


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
        if not tensor.is_meta:  # of an empty model only the shapes are of interest
            tensor.copy_(state[name])


# ------------------------------------------------------------------------------------------------ writing models


class ShardWriter:
    """Writes model.safetensors, or several of them with an index, holding one shard in memory."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.shard: dict[str, Tensor] = {}
        self.shard_bytes = self.total_bytes = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        if self.shard and self.shard_bytes + num_bytes > self.max_shard_bytes:
            self._flush()
        self.shard[name] = tensor.contiguous()
        self.shard_bytes += num_bytes
        self.total_bytes += num_bytes

    def _flush(self) -> None:
        save_file(self.shard, self.folder / f"shard-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.shard))
        self.shard, self.shard_bytes = {}, 0

    def close(self) -> None:
        """Write the last shard and give all of them the names that readers look for: their number is known now."""
        self._flush()
        count, weight_map = len(self.shards), {}
        for i, names in enumerate(self.shards):
            file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_text(self.folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that has to hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. It is needed to know what the other files mean.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}). Copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__} where an object is expected.")
    return value
