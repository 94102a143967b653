"""The configuration of a run: one model of its keys, one YAML file.

The field names are Axolotl's keys, so that one file runs in both and there is no second vocabulary. A key that is no
field stands in `axolotl_keys.yml` (old spelling, ignored, refused), or is an error that names the nearest one.
`rules.py` has the rules between keys, `keys.py` reads and checks one map, `options.py` has the options of the commands.

Left out: including other files, environment variables, schema versions. The complete Config is seen by `train.py` and
by what surrounds its loop (data, checkpoints, forecast, report); the model and all below it get plain values. Read
next: `train.yml`, then `train.py`.
"""

from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import AfterValidator, Field

from .keys import FATES, Fates, Keys, Many, PathText, key

Amount = Annotated[int | float, AfterValidator(lambda x: int(x) if x == int(x) else x)]  # 100.0 steps are 100
# Words of `fsdp`: each GPU holds its part of the base, or all of it.
IN_PARTS, REPLICATE = {"full_shard", "hybrid_shard"}, {"replicate", "no_shard"}
WHOLE = REPLICATE | {"shard_grad_op"}

RowType = Literal["alpaca", "chat_template", "completion", "prompt_completion"]
FileFormat = Literal["json", "jsonl", "csv", "parquet", "arrow", "text"]
EndTokens = Literal["turn", "last", "all", "none"]
Cadence = Literal["no", "steps", "epoch"]
Attention = Literal["flash_attention_2", "flash_attention_3", "sdpa", "flex_attention", "eager"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Fsdp = Literal["auto", "replicate", "full_shard", "shard_grad_op", "hybrid_shard", "no_shard", "auto_wrap", "offload"]

FSDP_MEANING = """full_shard: each GPU holds its part of the base; replicate: all of it; auto: what memory allows;
unset: full_shard with fsdp_config or fsdp_version: 2, else auto"""
ShardingStrategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]

# A map in a file is laid over the default, so that it needs to say only what differs.
MAPPINGS = {"role": "role", "content": "content"}
Mappings = Annotated[dict[str, str], AfterValidator(lambda given: MAPPINGS | given)]


class FrameConfig(Keys):
    """`type` of a data set as a map: which columns a row has, and which words stand around them."""

    format: str = key("prompt of a row with an input; {instruction}, {input} stand for it", "{instruction} {input} ")
    no_input_format: str | None = key('prompt of a row without one; unset: as format, or "{instruction} "', None)
    system_format: str = key("stands in front where there is a system text; {system} stands for it", "{system}")
    system_prompt: str = key("system text of rows that have none", "")
    field_system: str = key("column with the system text", "system")
    field_instruction: str = key("column with the instruction", "instruction")
    field_input: str = key("column with the input", "input")
    field_output: str = key("column with what is to be written", "output")


class DatasetConfig(Keys):
    """One entry of `datasets` or `test_datasets`."""

    fates: ClassVar[Fates] = FATES["dataset"]

    path: PathText = key("a file, a folder, or the name of a data set on the hub")
    type: RowType | FrameConfig = key("how a row becomes text; a map describes columns and text of your own")
    ds_type: FileFormat | None = key("file format; unset: by the suffix", None)
    data_files: Many[PathText] = key("the files of a folder or a hub data set to read", ())
    split: str | None = key("split of a folder or hub data set, or a part of one: train[:20%]; unset: train", None)
    name: str | None = key("configuration of a data set whose card lists several", None)
    revision: str | None = key("branch, tag or commit of a hub data set", None)
    field: str = key("completion: the column with the text", "text")
    field_messages: str = key("chat_template: the column with the list of messages", "messages")
    message_property_mappings: Mappings = key("chat_template: the template's name -> this file's name", MAPPINGS)
    roles: dict[str, Many[str]] = key("role of the template -> its names in this file", {})
    roles_to_train: Many[str] = key("roles that are learnt, by the template's names or this file's", ("assistant",))
    message_field_training: str | None = key("chat_template: if a message is learnt; unset: weight, train", None)
    field_tools: str = key("chat_template: the column with the list of tools, if there are any", "tools")
    field_system: str = key("chat_template: the column with a system text, if no message has one", "system")
    field_instruction: str | None = key("chat_template: the column with a question, in place of messages", None)
    field_output: str | None = key("chat_template: the column with the answer to it", None)
    train_on_eos: EndTokens = key("supervised end tokens: of trained turns, of the last, of all, none", "turn")
    chat_template: str | None = key("template of this file only; unset: the run's chat_template", None)
    chat_template_jinja: str | None = key("its Jinja text, or the path of a file with it", None)


