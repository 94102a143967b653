"""The configuration of a run: one dataclass, one YAML file, and a fate for every key.

The field names are Axolotl's keys, so that one file runs in both and there is no second vocabulary. A key has
exactly one fate, and each fate is a table that can be read from top to bottom:

    field          the dataclasses below: what the key means, its type, its default, its range
    old spelling   `Fates.old`: the field that it stands for, and how its value is translated
    ignored        `Fates.ignored`: asks for something that happens anyway, or not at all; one line at start
    refused        `Fates.refused`: would change the run in a way we do not do; says what to write instead
    not yet        `Fates.not_yet`: refused for now; this table is meant to shrink

A key in none of the tables is an error that names the nearest key. Values are converted to the declared type,
because YAML reads `2e-4` as text and `no` as false. A key without a value counts as unset.

Left out: including other files, environment variables, schema versions. Only `train.py` and this file ever see the
whole Config, all other files get plain values. Read next: `train.yml`, then `train.py`.
"""

import dataclasses
import difflib
import functools
import json
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from nanoqlora.cli import UserError

DEFAULT_FILE = "train.yml"


# ---------------------------------------------------------------------------------------------------------------------
# Fate 1: fields
# ---------------------------------------------------------------------------------------------------------------------


def key(meaning: str, default: Any = MISSING, within: str = "", group: str = "") -> Any:
    """A field that is a YAML key: what `--help` says of it, its default, the interval its value must lie in.

    `group` opens a new heading of `--help`. No default: the key is required.
    """
    meta = {"meaning": meaning, "within": within, "group": group}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One entry of `datasets` or `test_datasets`."""

    path: str = key("a file, a folder, or the name of a data set on the hub")
    type: Literal["alpaca", "chat_template", "completion"] = key("how a row becomes text")
    ds_type: Literal["json", "jsonl", "csv", "parquet", "text"] | None = key("file format; unset: by the suffix", None)
    data_files: tuple[str, ...] = key("the files of a folder or a hub data set to read", ())
    split: str | None = key("split of a hub data set; unset: train", None)
    field: str = key("completion: the column with the text", "text")
    field_messages: str = key("chat_template: the column with the list of messages", "messages")
    message_property_mappings: dict[str, str] = key(
        "chat_template: what the template calls it -> what a message of this file calls it",
        {"role": "role", "content": "content"},
    )
    roles: dict[str, tuple[str, ...]] = key("role of the template -> its names in this file", {})
    roles_to_train: tuple[str, ...] = key("roles whose tokens count in the loss", ("assistant",))
    train_on_eos: Literal["turn", "last", "all"] = key("end tokens that count: of trained turns, the last, all", "turn")
    chat_template: str | None = key("template of this file only; unset: the run's chat_template", None)
    chat_template_jinja: str | None = key("its Jinja text, or the path of a file with it", None)


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Tokens to use in place of the tokenizer's own; each must be in its vocabulary."""

    bos_token: str | None = key("begin of text", None)
    eos_token: str | None = key("end of text", None)
    pad_token: str | None = key("padding; may equal the end token: padding is masked by position", None)
    unk_token: str | None = key("unknown", None)
    additional_special_tokens: tuple[str, ...] = key("more tokens that text never becomes by chance", ())


@dataclass(frozen=True, kw_only=True)
class FsdpConfig:
    """How the base model is spread over several GPUs. Keys may carry Axolotl's older prefix `fsdp_`."""

    offload_params: bool = key("keep the shards of the base in host memory", False)
    reshard_after_forward: bool = key("drop gathered weights after the forward, gather again in backward", True)
    state_dict_type: str | None = key("accepted: an adapter is always saved whole", None)
    cpu_ram_efficient_loading: bool = key("accepted: tensors are always streamed", True)
    auto_wrap_policy: str | None = key("accepted: the unit is always the decoder layer", None)
    transformer_layer_cls_to_wrap: str | None = key("accepted: the unit is always the decoder layer", None)
    activation_checkpointing: bool | None = key("older place of gradient_checkpointing; unset: false", None)


