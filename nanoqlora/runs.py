"""What surrounds the training loop: its data, its log, its checkpoints. What it leaves behind is in `results.py`.

`train.py` reads without this file; open it to see how a checkpoint becomes whole, or how a resumed run goes on.
"""

import hashlib
import json
import math
import platform
import random
import shutil
import sys
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from . import distributed
from .adapter import fill_adapter, save_adapter
from .adapter_files import Trained, read_adapter
from .checkpoint import fingerprint, open_weights
from .cli import Failed, UserError, read_json, remove, whole_folder, write_text
from .config import Config, DatasetConfig
from .config_rules import template_in_force
from .data import Samples, join
from .data_files import DataFile, find_files, split_and_part
from .model import Llama
from .ops import Segments
from .optim import PartOptimizer, load_state, state_kind, state_problem
from .output_dir import STATE, checkpoint_folders, checkpoint_to_resume, read_log
from .packing import Plan, plan_steps
from .prepare import Encoding, InvalidRows, Reading, prepare_samples
from .prompts import CHAT_TEMPLATES, Frame, PromptFormat
from .sharding import BlockStore
from .tokenizer import Tokenizer, load_tokenizer

# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Data:
    """The run's samples, its plan, and how rows became tokens. `readings` has an entry for every file."""

    prompt_format: PromptFormat  # of the first data set: what the adapter is talked to with
    samples: Samples
    held_out: Samples
    plan: Plan
    readings: dict[str, Reading]


def prepare_data(config: Config, tokenizer: Tokenizer, ranks: int) -> Data:
    """Read and tokenise all data of a run, set evaluation rows aside, and plan every step."""
    readings: dict[str, Reading] = {}
    invalid: list[InvalidRows] = []
    for dataset in (*config.datasets, *config.test_datasets):
        name = f"{dataset.path}{f', split {dataset.split}' if dataset.split else ''}"
        encoding = encoding_of(config, dataset, tokenizer)
        name += f" ({len(readings) + 1})" * (name in readings)
        try:
            readings[name] = prepare_samples(data_files(dataset), encoding, Path(config.dataset_prepared_path))
        except InvalidRows as error:
            invalid.append(error)
    if invalid:
        advice = " To go on without such rows, write skip_invalid_rows: true."
        raise UserError(" ".join(map(str, invalid)) + advice * (not any(error.are_all for error in invalid)))
    parts = [reading.samples for reading in readings.values()]
    samples, held_out = join(parts[: len(config.datasets)]), join(parts[len(config.datasets) :])
    if config.val_set_size:
        size = config.val_set_size
        count = round(size * len(samples)) if size < 1 else int(size)
        if not 0 < count < len(samples):
            raise UserError(
                f"val_set_size is {size}, which takes {count} of {len(samples)} samples; both sides need at least one. "
                f"Set a share between 0 and 1, or a smaller count."
            )
        order = array("I", range(len(samples)))
        random.Random(f"{config.seed} validation").shuffle(order)
        chosen = np.zeros(len(samples), bool)
        chosen[np.array(order[:count])] = True
        samples, held_out = samples.take(np.flatnonzero(~chosen)), samples.take(np.flatnonzero(chosen))
    plan = plan_steps(
        samples.lengths,
        rows_per_step=config.micro_batch_size * config.gradient_accumulation_steps * ranks,
        capacity=config.sequence_len,
        packing=config.sample_packing,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        shuffle=config.shuffle_merged_datasets,
    )
    return Data(prompt_format_of(config, config.datasets[0], tokenizer), samples, held_out, plan, readings)


def encoding_of(config: Config, dataset: DatasetConfig, tokenizer: Tokenizer) -> Encoding:
    """How the rows of a data set of a run become samples."""
    _, part = split_and_part(dataset.split)
    return Encoding(
        prompt_format_of(config, dataset, tokenizer),
        tokenizer,
        config.sequence_len,
        config.excess_length_strategy,
        part,
        config.skip_invalid_rows,
    )


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of the base model, with the run's special tokens in place of its own."""
    tokenizer = load_tokenizer(config.base_model).with_special_tokens(
        bos_token=config.special_tokens.bos_token,
        eos_token=config.special_tokens.eos_token,
        pad_token=config.special_tokens.pad_token,
        unk_token=config.special_tokens.unk_token,
        additional_special_tokens=config.special_tokens.additional_special_tokens,
    )
    for key in ("tokens", "eot_tokens"):
        for text in getattr(config, key):
            tokenizer.id_of_special(text, key)
    return tokenizer.with_special_tokens(config.tokens)


