"""The folder that a run writes to. No run ends another, and one at a time writes there.

    refuse_other_runs    before anything is loaded: the folder holds a run that this one does not resume
    claim                after all checks: lock it; with overwrite_output_dir remove the earlier run's files

Only files that this program writes are removed; a user's own stay. W&B's folder stays too: it may not be synced yet.
Read next: `run/inputs.py`, the data of a run.
"""

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..config.errors import Failed, UserError
from ..config.files import DISK_FULL, free_on_disk, held, real, remove, sweep
from ..config.keys import keys_of
from ..config.schema import Config
from ..gguf.file_types import FILE_TYPES
from ..gguf.modelfile import is_ours
from ..parallel import collectives


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return [path for path in checkpoint_folders(folder).values() if (path / STATE).is_file()]


def what_is_saved(folder: Path) -> str:
    """The newest complete checkpoint, and how to go on from it."""
    complete = checkpoints(folder)
    go_on = "is saved; go on from it with --auto_resume_from_checkpoints true"
    return f"{complete[-1]} {go_on}" if complete else "No checkpoint is saved yet"


LOG, STATE = "metrics.jsonl", "trainer_state.json"
ADAPTER, REPORT = "adapter_model.safetensors", "report.md"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FILES = (ADAPTER, "adapter_config.json", LOG, "Fine-Tuning.png", REPORT, "train.yml", "prompt.json", *TOKENIZER)
OWN_NAMES = "|".join([r"checkpoint-\d+", *map(re.escape, FILES)])
MADE_FROM_IT = [f"{what}-{name.lower()}.gguf" for what in ("model", "adapter") for name in FILE_TYPES]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, up to the first line that is not one: it was being written when the run was killed."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int and row["step"] < 2**53:
                rows.append(row)
                continue
        break
    return rows


def checkpoint_folders(folder: Path) -> dict[int, Path]:
    """The folders checkpoint-STEP, by step in rising order; also those that are cut off."""
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()}
    return dict(sorted(found.items()))


def files_of_run(folder: Path) -> list[Path]:
    """What is there that a run writes. An empty log is nothing: no step was taken."""
    files = [path for name in FILES if (path := folder / name).is_file() and (name != LOG or path.stat().st_size)]
    return [*files, *checkpoint_folders(folder).values()]


