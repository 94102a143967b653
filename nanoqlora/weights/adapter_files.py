"""The files of an adapter: where they are, what they hold, what they are compared with.

    adapter_config.json         PEFT's: rank, alpha, and what else it computes
    adapter_model.safetensors   the tensors; or adapter_model.bin, a pickle, of which nothing but tensors is read
    its metadata                what our training adds, and PEFT does not look at: how the base was computed with, and
                                a fingerprint of its weights

They may come from anybody. So every value is checked before it is used, regular expressions end after a while, and
nothing here names a file to read or to write.
"""

import hashlib
import json
import math
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import regex
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..config.errors import UserError, visible
from ..config.files import read_json
from ..config.scripts import script_command
from ..gguf.reader import short
from .checkpoint import Weights, fingerprint
from .hub import ADAPTER_FILES, local_path

HANDLED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"}
NOT_COMPUTED = {  # of no effect here: the tensors show which layers learnt
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
ONLY = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}
LARGEST = 1e6  # rank or alpha
LARGEST_PATTERN, PATTERN_S = 1000, 0.2  # characters or repetitions; seconds for one name, where 0.00001 are usual

IN_4BIT, COMPUTED_IN, BASE = "load_in_4bit", "computed_in", "base_fingerprint"  # keys of our metadata
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST_YAML = 100_000  # characters of a train.yml that are read: one of ours has 6,000


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
    try:
        path = adapter_file(folder)
    except UserError:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:  # PyTorch's text advises to run what is in it
        raise UserError(f"{path}: holds more than tensors, or is damaged; nothing of it was run. Refused.") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a complete file of tensors ({reason}). Save or copy it again.") from error


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors of an adapter's folder, or of an adapter by its hub name.

    Raises:
        UserError: files missing or damaged, or a kind of adapter that is more than LoRA or DoRA.
    """
    path = adapter_file(folder)
    config = read_config(path.with_name("adapter_config.json"))
    with _reading(path):
        is_pickle = path.suffix == ".bin"
        state = torch.load(path, map_location="cpu", weights_only=True) if is_pickle else load_file(path)
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) and isinstance(k, str) for k, w in state.items()):
        raise UserError(f"{path}: holds something else than named tensors, so it is no adapter. Save it again.")
    for name, w in state.items():
        if w.dtype not in (torch.float64, *DTYPES.values()):
            kind = str(w.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name} is of type {kind}, and not of a floating-point type. Save it again.")
    return config, state


def read_config(where: Path) -> dict[str, Any]:
    """adapter_config.json, if all that it asks for is built in and of the right type."""
    config = read_json(where)

    def refuse(key: str, why: str) -> NoReturn:
        raise UserError(f"{where}: {key} is {short(config.get(key))}, {why}")

    for key, value in config.items():
        if not (value in (None, False, [], {}) or key in HANDLED | NOT_COMPUTED or value in ONLY.get(key, ())):
            refuse(key, "which is not built in. LoRA, rsLoRA and DoRA on linear layers of the blocks are read.")
    for key in ("r", "lora_alpha"):
        if not _is_positive(config.get(key)):
            refuse(key, "and the update's scale needs a number above zero.")
    for key in ("use_rslora", "use_dora"):
        if config.get(key) not in (None, True, False):
            refuse(key, "where true or false is expected.")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_positive, patterns.values())):
            refuse(key, "where a map from names to numbers above zero is expected.")
        for pattern in patterns:
            try:
                counts = [int(count[:9]) for count in re.findall(r"[{,] *(\d+)", pattern)]
                if max(len(pattern), math.prod(count or 1 for count in counts)) > LARGEST_PATTERN:
                    raise ValueError(f"it has more than {LARGEST_PATTERN} characters or repetitions")
                re.compile(pattern)
                re.compile(_of_ends(pattern))
            except (re.error, ValueError, OverflowError, RecursionError) as error:
                what = f"{key} has {short(pattern)}, which is not a regular expression ({error})"
                raise UserError(f"{where}: {what}. Correct it.") from error
    return config


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < LARGEST


def _of_ends(pattern: str) -> str:
    """PEFT's use of a pattern: it has to fit the end of a layer's name."""
    return rf"(.*\.)?({pattern})$"


def rank_and_alpha(config: dict[str, Any], name: str) -> tuple[int, float]:
    """What adapter_config.json asks of one layer: of the patterns that fit the end of its name, the first."""
    found = []
    for key, pattern_key in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = config[key]
        for pattern, own in (config.get(pattern_key) or {}).items():
            try:
                if regex.match(_of_ends(pattern), name, timeout=PATTERN_S):
                    value = own
                    break
            except (TimeoutError, regex.error) as error:
                what = f"{pattern_key} has {short(pattern)}, and whether {name} fits it was not found in {PATTERN_S} s"
                raise UserError(f"adapter_config.json: {what} ({error}). Write the names of layers.") from error
        found.append(value)
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------ where it comes from


def read_trained(folder: str | Path) -> Trained:
    """What an adapter's files report of its training: the metadata of its tensors, else two values of its train.yml.

    Raises:
        UserError: they are there and cannot be understood.
    """
    path, about = adapter_file(folder), dict[str, str]()
    if path.suffix == ".safetensors":
        with _reading(path), safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
    if not {IN_4BIT, COMPUTED_IN} <= about.keys():
        return Trained(*_read_train_yml(path.with_name("train.yml")), about.get(BASE))
    if about[IN_4BIT] not in ("True", "False") or about[COMPUTED_IN] not in DTYPES:
        found = f"{IN_4BIT} {about[IN_4BIT][:60]!r} and {COMPUTED_IN} {about[COMPUTED_IN][:60]!r}"
        raise UserError(f"{path}: its metadata have {found}, so it is not known how it was trained. Copy it again.")
    return Trained(about[IN_4BIT] == "True", DTYPES[about[COMPUTED_IN]], about.get(BASE))


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file, which come in any order, into one: equal tensors make equal files."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, "the header has another length"
        file.seek(8)
        file.write(text)


class _Plain(yaml.SafeLoader):
    """YAML without `<<`, by which a small file becomes a large map."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None: ...


