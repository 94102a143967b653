"""How a right input becomes a wrong one: of bytes, of JSON values, and of the text of JSON."""

import copy
import json
import math
import struct
from random import Random
from typing import Any

DEEP = "@@DEEP@@"  # `dump` writes lists in lists in lists in its place

STRINGS = [
    *("", " ", "x", "\0", "a\0b", "\ud800", "\udfff", "\x1b[31mred", "\x9b31m", "\u202e", "\ufeff", "\ue000", "\u2581"),
    *("../../etc/passwd", "/etc/passwd", "/", ".", "..", "~", "true", "null", "nan", "1e999", "-1", "0x10", "%s%n"),
    *("{0.__class__}", "{{ 7*7 }}", "<|im_end|>", "<|im_start|>", "</s>", "a" * 300, "a/" * 200, "A" * 5000, "\n"),
    *("\r\n", "\u00e9", "\U0001f642", "q_proj", "LLAMA", "\x85", "\u2028"),
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 5, 7, 64, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30),
    *(10**400, -(10**400), 0.5, -0.5, 1.5, 1e-9, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf, 1e18, 3.0),
    *(64.0, -0.0),
]
OTHERS: list[Any] = [
    *(None, True, False, [], {}, [[]], [{}], {"": 0}, {"x": 1}, [1], ["x"], [None], [1, "x", None, {}]),
    {"x": {"y": []}},
]
SIZES = [0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 256, 1000, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
SIZES += [2**62, 2**63 - 1, 2**63, 2**64 - 1]


def any_value(rng: Random) -> Any:
    """A value of any type that JSON has."""
    kind = rng.random()
    if kind < 0.33:
        return rng.choice(STRINGS)
    if kind < 0.66:
        return rng.choice(NUMBERS)
    return DEEP if kind < 0.67 else copy.deepcopy(rng.choice(OTHERS))


def places_in(node: Any, at: tuple = ()) -> list[tuple]:
    """The keys that lead to each value inside, of a long list only to the first ones."""
    found = [at] if at else []
    if isinstance(node, dict):
        for key, item in node.items():
            found += places_in(item, (*at, key))
    elif isinstance(node, list):
        for i, item in enumerate(node[:40]):
            found += places_in(item, (*at, i))
    return found


def mutate_json(node: Any, rng: Random, times: int | None = None, places: list[tuple] | None = None) -> Any:
    """A copy with some values replaced, removed, added or swapped; `places`: only there."""
    node = copy.deepcopy(node)
    for _ in range(times or rng.choice([1, 1, 1, 2, 3, 6])):
        choices = places or places_in(node)
        if not choices:
            return any_value(rng)
        *way, key = rng.choice(choices)
        try:
            parent, other = node, node
            for step in way:
                parent = parent[step]
            for step in rng.choice(choices):
                other = other[step]
            _mutate_item(parent, key, other, rng)
        except (KeyError, IndexError, TypeError, OverflowError):  # an earlier change has taken the place away
            continue
    return node


def _mutate_item(parent: Any, key: Any, other: Any, rng: Random) -> None:
    kind, old = rng.random(), parent[key] if not isinstance(parent, dict) else parent.get(key)
    if kind < 0.55:
        parent[key] = any_value(rng)
    elif kind < 0.65:
        del parent[key]
    elif kind < 0.72:
        parent[key] = [old]
    elif kind < 0.79 and isinstance(old, int | float):
        parent[key] = old * rng.choice([-1, 0, 2, 0.5, 1e9, 10**12]) + rng.choice([0, 1, -1])
    elif kind < 0.84 and isinstance(old, str):
        cut = rng.randrange(len(old) + 1)
        parent[key] = old[:cut] + rng.choice(STRINGS) + old[cut + rng.choice([0, 0, 1, 3]) :]
    elif kind < 0.9:
        parent[key] = copy.deepcopy(other)
    elif isinstance(parent, dict):
        parent[rng.choice([*STRINGS, "type", "id", "r", "step", "content"])] = any_value(rng)
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), any_value(rng))


def dump(node: Any, rng: Random) -> bytes:
    """JSON text of a value, now and then with a fault of the text itself."""
    try:
        text = json.dumps(node, ensure_ascii=rng.random() < 0.8)
    except (RecursionError, ValueError):
        return b"[" * 5000
    levels = rng.choice([100, 450, 480, 700, 900, 5000])
    text = text.replace(f'"{DEEP}"', "[" * levels + "]" * levels)
    data = text.encode("utf-8", "surrogatepass")
    return rng.choice(TEXT_FAULTS)(data, rng) if rng.random() > 0.94 else data


TEXT_FAULTS = [
    lambda data, rng: data[: rng.randrange(len(data) + 1)],
    lambda data, rng: b"\xef\xbb\xbf" + data,
    lambda data, rng: data.decode("utf-8", "replace").encode("utf-16"),
    lambda data, rng: data + data,
    lambda data, rng: data.replace(b"0", b"9" * 5000, 1),
    lambda data, rng: data.replace(b"}", b', "x": ' + b"[" * 3000 + b"]" * 3000 + b"}", 1),
    lambda data, rng: data.replace(b"}", b', "x": 1, "x": 2}', 1),
    lambda data, rng: data.replace(b"}", b', "\xff\xfe": 1}', 1),
    lambda data, rng: b"[" * 100_000,
    lambda data, rng: b'{"x":' * 20_000,
    lambda data, rng: b"",
    lambda data, rng: b"null",
    lambda data, rng: mutate_bytes(data, rng),
]


def mutate_bytes(data: bytes, rng: Random, within: int | None = None) -> bytes:
    """Some flips, numbers, cuts and copies; `within`: only in the first so many bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5, 10])):
        limit = max(1, min(len(out), within or len(out)))
        at, kind, size = rng.randrange(limit), rng.random(), rng.choice([1, 2, 4, 8, 16, 100])
        if kind < 0.25 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
        elif kind < 0.4 and out:
            out[min(at, len(out) - 1)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind < 0.6:
            code = rng.choice("BHIQ")
            packed = struct.pack("<" + code, rng.choice(SIZES) & ((1 << 8 * struct.calcsize(code)) - 1))
            out[at : at + len(packed)] = packed
        elif kind < 0.7:
            del out[at : at + size]
        elif kind < 0.8:
            out[at:at] = rng.randbytes(size)
        elif kind < 0.93:
            to = rng.randrange(limit)
            out[to:to] = out[at : at + 2 * size]
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)
