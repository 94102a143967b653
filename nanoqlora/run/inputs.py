"""The data of a run: its tokenizer, its prompt formats, its samples and the plan of its steps."""

import json
import platform
import random
from array import array
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config.errors import UserError
from ..config.files import read_text
from ..config.rules import template_in_force
from ..config.schema import Config, DatasetConfig
from ..config.splits import split_and_part
from ..data.batches import Samples, join
from ..data.files import DataFile, find_files
from ..data.packing import BatchSchedule, schedule_batches
from ..data.prepare import Encoding, InvalidRows, Reading, prepare_samples
from ..data.prompts import CHAT_TEMPLATES, PromptFormat
from ..data.row_format import Frame
from ..parallel import collectives
from ..tokenizer.tokenizer import Tokenizer, load_tokenizer
from ..weights.checkpoint import fingerprint, open_weights
from .state import plan_fingerprint


@dataclass(frozen=True)
class Data:
    """The run's samples, its plan, and how rows became tokens. `readings` has an entry for every file."""

    prompt_format: PromptFormat  # of the first data set: what the adapter is talked to with
    samples: Samples
    held_out: Samples
    plan: BatchSchedule
    readings: dict[str, Reading]


def prepare_data(config: Config, tokenizer: Tokenizer, ranks: int) -> Data:
    """Read and tokenise all data of a run, set evaluation rows aside, and plan every step."""
    readings: dict[str, Reading] = {}
    invalid: list[InvalidRows] = []
    for dataset in config.all_datasets:
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
        samples, held_out = split_held_out(samples, config.val_set_size, config.seed)
    plan = schedule_batches(
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


def split_held_out(samples: Samples, size: float, seed: int) -> tuple[Samples, Samples]:
    """Training and evaluation samples. size: share below 1, or count, of the latter."""
    count = round(size * len(samples)) if size < 1 else int(size)
    if not 0 < count < len(samples):
        found = f"{count} of {len(samples)} samples; both sides need at least one"
        raise UserError(f"val_set_size is {size}, which takes {found}. Set a share below 1, or a smaller count.")
    order = array("I", range(len(samples)))
    random.Random(f"{seed} validation").shuffle(order)
    chosen = np.zeros(len(samples), bool)
    chosen[np.array(order[:count])] = True
    return samples.take(np.flatnonzero(~chosen)), samples.take(np.flatnonzero(chosen))


def encoding_of(config: Config, dataset: DatasetConfig, tokenizer: Tokenizer) -> Encoding:
    """How the rows of a data set of a run become samples."""
    _, part = split_and_part(dataset.split)
    lengths = config.sequence_len, config.excess_length_strategy
    return Encoding(prompt_format_of(config, dataset, tokenizer), tokenizer, *lengths, part, config.skip_invalid_rows)


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer of the base model, with the run's special tokens in place of its own."""
    tokenizer = load_tokenizer(config.base_model).with_special_tokens(**config.special_tokens.model_dump())
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
        jinja = part.chat_template_jinja or ""
        if "{" not in jinja and "\n" not in jinja.strip():
            advice = "One line without braces is taken for a path. Correct it, or write the template's text"
            jinja = read_text(Path(jinja.strip()).expanduser(), advice, "chat_template_jinja: ")
    elif name != "tokenizer_default":
        spare = name.removeprefix("tokenizer_default_fallback_")  # for a tokenizer without a template of its own
        if spare not in CHAT_TEMPLATES:
            known = ", ".join(["tokenizer_default", *CHAT_TEMPLATES])
            advice = "For another write chat_template: jinja, and its text or a file's path as chat_template_jinja"
            raise UserError(f"chat_template is {name}; known are {known}. {advice}.")
        jinja = CHAT_TEMPLATES[spare] if spare == name else tokenizer.chat_template or CHAT_TEMPLATES[spare]
    prompt_format = replace(row_format(dataset), chat_template=jinja, train_on_inputs=config.train_on_inputs)
    if dataset.type != "chat_template":
        return prompt_format
    if not prompt_format.jinja(tokenizer):
        what = "type is chat_template and the model brings no chat template"
        raise UserError(f"data {dataset.path}: {what}. Set chat_template to one of {', '.join(CHAT_TEMPLATES)}.")
    prompt_format = prompt_format.for_tokenizer(tokenizer)
    if config.default_system_message:  # as a part of the template, whoever talks to the model has it too
        system = json.dumps([{"role": "system", "content": config.default_system_message}], ensure_ascii=False)
        start = f"{{% set messages = {system} + messages %}}"
        start = f"{{% if not messages or messages[0]['role'] != 'system' %}}{start}{{% endif %}}"
        prompt_format = replace(prompt_format, chat_template=f"{start}{prompt_format.chat_template}")
    return prompt_format


def row_format(dataset: DatasetConfig) -> PromptFormat:
    """What a data set's own keys say of its rows."""
    frame = None if isinstance(dataset.type, str) else Frame(**dataset.type.model_dump())
    names = {field.name for field in fields(PromptFormat)} - {"type", "chat_template"}
    own: dict[str, Any] = {name: x for name, x in dataset.model_dump(include=names).items() if x is not None}
    return PromptFormat(**own, type=dataset.type if isinstance(dataset.type, str) else "custom", frame=frame)


def same_on_all_ranks(config: Config, data: Data, ranks: int) -> None:
    """Stop before anything is loaded if a rank has another configuration, other data or another model than rank 0."""
    if ranks == 1:
        return
    weights = open_weights(config.base_model)
    files = json.dumps([fingerprint(weights), weights.config], sort_keys=True)
    mine = {"configuration": config.to_yaml(), "data": plan_fingerprint(data.samples, data.plan), "model files": files}
    everyone = collectives.gather_objects((platform.node(), mine))
    first_host, first = everyone[0]
    for rank, (host, theirs) in enumerate(everyone):
        different = [kind for kind in mine if theirs[kind] != first[kind]]
        if different:
            what = f"rank {rank} on host {host} has other {' and other '.join(different)} than rank 0 on host"
            raise UserError(f"{what} {first_host}. Give every rank the same files and options.")