def data_files(dataset: DatasetConfig) -> list[DataFile]:
    names = ("ds_type", "data_files", "name", "revision")
    split, _ = split_and_part(dataset.split)
    return find_files(dataset.path, split=split, **{name: getattr(dataset, name) for name in names})


def prompt_format_of(config: Config, dataset: DatasetConfig, tokenizer: Tokenizer) -> PromptFormat:
    """The prompt format of a data set, with its chat template written out."""
    part, name = template_in_force(config, dataset)
    jinja = None
    if name == "jinja":
        jinja = _template_text(part.chat_template_jinja)
    elif name != "tokenizer_default":
        spare = name.removeprefix("tokenizer_default_fallback_")  # for a tokenizer without a template of its own
        if spare not in CHAT_TEMPLATES:
            raise UserError(
                f"chat_template is {name}; known are {', '.join(['tokenizer_default', *CHAT_TEMPLATES])}. Most models "
                "bring their own, which is tokenizer_default. For any other write chat_template: jinja, and its text "
                "or the path of a file with it as chat_template_jinja."
            )
        jinja = CHAT_TEMPLATES[spare] if spare == name else tokenizer.chat_template or CHAT_TEMPLATES[spare]
    prompt_format = replace(row_format(dataset), chat_template=jinja, train_on_inputs=config.train_on_inputs)
    if dataset.type != "chat_template":
        return prompt_format
    if not prompt_format.jinja(tokenizer):
        raise UserError(
            f"data {dataset.path}: type is chat_template and the model brings no chat template, so a conversation "
            f"cannot be written as text. Set chat_template to one of {', '.join(CHAT_TEMPLATES)}."
        )
    prompt_format = prompt_format.for_tokenizer(tokenizer)
    if config.default_system_message:  # as a part of the template, whoever talks to the model has it too
        system = json.dumps([{"role": "system", "content": config.default_system_message}], ensure_ascii=False)
        start = f"{{% set messages = {system} + messages %}}"
        start = f"{{% if not messages or messages[0]['role'] != 'system' %}}{start}{{% endif %}}"
        prompt_format = replace(prompt_format, chat_template=start + prompt_format.chat_template)
    return prompt_format


