"""How the keys of a run go together: which exclude each other, what an unset one means, what cannot be honoured."""

from collections.abc import Callable
from typing import Any

from .keys import load_table
from .schema import IN_PARTS, REPLICATE, WHOLE, Config, DatasetConfig
from .scripts import TORCHRUN
from .splits import split_without_effect

# Two ways to say one thing. Both in one file is an error; on the command line the one given there wins.
EXCLUSIVE: list[list[str]] = load_table("rules.yml")["exclusive"]


def _evaluates(config: Config) -> bool:
    return bool(config.val_set_size or config.test_datasets)


def _cadence(per_epoch: int | None, steps: float | None) -> str:
    """The strategy that the two cadence keys ask for: a count of 0 asks for none, and no count for every epoch."""
    return "steps" if per_epoch or steps else "no" if 0 in (per_epoch, steps) else "epoch"


def _fits(strategy: str | None, per_epoch: int | None, steps: float | None) -> bool:
    return strategy == "no" or (strategy == "steps") == bool(per_epoch or steps)


def _is_broken(count: float) -> bool:
    """Neither a share below 1 nor a whole number."""
    return count > 1 and count != int(count)


def _is_half_an_instruction(dataset: DatasetConfig) -> bool:
    given = bool(dataset.field_instruction), bool(dataset.field_output)
    return given[0] != given[1] or (given[0] and dataset.type != "chat_template")


def _with_templates(config: Config) -> tuple[Config | DatasetConfig, ...]:
    """The maps that may name a chat template."""
    return config, *config.all_datasets


def template_in_force(config: Config, dataset: DatasetConfig) -> tuple[Config | DatasetConfig, str]:
    """The chat template of a data set by its name, and whose word it is: the data set's own, else the run's."""
    part = dataset if dataset.chat_template or dataset.chat_template_jinja else config
    return part, part.chat_template or ("jinja" if part.chat_template_jinja else "tokenizer_default")


def notes_on(config: Config) -> list[str]:
    """What is to be printed once at start: keys that are not used, templates, and differences from Axolotl."""
    lines = [_unused(dataset) for dataset in config.all_datasets]
    lines += [split_without_effect(dataset.path, dataset.split) for dataset in config.all_datasets]
    lines += [text for text, holds in RULES["differences"].items() if holds(config)]
    return [*filter(None, lines), *template_notes(config)]


CHAT = {"field_messages", "field_tools", "field_system", "message_property_mappings", "message_field_training"}
CHAT |= {"roles", "roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"}
UNREAD = {"chat_template": {"field"}, "completion": CHAT}  # keys of a data set that its type does not read


def _unused(dataset: DatasetConfig) -> str:
    """A line on the keys of a data set that its type does not read; else ""."""
    given = dataset.model_dump(exclude_defaults=True, include=UNREAD.get(str(dataset.type), CHAT | {"field"}))
    kind = dataset.type if isinstance(dataset.type, str) else "a map"
    return f"data {dataset.path}: {', '.join(given)} ignored, which type: {kind} does not read" if given else ""


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