class SpecialTokens(Keys):
    """Tokens to use in place of the tokenizer's own; each must be in its vocabulary."""

    fates: ClassVar[Fates] = FATES["special_tokens"]

    bos_token: str | None = key("begin of text", None)
    eos_token: str | None = key("end of text", None)
    pad_token: str | None = key("padding; may equal the end token: padding is masked by position", None)
    unk_token: str | None = key("unknown", None)
    additional_special_tokens: Many[str] = key("more tokens that text never becomes by chance", ())


class BnbConfig(Keys):
    """How bitsandbytes is asked to quantise. There is one way here; other values are errors."""

    fates: ClassVar[Fates] = FATES["bnb"]

    load_in_4bit: bool = key("accepted: the key of the same name above decides", True)
    bnb_4bit_quant_type: Literal["nf4"] = key("the levels", "nf4")
    bnb_4bit_use_double_quant: Literal[True] = key("quantise the scales too", True)


class FsdpConfig(Keys):
    """How the base model is spread over several GPUs. Keys may carry Axolotl's older prefix `fsdp_`."""

    fates: ClassVar[Fates] = FATES["fsdp"]

    offload_params: bool = key("keep the shards of the base in host memory", False)
    reshard_after_forward: bool = key("drop gathered weights after the forward, gather again in backward", True)
    state_dict_type: str | None = key("accepted: an adapter is always saved complete", None)
    cpu_ram_efficient_loading: bool = key("accepted: tensors are always streamed", True)
    auto_wrap_policy: str | None = key("accepted: the unit is always the decoder layer", None)
    transformer_layer_cls_to_wrap: str | None = key("accepted: the unit is always the decoder layer", None)
    sharding_strategy: ShardingStrategy | None = key("older place of fsdp: NO_SHARD is replicate", None)
    activation_checkpointing: bool | None = key("older place of gradient_checkpointing; unset: false", None)


