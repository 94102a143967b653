"""A command line and a YAML file to a Config: read both, let the command line win, convert, fill in, check."""

import os
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import yaml

from .errors import UserError
from .parser import (
    Given,
    Option,
    build,
    describe_keys,
    describe_options,
    given_in,
    keys_of,
    read_words,
    read_yaml,
    settle,
)
from .rules import CHECKS, DERIVED, DIFFERENCES, EXCLUSIVE, template_notes
from .schema import BnbConfig, Config, DatasetConfig, FrameConfig, FsdpConfig, SpecialTokens
from .scripts import this_command
from .splits import split_without_effect

DEFAULT_FILE = "train.yml"


def make_config(values: dict[str, Any], where: str = "configuration") -> Config:
    """A checked Config from a plain dict of YAML keys; for scripts and tests."""
    return _resolve(given_in(values, where), {}, where)


def load_config(argv: list[str] | None = None) -> Config:
    """The Config of a command line: `[train.yml] [--key value | --key=value ...]`.

    Args:
        argv: the words after the command's name; None takes those of this process.
    Raises:
        UserError: the file or an override is wrong; nothing has been written.
        SystemExit: after `--help`.
    """
    config, _ = load_command(argv, {})
    assert config is not None
    return config


def load_command(
    argv: list[str] | None, own: dict[str, Option], about: str = "", yaml_unless: Iterable[str] | None = None
) -> tuple[Config | None, dict[str, Any]]:
    """The same for a command with options of its own, which come back apart from the Config.

    Args:
        own: name -> Option. A name that is also a YAML key (`--adapter DIR` of merge.py) means the option.
        about: what `--help` says first.
        yaml_unless: when all of these options are given and no YAML file is named, the command has what it
            needs: no file is read and the Config is None. The default `train.yml` would belong to another run.
    Returns:
        The Config, and every option's value by name, with the default where it was not given.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(own, about))
        raise SystemExit(0)
    path, overrides, options = read_words(argv, Config, own)
    values = _at_home({name: options.get(name, option.default) for name, option in own.items()})
    if path is None and yaml_unless is not None and all(name in options for name in yaml_unless):
        for given in overrides.values():
            raise UserError(f"{given.at}: no YAML file is read here, so this key has no meaning. Name the file too.")
        return None, values
    path = os.path.expanduser(path or DEFAULT_FILE)
    return _resolve(read_yaml(path), overrides, path), values


def _resolve(file: dict[str, Given], overrides: dict[str, Given], where: str) -> Config:
    """Settle both sources, let the overrides win, convert, fill in what depends on other keys, check."""
    notes: list[str] = []
    given, over = settle(Config, file, notes), settle(Config, overrides, notes)
    for pair in EXCLUSIVE:
        for mine, other in (pair, pair[::-1]):
            if mine in over and over[mine].value and other not in over and other in given and given[other].value:
                notes.append(f"{given.pop(other).at} gives way to --{mine}")
    config = build(Config, given | over, where, notes)
    config = replace(config, **_at_home({name: getattr(config, name) for name in PATHS if hasattr(config, name)}))
    for one, other in EXCLUSIVE:
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"{where}: {one} and {other} are both given, and each would decide alone. Remove one.")
    filled = {name: rule(config) for name, rule in DERIVED.items() if getattr(config, name) is None}
    config = replace(config, **filled)
    for message, is_broken in CHECKS.items():
        if is_broken(config):
            raise UserError(f"{where}: {message}")
    notes += [text for dataset in (*config.datasets, *config.test_datasets) for text in _unused(dataset)]
    splits = (
        split_without_effect(dataset.path, dataset.split) for dataset in (*config.datasets, *config.test_datasets)
    )
    notes += [text for text in splits if text]
    notes += [text for text, matters in DIFFERENCES.items() if matters(config)]
    notes += template_notes(config)
    return replace(config, notes=(*_summary(config, given, over, filled, where), *notes))


# Keys and options that name a file or a folder; those of data sets and templates are expanded where they are read.
PATHS = ("base_model", "output_dir", "dataset_prepared_path", "lora_model_dir", "resume_from_checkpoint")
PATHS += ("model", "adapter", "out", "data")


def _at_home(values: dict[str, Any]) -> dict[str, Any]:
    """The same with ~ in paths as the home folder, as a shell does it for words that it sees."""
    return {n: os.path.expanduser(v) if n in PATHS and isinstance(v, str) else v for n, v in values.items()}


def _unused(dataset: DatasetConfig) -> list[str]:
    """A line on the keys of a data set that its type does not read."""
    default = DatasetConfig(path="", type="alpaca")
    chat = {"field_messages", "field_tools", "field_system", "message_property_mappings", "message_field_training"}
    chat |= {"roles", "roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"}
    unread = {"chat_template": {"field"}, "completion": chat}.get(str(dataset.type), chat | {"field"})
    given = [
        f.name for f in fields(dataset) if f.name in unread and getattr(dataset, f.name) != getattr(default, f.name)
    ]
    kind = dataset.type if isinstance(dataset.type, str) else "a map"
    return [f"data {dataset.path}: {', '.join(given)} ignored, which type: {kind} does not read"] if given else []


def _summary(config: Config, given: dict, over: dict, filled: dict, where: str) -> list[str]:
    """What was read, and what the other keys got, so that an imported file holds no surprise."""
    used = [name for name, (value, _) in given.items() if value is not None and name not in over]
    unsaid = len(keys_of(Config)) - len(used) - len(over) - len(filled)
    lines = [f"{where}: {len(used)} keys used: {', '.join(used)}"]
    lines += [f"command line: {', '.join(over)}"] if over else []
    values = ", ".join(
        f"{name} {yaml.safe_dump(value).split()[0]}" for name, value in filled.items() if value is not None
    )
    lines.append(f"filled in: {values}; {unsaid} others have their defaults, all in {config.output_dir}/train.yml")
    return lines


def help_text(own: dict[str, Option] | None = None, about: str = "") -> str:
    """What `--help` prints: the command's own options, then every key with type, default and meaning."""
    lines = [about] if about else []
    lines += [f"usage: {this_command()} [{DEFAULT_FILE}] [--key value | --key=value ...]", ""]
    lines += ["Every key of the YAML file can be overridden, with _ or -; lists and maps as JSON or YAML text."]
    lines += ["", "this command", *describe_options(own)] if own else []
    lines += describe_keys(Config, "--")
    maps = {"an entry of datasets": DatasetConfig, "type of such an entry, as a map": FrameConfig}
    maps |= {"special_tokens": SpecialTokens, "bnb_config_kwargs": BnbConfig}
    for title, cls in (maps | {"fsdp_config": FsdpConfig}).items():
        lines += ["", title, *describe_keys(cls)]
    return "\n".join(lines)
