"""YAML text and command-line words in, checked dataclasses out; every error says where the value was written.

A dataclass declares its keys with `key(...)`: type, default, range, meaning. Its `fates` say what becomes of keys that
are no fields of it. Values are converted to the declared type, because YAML reads `2e-4` as text and `no` as false.
A key without a value counts as unset. This file knows nothing of what the keys mean: read `config/schema.py` for that.
"""

import dataclasses
import difflib
import functools
import json
import textwrap
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import UserError

# ------------------------------------------------------------------------------------------------ declaring keys


def key(meaning: str, default: Any = MISSING, within: str = "", group: str = "") -> Any:
    """A field that is a YAML key. No default: it is required.

    Args:
        meaning: what `--help` and errors say of it. group: opens a new heading of `--help`.
        within: the interval that its number must lie in, such as "[0, 1)".
    """
    meta = {"meaning": meaning, "within": within, "group": group}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class Fates:
    """What becomes of the keys of one map that are no fields. In a list of keys, `*` stands for any characters."""

    old: dict[str, tuple[str, Callable[[Any], Any] | None]] = field(default_factory=dict)  # -> field, translation
    old_values: dict[str, dict[str, Any]] = field(default_factory=dict)  # field -> value -> today's value
    ignored: dict[str, str] = field(default_factory=dict)  # why that is harmless -> keys
    refused: dict[str, str] = field(default_factory=dict)  # what to do instead -> keys
    refused_values: dict[str, dict[str, str]] = field(default_factory=dict)  # field -> value -> what to do instead
    harmless: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # refused key -> values that ask for nothing
    prefix: str = ""  # may stand before any key


def when_on(value: Any) -> Callable[[Any], Any]:
    """The value that an old switch stands for when it is on; off leaves the field alone."""
    return lambda switch: value if _scalar(bool, switch) else None


@dataclass(frozen=True)
class Option:
    """An option of one command that is no key of the YAML: `--out DIR`. A bool is a switch and needs no value."""

    meaning: str
    kind: Any = str  # a type that a field may have
    default: Any = None


hints_of = functools.cache(get_type_hints)  # class -> name -> type


def keys_of(cls: type) -> list[dataclasses.Field]:
    """The fields that are YAML keys."""
    return [f for f in dataclasses.fields(cls) if "meaning" in f.metadata]


# ------------------------------------------------------------------------------------------------ from text


class Place(NamedTuple):
    """Where a value was written; as text "train.yml, line 12: lora_r"."""

    source: str
    line: int | None
    key: str

    def __str__(self) -> str:
        return f"{self.source}{f', line {self.line}' if self.line else ''}: {self.key}"


class Given(NamedTuple):
    """A value, and where it was written."""

    value: Any
    at: Place


class _Map(dict):
    """A YAML map that knows the line of each of its keys."""

    lines: dict[Any, int]


class _Loader(yaml.SafeLoader):
    """YAML that keeps line numbers, and refuses a key given twice, of which only the last would count."""

    def construct_lines(self, node: yaml.MappingNode) -> Any:
        result = _Map()
        yield result
        result.lines = {}
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in result.lines:
                    what = (
                        f"{name.value} is given twice (first in line {result.lines[name.value]}), and only one counts"
                    )
                    raise yaml.constructor.ConstructorError(None, None, what, name.start_mark)
                result.lines[name.value] = name.start_mark.line + 1
        result.update(self.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_lines)


def given_in(values: dict, source: str, parent: Place | None = None) -> dict[str, Given]:
    """The entries of a map, each with its place; `parent` is the place of the map itself."""
    lines = getattr(values, "lines", {})
    start, line = (f"{parent.key}.", parent.line) if parent else ("", None)
    return {str(n): Given(v, Place(source, lines.get(str(n), line), f"{start}{n}")) for n, v in values.items()}


