"""A .gguf file on disk and the Modelfile beside it, for a model (`gguf_model.py`) and for an adapter alike.

A file of another program and a Modelfile that the user edited are kept. Read next: `gguf_model.py`.
"""

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..config.errors import UserError
from ..config.files import check_file, check_space, whole_file
from ..data.prompts import PromptFormat
from ..gguf.container import Metadata
from ..gguf.ggml_blocks import FORMATS
from ..gguf.modelfile import Recipe, is_ours, own_name, quoted, write_modelfiles
from ..gguf.reader import read_gguf
from ..gguf.writer import NewTensor, write_gguf
from ..tokenizer.tokenizer import Tokenizer
from ..weights.hub import is_hub_name


def write_file(
    out: Path, metadata: Metadata, tensors: list[NewTensor], recipe: Recipe | None, notes: Sequence[str] = ()
) -> None:
    """Write a .gguf file and its Modelfile, and print a line for each of `notes`.

    Args:
        recipe: what the Modelfile holds; None: no Modelfile can be right.
    Raises:
        UserError: before anything is written, a file of the user's is in the way, or the disk is too small.
    """
    own, is_model, notes = own_name(out), metadata["general.type"][1] == "model", list(notes)
    check_file(out, "--out")
    if not is_ours(own):
        raise UserError(
            f"{own}: is not one that export_gguf.py wrote, or was changed since, and the Modelfile of {out.name} would "
            f"take its place. Rename it, or choose another --out."
        )
    check_space(out, sum(FORMATS[t.ggml_type].num_bytes(math.prod(t.shape)) for t in tensors))
    with whole_file(out) as fresh:
        write_gguf(fresh, metadata, tensors)
        if out.exists() and not is_like_ours(out, metadata):
            names = (out.with_name(f"{out.name}.old{number or ''}") for number in itertools.count())
            os.rename(out, kept := next(name for name in names if not name.exists()))
            print(f"{out}: the file of this name was not written by export_gguf.py and is kept as {kept}")
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")
    if recipe:
        write_modelfiles(out, recipe.text(), is_model)
        if missing := [ascii(stop) for stop in recipe.stops if quoted(stop) is None]:
            notes.append(f"no stop line for {', '.join(missing)}, which a Modelfile cannot hold")
    elif own.exists():
        own.unlink()
        notes.append(f"{own}, of an earlier export, is removed")
    for note in notes:
        print(f"{own}: {note}" if recipe else note)


def is_like_ours(path: Path, metadata: Metadata) -> bool:
    """Whether a file begins as one of ours does, which other programs' files do not."""
    try:
        return list(read_gguf(path).metadata)[:5] == list(metadata)[:5]
    except UserError:
        return False


def name_of(model: str | Path) -> str:
    """The name of a model: its folder, or that of the run which it was merged in."""
    path = Path(model) if is_hub_name(model) else Path(model).resolve()
    name = path.stem if path.suffix == ".gguf" else path.parent.name if path.name == "merged" else path.name
    return name.encode("utf-8", "replace").decode()


def own_folder(path: str | Path) -> Path:
    """Where results go by default: to what was given, of a file beside it, of a hub name to a folder of its name."""
    if is_hub_name(path):
        return Path(Path(path).name)
    return Path(path).parent if Path(path).is_file() else Path(path)


def prompt_format(model: Path, tok: Tokenizer) -> PromptFormat:
    """How the model was trained to be prompted; without prompt.json, as its tokenizer has it."""
    path = model / "prompt.json"
    return PromptFormat.from_json(path.read_text(encoding="utf-8")) if path.is_file() else usual_format(tok)


def usual_format(tok: Tokenizer) -> PromptFormat:
    return PromptFormat(type="chat_template" if tok.chat_template else "completion")