def _read_train_yml(run: Path) -> tuple[bool, torch.dtype]:
    """(base in four bits?, dtype of the matmuls) of adapters from before their metadata had it; never a configuration.

    Raises:
        UserError: the file is there and cannot be understood.
    """
    try:
        about = (yaml.load(run.read_text("utf-8")[:LARGEST_YAML], _Plain) if run.is_file() else None) or {}
        given = {key: about.get(key, usual) for key, usual in {"load_in_4bit": True, "bf16": True}.items()}
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]!r}"
        advice = "Copy the file again, or remove it: then NF4 and bfloat16 are taken"
        raise UserError(f"{run}: cannot be read ({reason}), so the training is not known. {advice}.") from error
    for key, value in given.items():
        if value not in (True, False, None, "auto"):
            raise UserError(f"{run}: {key} is {short(value)}, where true or false is expected. Correct or remove it.")
    return given["load_in_4bit"] is not False, torch.float32 if given["bf16"] is False else torch.bfloat16


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
        if name is None or Path(name).resolve() == Path(base).resolve() or Path(name).name == hub_or_last_name(base):
            return None
        return f"note: {folder} names {name} as its base; used on {base}. Whether they are the same is not known."
    if trained_on == fingerprint(weights):
        return None
    its_name = f" (its base is called {name})" if name else ""
    of = f"{folder}: was trained on other weights than those of {base}{its_name}"
    if other_base:
        return f"note: {of}; used on them, as --other_base asks."
    advice = "Give the base that it was trained on, or --other_base true to use it on this one"
    raise UserError(f"{of}, so its update means nothing there. {advice}.")


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
        as_it_is = "name the folder with --model alone" if named else "give the folder another name"
        raise UserError(
            f"{model}: holds another adapter than {run} has now, that of an earlier run. Merge again: {again}; or "
            f"{as_it_is} to use it as it is."
        )