def read_yaml(path: str) -> dict[str, Given]:
    """The keys of a YAML file. Raises UserError with the line of whatever is wrong."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Name the YAML file of the run: train.py path/to/train.yml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a YAML file ({error}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', error)}. Correct the YAML there.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, but a run is a map. Write lines such as lora_r: 16.")
    return given_in(values, path)


def read_words(
    words: list[str], cls: type, own: dict[str, Option]
) -> tuple[str | None, dict[str, Given], dict[str, Any]]:
    """Split a command line into the YAML file, overrides of its keys, and the command's own options.

    Args:
        own: name -> Option. A name that is also a YAML key means the option.
    """
    path, overrides, options = None, {}, {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            if path is not None:
                raise UserError(f"command line: {path} and {word} are both files, but a run has one. Remove one.")
            path = word
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        is_switch = name in own and own[name].kind is bool
        has_value = words and (words[0].lower() in ("true", "false") if is_switch else not words[0].startswith("--"))
        text = text if equals else words.pop(0) if has_value else "true"
        at = Place("command line", None, f"--{name}")
        hint = own[name].kind if name in own else hints_of(cls).get(name)
        try:  # text stays text, whatever YAML would make of it
            value = text if hint in (str, str | None) else yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{at}: {text!r} is neither YAML nor JSON ({getattr(error, 'problem', error)}).") from None
        if name not in own:
            overrides[name] = Given(None if text in ("null", "~") else value, at)
            continue
        try:
            options[name] = _convert(own[name].kind, Given(value, at), [])
        except _Mismatch:
            raise UserError(f"{at} is {_show(text)}, but it takes {_type(hint)}: {own[name].meaning}.") from None
    return path, overrides, options


# ------------------------------------------------------------------------------------------------ to dataclasses


class _Mismatch(Exception):
    """The value does not fit the type."""


def fate_of(cls: type, name: str) -> tuple[str, Any]:
    """The fate of a key: "field" or "old" with (field, translation), "ignored" or "refused" with words, "unknown"."""
    if name in (f.name for f in keys_of(cls)):
        return "field", (name, None)
    if name in cls.fates.old:
        return "old", cls.fates.old[name]
    for fate, table in {"ignored": cls.fates.ignored, "refused": cls.fates.refused}.items():
        for words, patterns in table.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                return fate, words
    return "unknown", None


def settle(cls: type, given: dict[str, Given], notes: list[str]) -> dict[str, Given]:
    """Give every written key its fate. What is left are fields; an emptied one keeps the value None."""
    settled: dict[str, Given] = {}
    lists = {f.name for f in keys_of(cls) if isinstance(_default(f), tuple) and _default(f)}
    for written, (value, at) in given.items():
        name = written.removeprefix(cls.fates.prefix)
        is_list = value in ([], ()) and name in lists  # an empty list is another one than the default
        value = None if value in ("", [], (), {}) and not is_list else value
        fate, row = fate_of(cls, name)
        if fate == "unknown":
            known = [f.name for f in keys_of(cls)]
            if homes := [key for key in known if name in _inner_keys(hints_of(cls)[key])]:
                raise UserError(
                    f"{at} belongs inside {' or '.join(homes)}, and here it would do nothing. Write it there."
                )
            nearest = difflib.get_close_matches(name, [*known, *cls.fates.old], n=1, cutoff=0)[0]
            raise UserError(f"{at} is no known key, so it would do nothing. The nearest one is {nearest}; see --help.")
        if fate == "refused" and not _is_off(value, cls.fates.harmless.get(name, ())):
            raise UserError(f"{at} is {_show(value)}, which would not be honoured. {row[0].upper() + row[1:]}.")
        if fate == "ignored" and value is not None:
            notes.append(f"{at} is ignored: {row}")
        if fate == "field" or (fate == "old" and value is not None):
            field_name, translate = row
            try:
                new = Given(translate(value) if translate else value, at)
            except _Mismatch:
                raise UserError(
                    f"{at} is {_show(value)}, but it takes true or false. Write {row[0]} instead."
                ) from None
            before = settled.get(field_name, Given(None, at))
            if isinstance(before.value, dict) and isinstance(new.value, dict):
                new = Given(before.value | new.value, at)
            elif before.value is not None and new.value is not None and before.value != new.value:
                raise UserError(f"{at} contradicts {before.at}: both set {field_name}. Remove the older spelling.")
            if new.value is not None or field_name not in settled:
                settled[field_name] = new
    return settled


def _inner_keys(hint: Any) -> set[str]:
    """The keys of the maps that a value of this type is or holds."""
    own = {f.name for f in keys_of(hint)} if dataclasses.is_dataclass(hint) else set()
    return own.union(*map(_inner_keys, get_args(hint)))


def _is_off(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Whether a refused key asks for nothing that we would not do."""
    return all(item in (None, False, 0, *harmless) and item is not True for item in _as_list(value))


