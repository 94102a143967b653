"""What a data set is called -> its files: a file, a folder, a glob, or a name on the hub.

Of a folder, and of a data set on the hub, the files of one split are taken. The card of a data set (README.md) may list
them; else the names of the files decide, as in `data/train-00000-of-00002.parquet`; else all files are the split
`train`.
Not supported: data sets that a program makes. Read next: data/rows.py, which reads the files.
"""

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..config.errors import UserError
from ..config.files import real
from ..config.parser import load_yaml
from ..weights.hub import hub_files, is_hub_name

# File name ending -> how it is read; `.gz` may follow.
KINDS = {".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".text": "text"}
KINDS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "json")
CARD, MOST_FILES = "README.md", 20_000
NOT_DATA = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")  # of the datasets library
CACHED = "cache-"  # how the names of its own working files begin, which end in .arrow
SPLITS = {  # parts of file names -> the split that they mean
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class DataFile:
    """A file of rows. `kind` is json (a list, or a row a line), csv, parquet, arrow or text (a row a line)."""

    path: Path
    kind: str


@dataclass(frozen=True)
class Wanted:
    """Which files of a data set to take; see `find_files`."""

    where: str  # the data set, in errors
    kind: str | None
    data_files: tuple[str, ...]
    split: str | None
    name: str | None


def find_files(
    path: str | Path,
    ds_type: str | None = None,
    data_files: tuple[str, ...] = (),
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> list[DataFile]:
    """The files of a data set, sorted by name.

    Args:
        path: a file, a folder, a glob, or a hub name. Of a folder and of the hub only data files are taken.
        ds_type: json, jsonl, csv, parquet, arrow or text; None: the file's ending decides.
        data_files: names or globs of files within a folder or hub data set; or the files themselves.
        split: of a folder or hub data set; None: train, where there are splits.
        name: one of the several configurations that a data set's card lists.
        revision: branch, tag or commit of a hub data set.
    Raises:
        UserError: nothing found, or files of several kinds.
    """
    where, kind = f"data {path}", "json" if ds_type == "jsonl" else ds_type
    path = os.path.expanduser(path)
    folder, data_files = Path(path), tuple(map(os.path.expanduser, data_files))
    want = Wanted(where, kind, data_files, split, name)
    if folder.is_file():
        found = [folder]
    elif glob.has_magic(path):
        found = _files(glob.glob(path, recursive=True))
    elif folder.is_dir():
        found = _in_folder(want, folder, folder)
    elif data_files and all(Path(file).is_file() for file in data_files):
        found = _files(data_files)  # then path is only a name, as in Axolotl's `path: json`
    elif is_hub_name(path):
        found = _on_the_hub(want, path, revision)
    else:
        advice = "Give a .jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder or a glob of them, or a hub name"
        raise UserError(f"{where}: no such file. {advice}.")
    if not found:
        wanted = ", ".join(data_files) or f"{kind or 'data'} of the split {split or 'train'}"
        there = ", ".join(sorted(set().union(*_splits(folder, kind, None).values()))) if folder.is_dir() else ""
        there = f"; its files are of the split {there}" if there and not data_files else ""
        advice = "Name the file itself, or check data_files, ds_type and split"
        raise UserError(f"{where}: no file found there ({wanted}{there}). {advice}.")
    files = [DataFile(file, kind or KINDS.get(_ending(file), "")) for file in sorted(set(found))]
    if unknown := [file.path for file in files if not file.kind]:
        raise UserError(f"data {unknown[0]}: its ending is unknown. Set ds_type to json, csv, parquet, arrow or text.")
    if len(kinds := sorted({file.kind for file in files})) > 1:
        raise UserError(f"{where}: files of several kinds ({', '.join(kinds)}). Name the one to read with ds_type.")
    return files


def _files(names: Iterable[str]) -> list[Path]:
    return [Path(name) for name in names if Path(name).is_file()]


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _in_folder(want: Wanted, folder: Path, inside: Path) -> list[Path]:
    """The files of a split: those that the user lists, else the card, else their names.

    The folder is not trusted: what its card lists, and what its links point to, has to be in `inside`.
    """
    if want.data_files:
        return _matching(want, folder, want.data_files)
    listed = _listed_on_card(want, folder)
    found = _matching(want, folder, listed) if listed else _by_name(folder, want.kind, want.split)
    for path in found:
        if not real(path).is_relative_to(real(inside)):
            raise UserError(f"{want.where}: {path} leads out of the folder, to {real(path)}. Name that file.")
    return found


def _matching(want: Wanted, folder: Path, patterns: Sequence[str]) -> list[Path]:
    if wrong := [pattern for pattern in patterns if re.search(r"[\0\ud800-\udfff]|(\*\*.*){3}", pattern)]:
        raise UserError(f"{want.where}: data_files has {wrong[0]}, which is no file's name or has many **. Correct it.")
    inside = glob.escape(str(folder))
    found = (glob.iglob(os.path.join(inside, p), recursive=True, include_hidden=True) for p in patterns)
    return _files(_bounded(chain(*found), folder))


def _bounded(found: Iterable[Any], folder: Path, takes_all: bool = False) -> list[Any]:
    """All of what is found, where it is of a data set and not of everything that a user has."""
    paths, home = list(islice(found, MOST_FILES)), Path(os.environ.get("HOME", "/root"))
    if len(paths) == MOST_FILES or takes_all and real(home).is_relative_to(real(folder)):
        raise UserError(f"data {folder}: is your home, or has {MOST_FILES:,} files, so is no data set. Name its files.")
    return paths


def _splits(folder: Path, kind: str | None, split: str | None) -> dict[Path, set[str]]:
    """The data files of a folder, each with the splits that its name mentions."""
    splits: dict[Path, set[str]] = {}
    for path in _bounded(folder.rglob("*"), folder, takes_all=True):
        name = path.relative_to(folder).as_posix()
        is_data = KINDS.get(_ending(path)) == kind if kind else _ending(path) in KINDS
        is_own = path.name in NOT_DATA or path.suffix == ".arrow" and path.name.startswith(CACHED)
        if is_data and not is_own and path.is_file() and not re.search(r"(^|/)\.", name):
            words = re.split(r"[^a-z]+", name.lower())
            splits[path] = {SPLITS.get(word, word) for word in words if word in SPLITS or word == split}
    return splits


def _by_name(folder: Path, kind: str | None, split: str | None) -> list[Path]:
    """The data files of a folder whose names mention the split; for train all of them, if no name mentions any."""
    splits = _splits(folder, kind, split)
    wanted = SPLITS.get(split or "train", split)
    is_any = wanted == "train" and not any(splits.values())
    return [path for path, found in splits.items() if is_any or wanted in found]


def _on_the_hub(want: Wanted, path: str, revision: str | None) -> list[Path]:
    def fetch(patterns: Iterable[str]) -> Path:
        return hub_files(path, tuple(patterns), "dataset", revision)

    try:
        card = fetch([CARD])
    except UserError:  # without a network, and only the data is in the cache; if nothing is, the next line raises
        card = fetch(want.data_files or ["*"])
    repository = card.parent.parent  # its files are links from snapshots/COMMIT to blobs
    if patterns := want.data_files or _listed_on_card(want, card):
        return _in_folder(want, fetch(patterns), repository)
    endings = [ending for ending in KINDS if want.kind in (KINDS[ending], None)]
    for part in (f"*{want.split or 'train'}*", "*"):  # so that no other split is fetched where the names mention them
        folder = fetch(f"{part}{ending}{gz}" for ending in endings for gz in ("", ".gz"))
        if found := _in_folder(want, folder, repository):
            return found
    return []


def _listed_on_card(want: Wanted, folder: Path) -> list[str]:
    """The patterns of the files of a split, from the `configs` at the head of a data set's card; empty without one.

    They look like {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}.
    """
    card, name, split = folder / CARD, want.name, want.split or "train"
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    try:
        facts = load_yaml(head[1], str(card)) if head else None
    except UserError:
        facts = None  # a card that only people can read
    configs = facts.get("configs") if isinstance(facts, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    names = [str(config.get("config_name", "default")) for config in configs]
    if name is None and len(configs) > 1 and "default" not in names:
        raise UserError(f"{want.where}: it has several configurations. Name one with name: {', '.join(names)}.")
    if name is not None and name not in names:
        raise UserError(f"{want.where}: no configuration {name} there, only {', '.join(names) or 'unnamed ones'}.")
    if not configs:
        return []
    config = configs[names.index(name or ("default" if "default" in names else names[0]))]
    by_split: dict[str, list[str]] = {}
    for entry in _listed(config.get("data_files")):
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        by_split.setdefault(str(entry.get("split", "train")), []).extend(map(str, _listed(entry.get("path"))))
    if not by_split:
        return [f"{config['data_dir']}/**/*"] if config.get("data_dir") else []
    if split not in by_split:
        raise UserError(f"{want.where}: no split {split} there, only {', '.join(by_split)}. Set split to one.")
    return by_split[split]


def _listed(value: Any) -> list[Any]:
    """A list as it is, nothing for nothing, anything else as the one item of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
