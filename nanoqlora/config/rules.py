"""How the keys of a run go together: which exclude each other, what an unset one means, what cannot be honoured."""

from collections.abc import Callable
from typing import Any

from .schema import IN_PARTS, WHOLE, Config, DatasetConfig
from .scripts import TORCHRUN
from .splits import split_without_effect

# Two ways to say one thing. Both in one file is an error; on the command line the one given there wins.
EXCLUSIVE = (
    ("warmup_steps", "warmup_ratio"),
    ("val_set_size", "test_datasets"),
    ("evals_per_epoch", "eval_steps"),
    ("saves_per_epoch", "save_steps"),
    ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
    ("overwrite_output_dir", "auto_resume_from_checkpoints"),
)


def _evaluates(config: Config) -> bool:
    return bool(config.val_set_size or config.test_datasets)


def _cadence(per_epoch: int | None, steps: float | None) -> str:
    """The strategy that the two cadence keys ask for: a count of 0 asks for none, and no count for every epoch."""
    return "steps" if per_epoch or steps else "no" if 0 in (per_epoch, steps) else "epoch"


def _fits(strategy: str | None, per_epoch: int | None, steps: float | None) -> bool:
    return strategy == "no" or (strategy == "steps") == bool(per_epoch or steps)


def template_in_force(config: Config, dataset: DatasetConfig) -> tuple[Config | DatasetConfig, str]:
    """The chat template of a data set by its name, and whose word it is: the data set's own, else the run's."""
    part = dataset if dataset.chat_template or dataset.chat_template_jinja else config
    return part, part.chat_template or ("jinja" if part.chat_template_jinja else "tokenizer_default")


def _with_templates(config: Config) -> tuple[Config | DatasetConfig, ...]:
    """The maps that may name a chat template."""
    return config, *config.all_datasets


def notes_on(config: Config) -> list[str]:
    """What is to be printed once at start: keys that are not used, templates, and differences from Axolotl."""
    lines = [line for dataset in config.all_datasets for line in _unused(dataset)]
    lines += filter(None, (split_without_effect(dataset.path, dataset.split) for dataset in config.all_datasets))
    lines += [text for text, matters in DIFFERENCES.items() if matters(config)]
    return lines + template_notes(config)


CHAT = {"field_messages", "field_tools", "field_system", "message_property_mappings", "message_field_training"}
CHAT |= {"roles", "roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"}
UNREAD = {"chat_template": {"field"}, "completion": CHAT}  # keys of a data set that its type does not read


def _unused(dataset: DatasetConfig) -> list[str]:
    """A line on the keys of a data set that its type does not read."""
    given = dataset.model_dump(exclude_defaults=True, include=UNREAD.get(str(dataset.type), CHAT | {"field"}))
    kind = dataset.type if isinstance(dataset.type, str) else "a map"
    return [f"data {dataset.path}: {', '.join(given)} ignored, which type: {kind} does not read"] if given else []


def template_notes(config: Config) -> list[str]:
    """A line for the template of each data set of chats, and for each key that gives one which is not used."""
    notes, used = [], []
    for dataset in config.all_datasets:
        if dataset.type == "chat_template":
            part, name = template_in_force(config, dataset)
            used.append((id(part), name))
            notes.append(f"{dataset.path}: chat_template {name}{' (its own)' * (part is dataset)}")
    for part in _with_templates(config):
        where = f"{part.path}: " if isinstance(part, DatasetConfig) else ""
        names = [name for owner, name in used if owner == id(part)]
        if part.chat_template_jinja and "jinja" not in names:
            why = f"chat_template is {part.chat_template}" if names else "no data set takes it"
            notes.append(f"{where}chat_template_jinja is not used: {why}")
        elif part.chat_template and not names:
            notes.append(f"{where}chat_template {part.chat_template} is not used: no data set takes it")
    return notes


