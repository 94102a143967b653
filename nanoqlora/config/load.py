"""A command line and a YAML file to a Config: read both, let the command line win, convert, fill in, check."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .commands import run_command
from .errors import UserError
from .keys import Keys, build, describe_keys, keys_of, kinds_of, settle, what_instead
from .options import RunOptions, TrainOptions
from .parser import Map, located, read_words, read_yaml
from .rules import CHECKS, DERIVED, EXCLUSIVE, notes_on
from .schema import BnbConfig, Config, DatasetConfig, FrameConfig, FsdpConfig, SpecialTokens
from .scripts import script_command, this_command

OwnT = TypeVar("OwnT", bound=Keys)
RunT = TypeVar("RunT", bound=RunOptions)
MAPS: dict[str, type[Keys]] = {"an entry of datasets": DatasetConfig, "type of such an entry, as a map": FrameConfig}
MAPS |= {"special_tokens": SpecialTokens, "bnb_config_kwargs": BnbConfig, "fsdp_config": FsdpConfig}
_answered: dict[type[Keys], Any] = {}  # what `answer_early` has read
began: list[float] = []  # when, by `time.perf_counter`; nothing where Python called us


def answer_early(own: type[Keys]) -> None:
    """Answer `--help`, and refuse what is wrong on the command line and in its YAML, before PyTorch is imported.

    A program calls it above its other imports; `load_command` then has the values already. Of several ranks nobody
    answers here: they do it together, when they have met.
    """
    began.append(time.perf_counter())
    if own is TrainOptions:  # a chat is over soon, and sleeping costs it a tenth to a fifth of its speed
        let_waiting_threads_sleep()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        read: Callable[..., Any] = load_command if issubclass(own, RunOptions) else load_options
        run_command(lambda: _answered.update({own: read(own)}))
    for received in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(received) is signal.default_int_handler:  # within the imports it would be a traceback
            signal.signal(received, signal.SIG_DFL)


def let_waiting_threads_sleep() -> None:
    """Set how long PyTorch's CPU threads spin while they wait for each other: microseconds, not a millisecond.

    They wait at the end of every operation. Beside another program one of them has lost its core, and the others would
    keep theirs busy. Read when PyTorch is loaded, so it is set before. The user's own setting has precedence.
    """
    if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def make_config(values: dict[str, Any], where: str = "configuration") -> Config:
    """A checked Config from a plain dict of YAML keys; for scripts and tests."""
    return _resolve(located(values, where), Map(), where)


def override(path: str | Path, keys: dict[str, Any]) -> Config:
    """The Config of a YAML file, in which `keys` win; for `nq.train`."""
    return _resolve(read_yaml(str(path)), located(keys, "nq.train"), str(path))


def load_config(argv: list[str] | None = None) -> Config:
    """The Config of a command line: `[train.yml] [--key value | --key=value ...]`.

    Args:
        argv: the words after the command's name; None takes those of this process.
    Raises:
        UserError: the file or an override is wrong; nothing has been written.
        SystemExit: after `--help`.
    """
    config, _ = load_command(RunOptions, argv)
    assert config is not None
    return config


def load_options(own: type[OwnT], argv: list[str] | None = None) -> OwnT:
    """The options of a command that reads no YAML. Raises as `load_config`."""
    if argv is None and own in _answered:
        return _answered.pop(own)
    given = _read(own, argv, {})
    for name in given.keys() - keys_of(own).keys():
        raise UserError(f"{given.at[name]} {what_instead(own, name)}")
    return build(own, given)


def load_command(own: type[RunT], argv: list[str] | None = None) -> tuple[Config | None, RunT]:
    """The Config and the options of a command that reads one. Raises as `load_config`.

    The Config is None where the options that stand in `alone` are given and no file is: the command has what it
    needs, and the `train.yml` that lies here would belong to another run.
    """
    if argv is None and own in _answered:
        return _answered.pop(own)
    given, words, over = _read(own, argv, keys_of(Config)), Map("command line: --"), Map()
    for name, value in given.items():
        is_own = name in keys_of(own)
        value = None if value in ("null", "~") and not is_own else value
        (words if is_own else over).put(name, value, given.at[name])
    options = build(own, words)
    if "file" not in words and any(all(name in words for name in names.split()) for names in own.alone):
        for at in over.at.values():
            raise UserError(f"{at}: no YAML file is read here, so this key has no meaning. Name the file too.")
        return None, options
    return _resolve(read_yaml(options.file), over, options.file, keys_of(own)), options


def _read(own: type[Keys], argv: list[str] | None, more: dict[str, Any]) -> Map:
    """The arguments of a command line; `more` are keys that it takes beside its own. Ends here after `--help`."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(help_text(own))
        raise SystemExit(0)
    kinds = [{name: kinds_of(field.annotation) for name, field in keys.items()} for keys in (keys_of(own), more)]
    return read_words(argv, own.positional, *kinds)


def _resolve(file: Map, overrides: Map, where: str, options: Iterable[str] = ()) -> Config:
    """Settle both sources, let the overrides win, convert, fill in what depends on other keys, check."""
    notes: list[str] = []
    given, over = settle(Config, file, notes), settle(Config, overrides, notes, options)
    for pair in EXCLUSIVE:
        for mine, other in (pair, pair[::-1]):
            if over.get(mine) and other not in over and given.get(other):
                notes.append(f"{given.at[other]} gives way to --{mine}")
                given[other] = None
    used = [name for name, value in given.items() if value is not None and name not in over]
    for name, value in over.items():
        given.put(name, value, over.at[name])
    config = build(Config, given)
    for one, other in EXCLUSIVE:
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"{where}: {one} and {other} are both given, and each would decide alone. Remove one.")
    filled = {name: rule(config) for name, rule in DERIVED.items() if getattr(config, name) is None}
    config = config.model_copy(update=filled)
    for message, is_broken in CHECKS.items():
        if is_broken(config):
            raise UserError(f"{where}: {message}")
    # What was read, and what the other keys got, so that an imported file holds no surprise.
    values = ", ".join(f"{name} {yaml.safe_dump(x).split()[0]}" for name, x in filled.items() if x is not None)
    others = len(keys_of(Config)) - len(used) - len(over) - len(filled)
    summary = [f"{where}: {len(used)} keys used: {', '.join(used)}"]
    summary += [f"command line: {', '.join(over)}"] if over else []
    summary.append(f"filled in: {values}; {others} others have their defaults, all in {config.output_dir}/train.yml")
    return config.model_copy(update={"notes": (*summary, *notes, *notes_on(config))})


def help_text(own: type[Keys]) -> str:
    """What `--help` prints: the command's own options, then the keys of the YAML that it reads."""
    if not issubclass(own, RunOptions):
        usage = " ".join(["usage:", this_command(), *own.positional, "[--option value | --option=value ...]"])
        return "\n".join([own.__doc__ or "", usage, "", *describe_keys(own, "--")])
    usage = f"usage: {this_command()} [train.yml] [--key value | --key=value ...]"
    lines = [own.__doc__ or "", usage, "", "this command", *describe_keys(own, "--"), ""]
    if own.reads:
        every = script_command("train.py", "--help")
        lines += [f"keys of the YAML file that it reads; all others of a run are accepted, see {every}"]
        return "\n".join([*lines, *describe_keys(Config, "--", own.reads)])
    lines += ["Every key of the YAML file can be overridden, with _ or -; lists and maps as JSON or YAML text."]
    lines += describe_keys(Config, "--")
    for title, cls in MAPS.items():
        lines += ["", title, *describe_keys(cls)]
    return "\n".join(lines)
