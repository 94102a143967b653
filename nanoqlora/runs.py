"""What surrounds the training loop: its data, its log, its checkpoints. What it leaves behind is in `results.py`.

`train.py` reads without this file; open it to see how a checkpoint becomes whole, or how a resumed run goes on.
"""

import hashlib
import json
import platform
import random
import shutil
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from . import distributed
from .adapter import fill_adapter, read_adapter, save_adapter
from .checkpoint import fingerprint
from .cli import Failed, UserError, read_json, sweep, whole_folder, write_text
from .config import Config, DatasetConfig
from .data import Samples, join
from .data_files import DataFile, find_files, split_and_part
from .model import Llama
from .ops import Segments
from .optim import PartOptimizer, state_kind
from .packing import Plan, plan_steps
from .prepare import Encoding, Reading, prepare_samples
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
    formats = [prompt_format_of(config, dataset, tokenizer) for dataset in (*config.datasets, *config.test_datasets)]
    readings: dict[str, Reading] = {}
    for dataset, prompt_format in zip((*config.datasets, *config.test_datasets), formats, strict=True):
        name = f"{dataset.path}{f', split {dataset.split}' if dataset.split else ''}"
        _, part = split_and_part(dataset.split)
        encoding = Encoding(prompt_format, tokenizer, config.sequence_len, config.excess_length_strategy, part)
        folder = Path(config.dataset_prepared_path)
        name += f" ({len(readings) + 1})" * (name in readings)
        readings[name] = prepare_samples(data_files(dataset), encoding, folder)
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
    return Data(formats[0], samples, held_out, plan, readings)


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
    name = dataset.chat_template or config.chat_template or "tokenizer_default"
    jinja = dataset.chat_template_jinja or config.chat_template_jinja
    if jinja and Path(jinja).is_file():
        jinja = Path(jinja).read_text("utf-8")
    if not jinja and name != "tokenizer_default":
        spare = name.removeprefix("tokenizer_default_fallback_")  # for a tokenizer without a template of its own
        if spare not in CHAT_TEMPLATES:
            known = ", ".join(["tokenizer_default", *CHAT_TEMPLATES])
            raise UserError(f"chat_template is {name}; known are {known}. Or give its text with chat_template_jinja.")
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
        if step and self.path.exists():
            for line in self.path.read_text("utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that was being written when the run was killed
                if row["step"] <= step:
                    self.rows.append(row)
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
            for track in self.trackers:
                track(row)


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
    began: float = field(default_factory=time.time)  # when this process did, in seconds since 1970
    base: str = ""  # `fingerprint` of the base model's weights

    def __post_init__(self) -> None:
        self.base = fingerprint(self.config.base_model, weights=True)


# ------------------------------------------------------------------------------------------------ checkpoints


def plan_fingerprint(samples: Samples, plan: Plan) -> str:
    """A hash of everything that decides which tokens stand in which step."""
    return hashlib.sha256((samples.fingerprint + plan.fingerprint()).encode()).hexdigest()


# What a run cannot change on its way: the scale of what it has learnt, the base below, the groups of the optimizer.
FIXED = ("lora_alpha", "peft_use_rslora", "load_in_4bit", "loraplus_lr_ratio")


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
                save_adapter(run.model, temporary, run.config.base_model)
                torch.save(optimizer_state, temporary / "optimizer.pt")
                state = {"step": step, "plan": plan_fingerprint(run.samples, run.plan), "ranks": run.ranks}
                state |= {"before": run.before, "began": run.began, "optimizer": run.config.optimizer}
                state |= {"steps": len(run.plan), "base": run.base}
                state["fixed"] = {key: getattr(run.config, key) for key in FIXED}
                write_text(temporary / "trainer_state.json", json.dumps(state) + "\n")
        except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, as each of the three writers tells it
            state = [x for values in run.optimizer.state.values() for x in values.values() if torch.is_tensor(x)]
            needed = run.flat.nbytes + sum(x.nbytes for x in state)
            raise Failed(cannot_write(folder, f"checkpoint-{step}", error, needed)) from error
        best = best_step(run.metrics.rows) if run.config.load_best_model_at_end else None
        for old in checkpoints(folder)[: -run.config.save_total_limit]:
            if old.name != f"checkpoint-{best}":
                shutil.rmtree(old, ignore_errors=True)
    distributed.wait_for_all()


def cannot_write(folder: Path, what: str, error: Exception, needed: int = 0) -> str:
    """What to say, and to do, when something in output_dir cannot be written. needed: its bytes, where known."""
    last = (checkpoints(folder) or [None])[-1]
    takes = f"it takes {needed / 1e6:.0f} MB and " if needed else ""
    return (
        f"{folder / what} cannot be written ({error}): {takes}its disk has {shutil.disk_usage(folder).free / 1e6:.0f} "
        f"MB free. {f'{last} is whole' if last else 'There is no checkpoint yet'}. Make room, then go on with "
        f"--auto_resume_from_checkpoints true."
    )


# When a run began in a folder with checkpoints of an earlier one: it must not go on from those.
BEGAN = ".began"


def checkpoints(folder: Path, since: float = 0.0) -> list[Path]:
    """The whole checkpoints in a folder, oldest first, of processes that began then or later."""
    files = {path: path / "trainer_state.json" for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    whole = {path: read_json(file) for path, file in files.items() if file.exists()}
    order = {path: (state.get("began", 0), state["step"]) for path, state in whole.items()}
    return sorted((path for path, (began, _) in order.items() if began >= since), key=order.get)


def find_checkpoint(config: Config, samples: Samples, plan: Plan) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the configuration names, if any, and its trainer_state.json.

    Raises:
        UserError: it is none, or of another run.
    """
    path = Path(config.resume_from_checkpoint) if config.resume_from_checkpoint else None
    if path is None and config.auto_resume_from_checkpoints:
        began = Path(config.output_dir) / BEGAN
        since = float(began.read_text()) if began.exists() else 0.0
        path = [None, *checkpoints(Path(config.output_dir), since)][-1]
    if path is None:
        return None
    if not path.is_dir():
        raise UserError(f"resume_from_checkpoint: {path} is no folder. Name a checkpoint-STEP folder of a run.")
    state = read_json(path / "trainer_state.json")
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
    if state.get("base") not in (None, fingerprint(config.base_model, weights=True)):
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
    folder = Path(run.config.output_dir)
    if run.rank == 0:
        sweep(folder)
    distributed.wait_for_all()
    found = find_checkpoint(run.config, run.samples, run.plan)
    if found is None:
        if run.rank == 0 and checkpoints(folder):
            write_text(folder / BEGAN, f"{run.began}\n")
        run.metrics.go_on_after(0)
        return 0
    path, state = found
    _, adapter = read_adapter(path)
    try:
        where = "cpu" if run.config.shard_optimizer_state else run.device  # of the whole state, before it is cut
        optimizer_state = torch.load(path / "optimizer.pt", map_location=where, weights_only=True)
    except Exception as error:  # reading another file, torch's unpickler fails in any way
        raise UserError(
            f"{path / 'optimizer.pt'}: cannot be read ({error}). Resume from another checkpoint."
        ) from error
    fill_adapter(run.model, adapter, path)
    run.optimizer.load_state_dict(optimizer_state)
    run.metrics.go_on_after(state["step"])
    run.before.update(state.get("before", {}))
    return state["step"]


# ------------------------------------------------------------------------------------------------ the best so far


def best_step(rows: list[dict[str, Any]]) -> int | None:
    """The step after which held-out loss was lowest, of those with an evaluation; the first of equals."""
    scored = [(row["eval_loss"], row["step"]) for row in rows if "eval_loss" in row and row["step"] > 0]
    return min(scored)[1] if scored else None


def reason_to_stop(config: Config, rows: list[dict[str, Any]]) -> str:
    """Why to end before the last step, in words, from the rows of metrics.jsonl; empty: go on."""
    evaluated = [row["step"] for row in rows if "eval_loss" in row and row["step"] > 0]
    patience = config.early_stopping_patience
    if patience and evaluated and len(evaluated) - 1 - evaluated.index(best_step(rows)) >= patience:
        return f"{patience} evaluations without a better one than after step {best_step(rows)}"
    recent = [row["loss"] for row in rows if "loss" in row][-config.loss_watchdog_patience :]
    threshold = config.loss_watchdog_threshold
    if threshold and len(recent) == config.loss_watchdog_patience and min(recent) > threshold:
        return f"the loss was above loss_watchdog_threshold {threshold} {len(recent)} times in a row"
    return ""


def load_best(run: Run, last: int) -> int:
    """Put the adapter of the best evaluation back, where the run asks for it. Returns the step that the model is of."""
    best = best_step(run.metrics.rows) if run.config.load_best_model_at_end else None
    path = Path(run.config.output_dir) / f"checkpoint-{best}"
    if best is None or run.rank or not path.is_dir():
        best = last
    if best != last:
        fill_adapter(run.model, read_adapter(path)[1], path)
    distributed.of_first_rank(run.flat.data)  # which alone has written checkpoints
    return int(distributed.of_first_rank(torch.tensor(best, device=run.device)))


def same_on_all_ranks(config: Config, data: Data, ranks: int) -> None:
    """Stop before anything is loaded if a rank has another configuration, other data or another model than rank 0."""
    if ranks > 1:
        mine = {"configuration": config.to_yaml(), "data": plan_fingerprint(data.samples, data.plan)}
        mine |= {"model files": fingerprint(config.base_model), "host": platform.node()}
        everyone = distributed.everyones_object(mine)
        for rank, theirs in enumerate(everyone):
            different = [kind for kind in mine if kind != "host" and theirs[kind] != everyone[0][kind]]
            if different:
                raise UserError(
                    f"rank {rank} on host {theirs['host']} has other {' and other '.join(different)} than rank 0 on "
                    f"host {everyone[0]['host']}, so the ranks would train on different things. Give every rank the "
                    f"same files and options."
                )
