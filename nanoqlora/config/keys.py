"""Maps of keys: pydantic models whose values come from YAML or from a command line, with errors that say where.

A key of a map is a field of its model. Axolotl's other keys stand in `axolotl_keys.yml`. pydantic checks and converts
the values. An error is one line about one value: where it was written, what was found, what the key takes and means.
`schema.py` has the keys of a run, `options.py` those of the commands.
"""

import difflib
import json
import os
import textwrap
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic import Field
from pydantic.fields import FieldInfo

from .errors import UserError
from .parser import Map

T = TypeVar("T")
K = TypeVar("K", bound="Keys")
Many = Annotated[tuple[T, ...], pydantic.BeforeValidator(lambda given: as_list(given))]  # or one that stands alone
PathText = Annotated[str, pydantic.AfterValidator(lambda given, info: as_path(given, info.field_name))]


class Fates(NamedTuple):
    """What becomes of the keys of one map that are no fields; a part of `axolotl_keys.yml`, which explains each."""

    old: dict[str, str | dict[str, Any]] = {}
    old_values: dict[str, dict[str, Any]] = {}
    ignored: dict[str, str] = {}
    refused: dict[str, str] = {}
    refused_values: dict[str, dict[str, str]] = {}
    harmless: dict[str, list[Any]] = {}
    prefix: str = ""


@cache
def load_table(name: str) -> dict[str, Any]:
    """A YAML file beside this one."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it, 50 ms less
    return yaml.load(files(__package__).joinpath(name).read_text("utf-8"), loader)


FATES = {name: Fates(**table) for name, table in load_table("axolotl_keys.yml").items()}


def key(meaning: str, default: Any = ..., group: str = "", **limits: Any) -> Any:
    """A field that is a key. No default: it is required.

    Args:
        meaning: what `--help` and errors say of it. group: opens a new heading of `--help`.
        limits: of its number, as pydantic calls them: ge, gt, le, lt.
    """
    return Field(default, description=meaning, title=group or None, **limits)


class Keys(pydantic.BaseModel):
    """A map whose keys are the fields; without a value a key has its default."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)
    fates: ClassVar[Fates] = Fates()
    positional: ClassVar[tuple[str, ...]] = ()  # keys that a command line gives without their names

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """What YAML makes of some values: `no` is false, 2e-4 is text."""
        kinds = kinds_of(cls.model_fields[info.field_name or ""].annotation)
        choices = {str(choice): choice for choice in kinds if not isinstance(choice, type)}
        if value is False and "no" in choices:
            return "no"
        if isinstance(value, str) and kinds & {int, float}:
            return float(value)
        if isinstance(value, bool) and bool not in kinds and str not in kinds:
            return choices.get(str(value), "true")  # true is not 1
        return choices.get(str(value), value)

    def plain(self) -> dict[str, Any]:
        """The keys as the maps and lists of YAML."""
        return self.model_dump(mode="json")


def as_list(value: Any) -> list[Any] | tuple[Any, ...]:
    return value if isinstance(value, list | tuple) else [value]


def as_path(given: str, name: str) -> str:
    """~ is the home folder, as in a shell."""
    if not given or len(given.encode()) > 3500 or max(map(len, given.encode().split(b"/"))) > 255:
        raise UserError(f"{name}: {given[:60]} ... is empty, has more than 255 bytes in a part, or 3500. Shorten it.")
    return os.path.expanduser(given)


def keys_of(cls: type[Keys]) -> dict[str, FieldInfo]:
    """The fields that are keys."""
    return {field.alias or name: field for name, field in cls.model_fields.items() if not field.exclude}


def kinds_of(hint: Any) -> frozenset[Any]:
    """The types and choices that a type is made of: bool | Literal["auto"] -> {bool, "auto"}."""
    inner = get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint)
    return frozenset().union(*map(kinds_of, inner)) if inner else frozenset({hint})


def maps_in(hint: Any) -> list[type[Keys]]:
    """The maps that a value of this type is or holds."""
    return [kind for kind in kinds_of(hint) if isinstance(kind, type) and issubclass(kind, Keys)]


# ------------------------------------------------------------------------------------------------ which keys


def fate_of(cls: type[Keys], name: str) -> tuple[str, Any]:
    """The fate of a key: "field", a table of `Fates` with its row, or "unknown"."""
    if name in keys_of(cls):
        return "field", None
    if name in cls.fates.old:
        return "old", cls.fates.old[name]
    for fate in ("ignored", "refused"):
        for reason, patterns in getattr(cls.fates, fate).items():
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                return fate, reason
    return "unknown", None


def settle(cls: type[Keys], given: Map, notes: list[str], options: Iterable[str] = ()) -> Map:
    """Give every written key its fate, in inner maps too. What is left are fields; an emptied one keeps None.

    Args:
        notes: gets a line for each key that is ignored. options: names that may be meant by a misspelt one too.
    """
    settled = Map(given.where)
    for written, value in given.items():
        at, name = given.at[written], written.removeprefix(cls.fates.prefix)
        fate, row = fate_of(cls, name)
        is_list = fate == "field" and isinstance(keys_of(cls)[name].default, tuple) and keys_of(cls)[name].default != ()
        if value in ("", {}) or value == [] and not is_list:  # where the default is another list, an empty one stays
            value = None
        if fate == "unknown":
            raise UserError(f"{at} {what_instead(cls, name, options)}")
        if fate == "refused" and not _is_off(value, cls.fates.harmless.get(name, [])):
            raise UserError(f"{at} is {_show(value)}, which would not be honoured. {row[0].upper() + row[1:]}.")
        if fate == "ignored" and value is not None:
            notes.append(f"{at} is ignored: {row}")
        if fate in ("ignored", "refused") or (value is None and fate != "field"):
            continue
        if fate == "old" and isinstance(row, str):
            name, _, entry = row.partition(".")
            value = {entry: value} if entry else value
        elif fate == "old":
            ((name, meant),) = row.items()
            try:
                if not pydantic.TypeAdapter(bool).validate_python(value):
                    continue
            except pydantic.ValidationError:
                raise UserError(f"{at} is {_show(value)}, but it takes true or false. Write {name} instead.") from None
            value = meant
        for pattern, advice in cls.fates.refused_values.get(name, {}).items():
            if fnmatchcase(str(value), pattern):
                raise UserError(f"{at} is {_show(value)}, which is not built in. {advice[0].upper() + advice[1:]}.")
        if isinstance(value, str):
            value = cls.fates.old_values.get(name, {}).get(value, value)
        value, before = _settle_inside(keys_of(cls)[name].annotation, value, notes), settled.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = before | value
        elif before is not None and value is not None and before != value:
            raise UserError(f"{at} contradicts {settled.at[name]}: both set {name}. Remove the older spelling.")
        if value is not None or name not in settled:
            settled.put(name, value, at)
    return settled


