"""Models and data sets by their hub name, such as NousResearch/Meta-Llama-3-8B.

A name that is no folder here is looked up in the Hugging Face cache; what is missing there is fetched, only the files
that are needed, going on where an interrupted download stopped, and compared with the hash that the hub gives of each.
A model in the cache is used as it is: nobody asks the hub whether there is a newer one.

`huggingface_hub` does the work and is imported only here, only then. Its settings hold: HF_HOME, HF_TOKEN,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..config.errors import UserError, check_regular
from ..config.files import real

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json", "config.json", "prompt.json"),
)
# Not the second copies that some models bring: Mistral's consolidated.safetensors, Meta's original/, *.bin.
MODEL_FILES = (*TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES)
WEIGHTS = (".safetensors", ".pth", ".gguf")


def is_hub_name(path: str | Path) -> bool:
    """Whether this can only be a hub name: owner/name with nothing of that name, or of the owner's, in this folder."""
    name = str(path)
    has_form = len(name) < 200 and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and ".." not in name
    return bool(has_form) and not Path(name).exists() and not Path(name).parent.exists()


def local_path(path: str | Path, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The path itself, or, where it is the hub name of a model, the folder that holds its files.

    Raises:
        UserError: the hub does not give the files, or the folder has a link that leads out of it.
    """
    if is_hub_name(path):
        return hub_files(str(path), patterns)
    path = Path(path)
    if path.is_dir():
        _check_links(path, of_adapter=ADAPTER_FILES[0] in patterns)
    return path


def _check_links(folder: Path, of_adapter: bool) -> None:
    """Refuse links by which a folder that somebody else made would choose which files of this machine are read.

    The hub's cache is made of links to its own blobs. In the folder of a model, weights may lie elsewhere, and other
    files under the same name.
    """
    home = real(folder)
    for file in folder.iterdir():
        check_regular(file)
        if not file.is_symlink():
            continue
        target = real(file)
        is_inside = target.is_relative_to(home) or target.parent == home.parent.parent / "blobs"
        is_shared = not of_adapter and (target.name == file.name or file.suffix in WEIGHTS and target.suffix in WEIGHTS)
        if not is_inside and not is_shared and target.is_file():
            raise UserError(f"{file}: is a link to {target}, out of its folder. Put a copy in its place.")


def hub_files(
    name: str, patterns: Sequence[str], kind: Literal["model", "dataset"] = "model", revision: str | None = None
) -> Path:
    """The folder with those files of a hub repository that match one of the patterns, all of them, complete.

    Args:
        name: owner/name.
        patterns: as the shell's; `*` stands for any characters, `/` too.
        revision: branch, tag or commit; None: main.
    Returns:
        A folder of the cache, to be read and never written to. A pattern that matches nothing is no error.
    Raises:
        UserError: neither in the cache nor to be had, with what to do about it.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise UserError(f"{kind} {name}: no such folder here. For the hub run: pip install huggingface_hub.") from error
    where: dict[str, Any] = {"repo_id": name, "repo_type": kind, "revision": revision}
    wanted = where | {"allow_patterns": list(patterns)}
    try:
        hub.get_cached_repo_tree(**where)  # without its list of files nobody knows whether a cached copy is complete
        return Path(hub.snapshot_download(**wanted, local_files_only=True))
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        pass
    try:
        try:
            fetched = [file.filename for file in hub.snapshot_download(**wanted, dry_run=True) if file.will_download]
        except hub.errors.DryRunError:  # no hub: what follows gives a copy with no list of its files, or the reason
            fetched = []
        folder = Path(hub.snapshot_download(**wanted))
    except Exception as error:  # the hub's client has many, of three libraries; what they mean to a user is few
        raise UserError(f"{kind} {name}: {_explain(error, name, kind, patterns, revision)}") from error
    for file in fetched:
        _check(folder / file)
    return folder


def _check(path: Path) -> None:
    """Compare a fetched file with its hash, which is the name of what the cache links it to; drop it if they differ.

    Large files are named by their SHA-256, small ones as git names them: SHA-1 over "blob", the size, a zero byte
    and the contents.
    """
    if not path.is_symlink():
        return  # a file system without links, where the cache keeps no hash
    blob = path.parent / path.readlink()
    is_large = re.fullmatch("[0-9a-f]{64}", blob.name)
    start = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    with open(blob, "rb") as file:
        digest = hashlib.file_digest(file, "sha256" if is_large else lambda: start)
    if digest.hexdigest() != blob.name:
        path.unlink()
        blob.unlink()
        raise UserError(f"{path}: what was fetched has another hash than the hub's file, so it is removed. Run again.")


def _explain(error: Exception, name: str, kind: str, patterns: Sequence[str], revision: str | None) -> str:
    """What happened and what to do."""
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    log_in = "run 'hf auth login' or set HF_TOKEN."
    if isinstance(error, GatedRepoError):  # a kind of the next one
        return f"its owner asks you to accept its terms. Accept them on its page of the hub, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        what = "no such folder here, and the hub has no public repository of that name"
        return f"{what}. Check the name; for a private one {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return "the hub's repository has no such revision. Check its name."
    quoted = (shlex.quote(text) if "'" in text else f"'{text}'" for text in patterns)
    options = [f"--repo-type {kind}"] * (kind != "model")
    options += [f"--revision {shlex.quote(revision)}"] if revision else []
    command = " ".join(["hf download", name, *options, *(f"--include {text}" for text in quoted)])
    found = f"not in the Hugging Face cache, and fetching it failed ({str(error).splitlines()[0]})"
    if is_offline_mode():
        found = "not complete in the Hugging Face cache, and HF_HUB_OFFLINE forbids to fetch it"
    return f"no such folder here, {found}. Where there is a network, run: {command}"
