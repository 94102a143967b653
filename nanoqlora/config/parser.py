"""YAML text and command-line words to plain values that know where they were written, for errors such as
"train.yml, line 12: lora_r is ...". What the values mean is the matter of `keys.py`.
"""

import re
from collections.abc import Mapping, Set
from typing import Any

import yaml

from .errors import UserError, short
from .files import read_text
from .scripts import this_command


class Map(dict[str, Any]):
    """A map and the places of its entries, as the beginning of an error: "train.yml, line 12: lora_r"."""

    def __init__(self, where: str = "") -> None:
        """where: what stands in front of the name of an entry that is missing."""
        super().__init__()
        self.where, self.at = where, dict[str, str]()
        self.lines = dict[Any, int]()  # while YAML is read

    def put(self, name: str, value: Any, at: str) -> None:
        self[name], self.at[name] = value, at


MOST_VALUES, DEEPEST = 100_000, 100


class _Loader(yaml.SafeLoader):
    """YAML that keeps line numbers, and refuses a key given twice, of which only the last would be used."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # no such day, 0x without digits
            what = f"{short(node.value)} is not a value ({short(str(error))})"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None

    def fetch_flow_collection_start(self, token: Any) -> None:
        if self.flow_level > DEEPEST:  # each token is compared with all open brackets
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def construct_lines(self, node: yaml.MappingNode) -> Any:
        yield (result := Map())
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if line := result.lines.get(name.value):
                    what = f"{name.value} is given twice (first in line {line}), and only one counts"
                    raise yaml.constructor.ConstructorError(None, None, what, name.start_mark)
                result.lines[name.value] = name.start_mark.line + 1
        result.update({str(name): value for name, value in self.construct_mapping(node).items()})


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_lines)


def load_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises UserError, with the line of whatever is wrong."""
    try:
        value = yaml.load(text, _Loader)
        if _count(value, {}) > MOST_VALUES:
            raise ValueError(f"more than {MOST_VALUES} values, with those of its aliases")
        return value
    except Exception as error:  # also RecursionError, and what PyYAML stumbles over, such as !!set [1]
        problem = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", error)
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise UserError(f"{where}{line}: {problem}. Correct the YAML there.") from None


def _count(value: Any, known: dict[int, int]) -> int:
    """How many values this one is with all inside; of each alias too, by which a short text can have billions."""
    if id(value) not in known:
        known[id(value)] = MOST_VALUES  # if it is a part of itself
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        known[id(value)] = 1 + sum(_count(item, known) for item in items)
    return known[id(value)]


def located(value: Any, source: str, key: str = "", line: int | None = None) -> Any:
    """The same value, in which each map is a `Map`.

    Args:
        source: a file, or "command line". key, line: of the value itself.
    """
    if isinstance(value, list | tuple):
        return [located(item, source, f"{key}[{i}]", line) for i, item in enumerate(value)]
    at = f"{source}{f', line {line}' if line else ''}: "
    if isinstance(value, str) and (odd := re.search("[\0\ud800-\udfff]", value)):
        raise UserError(f"{at}{key} is {value!r:.200}, and {odd[0]!r} is not text. Remove it, or rename the file.")
    if not isinstance(value, dict):
        return value
    result = Map(f"{at}{key}{': ' if key else ''}")
    for name, entry in value.items():
        own_line = getattr(value, "lines", {}).get(str(name), line)
        own_key = f"{key}.{name}" if key else str(name)
        at = f"{source}{f', line {own_line}' if own_line else ''}: {own_key}"
        result.put(str(name), located(entry, source, own_key, own_line), at)
    return result


def read_yaml(path: str) -> Map:
    """The keys of a YAML file. Raises UserError with the line of whatever is wrong."""
    text = read_text(path, f"Name the YAML file of a run, as in {this_command('my.yml')}")
    values = load_yaml(text, path) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, but a run is a map. Write lines such as lora_r: 16.")
    return located(values, path)


def read_words(
    words: list[str], positional: tuple[str, ...], own: Mapping[str, Set[Any]], keys: Mapping[str, Set[Any]]
) -> Map:
    """The arguments of a command line as a map: `--name value`, `--name=value`, `--switch`, or by their position.

    Args:
        positional: names of the values that stand without one, in their order.
        own: name of an option -> the types that its value may have. A bool needs no value, and a list of texts is
            given one by one.
        keys: the same of keys of the YAML, which are written as there.
    """
    result, words, places = Map("command line: --"), list(words), list(positional)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            name, equals, text = word.lstrip("-").partition("=")
            name, at = name.replace("-", "_"), f"command line: --{name.replace('-', '_')}"
            kinds = own.get(name) or keys.get(name, frozenset())
            is_switch = own.get(name) == {bool}
            has_value = words and (words[0].lower() in ("true", "false") if is_switch else words[0][:2] != "--")
            text = text if equals else words.pop(0) if has_value else "true"
        elif places:
            name, text, at, kinds = places[0], word, f"command line: {places[0]}", {str}
            places = places[... not in own.get(name, ()) :]  # a list takes all words that follow
        elif positional == ("file",):
            raise UserError(f"command line: {result['file']} and {word} are both files, but a run has one. Remove one.")
        else:
            raise UserError(f"command line: {word} follows no --option, so it would do nothing. See --help.")
        if ... in own.get(name, ()):
            result.put(name, [*result.get(name, ()), text], at)
            continue
        is_text = str in kinds and kinds <= {str, type(None)}  # whatever YAML would make of it
        value = text if is_text else load_yaml(text, f"{at}: {text!r:.99} is neither YAML nor JSON")
        result.put(name, located(value, "command line", f"--{name}"), at)
    return result
