"""What `split` of a data set asks for, such as train[:20%]: the split's name and a part of its rows."""

import re
from pathlib import Path

from .errors import UserError


def split_and_part(split: str | None) -> tuple[str | None, str]:
    """The name of a split and the part of its rows that is wanted: "train[:20%]" -> ("train", ":20%")."""
    found = re.fullmatch(r"([\w.-]+)(?:\[((?:-?\d{1,15}%?)?:(?:-?\d{1,15}%?)?)\])?", split or "train")
    if not found:
        raise UserError(f"split is {split!r}. Give the name of a split, or a part of one: train[:20%], train[100:200].")
    return found[1] if split else None, found[2] or ""


def split_without_effect(path: str | Path, split: str | None) -> str:
    """A line on a split that is named of a single file, which has none, unless its name tells the same; else ""."""
    name, _ = split_and_part(split)
    path = Path(path)
    is_needless = name in (None, "train") or name in path.name or not path.is_file()
    return "" if is_needless else f"data {path}: split {name} ignored: a single file has no splits"
