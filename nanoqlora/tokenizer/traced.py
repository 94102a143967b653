"""Text with the source of each of its parts.

A chat template mixes its own text with that of a row. What a row has given must never turn into a special token, or a
message that holds "<|im_end|>" could end its own turn; and data/masks.py has to know where each message has got to. No
character could mark that, as users may write any. So while a template runs, each string of a row is a `Traced`: a str
that also has spans, and what is made of it has them too.

Pieces, sums and replacements of strings keep their spans. Everything else that makes strings of strings (formatting,
JSON, filters) is recomputed, with marks around the parts that are traced, and the marks give the spans. They are
halves of surrogate pairs, which no text holds (`trace`), and nobody sees the second result.
"""

import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Sequence, ValuesView
from types import MethodType
from typing import Any, NamedTuple, SupportsIndex


class Span(NamedTuple):
    """A part of a text, and who gave it: `source` is what `trace` was given, None where that cannot be known."""

    start: int
    stop: int
    source: int | None


class Traced(str):
    """A str with the spans, in order, of what was traced. Whatever lies between them is the template's own."""

    _spans: tuple[Span, ...]

    def __new__(cls, text: str = "", spans: Iterable[Span] = ()) -> "Traced":
        self = super().__new__(cls, text)
        self._spans = tuple(spans)
        return self

    def __str__(self) -> "Traced":
        return self

    def __add__(self, other: Any) -> Any:
        return join((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return join((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: Any) -> Any:
        return join([self] * count) if isinstance(count, int) else NotImplemented

    __rmul__ = __mul__

    def _cut(self, start: int, stop: int) -> "Traced":
        """The characters from `start` to `stop`. A text of which nothing is left keeps its place: an empty span."""
        spans = []
        for a, b, source in self._spans:
            a, b, is_empty = max(a, start), min(b, stop), a == b or start == stop
            if a < b or a == b and is_empty:
                spans.append(Span(a - start, b - start, source))
        return Traced(str.__getitem__(self, slice(start, stop)), spans)

    def __getitem__(self, key: Any) -> "Traced":
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step != 1:
                return Traced(str.__getitem__(self, key), [Span(0, len(range(start, stop, step)), _source_of([self]))])
            return self._cut(start, max(start, stop))
        str.__getitem__(self, key)  # or its error
        return self._cut(key % len(self), key % len(self) + 1)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def lstrip(self, chars: str | None = None) -> "Traced":
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None) -> "Traced":
        return self._cut(0, len(super().rstrip(chars)))

    def strip(self, chars: str | None = None) -> "Traced":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> "Traced":
        return self._cut(len(self) - len(super().removeprefix(prefix)), len(self))

    def removesuffix(self, suffix: str) -> "Traced":
        return self._cut(0, len(super().removesuffix(suffix)))

    def _pieces(self, pieces: Sequence[str], gap: int | None) -> "list[str]":
        """Where plain pieces are that stand in this order, `gap` characters apart; None: apart by white space."""
        found: list[str] = []
        at = 0
        for piece in pieces:
            at = self.find(piece, at) if gap is None else at
            found.append(self._cut(at, at + len(piece)))
            at += len(piece) + (gap or 0)
        return found

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[str]":
        return self._pieces(super().split(sep, maxsplit), sep if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> "list[str]":
        return self._pieces(super().rsplit(sep, maxsplit), sep if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> "list[str]":
        lines = self._pieces(super().splitlines(keepends=True), 0)
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def partition(self, sep: str) -> Any:
        return tuple(self._pieces(super().partition(sep), 0))

    def rpartition(self, sep: str) -> Any:
        return tuple(self._pieces(super().rpartition(sep), 0))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:
            return run(str.replace, self, old, new, count)
        first, *others = self.split(old, count)
        return join([first, *(part for other in others for part in (new, other))])


class _Number:
    """A number of a row, whose digits are traced."""

    source: int

    def __str__(self) -> str:
        return trace(super().__repr__(), self.source)


class _Whole(_Number, int):
    """The same for a whole number."""


class _Real(_Number, float):
    """The same for a fraction."""


def trace(value: Any, source: int) -> Any:
    """The same value with all its strings, however deep, traced to `source`, keys and numbers too.

    Half of a surrogate pair, which has no UTF-8 bytes, becomes U+FFFD.
    """
    if isinstance(value, str):
        if _HALF.search(value):
            value = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return Traced(value, [Span(0, len(value), source)])
    if isinstance(value, dict):
        return {trace(key, source): trace(item, source) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace(item, source) for item in value]
    if type(value) in (int, float):
        value = (_Whole if type(value) is int else _Real)(value)
        value.source = source
    return value


def of_unknown(text: str) -> Traced:
    """A text whose sources are unknown."""
    return Traced(text, [Span(0, len(text), None)])


def spans_of(text: str) -> tuple[Span, ...]:
    """The spans of a text; none of a plain one."""
    return getattr(text, "_spans", ())


def plain(text: str) -> str:
    """The same text without its spans."""
    return "".join((text,))


def join(parts: Iterable[str]) -> str:
    """The parts as one text."""
    parts, spans, at = list(parts), [], 0
    for part in parts:
        spans += [Span(at + a, at + b, source) for a, b, source in spans_of(part)]
        at += len(part)
    text = "".join(parts)
    return Traced(text, spans) if spans else text


def is_own(function: Any) -> bool:
    """Whether this is a method of a traced text that keeps its spans."""
    return isinstance(getattr(function, "__self__", None), Traced) and isinstance(function, MethodType)


# ------------------------------------------------------------------------------------------------ marks

_HALF = re.compile(r"[\ud800-\udfff]")
_END = "\ud800"
_MARK = re.compile(r"\ud800|[\ud801-\udbff][\udc00-\udfff]")
_COLLECTIONS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


def run(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a function returns; if that is a text made of traced ones, with its spans."""
    result = function(*args, **kwargs)
    if not isinstance(result, str):
        return result
    given: list[str] = []
    args, kwargs = _marked((args, kwargs), given)
    if not any(map(spans_of, given)):
        return result
    return _unmarked(_marked(function(*args, **kwargs), []), plain(result), given)


def _marked(value: Any, given: list[str]) -> Any:
    """The same arguments, with marks around everything that is traced. Adds all their strings to `given`."""
    if isinstance(value, str):
        given.append(value)
        parts, at = [], 0
        for start, stop, source in spans_of(value):
            number = 0 if source is None else source + 2
            mark = chr(0xD801 + number // 512) + chr(0xDC00 + number % 512)
            parts += [str.__getitem__(value, slice(at, start)), mark, str.__getitem__(value, slice(start, stop)), _END]
            at = stop
        return "".join([*parts, str.__getitem__(value, slice(at, None))]) if parts else value
    if isinstance(value, dict):
        return {_marked(key, given): _marked(item, given) for key, item in value.items()}
    if isinstance(value, _COLLECTIONS):
        return (tuple if isinstance(value, tuple) else list)([_marked(item, given) for item in value])
    if isinstance(owner := getattr(value, "__self__", None), str):  # a method of a string
        return getattr(_marked(owner, given), value.__name__)
    return value


def _unmarked(marked: Any, text: str, given: list[str]) -> Traced:
    """The result with the spans that the marks in the second one show."""
    spans, removed, opened = [], 0, None
    is_known = isinstance(marked, str) and _MARK.sub("", marked) == text
    for mark in _MARK.finditer(marked) if is_known else ():
        at, removed = mark.start() - removed, removed + len(mark[0])
        if opened is None:
            is_known &= mark[0] != _END
        else:
            spans.append(Span(opened[0], at, opened[1]))
        number = -1 if mark[0] == _END else (ord(mark[0][0]) - 0xD801) * 512 + ord(mark[0][1]) - 0xDC00
        opened = None if number < 0 else (at, number - 2 if number else None)
    if is_known and opened is None:
        return Traced(text, spans)
    # The marks change the result. If all arguments have one source, so has the result.
    return Traced(text, [Span(0, len(text), _source_of(given))])


def _source_of(texts: Iterable[str]) -> int | None:
    """Who gave all of these texts; None where that is more than one."""
    texts = [*texts]
    found = {span.source for text in texts for span in spans_of(text)}
    is_traced = all(sum(stop - start for start, stop, _ in spans_of(text)) >= len(text) for text in texts)
    return found.pop() if len(found) == 1 and is_traced else None