def _settle_inside(hint: Any, value: Any, notes: list[str]) -> Any:
    """The same for the maps within a value, whose emptied keys are left out."""
    if isinstance(value, list):
        return [_settle_inside(hint, item, notes) for item in value]
    if not (isinstance(value, Map) and maps_in(hint)):
        return value
    settled = settle(maps_in(hint)[0], value, notes)
    for name in [name for name, entry in settled.items() if entry is None]:
        del settled[name]
    return settled


def _is_off(value: Any, harmless: list[Any]) -> bool:
    """Whether a refused key asks for nothing that we would not do."""
    return all(item in (None, False, 0, *harmless) and item is not True for item in as_list(value))


def what_instead(cls: type[Keys], name: str, options: Iterable[str] = ()) -> str:
    """What to do about an unknown key."""
    if homes := [key for key, field in keys_of(cls).items() if name in _keys_inside(field.annotation)]:
        return f"belongs inside {' or '.join(homes)}, and here it would do nothing. Write it there."
    known = [*keys_of(cls), *cls.fates.old, *options]
    nearest = "".join(difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4))
    return f"is no known key, so it does nothing. {f'The nearest one is {nearest}; s' if nearest else 'S'}ee --help."


def _keys_inside(hint: Any) -> set[str]:
    fields = [(name, field) for inner in maps_in(hint) for name, field in keys_of(inner).items()]
    return {name for name, _ in fields}.union(*(_keys_inside(field.annotation) for _, field in fields))


# ------------------------------------------------------------------------------------------------ which values


def build(cls: type[K], values: Map) -> K:
    """An instance from its settled keys, each converted to the declared type and checked for its range."""
    try:
        return cls.model_validate({name: value for name, value in values.items() if value is not None})
    except pydantic.ValidationError as error:
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # the innermost is the most precise
        if isinstance(rule := found.get("ctx", {}).get("error"), UserError):
            raise rule from None
        raise UserError(_explain(cls, values, found["loc"])) from None


def _explain(cls: type[Keys], values: Map, loc: tuple[int | str, ...]) -> str:
    """One line about the value at `loc`, as pydantic names places: keys, numbers of items, and types of a union."""
    field, at, value, found = FieldInfo(), "", values, values  # type: FieldInfo, str, Any, Any
    for part in loc:
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else value
        elif isinstance(value, Map) and part in keys_of(cls):
            field, at, where = keys_of(cls)[part], value.at.get(part, ""), value.where
            found = value = value.get(part)
            cls = next(iter(maps_in(field.annotation)), cls)
            if value is None:
                return f"{where}{part} is missing: {field.description}. Add it ({type_text(field.annotation)})."
    takes = " ".join(filter(None, (type_text(field.annotation), range_text(field))))
    default = field.get_default()
    advice = "See --help" if field.is_required() or not default else f"Leave it out for the default, {_show(default)}"
    return f"{at} is {_show(found)}, but it takes {takes}: {field.description}. {advice}."


# ------------------------------------------------------------------------------------------------ to text


def describe_keys(cls: type[Keys], dashes: str = "", only: tuple[str, ...] = ()) -> list[str]:
    """The lines of `--help` about one map: every key with type, range, default and meaning.

    Args:
        only: the names of some keys; (): all, under their headings.
    """
    lines = []
    for name, field in keys_of(cls).items():
        if only and name not in only:
            continue
        lines += ["", field.title] if field.title and not only else []
        default, text = field.get_default(), field.description or ""
        is_unset = default is None or isinstance(default, Keys)
        shown = "required" if field.is_required() else "unset" if is_unset else f"default: {_show(default)}"
        text = text if "unset:" in text else f"{text}; {shown}"  # some meanings say it already
        shown_name = name if name in cls.positional else dashes + name
        title = "  ".join(("", shown_name, " ".join((type_text(field.annotation), range_text(field))).strip()))
        lines.append(f"{title}\n" + textwrap.indent(textwrap.fill(text, 94), " " * 6))
    return lines


def range_text(field: FieldInfo) -> str:
    """The limits of a number: ">= 0 and < 1"."""
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    ends = [(sign, getattr(one, end, None)) for one in field.metadata for end, sign in signs.items()]
    return " and ".join(f"{sign} {limit}" for sign, limit in ends if limit is not None)


def type_text(hint: Any) -> str:
    """A type as YAML calls it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return type_text(inner[0])
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(type_text(option) for option in inner if option is not NoneType))
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        return f"list of ({type_text(inner[0])})" if get_origin(inner[0]) else f"list of {type_text(inner[0])}s"
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(hint, "map")


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:200]