def _template_text(given: str) -> str:
    """The text of a template that is given as such, in braces or lines, or as the path of a file."""
    if "{" in given or "\n" in given.strip():
        return given
    path = Path(given.strip()).expanduser()
    try:
        return path.read_text("utf-8")
    except FileNotFoundError as error:
        raise UserError(
            f"chat_template_jinja: no such file {path}. It is one line without braces, so it is taken for a path: "
            "without the template no conversation can be written. Correct it, or write the template's text."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template_jinja: {path} cannot be read ({error}). Name a text file in UTF-8.") from error


def row_format(dataset: DatasetConfig) -> PromptFormat:
    """What a data set's own keys say of its rows."""
    is_custom = not isinstance(dataset.type, str)
    return PromptFormat(
        type="custom" if is_custom else dataset.type,
        frame=Frame(**asdict(dataset.type)) if is_custom else None,
        roles_to_train=dataset.roles_to_train,
        train_on_eos=dataset.train_on_eos,
        field=dataset.field,
        field_messages=dataset.field_messages,
        field_tools=dataset.field_tools,
        field_system=dataset.field_system,
        field_instruction=dataset.field_instruction or "",
        field_output=dataset.field_output or "",
        message_field_training=dataset.message_field_training or "",
        message_property_mappings=dataset.message_property_mappings,
        roles=dataset.roles,
    )


# ------------------------------------------------------------------------------------------------ log


class Metrics:
    """metrics.jsonl: one object a line, each step once, also after a resume. Only rank 0 writes."""

    def __init__(self, path: Path, writes: bool) -> None:
        self.path, self.writes = path, writes
        self.rows: list[dict[str, Any]] = []
        self.trackers: list[Callable[[dict[str, Any]], None]] = []  # that want each row too

    def go_on_after(self, step: int) -> None:
        """Keep the lines up to `step` of an earlier run in the same folder, none for 0."""
        self.rows = [row for row in read_log(self.path) if step and row["step"] <= step]
        if self.writes:
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.writes:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            except OSError as error:
                raise Failed(cannot_write(self.path.parent, self.path.name, error)) from error
            for track in [*self.trackers]:
                try:
                    track(row)
                except Exception as error:  # a disk, a network, a service: the run is worth more than its curve
                    self.trackers.remove(track)
                    print(f"warning: {track.__name__} failed ({error}) and gets no more rows", file=sys.stderr)


@dataclass
class Progress:
    """What early stopping and the best evaluation depend on: a part of every checkpoint."""

    best_step: int = 0  # the first step of the lowest held-out loss; 0: none was evaluated
    best_loss: float = math.nan
    since_best: int = 0  # evaluations after that one
    high: int = 0  # logged losses in a row above the watchdog's threshold

    def evaluated(self, step: int, loss: float) -> None:
        """Held-out loss after `step`; the one before the first step is none of the run's."""
        if step and not loss >= self.best_loss and not (self.best_step and math.isnan(loss)):
            self.best_step, self.best_loss, self.since_best = step, loss, 0
        else:
            self.since_best += step > 0

    def logged(self, loss: float, threshold: float | None) -> None:
        self.high = self.high + 1 if threshold and loss > threshold else 0

    def reason_to_stop(self, config: Config) -> str:
        """Why to end before the last step, in words; empty: go on."""
        patience = config.early_stopping_patience
        if patience and self.since_best >= patience:
            return f"{self.since_best} evaluations without a better one than after step {self.best_step}"
        if config.loss_watchdog_threshold and self.high >= config.loss_watchdog_patience:
            threshold = config.loss_watchdog_threshold
            return f"the loss was above loss_watchdog_threshold {threshold} {self.high} times in a row"
        return ""


# ------------------------------------------------------------------------------------------------ the run


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    rank: int
    ranks: int
    device: torch.device
    model: Llama
    body: Callable[[torch.Tensor, Segments], torch.Tensor]  # model.model, or the same from recorded graphs
    samples: Samples
    held_out: Samples
    plan: Plan
    flat: torch.nn.Parameter  # every trained value, and its gradient
    optimizer: torch.optim.Optimizer | PartOptimizer
    metrics: Metrics
    store: BlockStore | None  # where the base is spread over the ranks
    before: dict[str, Any] = field(default_factory=dict)  # what the untrained model could do, for the report
    progress: Progress = field(default_factory=Progress)
    base: str = ""  # `fingerprint` of the base model's weights

    def __post_init__(self) -> None:
        self.base = fingerprint(open_weights(self.config.base_model))

    @property
    def trained(self) -> Trained:
        """What an adapter keeps of its training."""
        return Trained(self.config.load_in_4bit, self.model.model.embed_tokens.weight.dtype, self.base)


# ------------------------------------------------------------------------------------------------ checkpoints


def plan_fingerprint(samples: Samples, plan: Plan) -> str:
    """A hash of everything that decides which tokens stand in which step."""
    return hashlib.sha256((samples.fingerprint + plan.fingerprint()).encode()).hexdigest()


# What a run cannot change on its way: size and scale of what it has learnt, base below, groups of the optimizer.
FIXED = ("lora_r", "lora_alpha", "peft_use_rslora", "load_in_4bit", "loraplus_lr_ratio")


def save_checkpoint(run: Run, step: int) -> None:
    """Write checkpoint-STEP whole: adapter, optimizer state and step; then drop the oldest ones.

    The data order, the schedule and the dropout masks are functions of the seed and the step, so nothing else is
    needed to go on bit for bit.
    """
    optimizer_state = run.optimizer.state_dict()  # to which every rank may have to add its part
    if run.rank == 0:
        folder = Path(run.config.output_dir)
        try:
            with whole_folder(folder / f"checkpoint-{step}") as temporary:
                save_adapter(run.model, temporary, run.config.base_model, run.trained)
                torch.save(optimizer_state, temporary / "optimizer.pt")
                state = {"step": step, "plan": plan_fingerprint(run.samples, run.plan), "ranks": run.ranks}
                state |= {"before": run.before, "optimizer": run.config.optimizer, "base_fingerprint": run.base}
                state |= {"steps": len(run.plan), "progress": asdict(run.progress)}
                state["fixed"] = {key: getattr(run.config, key) for key in FIXED}
                write_text(temporary / "trainer_state.json", json.dumps(state) + "\n")
        except (OSError, SafetensorError, RuntimeError) as error:
            if not is_disk_error(error):
                raise
            state = [x for values in run.optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
            needed = run.flat.nbytes + sum(x.nbytes for x in state)
            raise Failed(cannot_write(folder, f"checkpoint-{step}", error, needed)) from error
        best = run.progress.best_step if run.config.load_best_model_at_end else None
        for old in checkpoints(folder)[: -run.config.save_total_limit]:
            if old.name != f"checkpoint-{best}":
                remove(old)
    distributed.wait_for_all()


def is_disk_error(error: Exception) -> bool:
    """Whether a file could not be written, as each of the three writers says it. Whatever else is a fault of ours."""
    signs = {SafetensorError: ("I/O error",), RuntimeError: ("inline_container", "PytorchStreamWriter", "iostream")}
    return isinstance(error, OSError) or any(sign in str(error) for sign in signs.get(type(error), ()))


def cannot_write(folder: Path, what: str, error: Exception, needed: int = 0) -> str:
    """What to say, and to do, when something in output_dir cannot be written. needed: its bytes, where known."""
    last = (checkpoints(folder) or [None])[-1]
    takes = f"it takes {needed / 1e6:.0f} MB and " if needed else ""
    return (
        f"{folder / what} cannot be written ({error}): {takes}its disk has {shutil.disk_usage(folder).free / 1e6:.0f} "
        f"MB free. {f'{last} is whole' if last else 'There is no checkpoint yet'}. Make room, then go on with "
        f"--auto_resume_from_checkpoints true."
    )


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return [path for path in checkpoint_folders(folder).values() if (path / STATE).is_file()]


# What trainer_state.json holds, those of older versions in parts.
STATE_TYPES = {"step": int, "plan": str, "steps": int, "base": str, "optimizer": str}
STATE_TYPES |= {"fixed": dict, "before": dict, "progress": dict}


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint.

    Raises:
        UserError: it does not have the shape that `save_checkpoint` gives it.
    """
    state = read_json(path / STATE)
    wrong = [key for key, kind in STATE_TYPES.items() if key in state and type(state[key]) is not kind]
    wrong += [key for key in ("step", "plan") if key not in state]
    before, progress = state.get("before"), state.get("progress")
    if before and not wrong:
        numbers = all(type(before.get(key)) is float for key in ("loss", "plain_loss"))
        answers = before.get("answers")
        is_right = numbers and isinstance(answers, list) and all(isinstance(text, str) for text in answers)
        wrong += [] if is_right else ["before"]
    if progress and not wrong:
        kinds = {name: type(value) for name, value in asdict(Progress()).items()}
        wrong += [] if {name: type(value) for name, value in progress.items()} == kinds else ["progress"]
    if wrong or state["step"] < 1:
        key = (wrong or ["step"])[0]
        raise UserError(
            f"{path / STATE}: {key} is {state.get(key)!r}, which is not what a checkpoint has there, so it is damaged. "
            f"Resume from another checkpoint."
        )
    return state


def find_checkpoint(config: Config, samples: Samples, plan: Plan) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the configuration names, if any, and its trainer_state.json.

    Raises:
        UserError: it is none, or of another run.
    """
    path = checkpoint_to_resume(config)
    if path is None:
        return None
    state = read_state(path)
    if state.get("steps", len(plan)) != len(plan):
        raise UserError(
            f"{path}: its run has {state['steps']} steps, this one {len(plan)}, so the learning rate would not be the "
            f"one it has come with. Resume with the same max_steps and num_epochs, or start anew with "
            f"lora_model_dir: {path}."
        )
    if state.get("plan") != plan_fingerprint(samples, plan):
        raise UserError(
            f"{path}: its run had other data, another seed or other batches, so going on would train on the wrong "
            f"samples. Resume with the same configuration, or start anew with lora_model_dir: {path}."
        )
    if state.get("base_fingerprint") not in (None, fingerprint(open_weights(config.base_model))):
        raise UserError(
            f"{path}: its run trained over other weights than those in base_model {config.base_model} now, and what it "
            f"has learnt belongs to them. Give the same base_model, or start anew with lora_model_dir: {path}."
        )
    saved = state.get("optimizer", config.optimizer)
    if state_kind(saved) != state_kind(config.optimizer):
        raise UserError(
            f"{path}: its optimizer was {saved}, whose state ({state_kind(saved)}) {config.optimizer} cannot take up. "
            f"Resume with optimizer: {saved}, or start anew with lora_model_dir: {path}."
        )
    for key, value in state.get("fixed", {}).items():
        if value != getattr(config, key):
            raise UserError(
                f"{path}: its run had {key}: {value}, this one has {getattr(config, key)}: what was learnt would mean "
                f"something else. Resume with {key}: {value}, or start anew."
            )
    return path, state


def load_checkpoint(run: Run) -> int:
    """Go on from the checkpoint that the configuration names, if any. Returns the number of steps already taken."""
    found = find_checkpoint(run.config, run.samples, run.plan)
    if found is None:
        return 0
    path, state = found
    _, adapter = read_adapter(path)
    file = path / "optimizer.pt"
    try:
        where = "cpu" if run.config.shard_optimizer_state else run.device  # of the whole state, before it is cut
        optimizer_state = torch.load(file, map_location=where, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # reading another file, torch's unpickler fails in any way
        raise UserError(f"{file}: cannot be read ({error}). Resume from another checkpoint.") from error
    if problem := state_problem(run.optimizer, optimizer_state):
        raise UserError(
            f"{file}: {problem}, so other layers were trained, or it is damaged. Resume with the same configuration."
        )
    fill_adapter(run.model, adapter, path)
    load_state(run.optimizer, optimizer_state)
    run.before.update(state.get("before", {}))
    if "progress" in state:
        run.progress = Progress(**state["progress"])
    return state["step"]


def load_best(run: Run, last: int) -> int:
    """Put the adapter of the best evaluation back, where the run asks for it. Returns the step that the model is of."""
    best = run.progress.best_step if run.config.load_best_model_at_end else 0
    path = Path(run.config.output_dir) / f"checkpoint-{best}"
    if best and not run.rank and not path.is_dir():
        print(f"load_best_model_at_end: the best step, {best}, has no {path}; the adapter of step {last} is kept")
    if not best or run.rank or not path.is_dir():
        best = last
    if best != last:
        fill_adapter(run.model, read_adapter(path)[1], path)
    distributed.of_first_rank(run.flat.data)  # which alone has written checkpoints
    return int(distributed.of_first_rank(torch.tensor(best, device=run.device)))


def same_on_all_ranks(config: Config, data: Data, ranks: int) -> None:
    """Stop before anything is loaded if a rank has another configuration, other data or another model than rank 0."""
    if ranks > 1:
        mine = {"configuration": config.to_yaml(), "data": plan_fingerprint(data.samples, data.plan)}
        weights = open_weights(config.base_model)
        files = json.dumps([fingerprint(weights), weights.config], sort_keys=True)
        mine |= {"model files": files, "host": platform.node()}
        everyone = distributed.everyones_object(mine)
        for rank, theirs in enumerate(everyone):
            different = [kind for kind in mine if kind != "host" and theirs[kind] != everyone[0][kind]]
            if different:
                raise UserError(
                    f"rank {rank} on host {theirs['host']} has other {' and other '.join(different)} than rank 0 on "
                    f"host {everyone[0]['host']}, so the ranks would train on different things. Give every rank the "
                    f"same files and options."
                )