# What an unset key means when that depends on other keys.
DERIVED: dict[str, Callable[[Config], Any]] = {
    "load_in_4bit": lambda c: c.adapter == "qlora",
    "lora_target_linear": lambda c: not c.lora_target_modules,
    "chat_template": lambda c: "jinja" if c.chat_template_jinja else None,
    "gradient_checkpointing": lambda c: bool(c.fsdp_config and c.fsdp_config.activation_checkpointing),
    "eval_sample_packing": lambda c: c.sample_packing,
    "eval_batch_size": lambda c: c.micro_batch_size,
    "use_wandb": lambda c: bool(c.wandb_project),
    "load_best_model_at_end": lambda c: bool(c.early_stopping_patience),
    "eval_strategy": lambda c: _cadence(c.evals_per_epoch, c.eval_steps) if _evaluates(c) else "no",
    "save_strategy": lambda c: _cadence(c.saves_per_epoch, c.save_steps),
}

# What to say, and when: each of these ends the run before it starts.
CHECKS: dict[str, Callable[[Config], Any]] = {
    "adapter: qlora trains over a 4-bit base, but load_in_4bit is false. Write load_in_4bit: true, or adapter: lora "
    "for a base in 16 bits.": lambda c: c.adapter == "qlora" and not c.load_in_4bit,
    "lora_r is missing: an adapter has a rank, and no default fits every model. Write for example "
    "lora_r: 16.": lambda c: not (c.lora_r or c.lora_model_dir),
    "lora_alpha is missing: the update is scaled by lora_alpha / lora_r. Write for example lora_alpha: 32.": lambda c: (
        not (c.lora_alpha or c.lora_model_dir)
    ),
    "lora_target_linear is false and lora_target_modules names no layer, so nothing would be trained. Write "
    "lora_target_linear: true, or name layers.": lambda c: not (c.lora_target_linear or c.lora_target_modules),
    "chat_template is jinja, but no template is given. Write it, or the path of a file with it, as "
    "chat_template_jinja.": lambda c: any(
        part.chat_template == "jinja" and not part.chat_template_jinja for part in _with_templates(c)
    ),
    "field_instruction and field_output of a data set are read together, with type: chat_template. Write both beside "
    "it, or within type, as in type: {field_instruction: question, field_output: answer}.": lambda c: any(
        bool(d.field_instruction) != bool(d.field_output) or d.field_instruction and d.type != "chat_template"
        for d in c.all_datasets
    ),
    "shard_optimizer_state cuts LoRA's values into equal parts, and loraplus_lr_ratio gives them rates of their own. "
    "Leave out one of the two.": lambda c: c.shard_optimizer_state and c.loraplus_lr_ratio,
    "offload_params keeps each GPU's part of the base in host memory, and with fsdp: replicate there are no parts. "
    "Write fsdp: full_shard, or leave out offload_params.": lambda c: c.offload_params and c.sharding == "replicate",
    "fsdp asks for the whole base on every GPU (replicate, no_shard, shard_grad_op) and for a part on each "
    "(full_shard, hybrid_shard). Write one of the two.": lambda c: c.fsdp_words & WHOLE and c.fsdp_words & IN_PARTS,
    "fsdp_version: 2 shards the base with PyTorch's fully_shard, and fsdp asks for all of it on every GPU (replicate, "
    "no_shard). Leave out one of the two.": lambda c: c.fsdp_version == 2 and c.fsdp_words & {"replicate", "no_shard"},
    "eval_strategy contradicts its counts: epoch goes without them, steps needs evals_per_epoch or eval_steps. "
    "Remove it, or correct them.": lambda c: (
        _evaluates(c) and not _fits(c.eval_strategy, c.evals_per_epoch, c.eval_steps)
    ),
    "save_strategy contradicts its counts: epoch goes without them, steps needs saves_per_epoch or save_steps. "
    "Remove it, or correct them.": lambda c: not _fits(c.save_strategy, c.saves_per_epoch, c.save_steps),
    "eval_steps and save_steps are whole numbers of steps, or a share below 1 of all. Write a whole "
    "number.": lambda c: any(steps > 1 and steps != int(steps) for steps in (c.eval_steps or 0, c.save_steps or 0)),
    "val_set_size is a whole number of rows, or a share below 1 of all. Write a whole number.": lambda c: (
        c.val_set_size > 1 and c.val_set_size != int(c.val_set_size)
    ),
    "early_stopping_patience and load_best_model_at_end need evaluations, and there are none. Set val_set_size or "
    "test_datasets, and an eval_strategy other than no.": lambda c: (
        (c.early_stopping_patience or c.load_best_model_at_end) and (not _evaluates(c) or c.eval_strategy == "no")
    ),
    "cosine_min_lr_ratio has a meaning for lr_scheduler: cosine only. Remove it, or choose cosine.": lambda c: (
        c.cosine_min_lr_ratio is not None and c.lr_scheduler != "cosine"
    ),
}