# When each sentence of `rules.yml` holds. Those of "checks" end the run before it starts.
CONDITIONS: dict[str, dict[str, Callable[[Config], Any]]] = {
    "checks": {
        "qlora_in_16_bits": lambda c: c.adapter == "qlora" and not c.load_in_4bit,
        "blocks_in_16_bits": lambda c: c.keep_gguf_blocks and not c.load_in_4bit,
        "no_blocks": lambda c: c.keep_gguf_blocks and not c.base_model.endswith(".gguf"),
        "fp8_of_blocks": lambda c: c.keep_gguf_blocks and c.fp8,
        "fp8_of_16_bits": lambda c: c.fp8 and not c.load_in_4bit,
        "fp8_in_float32": lambda c: c.fp8 and c.bf16 is False,
        "fp8_of_plain_blocks": lambda c: c.fp8 and c.peft_use_dora and c.lora_dropout,
        "no_lora_r": lambda c: not (c.lora_r or c.lora_model_dir),
        "no_lora_alpha": lambda c: not (c.lora_alpha or c.lora_model_dir),
        "no_layers": lambda c: not (c.lora_target_linear or c.lora_target_modules),
        "no_jinja": lambda c: any(m.chat_template == "jinja" and not m.chat_template_jinja for m in _with_templates(c)),
        "half_an_instruction": lambda c: any(map(_is_half_an_instruction, c.all_datasets)),
        "parts_with_rates": lambda c: c.shard_optimizer_state and c.loraplus_lr_ratio,
        "offload_without_parts": lambda c: c.offload_params and c.sharding == "replicate",
        "two_shardings": lambda c: c.fsdp_words & WHOLE and c.fsdp_words & IN_PARTS,
        "fully_shard_nothing": lambda c: c.fsdp_version == 2 and c.fsdp_words & REPLICATE,
        "eval_strategy": lambda c: _evaluates(c) and not _fits(c.eval_strategy, c.evals_per_epoch, c.eval_steps),
        "save_strategy": lambda c: not _fits(c.save_strategy, c.saves_per_epoch, c.save_steps),
        "part_of_a_step": lambda c: _is_broken(c.eval_steps or 0) or _is_broken(c.save_steps or 0),
        "part_of_a_row": lambda c: _is_broken(c.val_set_size),
        "no_evaluations": lambda c: (
            (c.early_stopping_patience or c.load_best_model_at_end) and (not _evaluates(c) or c.eval_strategy == "no")
        ),
        "min_lr_without_cosine": lambda c: c.cosine_min_lr_ratio is not None and c.lr_scheduler != "cosine",
    },
    "differences": {
        "one_mean": lambda c: c.gradient_accumulation_steps > 1,
        "hybrid_shard": lambda c: "hybrid_shard" in c.fsdp_words,
        "kept_gathered": lambda c: c.sharding == "replicate" and not REPLICATE & c.fsdp_words,
        "nothing_evaluated": lambda c: (
            not _evaluates(c) and (c.evals_per_epoch or c.eval_steps or c.eval_strategy != "no")
        ),
    },
    "without_effect": {
        "fully_shard_kept": lambda c: c.fsdp_version == 2 and c.sharding == "replicate",
        "constant_warmup": lambda c: c.lr_scheduler == "constant" and (c.warmup_steps or c.warmup_ratio),
        "modules_in_linear": lambda c: c.lora_target_linear and c.lora_target_modules,
        "no_eval": lambda c: _evaluates(c) and c.eval_strategy == "no" and (c.evals_per_epoch or c.eval_steps),
        "no_save": lambda c: c.save_strategy == "no" and (c.saves_per_epoch or c.save_steps),
        "no_limit": lambda c: (
            c.save_strategy == "no" and c.save_total_limit != 4 and not (c.save_first_step or c.load_best_model_at_end)
        ),
        "patience": lambda c: c.loss_watchdog_patience != 3 and not c.loss_watchdog_threshold,
        "no_wandb": lambda c: (
            not (c.use_wandb or c.wandb_project) and (c.wandb_entity or c.wandb_name or c.wandb_mode or c.wandb_run_id)
        ),
        "no_table": lambda c: c.eval_table_size and not _evaluates(c),
        "no_table_size": lambda c: c.eval_max_new_tokens != 128 and not c.eval_table_size,
        "no_chats": lambda c: c.default_system_message and all(d.type != "chat_template" for d in c.all_datasets),
        "inputs_of_text": lambda c: c.train_on_inputs and all(d.type == "completion" for d in c.datasets),
    },
}
RULES = {
    kind: {load_table("rules.yml")[kind][name]: holds for name, holds in conditions.items()}
    for kind, conditions in CONDITIONS.items()
}
CHECKS = RULES["checks"]


def without_effect(config: Config, ranks: int, on_gpu: bool) -> list[str]:
    """A line for each option that does nothing in this run."""
    found = [text for text, holds in RULES["without_effect"].items() if holds(config)]
    if config.optimizer.startswith("paged") and not on_gpu:
        found.append(f"{config.optimizer} pages nothing on a CPU, where its state is in memory anyway")
    if ranks > 1:
        return found
    shards = config.sharding == "full_shard" and not config.offload_params
    if shards and config.fsdp_version == 2:
        found.append("fsdp_version: 2 shards nothing with one process; it copies each block to use it; leave it out")
    names = {"fsdp" if config.fsdp else "fsdp_config": shards and config.fsdp_version != 2}
    names |= {"shard_optimizer_state": config.shard_optimizer_state}
    start = f"does nothing with one process; {TORCHRUN} starts several"
    return found + [f"{name} {start}" for name, wanted in names.items() if wanted]