def build(cls: type, given: dict[str, Given], where: str, notes: list[str]) -> Any:
    """An instance of `cls` from its settled keys, each converted to the declared type and checked for its range."""
    values = {}
    for f in keys_of(cls):
        hint, (value, at) = hints_of(cls)[f.name], given.get(f.name, Given(None, where))
        meaning, within = f.metadata["meaning"], f.metadata["within"]
        if value is None:
            if _default(f) is MISSING:
                raise UserError(f"{where}: {f.name} is missing: {meaning}. Add it ({_type(hint)}).")
            continue
        for pattern, advice in cls.fates.refused_values.get(f.name, {}).items():
            if fnmatchcase(str(value), pattern):
                raise UserError(f"{at} is {_show(value)}, which is not built in. {advice[0].upper() + advice[1:]}.")
        if isinstance(value, str):
            value = cls.fates.old_values.get(f.name, {}).get(value, value)
        try:
            converted = _convert(hint, Given(value, at), notes)
            wanted = "" if not within or _lies_within(within, converted) else f"must be {_range(f)}"
        except _Mismatch:
            wanted = f"takes {_type(hint)}"
        if wanted:
            default = _default(f)
            advice = (
                "See --help" if default in (MISSING, None, ()) else f"Leave it out for the default, {_show(default)}"
            )
            raise UserError(f"{at} is {_show(value)}, but it {wanted}: {meaning}. {advice}.")
        # A map is laid over its default, so that a file needs to say only what differs.
        values[f.name] = _default(f) | converted if isinstance(converted, dict) else converted
    return cls(**values)


def _convert(hint: Any, given: Given, notes: list[str]) -> Any:
    """The value in the declared type. Raises _Mismatch where it does not fit."""
    (value, at), origin, inner = given, get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:  # the first that fits, so `int | float` keeps whole numbers whole
            try:
                return _convert(option, given, notes)
            except _Mismatch:
                continue
    elif origin is Literal:
        value = "no" if value is False and "no" in inner else value  # YAML reads a bare `no` as false
        for choice in inner:
            if str(choice) == str(value):
                return choice
    elif origin is tuple:  # one value stands for a list of one
        items = enumerate(_as_list(value))
        return tuple(_convert(inner[0], Given(v, at._replace(key=f"{at.key}[{i}]")), notes) for i, v in items)
    elif isinstance(value, dict) and (origin is dict or dataclasses.is_dataclass(hint)):
        entries = given_in(value, at.source, at)
        if origin is dict:
            return {name: _convert(inner[1], entry, notes) for name, entry in entries.items()}
        return build(hint, settle(hint, entries, notes), str(at), notes)
    else:
        return _scalar(hint, value)
    raise _Mismatch


def _as_list(value: Any) -> list | tuple:
    return value if isinstance(value, list | tuple) else [value]


def _scalar(kind: Any, value: Any) -> Any:
    """The value as bool, int, float or str. Raises _Mismatch where it is none, or would lose something."""
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() in words:
            return words[str(value).lower()]
    elif kind in (int, float, str) and isinstance(value, int | float | str) and not isinstance(value, bool):
        if kind is str or (kind is int and isinstance(value, int)):
            return kind(value)
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _Mismatch from None
        if kind is float or number.is_integer():
            return kind(number)
    raise _Mismatch


def _lies_within(interval: str, value: float) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value < high) or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


# ------------------------------------------------------------------------------------------------ to text


def plain(value: Any) -> Any:
    """Dataclasses and tuples as the maps and lists of YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in keys_of(type(value))}
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def describe_keys(cls: type, dashes: str = "") -> list[str]:
    """The lines of `--help` about one map: every key with type, range, default and meaning, under its headings."""
    lines = []
    for f in keys_of(cls):
        lines += ["", f.metadata["group"]] if f.metadata["group"] else []
        kind = " ".join(filter(None, (_type(hints_of(cls)[f.name]), _range(f))))
        lines.append(_describe(dashes + f.name, kind, _default(f), f.metadata["meaning"]))
    return lines


def describe_options(own: dict[str, Option]) -> list[str]:
    """The same for the options of one command."""
    return [_describe(f"--{name}", _type(option.kind), option.default, option.meaning) for name, option in own.items()]


def _describe(name: str, kind: str, default: Any, meaning: str) -> str:
    is_unset = default is None or dataclasses.is_dataclass(default)
    shown = "unset" if is_unset else "required" if default is MISSING else f"default: {_show(plain(default))}"
    text = meaning if "unset:" in meaning else f"{meaning}; {shown}"  # some meanings say it already
    return f"  {name}  {kind}\n" + textwrap.indent(textwrap.fill(text, 94), " " * 6)


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _range(f: dataclasses.Field) -> str:
    """The interval of a field in words: ">= 1", "> 0", "in [0, 1)"."""
    low, _, high = f.metadata["within"].partition(", ")
    return low.replace("[", ">= ").replace("(", "> ") if high == "inf)" else f"in {low}, {high}" if high else ""


def _type(hint: Any) -> str:
    """A type in the words of YAML."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(option) for option in inner if option is not types.NoneType))
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin is tuple:
        return f"list of ({_type(inner[0])})" if get_origin(inner[0]) else f"list of {_type(inner[0])}s"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "map"
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}[hint]


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)