Cadence = Literal["no", "steps", "epoch"]
Attention = Literal["flash_attention_2", "flash_attention_3", "sdpa", "flex_attention", "eager"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Sharding = Literal["full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "auto_wrap", "offload"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. Field names are Axolotl's YAML keys.

    Fields whose default is None and that stand in `DERIVED` are filled in by `make_config` and `load_config`.
    """

    base_model: str = key("Hugging Face folder, .gguf file, or hub name", group="model")
    adapter: Literal["qlora", "lora"] = key("qlora: over a 4-bit base; lora: over a 16-bit base")
    load_in_4bit: bool | None = key("quantise the linear layers of the blocks to NF4; unset: true for qlora", None)
    output_dir: str = key("folder of the adapter, checkpoints, metrics and report", "./model-out")
    special_tokens: SpecialTokens = key("tokens in place of the tokenizer's own", SpecialTokens())
    bf16: bool | Literal["auto"] = key("compute in bfloat16; auto: where the hardware has it, else float32", "auto")
    tf32: bool | Literal["auto"] = key("TensorFloat-32 for float32 products on a GPU", "auto")
    attn_implementation: Attention | None = key("wanted attention kernel; all of them are exact", None)

    lora_r: int | None = key("rank of the update", None, "[1, inf)", group="LoRA")
    lora_alpha: int | float | None = key("the update is scaled by lora_alpha / lora_r", None, "(0, inf)")
    lora_dropout: float = key("share of an adapter's inputs that is dropped in training", 0.0, "[0, 1)")
    lora_target_linear: bool | None = key("adapt all linear layers of the blocks; unset: if no modules are named", None)
    lora_target_modules: tuple[str, ...] = key("names of the layers to adapt, such as q_proj", ())
    lora_model_dir: str | None = key("start from the adapter in this folder", None)
    peft_use_rslora: bool = key("scale by lora_alpha / sqrt(lora_r) instead", False)

    datasets: tuple[DatasetConfig, ...] = key("training data, a list of maps", group="data")
    test_datasets: tuple[DatasetConfig, ...] = key("evaluation data, a list of maps", ())
    val_set_size: int | float = key("evaluation rows taken from datasets: a share below 1, else a count", 0, "[0, inf)")
    chat_template: str | None = key("tokenizer_default, a built-in name, or jinja", None)
    chat_template_jinja: str | None = key("a Jinja template, or the path of a file with one", None)
    default_system_message: str | None = key("system message of conversations that have none", None)
    eot_tokens: tuple[str, ...] = key("tokens that end a turn, beside the end token", ())
    train_on_inputs: bool = key("count the prompt in the loss too", False)
    sequence_len: int = key("tokens in a row, at most", 512, "[2, inf)")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = key("samples longer than a row; counted", "drop")
    sample_packing: bool = key("several samples in a row, which do not see each other", False)
    eval_sample_packing: bool | None = key("the same for evaluation; unset: as sample_packing", None)
    pad_to_sequence_len: bool | None = key("pad every row to sequence_len; unset: where fixed shapes pay", None)
    dataset_prepared_path: str | None = key("folder that keeps tokenised data between runs", None)
    shuffle_merged_datasets: bool = key("mix the rows of all datasets, anew in every epoch", True)
    seed: int = key("of the data order, the adapter's start and dropout", 42, "[0, 4294967295]")

    learning_rate: float = key("peak, reached after the warm-up", within="(0, 1]", group="training")
    micro_batch_size: int = key("rows per GPU in one forward", 1, "[1, inf)")
    gradient_accumulation_steps: int = key("forwards and backwards per optimizer step", 1, "[1, inf)")
    num_epochs: float = key("passes over the training data", 1.0, "(0, inf)")
    max_steps: int | None = key("optimizer steps after which to stop", None, "[1, inf)")
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = key("after the warm-up", "cosine")
    cosine_min_lr_ratio: float | None = key("cosine ends at this share of the peak; unset: 0", None, "[0, 1]")
    warmup_steps: int = key("optimizer steps of linear warm-up", 0, "[0, inf)")
    warmup_ratio: float = key("warm-up as a share of all steps, rounded up", 0.0, "[0, 1]")
    optimizer: Optimizer = key("AdamW: plain, fused, 8-bit state, state paged to host memory", "adamw_torch_fused")
    weight_decay: float = key("decoupled, per step times the learning rate", 0.0, "[0, inf)")
    adam_beta1: float = key("decay of the mean of gradients", 0.9, "[0, 1)")
    adam_beta2: float = key("decay of the mean of squared gradients", 0.999, "[0, 1)")
    adam_epsilon: float = key("added to the denominator", 1e-8, "(0, inf)")
    max_grad_norm: float = key("clip the global gradient norm; 0: do not clip", 1.0, "[0, inf)")
    gradient_checkpointing: bool | Literal["offload", "auto"] | None = key(
        "recompute blocks in backward; offload: keep their inputs in host memory; auto: if memory needs it; "
        "unset: as fsdp_config.activation_checkpointing, else false",
        None,
    )

    logging_steps: int = key("optimizer steps between log lines", 1, "[1, inf)", group="cadence")
    eval_strategy: Cadence | None = key("when to evaluate; unset: by the two keys below, else every epoch", None)
    eval_steps: int | float | None = key("steps between evaluations; below 1: a share of all", None, "[0, inf)")
    evals_per_epoch: int | None = key("evaluations in an epoch; 0: none", None, "[0, inf)")
    eval_batch_size: int | None = key("rows per GPU in an evaluation; unset: micro_batch_size", None, "[1, inf)")
    save_strategy: Cadence | None = key("when to save; unset: by the two keys below, else every epoch", None)
    save_steps: int | float | None = key("steps between checkpoints; below 1: a share of all", None, "[0, inf)")
    saves_per_epoch: int | None = key("checkpoints in an epoch; 0: none", None, "[0, inf)")
    save_total_limit: int = key("checkpoints to keep, the newest ones", 4, "[1, inf)")
    resume_from_checkpoint: str | None = key("go on from this checkpoint-STEP folder", None)
    auto_resume_from_checkpoints: bool = key("go on from the newest checkpoint in output_dir, if any", False)

    fsdp: tuple[Sharding, ...] = key("older way to ask for sharding", (), group="several GPUs")
    fsdp_version: Literal[1, 2] | None = key("accepted: there is one implementation", None)
    fsdp_config: FsdpConfig | None = key("spread the base over the GPUs", None)

    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)  # to be said once at start; not a key

    def to_yaml(self) -> str:
        """The resolved run, every default filled in. Loads again to an equal Config."""
        return yaml.safe_dump(_plain(self), sort_keys=False, allow_unicode=True, width=110)


# ---------------------------------------------------------------------------------------------------------------------
# Fates 2 to 5: old spellings, ignored, refused, not yet
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fates:
    """What becomes of the keys of one map that are not fields. In a list of keys, `*` stands for any characters."""

    old: dict[str, tuple[str, Callable[[Any], Any] | None]] = field(default_factory=dict)  # -> field, translation
    old_values: dict[str, dict[str, Any]] = field(default_factory=dict)  # field -> value -> today's value
    ignored: dict[str, str] = field(default_factory=dict)  # why that is harmless -> keys
    refused: dict[str, str] = field(default_factory=dict)  # what to do instead -> keys
    refused_values: dict[str, dict[str, str]] = field(default_factory=dict)  # field -> value -> what to do instead
    not_yet: str = ""  # keys
    prefix: str = ""  # may stand before any key


def when_on(value: Any) -> Callable[[Any], Any]:
    """The value that an old switch stands for when it is on; off leaves the field alone."""
    return lambda switch: value if _to_bool(switch) else None


_SHAREGPT = (
    "write type: chat_template, field_messages: conversations and message_property_mappings: "
    "{role: from, content: value}"
)

FATES: dict[type, Fates] = {
    Config: Fates(
        old={
            "evaluation_strategy": ("eval_strategy", None),
            "flash_attention": ("attn_implementation", when_on("flash_attention_2")),
            "sdp_attention": ("attn_implementation", when_on("sdpa")),
            "flex_attention": ("attn_implementation", when_on("flex_attention")),
            "eager_attention": ("attn_implementation", when_on("eager")),
            "bfloat16": ("bf16", when_on(True)),
            "float32": ("bf16", when_on(False)),
        },
        old_values={
            "optimizer": {"adamw_bnb_8bit": "adamw_8bit"},
            "gradient_checkpointing": {"unsloth": "offload"},
            "bf16": {"full": True},
        },
        ignored={
            "the model's own files say what it is": "model_type tokenizer_type tokenizer_use_fast tokenizer_legacy "
            "is_*_derived_model",
            "unknown keys are always refused": "strict",
            "--plan shows the data": "debug",
            "torchrun says how many processes there are": "local_rank world_size ddp*",
            "a GPU is used where there is one": "device device_map",
            "there is no wandb logging": "wandb_watch wandb_log_model wandb_mode wandb_run_id",
            "kernels are chosen by measurement, and all compute the same": "lora_mlp_kernel lora_qkv_kernel "
            "lora_o_kernel liger_* unsloth_* cut_cross_entropy flash_attn_cross_entropy xformers_attention "
            "torch_compile*",
            "data is read in one pass before step 1": "dataset_processes dataset_num_proc dataset_keep_in_memory "
            "dataloader_* remove_unused_columns",
            "rows are packed, or batched with others of like length": "group_by_length",
            "packing looks at all rows at once": "sample_packing_group_size sample_packing_bin_size",
            "there is one way to recompute": "gradient_checkpointing_kwargs",
            "weights are handled one tensor at a time": "low_cpu_mem_usage lora_on_cpu",
            "adapters are always saved whole, as safetensors": "save_safetensors fsdp_final_state_dict_type",
            "tokens per second are always logged": "include_tokens_per_second",
            "there is one way to shard": "fsdp_use_orig_params fsdp_sync_module_states fsdp_limit_all_gathers "
            "fsdp_sharding_strategy",
        },
        refused={
            "8-bit weights are not built in: write load_in_4bit: true with adapter: qlora": "load_in_8bit",
            "the base is quantised here: name the unquantised model and write load_in_4bit: true": "gptq",
            "remove it: torchrun alone starts several GPUs, and fsdp_config shards the base": "deepspeed",
            "write bf16: auto": "fp16 float16 fp8",
            "write adapter: qlora, which trains over the weights as they are rounded": "qat",
            "only supervised fine-tuning is built in: remove it": "rl reward_model process_reward_model",
            "write datasets with type: completion": "pretraining_dataset",
            "the batch plan needs all lengths before step 1: write false": "streaming",
            "a row must fit one GPU: write 1, and a smaller sequence_len": "context_parallel_size "
            "sequence_parallel_degree",
            "a layer must fit one GPU: write 1, and fsdp_config to shard the base": "tensor_parallel_size",
            "only one adapter is trained, from start to end: write a larger lora_r": "relora* lisa* "
            "unfrozen_parameters",
            "mixtures of experts are not built in: use a dense Llama or Mistral": "quantize_moe_experts",
            "code that comes with a model or data set is never run: write false": "trust_remote_code",
            "plugins are not loaded: remove it": "plugins",
            "attention is always exact: remove it": "s2_attention sage_attention",
            "the model's config.json decides: change it there": "rope_scaling overrides_of_model_config "
            "base_model_config",
            "the tokenizer is read from base_model's folder: put its files there": "tokenizer_config",
            "nothing is sent over the network: remove it, metrics.jsonl has the numbers": "hub_model_id mlflow_* "
            "comet_* use_wandb",
            "write micro_batch_size and gradient_accumulation_steps": "batch_size",
            "write sequence_len, and sample_packing: true": "max_packed_sequence_len",
            # Names of other trainers, which the nearest spelling would not lead to.
            "write learning_rate": "lr",
            "write num_epochs": "epochs num_train_epochs",
            "write optimizer": "optim",
            "write sequence_len": "max_seq_length max_length",
            "write micro_batch_size": "per_device_train_batch_size",
        },
        not_yet="early_stopping_patience load_best_model_at_end peft_use_dora loraplus_lr_* neftune_noise_alpha "
        "noisy_embedding_alpha bnb_config_kwargs wandb_project wandb_entity wandb_name use_tensorboard "
        "loss_watchdog_* lora_modules_to_save peft_layers_to_transform tokens save_first_step min_sample_len "
        "dataset_exact_deduplication lr_groups lr_scheduler_kwargs optim_args",
    ),
    DatasetConfig: Fates(
        old={
            "message_field_role": ("message_property_mappings", lambda name: {"role": name}),
            "message_field_content": ("message_property_mappings", lambda name: {"content": name}),
            "train_on_split": ("split", None),
        },
        refused={
            _SHAREGPT: "conversation",
            "code that comes with a model or data set is never run: write false": "trust_remote_code",
        },
        refused_values={"type": {"sharegpt*": _SHAREGPT}},
        not_yet="name revision shards shards_idx preprocess_shards drop_system_message message_field_training* "
        "field_system field_tools field_thinking template_thinking_key split_thinking train_on_eot input_transform "
        "input_format",
    ),
    SpecialTokens: Fates(old={name: (f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")}),
    FsdpConfig: Fates(
        prefix="fsdp_",
        ignored={
            "there is one way to shard": "version use_orig_params sync_module_states limit_all_gathers "
            "sharding_strategy backward_prefetch forward_prefetch min_num_params cpu_offload_pin_memory",
            "bf16 decides": "mixed_precision_policy",
            "adapters are always saved whole, as safetensors": "final_state_dict_type",
        },
    ),
}

# A refused key that is off asks for nothing and may stay. Off is empty, false or 0, and for these keys also:
HARMLESS: dict[str, tuple[Any, ...]] = {
    "context_parallel_size": (1,),
    "sequence_parallel_degree": (1,),
    "tensor_parallel_size": (1,),
    "plugins": (
        "axolotl.integrations.liger.LigerPlugin",
        "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    ),
}

# Two ways to say one thing. Both in one file is an error; on the command line the one given there wins.
EXCLUSIVE = (
    ("warmup_steps", "warmup_ratio"),
    ("val_set_size", "test_datasets"),
    ("evals_per_epoch", "eval_steps"),
    ("saves_per_epoch", "save_steps"),
    ("resume_from_checkpoint", "auto_resume_from_checkpoints"),
)


def _cadence(per_epoch: int | None, steps: float | None) -> str:
    """The strategy that the two cadence keys ask for: a count of 0 asks for none, and no count for every epoch."""
    return "steps" if per_epoch or steps else "no" if 0 in (per_epoch, steps) else "epoch"


def _fits(strategy: str | None, per_epoch: int | None, steps: float | None) -> bool:
    return strategy == "no" or (strategy == "steps") == bool(per_epoch or steps)


# What an unset key means when that depends on other keys.
DERIVED: dict[str, Callable[[Config], Any]] = {
    "load_in_4bit": lambda c: c.adapter == "qlora",
    "lora_target_linear": lambda c: not c.lora_target_modules,
    "chat_template": lambda c: "jinja" if c.chat_template_jinja else None,
    "gradient_checkpointing": lambda c: bool(c.fsdp_config and c.fsdp_config.activation_checkpointing),
    "eval_sample_packing": lambda c: c.sample_packing,
    "eval_batch_size": lambda c: c.micro_batch_size,
    "eval_strategy": lambda c: _cadence(c.evals_per_epoch, c.eval_steps),
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
        part.chat_template == "jinja" and not part.chat_template_jinja for part in (c, *c.datasets, *c.test_datasets)
    ),
    "eval_strategy contradicts its counts: epoch goes without them, steps needs evals_per_epoch or eval_steps. "
    "Remove it, or correct them.": lambda c: not _fits(c.eval_strategy, c.evals_per_epoch, c.eval_steps),
    "save_strategy contradicts its counts: epoch goes without them, steps needs saves_per_epoch or save_steps. "
    "Remove it, or correct them.": lambda c: not _fits(c.save_strategy, c.saves_per_epoch, c.save_steps),
    "eval_steps and save_steps are whole numbers of steps, or a share below 1 of all. Write a whole "
    "number.": lambda c: any((steps or 0) > 1 and steps != int(steps) for steps in (c.eval_steps, c.save_steps)),
    "val_set_size is a whole number of rows, or a share below 1 of all. Write a whole number.": lambda c: (
        c.val_set_size > 1 and c.val_set_size != int(c.val_set_size)
    ),
    "cosine_min_lr_ratio has a meaning for lr_scheduler: cosine only. Remove it, or choose cosine.": lambda c: (
        c.cosine_min_lr_ratio is not None and c.lr_scheduler != "cosine"
    ),
}

# What a reader who comes from Axolotl would not expect, said once at start when it matters.
DIFFERENCES: dict[str, Callable[[Config], Any]] = {
    "loss is one mean over all supervised tokens of an optimizer step; Axolotl averages the means of its "
    "micro-batches": lambda c: c.gradient_accumulation_steps > 1,
    "nothing will be evaluated: there is neither val_set_size nor test_datasets": lambda c: (
        not _evaluates(c) and (c.evals_per_epoch or c.eval_steps)
    ),
}


def _evaluates(config: Config) -> bool:
    return bool(config.val_set_size or config.test_datasets)


# ---------------------------------------------------------------------------------------------------------------------
# From what was written to a Config
# ---------------------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """A value, and where it was written: "train.yml, line 12: lora_r"."""

    value: Any
    at: str


class _Mismatch(Exception):
    """The value does not fit the type."""


def make_config(values: dict[str, Any], where: str = "configuration") -> Config:
    """A checked Config from a plain dict of YAML keys; for scripts and tests."""
    return _resolve({name: Given(value, f"{where}: {name}") for name, value in values.items()}, {}, where)


def _resolve(file: dict[str, Given], overrides: dict[str, Given], where: str) -> Config:
    """Settle both sources, let the overrides win, convert, fill in what depends on other keys, check."""
    notes: list[str] = []
    given, over = _settle(Config, file, notes), _settle(Config, overrides, notes)
    for pair in EXCLUSIVE:
        for mine, other in (pair, pair[::-1]):
            if mine in over and over[mine].value and other not in over and other in given and given[other].value:
                notes.append(f"{given.pop(other).at} gives way to --{mine}")
    config = _build(Config, given | over, where, notes)
    for one, other in EXCLUSIVE:
        if getattr(config, one) and getattr(config, other):
            raise UserError(f"{where}: {one} and {other} are both given, and each would decide alone. Remove one.")
    unset = {name: rule(config) for name, rule in DERIVED.items() if getattr(config, name) is None}
    if not _evaluates(config):
        unset["eval_strategy"] = "no"
    config = dataclasses.replace(config, **unset)
    for message, is_broken in CHECKS.items():
        if is_broken(config):
            raise UserError(f"{where}: {message}")
    notes += [text for text, matters in DIFFERENCES.items() if matters(config)]
    return dataclasses.replace(config, notes=tuple(notes))


def fate_of(cls: type, name: str) -> tuple[str, Any]:
    """The fate of a key of one map: "field", "old", "ignored", "refused", "not_yet" or "unknown", and its table row."""
    fates = FATES[cls]
    if name in (f.name for f in _keys(cls)):
        return "field", (name, None)
    if name in fates.old:
        return "old", fates.old[name]
    tables = {
        "ignored": fates.ignored,
        "refused": fates.refused,
        "not_yet": {"not supported yet: remove it": fates.not_yet},
    }
    for fate, table in tables.items():
        for reason, patterns in table.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
                return fate, reason
    return "unknown", None


def _settle(cls: type, given: dict[str, Given], notes: list[str]) -> dict[str, Given]:
    """Give every written key its fate. What is left are fields; an emptied one keeps the value None."""
    settled: dict[str, Given] = {}
    for written, (value, at) in given.items():
        name = str(written).removeprefix(FATES[cls].prefix)
        value = None if value in ("", [], (), {}) else value
        fate, row = fate_of(cls, name)
        if fate == "unknown":
            nearest = difflib.get_close_matches(name, [f.name for f in _keys(cls)], n=1, cutoff=0)[0]
            raise UserError(f"{at} is no known key, so it would do nothing. The nearest one is {nearest}; see --help.")
        elif fate == "ignored" and value is not None:
            notes.append(f"{at} is ignored: {row}")
        elif fate in ("refused", "not_yet") and not _is_off(name, value):
            raise UserError(f"{at} is {_show(value)}, which would not be honoured. {_sentence(row)}")
        elif fate == "field" or (fate == "old" and value is not None):
            field_name, translate = row
            try:
                new = Given(translate(value) if translate else value, at)
            except _Mismatch:
                raise UserError(
                    f"{at} is {_show(value)}, but it takes true or false. Write {row[0]} instead."
                ) from None
            before = settled.get(field_name, Given(None, at))
            if isinstance(before.value, dict) and isinstance(new.value, dict):
                new = Given(before.value | new.value, at)
            elif before.value is not None and new.value is not None and before.value != new.value:
                raise UserError(f"{at} contradicts {before.at}: both set {field_name}. Remove the older spelling.")
            if new.value is not None or field_name not in settled:
                settled[field_name] = new
    return settled


def _is_off(name: str, value: Any) -> bool:
    """Whether a refused key asks for nothing that we would not do."""
    values = value if isinstance(value, list) else [value]
    return all(item in (None, False, 0, *HARMLESS.get(name, ())) and item is not True for item in values)


def _build(cls: type, given: dict[str, Given], where: str, notes: list[str]) -> Any:
    """An instance of `cls` from its settled keys, each converted to the declared type and checked for its range."""
    hints, values = _hints(cls), {}
    for f in _keys(cls):
        value, at = given.get(f.name, Given(None, where))
        if value is None:
            if f.default is MISSING and f.default_factory is MISSING:
                raise UserError(
                    f"{where}: {f.name} is missing: {f.metadata['meaning']}. Add it ({_type(hints[f.name])})."
                )
            continue
        for pattern, advice in FATES[cls].refused_values.get(f.name, {}).items():
            if fnmatchcase(str(value), pattern):
                raise UserError(f"{at} is {_show(value)}, which is not built in. {_sentence(advice)}")
        if isinstance(value, str):
            value = FATES[cls].old_values.get(f.name, {}).get(value, value)
        try:
            converted = _convert(hints[f.name], Given(value, at), notes)
        except _Mismatch:
            raise UserError(
                f"{at} is {_show(value)}, but it takes {_type(hints[f.name])}: {f.metadata['meaning']}. {_way_out(f)}"
            ) from None
        if f.metadata["within"] and not _lies_within(f.metadata["within"], converted):
            raise UserError(
                f"{at} is {_show(value)}, but it must be {_range(f)}: {f.metadata['meaning']}. {_way_out(f)}"
            )
        # A map is laid over its default, so that a file needs to say only what differs.
        values[f.name] = _default(f) | converted if isinstance(converted, dict) else converted
    return cls(**values)


def _convert(hint: Any, given: Given, notes: list[str]) -> Any:
    """The value in the declared type. Raises _Mismatch where it does not fit."""
    value, at = given
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in inner:  # the first that fits, so `int | float` keeps whole numbers whole
            try:
                return _convert(option, given, notes)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is Literal:
        value = "no" if value is False and "no" in inner else value  # YAML reads a bare `no` as false
        matching = [choice for choice in inner if str(choice) == str(value)]
        return matching[0] if matching else _refuse()
    if origin is tuple:  # one value stands for a list of one
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(inner[0], Given(item, f"{at}[{i}]"), notes) for i, item in enumerate(items))
    if origin is dict or dataclasses.is_dataclass(hint):
        entries = value if isinstance(value, dict) else _refuse()
        entries = {name: Given(entry, f"{at}.{name}") for name, entry in entries.items()}
        if origin is dict:
            return {_to_text(name): _convert(inner[1], entry, notes) for name, entry in entries.items()}
        return _build(hint, _settle(hint, entries, notes), at, notes)
    return SCALARS.get(hint, _refuse)(value)


def _refuse(value: Any = None) -> Any:
    raise _Mismatch


def _to_bool(value: Any) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    text = str(value).lower()
    return words[text] if text in words else _refuse()


def _to_int(value: Any) -> int:
    number = _to_float(value)
    if not number.is_integer():
        raise _Mismatch
    return value if isinstance(value, int) else int(number)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Mismatch
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None


def _to_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _Mismatch
    return str(value)


SCALARS: dict[Any, Callable[[Any], Any]] = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}


def _lies_within(interval: str, value: float) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value < high) or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


# ---------------------------------------------------------------------------------------------------------------------
# Words for people
# ---------------------------------------------------------------------------------------------------------------------


_hints = functools.cache(get_type_hints)  # class -> name -> type


def _keys(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if "meaning" in f.metadata]


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _way_out(f: dataclasses.Field) -> str:
    """The advice at the end of an error about a value."""
    default = _default(f)
    return "See --help." if default in (MISSING, None, ()) else f"Leave it out for the default, {_show(default)}."


def _range(f: dataclasses.Field) -> str:
    """The interval of a field in words: ">= 1", "> 0", "in [0, 1)"."""
    low, _, high = f.metadata["within"].partition(", ")
    return low.replace("[", ">= ").replace("(", "> ") if high == "inf)" else f"in {low}, {high}" if high else ""


def _type(hint: Any) -> str:
    """A type in the words of YAML."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(option) for option in inner if option is not types.NoneType))
    if origin is Literal:
        return " | ".join(str(choice) for choice in inner)
    if origin is tuple:
        return f"list of ({_type(inner[0])})" if get_origin(inner[0]) else f"list of {_type(inner[0])}s"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "map"
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}[hint]


def _show(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as the maps and lists of YAML."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in _keys(type(value))}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# The file and the command line
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of one command that is no key of the YAML: `--out DIR`. A bool is a switch and needs no value."""

    meaning: str
    kind: Any = str  # a type that a field may have
    default: Any = None


def load_config(argv: list[str] | None = None) -> Config:
    """The Config of a command line: `[train.yml] [--key value | --key=value ...]`.

    Args:
        argv: the words after the command's name; None takes those of this process.
    Raises:
        UserError: the file or an override is wrong; nothing has been written.
        SystemExit: after `--help`.
    """
    config, _ = load_command(argv, {})
    assert config is not None
    return config


def load_command(
    argv: list[str] | None, own: dict[str, Option], about: str = "", yaml_unless: Iterable[str] | None = None
) -> tuple[Config | None, dict[str, Any]]:
    """The same for a command with options of its own, which come back apart from the Config.

    Args:
        own: name -> Option. A name that is also a YAML key (`--adapter DIR` of merge.py) means the option.
        about: what `--help` says first.
        yaml_unless: when all of these options are given and no YAML file is named, the command has what it
            needs: no file is read and the Config is None. The default `train.yml` would belong to another run.
    Returns:
        The Config, and every option's value by name, with the default where it was not given.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(own, about))
        raise SystemExit(0)
    path, overrides, options = _read_command_line(argv, own)
    values = {name: options.get(name, option.default) for name, option in own.items()}
    if path is None and yaml_unless is not None and all(name in options for name in yaml_unless):
        for given in overrides.values():
            raise UserError(f"{given.at}: no YAML file is read here, so this key has no meaning. Name the file too.")
        return None, values
    path = path or DEFAULT_FILE
    return _resolve(_read_yaml(path), overrides, path), values


def _read_command_line(argv: list[str], own: dict[str, Option]) -> tuple[str | None, dict[str, Given], dict[str, Any]]:
    """Split the words into the YAML file, overrides of its keys, and the command's own options."""
    path, overrides, options = None, {}, {}
    hints = _hints(Config)
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            if path is not None:
                raise UserError(f"command line: {path} and {word} are both files, but a run has one. Remove one.")
            path = word
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        is_switch = name in own and own[name].kind is bool
        has_value = words and (words[0].lower() in ("true", "false") if is_switch else not words[0].startswith("--"))
        text = text if equals else words.pop(0) if has_value else "true"
        at = f"command line: --{name}"
        hint = own[name].kind if name in own else hints.get(name)
        given = Given(text if hint in (str, str | None) else _parse(text, at), at)
        if name not in own:
            overrides[name] = given._replace(value=None) if text in ("null", "~") else given
            continue
        try:
            options[name] = _convert(own[name].kind, given, [])
        except _Mismatch:
            raise UserError(f"{at} is {_show(text)}, but it takes {_type(hint)}: {own[name].meaning}.") from None
    return path, overrides, options


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which only the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        first: dict[str, int] = {}
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in first:
                    what = f"{name.value} is given twice (first in line {first[name.value]}), and only one can count"
                    raise yaml.constructor.ConstructorError(None, None, what, name.start_mark)
                first[name.value] = name.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _parse(text: str, at: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{at}: {text!r} is neither YAML nor JSON ({getattr(error, 'problem', error)}).") from None


def _read_yaml(path: str) -> dict[str, Given]:
    """The keys of a YAML file, each with the line it stands in."""
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        values = loader.construct_document(node) if node else {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Name the YAML file of the run: train.py path/to/train.yml.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a YAML file ({error}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {getattr(error, 'problem', error)}. Correct the YAML there.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, but a run is a map. Write lines such as lora_r: 16.")
    lines = {name.value: name.start_mark.line + 1 for name, _ in node.value} if node else {}
    places = {name: f"{path}, line {lines[name]}" if name in lines else path for name in values}
    return {name: Given(value, f"{places[name]}: {name}") for name, value in values.items()}


def help_text(own: dict[str, Option] | None = None, about: str = "") -> str:
    """What `--help` prints: the command's own options, then every key with type, default and meaning."""
    lines = [about] if about else []
    lines += [f"usage: {Path(sys.argv[0]).name} [{DEFAULT_FILE}] [--key value | --key=value ...]", ""]
    lines += ["Every key of the YAML file can be overridden, with _ or -; lists and maps as JSON or YAML text."]
    if own:
        lines += ["", "this command"]
        lines += [
            _entry(f"--{name}", _type(option.kind), option.default, option.meaning) for name, option in own.items()
        ]
    sections = {Config: "--", DatasetConfig: "", SpecialTokens: "", FsdpConfig: ""}
    titles = {DatasetConfig: "an entry of datasets", SpecialTokens: "special_tokens", FsdpConfig: "fsdp_config"}
    for cls, dashes in sections.items():
        hints = _hints(cls)
        lines += ["", titles[cls]] if cls in titles else []
        for f in _keys(cls):
            lines += ["", f.metadata["group"]] if f.metadata["group"] else []
            kind = " ".join(filter(None, (_type(hints[f.name]), _range(f))))
            lines.append(_entry(dashes + f.name, kind, _default(f), f.metadata["meaning"]))
    return "\n".join(lines)


def _entry(name: str, kind: str, default: Any, meaning: str) -> str:
    """One key of `--help`: name and type on a line, meaning and default below."""
    is_unset = default is None or dataclasses.is_dataclass(default)
    shown = "unset" if is_unset else "required" if default is MISSING else f"default: {_show(_plain(default))}"
    if "unset:" in meaning:
        shown = ""  # the meaning says it already
    body = textwrap.fill(
        "; ".join(filter(None, (meaning, shown))), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
    return f"  {name}  {kind}\n{body}"