class Config(Keys):
    """One run. Field names are Axolotl's YAML keys.

    Fields whose default is None and that stand in `DERIVED` are filled in by `make_config` and `load_config`.
    """

    fates: ClassVar[Fates] = FATES["run"]

    base_model: PathText = key("Hugging Face folder, .gguf file, or hub name", group="model")
    adapter: Literal["qlora", "lora"] = key("qlora: over a 4-bit base; lora: over a 16-bit base")
    load_in_4bit: bool = key("quantise the linear layers of the blocks to NF4; unset: true for qlora", None)
    keep_gguf_blocks: bool = key("do not: train over the blocks of a .gguf file, as they are in it", False)
    bnb_config_kwargs: BnbConfig = key("accepted: there is one way to quantise", BnbConfig())
    output_dir: PathText = key("folder of the adapter, checkpoints, metrics and report", "./model-out")
    overwrite_output_dir: bool = key("remove the run that output_dir holds; false: refuse to write over it", False)
    special_tokens: SpecialTokens = key("tokens in place of the tokenizer's own", SpecialTokens())
    tokens: Many[str] = key("more special tokens; the vocabulary must have them: the embedding is not trained", ())
    bf16: bool | Literal["auto"] = key("compute in bfloat16; auto: where the hardware has it, else float32", "auto")
    tf32: bool | Literal["auto"] = key("TensorFloat-32 for float32 products on a GPU", "auto")
    attn_implementation: Attention | None = key("wanted attention kernel; all of them are exact", None)

    lora_r: int | None = key("rank of the update", None, ge=1, le=65536, group="LoRA")
    lora_alpha: Amount | None = key("the update is scaled by lora_alpha / lora_r", None, gt=0, le=1_000_000)
    lora_dropout: float = key("share of an adapter's inputs that is dropped in training", 0.0, ge=0, le=0.99)
    lora_target_linear: bool = key("adapt all linear layers of the blocks; unset: if no modules are named", None)
    lora_target_modules: Many[str] = key("layers to adapt: ends of names (q_proj), full names, regular expression", ())
    lora_model_dir: PathText | None = key("start from the adapter in this folder", None)
    peft_use_rslora: bool = key("scale by lora_alpha / sqrt(lora_r) instead", False)
    peft_use_dora: bool = key("DoRA: learn the length of every row of a weight apart from its direction", False)

    datasets: Many[DatasetConfig] = key("training data, a list of maps", group="data")
    test_datasets: Many[DatasetConfig] = key("evaluation data, a list of maps", ())
    val_set_size: Amount = key("evaluation rows taken from datasets: a share below 1, else a count", 0, ge=0)
    chat_template: str | None = key("tokenizer_default, a built-in name, or jinja", None)
    chat_template_jinja: str | None = key("a Jinja template, or the path of a file with one", None)
    default_system_message: str | None = key("system message of conversations that have none", None)
    eot_tokens: Many[str] = key("accepted: the chat template shows how a turn ends; must be in the vocabulary", ())
    train_on_inputs: bool = key("count the prompt in the loss too", False)
    sequence_len: int = key("tokens in a row, at most", 512, ge=2, le=100_000_000)
    excess_length_strategy: Literal["drop", "truncate", "raise"] = key("samples longer than a row; counted", "drop")
    skip_invalid_rows: bool = key("leave out rows that cannot be used, and report how many; false: stop", False)
    sample_packing: bool = key("several samples in a row, which do not see each other", False)
    eval_sample_packing: bool | None = key("accepted: evaluation packs always; packed rows do not see each other", None)
    pad_to_sequence_len: bool | None = key("pad every row to sequence_len; unset: where fixed shapes pay", None)
    dataset_prepared_path: PathText = key("folder that keeps tokenised data between runs", "last_run_prepared")
    shuffle_merged_datasets: bool = key("mix the rows of all datasets, anew in every epoch", True)
    seed: int = key("of the data order, the adapter's start and dropout", 42, ge=0, le=4294967295)
    full_determinism: bool = key("GPU: sums in a fixed order, so that runs are equal bit for bit; slower", False)

    learning_rate: float = key("peak, reached after the warm-up", gt=0, le=1, group="training")
    micro_batch_size: int = key("rows per GPU in one forward", 1, ge=1, le=1_000_000)
    gradient_accumulation_steps: int = key("forwards and backwards per optimizer step", 1, ge=1, le=1_000_000)
    num_epochs: float = key("passes over the training data", 1.0, gt=0, le=1_000_000)
    max_steps: int | None = key("optimizer steps after which to stop", None, ge=1, le=100_000_000)
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = key("after the warm-up", "cosine")
    cosine_min_lr_ratio: float | None = key("cosine ends at this share of the peak; unset: 0", None, ge=0, le=1)
    warmup_steps: int = key("optimizer steps of linear warm-up", 0, ge=0)
    warmup_ratio: float = key("warm-up as a share of all steps, rounded up", 0.0, ge=0, le=1)
    optimizer: Optimizer = key("AdamW: plain, fused, 8-bit state, state paged to host memory", "adamw_torch_fused")
    weight_decay: float = key("decoupled, per step times the learning rate", 0.0, ge=0)
    adam_beta1: float = key("decay of the mean of gradients", 0.9, ge=0, lt=1)
    adam_beta2: float = key("decay of the mean of squared gradients", 0.999, ge=0, lt=1)
    adam_epsilon: float = key("added to the denominator", 1e-8, gt=0)
    loraplus_lr_ratio: float | None = key("LoRA+: lora_B learns so many times as fast as lora_A", None, gt=0)
    neftune_noise_alpha: float | None = key("NEFTune: noise on the embeddings in training", None, gt=0)
    max_grad_norm: float = key("clip the global gradient norm; 0: do not clip", 1.0, ge=0)
    skip_nonfinite_steps: bool = key("leave out steps whose loss or gradient is NaN or infinite; false: stop", False)
    gradient_checkpointing: bool | Literal["offload", "auto"] = key(
        "recompute blocks in backward; offload: keep their inputs in host memory; auto: if memory needs it", None
    )
    fp8: bool | Literal["backward"] = key(
        "matmuls with the 4-bit weights in fp8, on GPUs that have it; backward: those of the backward pass only", False
    )

    logging_steps: int = key("optimizer steps between log lines", 1, ge=1, group="cadence")
    eval_strategy: Cadence = key("when to evaluate; unset: by the two keys below, else every epoch", None)
    eval_steps: Amount | None = key("steps between evaluations; below 1: a share of all", None, ge=0)
    evals_per_epoch: int | None = key("evaluations in an epoch; 0: none", None, ge=0)
    eval_table_size: int = key("questions to answer at each evaluation, printed, in the log and the report", 0, ge=0)
    eval_max_new_tokens: int = key("the longest of these answers, in tokens", 128, ge=1)
    eval_batch_size: int | None = key("accepted: evaluation takes one packed row at a time", None, ge=1)
    save_strategy: Cadence = key("when to save; unset: by the two keys below, else every epoch", None)
    save_steps: Amount | None = key("steps between checkpoints; below 1: a share of all", None, ge=0)
    saves_per_epoch: int | None = key("checkpoints in an epoch; 0: none", None, ge=0)
    save_total_limit: int = key("checkpoints to keep, the newest ones", 4, ge=1)
    save_first_step: bool = key("a checkpoint after the first step too", False)
    load_best_model_at_end: bool = key("end with the best evaluation's model; unset: if early_stopping_patience", None)
    metric_for_best_model: Literal["eval_loss", "loss"] = key("what is best: the held-out loss", "eval_loss")
    early_stopping_patience: int | None = key("stop after so many evaluations without a better one", None, ge=1)
    loss_watchdog_threshold: float | None = key("stop when the loss stays above this", None, gt=0)
    loss_watchdog_patience: int = key("so many logged losses in a row", 3, ge=1)
    resume_from_checkpoint: PathText | None = key("resume from this checkpoint-STEP folder", None)
    auto_resume_from_checkpoints: bool = key("resume from the newest checkpoint in output_dir, if any", False)

    use_tensorboard: bool = key("write event files to output_dir/tensorboard too", False, group="logs")
    use_wandb: bool = key("send metrics to Weights & Biases; unset: if wandb_project is given", None)
    wandb_project: str | None = key("its project there", None)
    wandb_entity: str | None = key("user or team there", None)
    wandb_name: str | None = key("name of the run there", None)
    wandb_mode: Literal["online", "offline", "disabled"] | None = key("offline writes to output_dir alone", None)
    wandb_run_id: str | None = key("continue this run there", None)

    fsdp: Many[Fsdp] = key(FSDP_MEANING, (), group="several GPUs")
    shard_optimizer_state: bool = key("each GPU keeps its part of the moments and updates its part of LoRA", False)
    fsdp_version: Literal[1, 2] | None = key("2: PyTorch's fully_shard shards the base; else our own store", None)
    fsdp_config: FsdpConfig | None = key("spread the base over the GPUs", None)

    notes: tuple[str, ...] = Field((), exclude=True, repr=False)  # to be printed once at start; not a key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.plain() == other.plain()  # whatever was noted

    @property
    def all_datasets(self) -> tuple[DatasetConfig, ...]:
        return *self.datasets, *self.test_datasets

    @property
    def base_form(self) -> dict[str, Any]:
        """How the linear layers of the base are held, as `pretrained.open_model` takes it."""
        kept = self.keep_gguf_blocks
        return {"load_in_4bit": self.load_in_4bit and not kept, "keep_gguf_blocks": kept}

    @property
    def sharding(self) -> Literal["auto", "replicate", "full_shard"]:
        """Where the base goes when several GPUs train."""
        keeps_gathered = self.fsdp_config and not self.fsdp_config.reshard_after_forward
        if keeps_gathered or self.fsdp_words & WHOLE:
            return "replicate"
        asks = self.fsdp or self.fsdp_config or self.fsdp_version == 2
        return "auto" if "auto" in self.fsdp or not asks else "full_shard"

    @property
    def fsdp_words(self) -> set[str]:
        """The words of `fsdp`, and of `fsdp_config` in its place."""
        strategy = self.fsdp_config and self.fsdp_config.sharding_strategy
        return {*self.fsdp, *([strategy.lower()] if strategy else [])}

    @property
    def offload_params(self) -> bool:
        return "offload" in self.fsdp or bool(self.fsdp_config and self.fsdp_config.offload_params)

    @property
    def row_width(self) -> int:
        """Tokens that every row is padded to; 0: the rows of a micro-batch are laid one after another.

        Packed rows are nearly full anyway, and tensors of one size find their place in memory again.
        """
        pad = self.sample_packing if self.pad_to_sequence_len is None else self.pad_to_sequence_len
        return self.sequence_len if pad else 0

    def to_yaml(self) -> str:
        """The resolved run, every default filled in. Loads again to an equal Config."""
        text = yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=110)
        is_plain = not {*text} & {*"\x85\u2028\u2029\ufeff"}  # which YAML would read as line breaks
        return text if is_plain else yaml.safe_dump(self.plain(), sort_keys=False, width=110)