# What a reader who comes from Axolotl would not expect, said once at start when it matters.
DIFFERENCES: dict[str, Callable[[Config], Any]] = {
    "loss is one mean over all supervised tokens of an optimizer step; Axolotl averages the means of its "
    "micro-batches": lambda c: c.gradient_accumulation_steps > 1,
    "hybrid_shard spreads the base over the GPUs of all hosts, not of each": lambda c: "hybrid_shard" in c.fsdp_words,
    "gathered weights that are kept from forward to backward take the memory of the whole base, so every GPU holds "
    "all of it": lambda c: c.sharding == "replicate" and not {"replicate", "no_shard"} & c.fsdp_words,
    "nothing will be evaluated: there is neither val_set_size nor test_datasets": lambda c: (
        not _evaluates(c) and (c.evals_per_epoch or c.eval_steps or c.eval_strategy != "no")
    ),
}

# Options that do nothing beside the others, and what would make them work.
WITHOUT_EFFECT: dict[str, Callable[[Config], Any]] = {
    "fsdp_version: 2 shards nothing where gathered weights are kept: every GPU holds all of the base; write "
    "reshard_after_forward: true": lambda c: c.fsdp_version == 2 and c.sharding == "replicate",
    "there is no warm-up with lr_scheduler constant; constant_with_warmup has one": lambda c: (
        c.lr_scheduler == "constant" and (c.warmup_steps or c.warmup_ratio)
    ),
    "lora_target_modules adds nothing to lora_target_linear: true, which takes all linear layers; write "
    "lora_target_linear: false to train only those named": lambda c: c.lora_target_linear and c.lora_target_modules,
    "eval_strategy is no, so evals_per_epoch and eval_steps do nothing; remove eval_strategy": lambda c: (
        _evaluates(c) and c.eval_strategy == "no" and (c.evals_per_epoch or c.eval_steps)
    ),
    "save_strategy is no, so saves_per_epoch and save_steps do nothing; remove save_strategy": lambda c: (
        c.save_strategy == "no" and (c.saves_per_epoch or c.save_steps)
    ),
    "no checkpoint is written (save_strategy no), so save_total_limit does nothing": lambda c: (
        c.save_strategy == "no" and c.save_total_limit != 4 and not (c.save_first_step or c.load_best_model_at_end)
    ),
    "loss_watchdog_patience does nothing without loss_watchdog_threshold": lambda c: (
        c.loss_watchdog_patience != 3 and not c.loss_watchdog_threshold
    ),
    "wandb_entity, wandb_name, wandb_mode and wandb_run_id do nothing without wandb_project": lambda c: (
        not (c.use_wandb or c.wandb_project) and (c.wandb_entity or c.wandb_name or c.wandb_mode or c.wandb_run_id)
    ),
    "default_system_message is only for data of type chat_template, and there is none": lambda c: (
        c.default_system_message and all(d.type != "chat_template" for d in c.all_datasets)
    ),
    "train_on_inputs does nothing for data of type completion, which is learnt from its first word on": lambda c: (
        c.train_on_inputs and all(d.type == "completion" for d in c.datasets)
    ),
}


def without_effect(config: Config, ranks: int, on_gpu: bool) -> list[str]:
    """A line for each option that does nothing in this run."""
    found = [text for text, matters in WITHOUT_EFFECT.items() if matters(config)]
    if config.optimizer.startswith("paged") and not on_gpu:
        found.append(f"{config.optimizer} pages nothing on a CPU, where its state is in memory anyway")
    if ranks == 1:
        shards = config.sharding == "full_shard" and not config.offload_params
        if shards and config.fsdp_version == 2:
            found.append(
                "fsdp_version: 2 shards nothing with one process; it copies each block to use it; leave it out"
            )
        names = {"fsdp" if config.fsdp else "fsdp_config": shards and config.fsdp_version != 2}
        names |= {"shard_optimizer_state": config.shard_optimizer_state}
        start = f"does nothing with one process; {TORCHRUN} starts several"
        found += [f"{name} {start}" for name, wanted in names.items() if wanted]
    return found
