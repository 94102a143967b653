"""What a data set is called -> its files: a file, a folder, a glob, or a name on the hub.

Of a folder, and of a data set on the hub, the files of one split are taken. The card of a data set (README.md) may list
them; else the names of the files decide, as in `data/train-00000-of-00002.parquet`; else all files are the split
`train`.
Left out: data sets that are made by a program. Read next: data/rows.py, which reads the files.
"""

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..config.errors import UserError
from ..weights.hub import hub_files, is_hub_name

KINDS = {  # file name ending -> how it is read; `.gz` may follow
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
}
CARD = "README.md"
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
    path = Path(path).expanduser() if str(path).startswith("~") else path
    data_files = tuple(os.path.expanduser(file) for file in data_files)
    if Path(path).is_file():
        return [_data_file(Path(path), kind)]
    if glob.has_magic(str(path)):
        found = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    elif Path(path).is_dir():
        found = _in_folder(where, Path(path), Path(path), data_files, kind, split, name)
    elif data_files and all(Path(file).is_file() for file in data_files):
        found = [Path(file) for file in data_files]  # then path is only a name, as in Axolotl's `path: json`
    elif is_hub_name(path):
        found = _on_the_hub(str(path), data_files, kind, split, name, revision)
    else:
        raise UserError(
            f"{where}: no such file. Give the path of a .jsonl, .json, .csv, .parquet, .arrow or .txt file, a folder "
            "or a glob of such files, or the name of a data set on the hub."
        )
    if not found:
        wanted = (
            ", ".join(data_files) or f"{kind or 'json, csv, parquet, arrow or text'} of the split {split or 'train'}"
        )
        there = ", ".join(sorted(set().union(*_splits(Path(path), kind, None).values()))) if Path(path).is_dir() else ""
        there = f"; its files are of the split {there}" if there and not data_files else ""
        raise UserError(
            f"{where}: no file found there ({wanted}{there}). Name the file itself, or check data_files, ds_type and "
            "split."
        )
    files = [_data_file(file, kind) for file in sorted(set(found))]
    if len(kinds := sorted({file.kind for file in files})) > 1:
        raise UserError(f"{where}: files of several kinds ({', '.join(kinds)}). Say which to read with ds_type.")
    return files


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _data_file(path: Path, kind: str | None) -> DataFile:
    kind = kind or KINDS.get(_ending(path))
    if kind is None:
        raise UserError(
            f"data {path}: {_ending(path) or 'no ending'} tells no kind of file. Set ds_type to json, csv, parquet, "
            "arrow or text."
        )
    return DataFile(path, kind)


def _in_folder(
    where: str,
    folder: Path,
    inside: Path,
    data_files: tuple[str, ...],
    kind: str | None,
    split: str | None,
    name: str | None,
) -> list[Path]:
    """The files of a split: those that the user lists, else the card, else their names.

    A folder may come from anybody. So what its card lists, and where its links lead to, has to lie in `inside`.
    """
    if data_files:
        return _matching(where, folder, data_files)
    listed = _listed_on_card(where, folder, split, name)
    found = _matching(where, folder, listed) if listed else _by_name(folder, kind, split)
    for path in found:
        if not path.resolve().is_relative_to(inside.resolve()):
            raise UserError(
                f"{where}: {path} leads out of the folder, to {path.resolve()}. The folder may not choose files from "
                "elsewhere: name that file itself if you mean it."
            )
    return found


def _matching(where: str, folder: Path, patterns: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for pattern in patterns:
        if "\0" in pattern:
            raise UserError(f"{where}: {pattern!r} names no file. Correct data_files.")
        names = glob.glob(os.path.join(glob.escape(str(folder)), pattern), recursive=True, include_hidden=True)
        found += [Path(name) for name in names if Path(name).is_file()]
    return found


def _splits(folder: Path, kind: str | None, split: str | None) -> dict[Path, set[str]]:
    """The data files of a folder, each with the splits that its name mentions."""
    splits: dict[Path, set[str]] = {}
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        is_data = KINDS.get(_ending(path)) == kind if kind else _ending(path) in KINDS
        is_own = path.name in NOT_DATA or path.suffix == ".arrow" and path.name.startswith(CACHED)
        if is_data and not is_own and path.is_file() and not any(part[0] == "." for part in parts):
            words = re.split(r"[^a-z]+", "/".join(parts).lower())
            splits[path] = {SPLITS.get(word, word) for word in words if word in SPLITS or word == split}
    return splits


def _by_name(folder: Path, kind: str | None, split: str | None) -> list[Path]:
    """The data files of a folder whose names mention the split; for train all of them, if no name mentions any."""
    splits = _splits(folder, kind, split)
    wanted = SPLITS.get(split or "train", split)
    is_any = wanted == "train" and not any(splits.values())
    return [path for path, found in splits.items() if is_any or wanted in found]


def _on_the_hub(
    path: str, data_files: tuple[str, ...], kind: str | None, split: str | None, name: str | None, revision: str | None
) -> list[Path]:
    def fetch(patterns: Iterable[str]) -> Path:
        return hub_files(path, tuple(patterns), "dataset", revision)

    try:
        card = fetch([CARD])
    except UserError:  # without a network, and only the data is in the cache; if nothing is, the next line raises
        card = fetch(data_files or ["*"])
    where, repository = f"data {path}", card.parent.parent  # whose files are links from snapshots/COMMIT to blobs
    if patterns := data_files or _listed_on_card(where, card, split, name):
        return _in_folder(where, fetch(patterns), repository, data_files, kind, split, name)
    endings = [ending for ending in KINDS if KINDS[ending] == kind or not kind]
    for part in (f"*{split or 'train'}*", "*"):  # so that no other split is fetched where the names mention them
        folder = fetch(f"{part}{ending}{gz}" for ending in endings for gz in ("", ".gz"))
        if found := _in_folder(where, folder, repository, (), kind, split, name):
            return found
    return []


def _listed_on_card(where: str, folder: Path, split: str | None, name: str | None) -> list[str]:
    """The patterns of the files of a split, from the `configs` at the head of a data set's card; empty without one.

    They look like {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}.
    """
    card = folder / CARD
    head = re.match(r"---\s*\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL) if card.is_file() else None
    try:
        facts = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):
        facts = None  # a card that only people can read
    configs = facts.get("configs") if isinstance(facts, dict) else None
    configs = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
    names = [str(config.get("config_name", "default")) for config in configs]
    if name is None and len(configs) > 1 and "default" not in names:
        raise UserError(f"{where}: it has several configurations. Name one with name: {', '.join(names)}.")
    if name is not None and name not in names:
        raise UserError(f"{where}: no configuration {name} there, only {', '.join(names) or 'unnamed ones'}.")
    if not configs:
        return []
    config = configs[names.index(name or ("default" if "default" in names else names[0]))]
    by_split: dict[str, list[str]] = {}
    for entry in _listed(config.get("data_files")):
        entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
        by_split.setdefault(str(entry.get("split", "train")), []).extend(map(str, _listed(entry.get("path"))))
    if not by_split:
        return [f"{config['data_dir']}/**/*"] if config.get("data_dir") else []
    if (split or "train") not in by_split:
        raise UserError(f"{where}: no split {split or 'train'} there, only {', '.join(by_split)}. Set split to one.")
    return by_split[split or "train"]


def _listed(value: Any) -> list[Any]:
    """A list as it is, nothing for nothing, anything else as the one item of a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