def files_made_from_it(folder: Path) -> list[Path]:
    """What merge.py, export_gguf.py and TensorBoard have added: of a run whose adapter is removed they say nothing."""
    merged = [folder / "merged"] if (folder / "merged" / "merge.json").is_file() else []
    events = [folder / "tensorboard"] if [*folder.glob("tensorboard/events.out.tfevents.*")] else []
    texts = sorted((*folder.glob("Modelfile*"), *folder.glob("adapter-*.jinja")))
    ours = [path for path in texts if path.is_file() and is_ours(path)]
    return [*merged, *events, *(folder / name for name in MADE_FROM_IT if (folder / name).is_file()), *ours]


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end there: the report is written last."""
    return (folder / ADAPTER).exists() and (folder / REPORT).exists()


def describe(folder: Path) -> str:
    """What run is there: its steps, whether it has ended, and when it last wrote."""
    files = files_of_run(folder)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(path.stat().st_mtime for path in files)))
    steps = [row["step"] for row in read_log(folder / LOG)] + list(checkpoint_folders(folder))
    kind = "a finished run" if is_finished(folder) else "a run that has not ended"
    what = f"{kind}, {max(steps)} steps of it" if steps else ", ".join(path.name for path in files)
    return f"{what} (last written {written})"


def checkpoint_to_resume(config: Config) -> Path | None:
    """The folder of the checkpoint that the configuration asks to resume; None: begin with the first step.

    Raises:
        UserError: the folder that is named is no checkpoint.
    """
    path = Path(config.resume_from_checkpoint or config.output_dir)
    complete = checkpoints(path)
    if not config.resume_from_checkpoint:
        return complete[-1] if complete and config.auto_resume_from_checkpoints else None
    if not (path / STATE).is_file():
        what = "is no folder" if not path.is_dir() else f"holds no {STATE}" if any(path.iterdir()) else "is empty"
        names = f"It has {', '.join(p.name for p in complete)}: name one of them" if complete else ""
        names = names or "Name a checkpoint-STEP folder of a run, or set auto_resume_from_checkpoints: true"
        raise UserError(f"resume_from_checkpoint {path}: {what}, so it is no complete checkpoint. {names}.")
    return path


def refuse_other_runs(config: Config) -> None:
    """Refuse an output_dir whose run this one does not resume, or in which another run is writing.

    Raises:
        UserError: with what to do instead. Nothing has been touched.
    """
    folder = Path(config.output_dir)
    if not folder.is_dir():
        return
    for key in ("base_model", "lora_model_dir"):
        if getattr(config, key) and real(getattr(config, key)) == real(folder):
            raise UserError(f"output_dir {folder}: is {key} too, and this run would replace its files. Name another.")
    with lock(folder):
        if config.auto_resume_from_checkpoints:
            sweep(folder, OWN_NAMES)  # a checkpoint that was being replaced gets its name again
        _check(config)


def _check(config: Config) -> None:
    """`refuse_other_runs`, with the folder locked."""
    folder = Path(config.output_dir)
    own = folder / "train.yml"
    if own.is_file() and own.read_text("utf-8", "replace").count("\n") < len(keys_of(Config)) / 2:  # not a resolved one
        what = "holds a train.yml that no run has written, and this run would replace it by its own"
        raise UserError(f"output_dir {folder}: {what}. Move the file, or name another output_dir.")
    if taken := [name for name in FILES if (folder / name).is_dir()]:
        raise UserError(f"output_dir {folder}: {taken[0]} is a folder there, and a run writes this file. Name another.")
    files = files_of_run(folder)
    log_alone = {path.name for path in files} <= {LOG}  # killed before its first checkpoint: nothing can resume it
    if not files or _goes_on(config) or (config.auto_resume_from_checkpoints and log_alone):
        return
    if config.overwrite_output_dir:
        removed = {real(path) for path in (*files, *files_made_from_it(folder))}
        for path in inputs_of(config):
            if removed & {real(path), *real(path).parents}:
                raise UserError(f"overwrite_output_dir would remove {path}, which this run reads. Name another folder.")
        return
    resume = "go on with it by --auto_resume_from_checkpoints true or --resume_from_checkpoint "
    ways = [f"{resume}{shlex.quote(str(path))}; or " for path in checkpoints(folder)[-1:]]
    what = f"output_dir {folder}: holds {describe(folder)}, which this run would write over. Choose: {''.join(ways)}"
    others = "name another --output_dir; or give --overwrite_output_dir true, which first removes what that run has"
    raise UserError(f"{what}{others} written.")


def _goes_on(config: Config) -> bool:
    """Whether the run resumes from a checkpoint in its own folder."""
    path = checkpoint_to_resume(config)
    return path is not None and real(path).parent == real(config.output_dir)


def inputs_of(config: Config) -> list[Path]:
    """The files and folders that a run reads, as far as they are on this machine."""
    named = [config.base_model, config.lora_model_dir, config.resume_from_checkpoint, config.chat_template_jinja]
    for dataset in config.all_datasets:
        named += [dataset.path, dataset.chat_template_jinja, *(str(Path(dataset.path) / f) for f in dataset.data_files)]
    return [Path(name) for name in named if name and "\n" not in name and len(name) < 1000]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder: it is free again when this process ends, however it ends. Nothing is written for it.

    Raises:
        UserError: another run holds it.
    """
    with held(folder) as holder:
        if holder:
            raise UserError(f"output_dir {folder}: {holder} is writing there now. Wait for its end, or name another.")
        yield


@contextmanager
def claim(config: Config, rank: int, step: int, say: Callable[..., None]) -> Iterator[None]:
    """Hold output_dir until the run ends, and remove what does not belong to it. Rank 0 does, for all.

    Args:
        step: the step from which a run in this folder resumes; its later checkpoints are of another course.
    """
    folder = Path(config.output_dir)
    with ExitStack() as until_the_end:
        with collectives.together():
            if rank == 0:
                folder.mkdir(parents=True, exist_ok=True)
                until_the_end.enter_context(lock(folder))
                _check(config)  # again: another run may have ended there in the meantime
                sweep(folder, OWN_NAMES)
                if _goes_on(config):
                    removed = [path for number, path in checkpoint_folders(folder).items() if number > step]
                    removed += [path for path in (folder / ADAPTER, folder / REPORT) if path.exists()]
                else:
                    removed = [*files_of_run(folder), *files_made_from_it(folder)]
                for path in removed:
                    remove(path)
                if removed:
                    what = f"of what came after step {step}" if step else "of an earlier run"
                    say(f"{folder}: removed {', '.join(path.name for path in removed)}, {what}")
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL and not str(error.filename).startswith(str(folder)):
                raise
            what = f"{error.filename or folder} cannot be written ({error.strerror}): {free_on_disk(folder)}"
            raise Failed(f"{what}. Free some space. {what_is_saved(folder)}.") from error
