"""Every key, every rule between keys, every table of other keys; and their door: types, ranges, spelling, lines."""

import ast
import dataclasses
import operator
import textwrap
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from paths import ROOT

from nanoqlora.config.errors import UserError
from nanoqlora.config.keys import PathText, fate_of, key, keys_of, kinds_of
from nanoqlora.config.load import load_command, load_config, make_config
from nanoqlora.config.options import RunOptions
from nanoqlora.config.rules import CHECKS, DERIVED, EXCLUSIVE
from nanoqlora.config.schema import (
    BnbConfig,
    Config,
    DatasetConfig,
    FsdpConfig,
    SpecialTokens,
)
from nanoqlora.data.prompts import PromptFormat

LEAST = {
    "base_model": "m",
    "adapter": "qlora",
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 1e-4,
    "datasets": [{"path": "d.jsonl", "type": "alpaca"}],
}

# A file that trains in Axolotl today, with its empty values, its old FSDP spellings and its switched-off keys.
AXOLOTL_FILE = """\
base_model: NousResearch/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: data/pirate.jsonl
    ds_type: json
    type: alpaca
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: true
lora_r: 64
lora_alpha: 32
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: true
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_sync_module_states: true
  fsdp_offload_params: false
  fsdp_use_orig_params: false
  fsdp_cpu_ram_efficient_loading: true
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_sharding_strategy: FULL_SHARD
special_tokens:
  pad_token: "<|end_of_text|>"
"""


# Every key of Axolotl 0.18: of a run, of an entry of datasets, of fsdp_config.
AXOLOTL_KEYS = {
    Config: """
accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 adapter
added_tokens_overrides attn_implementation auto_find_batch_size auto_resume_from_checkpoints axolotl_config_path
base_model base_model_config batch_flattening batch_size bench_dataset bench_split bf16 bfloat16
bnb_config_kwargs center_rewards_coefficient chat_template chat_template_jinja chat_template_kwargs
chunked_cross_entropy chunked_cross_entropy_num_chunks cls_model_config comet_api_key comet_experiment_config
comet_experiment_key comet_mode comet_online comet_project_name comet_workspace context_parallel_size
cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha curriculum_sampling dataloader_drop_last
dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataset_exact_deduplication
dataset_keep_in_memory dataset_num_proc dataset_prepared_path dataset_processes dataset_shard_idx
dataset_shard_num datasets ddp ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout
deepcompile deepspeed default_system_message device device_map dion_lr dion_momentum dion_rank_fraction
dion_rank_multiple_of do_bench_eval do_causal_lm_eval dp_replicate_size dp_shard_size dpo_beta
dpo_generate_during_eval dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free
dpo_use_liger_kernel dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha eaft_k
eager_attention early_stopping_patience ebft embedding_lr embedding_lr_scale embeddings_skip_upcast eot_tokens
eval_batch_size eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len eval_steps
eval_strategy eval_table_size evals_per_epoch evaluation_strategy excess_length_strategy
experimental_skip_move_to_device experts_implementation fix_untrained_tokens flash_attention
flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum flex_attention
flex_attn_compile_kwargs float16 float32 fp16 fp32_norm_classes fp32_norms fp8 fp8_enable_fsdp_float8_all_gather
freeze_mm_modules fsdp fsdp_config fsdp_final_state_dict_type fsdp_version fused_attn_kernel gc_collect_steps
gc_steps gemma4_hybrid_attn_impl generate_samples generation_do_sample generation_max_new_tokens
generation_prompt_ratio generation_temperature generation_top_k generation_top_p gptq gpu_memory_limit
gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs gradio_max_new_tokens
gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title greater_is_better
group_by_length heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id hub_revision hub_strategy
image_resize_algorithm image_size include_tkps include_tokens_per_second is_falcon_derived_model
is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model jagged_restart_anneal_steps
jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight kto_undesirable_weight
large_head_attention layer_offloading learning_rate lisa_layers_attribute lisa_n_layers lisa_step_interval
llama4_linearized_experts load_best_model_at_end load_in_4bit load_in_8bit local_rank loftq_config logging_steps
lora_alpha lora_alpha_pattern lora_dropout lora_embedding_kernel lora_fan_in_fan_out lora_mlp_kernel
lora_model_dir lora_modules_to_save lora_o_kernel lora_on_cpu lora_qkv_kernel lora_r lora_rank_pattern
lora_target_linear lora_target_modules lora_target_parameters loraplus_lr_embedding loraplus_lr_ratio
loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups lr_quadratic_warmup
lr_scheduler lr_scheduler_kwargs max_grad_norm max_memory max_packed_sequence_len max_prompt_len max_steps
mean_resizing_embeddings merge_lora merge_method metric_for_best_model micro_batch_size min_sample_len
mlflow_experiment_name mlflow_run_name mlflow_tracking_uri model_quantization_config
model_quantization_config_kwargs multipack_real_batches neftune_noise_alpha noisy_embedding_alpha
num_dataset_shards_to_save num_epochs num_generation_samples num_labels optim_args optim_target_modules
optimizer orpo_alpha otel_metrics_host otel_metrics_port output_dir overrides_of_model_config
overrides_of_model_kwargs pad_to_multiple_of pad_to_sequence_len peft peft_autocast_adapter_dtype
peft_ensure_weight_tying peft_init_lora_weights peft_layer_replication peft_layers_pattern
peft_layers_to_transform peft_trainable_token_indices peft_use_dora peft_use_rslora plugins pose_max_context_len
pose_num_chunks pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable pretrain_multipack_attn
pretrain_multipack_buffer_size pretraining_dataset pretraining_sample_concatenation process_reward_model
processor_kwargs processor_type profiler_steps profiler_steps_start push_dataset_to_hub qat
qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap
qlora_sharded_model_loading quantization quantize_moe_experts ray_num_workers ray_run_name reinit_weights relora
relora_cpu_offload relora_prune_method relora_prune_ratio remove_unused_columns resize_token_embeddings_to_32x
resources_per_worker resume_from_checkpoint revision_of_model reward_model ring_attn_func rl rl_beta
role_boundaries rope_scaling rpo_alpha s2_attention sage_attention sample_packing sample_packing_bin_size
sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method sample_packing_sequentially
save_first_step save_only_model save_safetensors save_steps save_strategy save_total_limit saves_per_epoch
scaling_softmax scaling_softmax_bias scaling_softmax_factor sdp_attention sdpa_varlen seed
selective_checkpointing sequence_len sequence_parallel_degree shrink_embeddings shuffle_before_merging_datasets
shuffle_merged_datasets simpo_gamma skip_prepare_dataset special_tokens streaming
streaming_multipack_buffer_size strict tensor_parallel_size test_datasets tf32 tiled_mlp tiled_mlp_num_shards
tiled_mlp_use_original_mlp tokenizer_config tokenizer_legacy tokenizer_save_jinja_files tokenizer_type
tokenizer_use_fast tokenizer_use_mistral_common tokens torch_compile torch_compile_backend torch_compile_mode
torch_compile_options torch_empty_cache_steps torchdistx_path total_num_tokens total_supervised_tokens
trackio_project_name trackio_run_name trackio_space_id train_on_inputs trainer_cls trl trust_remote_code
type_of_model unfrozen_parameters use_comet use_eaft use_kernels use_mlflow use_onebitllms use_otel_metrics
use_pose use_ray use_tensorboard use_trackio use_wandb val_set_size vllm wandb_entity wandb_log_model wandb_mode
wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps weight_decay world_size
xformers_attention
""",
    DatasetConfig: """
chat_template chat_template_jinja conversation data_files drop_system_message ds_type field field_human
field_messages field_model field_thinking field_tools input_format input_transform logprobs_field
message_field_content message_field_role message_field_training message_field_training_detail
message_property_mappings name path preprocess_shards revision roles roles_to_train shards shards_idx split
split_thinking temperature template_thinking_key train_on_eos train_on_eot trust_remote_code type
""",
    FsdpConfig: """
activation_checkpointing auto_wrap_policy cpu_offload_pin_memory cpu_ram_efficient_loading final_state_dict_type
fsdp_version min_num_params mixed_precision_policy offload_params reshard_after_forward state_dict_type
sync_module_states transformer_layer_cls_to_wrap use_orig_params
""",
}


def least(**more) -> dict:
    return LEAST | more


def written(folder: Path, text: str) -> str:
    path = folder / "run.yml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


def least_file(folder: Path, more: str = "") -> str:
    return written(folder, yaml.safe_dump(LEAST) + textwrap.dedent(more))


MAPS = (Config, DatasetConfig, SpecialTokens, BnbConfig, FsdpConfig)
HARMLESS = Config.fates.harmless


def rows(table: str) -> list[tuple[type, str, str]]:
    """(map, key, reason) of every row of one fate; a pattern stands as one of the keys that it covers."""
    tables = [(cls, why, names) for cls in MAPS for why, names in getattr(cls.fates, table).items()]
    return [(cls, name.replace("*", "x"), why) for cls, why, names in tables for name in names.split()]


def present_name(new: str | dict) -> str:
    """The key that an old one stands for."""
    return new.partition(".")[0] if isinstance(new, str) else next(iter(new))


def within_map(cls: type, name: str, value: object) -> dict:
    """The least run, with one more key in the map that `cls` describes."""
    if cls is DatasetConfig:
        return least(datasets=[LEAST["datasets"][0] | {name: value}])
    nested = {SpecialTokens: "special_tokens", FsdpConfig: "fsdp_config", BnbConfig: "bnb_config_kwargs"}.get(cls)
    return least(**{nested: {name: value}}) if nested else least(**{name: value})


# ---- a real file --------------------------------------------------------------------------------------------------


def test_an_empty_list_means_nobody_where_the_default_names_somebody():
    """`roles_to_train: []` of Axolotl: only the messages that message_field_training marks."""
    data = {"path": "x.jsonl", "type": "chat_template", "data_files": []}
    for entry, roles in (
        ({"roles_to_train": []}, ()),
        ({"roles_to_train": None}, ("assistant",)),
        ({}, ("assistant",)),
    ):
        run = {"base_model": "m", "adapter": "qlora", "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3}
        dataset = make_config(run | {"datasets": [data | entry], "seed": [], "output_dir": []}).datasets[0]
        assert dataset.roles_to_train == roles and dataset.data_files == ()


def test_axolotl_file_runs_as_it_stands(tmp_path):
    """Values arrive typed, empty keys are unset, and exactly the harmless keys are listed as ignored."""
    c = load_config([written(tmp_path, AXOLOTL_FILE)])
    assert (c.lora_r, c.lora_alpha, c.lora_dropout, c.learning_rate) == (64, 32, 0.05, 2e-4)
    assert (c.val_set_size, c.sequence_len, c.num_epochs, c.tf32, c.bf16) == (0.05, 4096, 2.0, False, "auto")
    assert c.datasets == (DatasetConfig(path="data/pirate.jsonl", ds_type="json", type="alpaca"),)
    assert c.special_tokens == SpecialTokens(pad_token="<|end_of_text|>")
    assert c.fsdp == ("full_shard", "auto_wrap")
    assert c.fsdp_config.transformer_layer_cls_to_wrap == "LlamaDecoderLayer"
    assert c.lora_model_dir is None and c.resume_from_checkpoint is None
    assert c.eval_strategy == c.save_strategy == "steps" and c.eval_sample_packing and c.eval_batch_size == 2

    ignored = [note.split(": ", 1)[1].split(" is ignored")[0] for note in c.notes if "is ignored" in note]
    assert ignored == [
        "model_type",
        "tokenizer_type",
        "gradient_checkpointing_kwargs",
        "fsdp_config.fsdp_limit_all_gathers",
        "fsdp_config.fsdp_sync_module_states",
        "fsdp_config.fsdp_use_orig_params",
    ]
    assert sum("mean over all supervised tokens" in note for note in c.notes) == 1
    used = next(note for note in c.notes if " keys used: " in note)
    assert used.startswith(f"{tmp_path / 'run.yml'}: 31 keys used: base_model, load_in_4bit, datasets,")
    filled = next(note for note in c.notes if note.startswith("filled in: "))
    for words in ("lora_target_linear", "eval_batch_size 2", "save_strategy steps", "./outputs/qlora-out/train.yml"):
        assert (words in filled) is (words != "lora_target_linear")
    assert len(c.notes) == len(ignored) + 3


@pytest.mark.parametrize("name", ["train.yml", *(f"configs/{path.name}" for path in (ROOT / "configs").iterdir())])
def test_our_own_files_need_no_notes_on_keys(name):
    notes = load_config([str(ROOT / name)]).notes
    assert not [note for note in notes if "ignored" in note or "gives way" in note]


@pytest.mark.parametrize("text", [AXOLOTL_FILE, (ROOT / "train.yml").read_text(), yaml.safe_dump(LEAST)])
def test_resolved_yaml_loads_to_an_equal_config(tmp_path, text):
    """Round trip: equal, not close; and the second text is the first, so nothing drifts."""
    first = load_config([written(tmp_path, text)])
    second = load_config([written(tmp_path, first.to_yaml())])
    assert second == first
    assert second.to_yaml() == first.to_yaml()
    assert set(yaml.safe_load(first.to_yaml())) == set(keys_of(Config))


# ---- the tables ---------------------------------------------------------------------------------------------------


def test_no_key_has_two_fates():
    """Fields, old spellings and the two lists of patterns are disjoint, also through their wildcards."""
    for cls in MAPS:
        fates = cls.fates
        fields, old = [*keys_of(cls)], [*fates.old]
        patterns = [n for table in (fates.ignored, fates.refused) for names in table.values() for n in names.split()]
        names = [*fields, *old, *(pattern.replace("*", "x") for pattern in patterns)]
        assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
        for name in names:
            claims = (name in fields) + (name in old) + sum(fnmatchcase(name, p) for p in patterns)
            assert claims == 1, f"{cls.__name__}.{name} has {claims} fates"
        assert {present_name(new) for new in fates.old.values()} <= set(fields)
        assert {*fates.old_values, *fates.refused_values} <= set(fields)


def names_read() -> set[str]:
    """Attributes of a configuration, by the names that such objects have, and keys of one as a mapping."""
    found, owners = set(), ("config", "c", "self", "dataset", "special_tokens", "fsdp_config")
    for path in [ROOT / "train.py", *ROOT.glob("nanoqlora/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", None)
                found |= {node.attr} if owner in owners else set()
            elif isinstance(node, ast.Subscript) and getattr(node.value, "id", None) == "config":
                found.add(getattr(node.slice, "value", None))
    return found


def test_every_field_is_read_somewhere():
    """A key that nothing reads would be accepted and do nothing, unless it says that it is only accepted."""
    words = names_read()
    words |= {f"{name}_token" for name in ("bos", "eos", "pad", "unk")}  # the names are put together there
    words |= {"ds_type", "data_files", "split", "name", "revision", "tokens", "eot_tokens"}  # handed on together
    words |= {"additional_special_tokens", *(field.name for field in dataclasses.fields(PromptFormat))}  # as well
    only_accepted = ("accepted", "wanted", "what is best")
    fields = {n: f for cls in (Config, DatasetConfig, SpecialTokens, FsdpConfig) for n, f in keys_of(cls).items()}
    unread = [n for n, f in fields.items() if n not in words and not f.description.startswith(only_accepted)]
    assert not unread


@pytest.mark.parametrize("cls", AXOLOTL_KEYS)
def test_every_key_of_axolotl_has_a_fate(cls):
    unknown = [
        name for name in AXOLOTL_KEYS[cls].split() if fate_of(cls, name.removeprefix(cls.fates.prefix))[0] == "unknown"
    ]
    assert not unknown


def test_what_is_derived_or_exclusive_is_a_key():
    names = set(keys_of(Config))
    assert {*DERIVED, *(name for pair in EXCLUSIVE for name in pair)} <= names
    assert all(fate_of(Config, name)[0] == "refused" for name in HARMLESS)


@pytest.mark.parametrize(("cls", "name", "reason"), rows("ignored"))
def test_ignored_key_is_accepted_and_named_once(cls, name, reason):
    c = make_config(within_map(cls, name, "x"))
    assert len([note for note in c.notes if f"{name} is ignored" in note and reason in note]) == 1
    assert c == make_config(within_map(cls, name, None) if cls is Config else within_map(cls, name, "y"))
    assert not any("ignored" in note for note in make_config(within_map(cls, name, None)).notes)


@pytest.mark.parametrize(("cls", "name", "advice"), rows("refused"))
def test_refused_key_says_what_to_do_and_may_stay_when_off(cls, name, advice):
    with pytest.raises(UserError, match=name) as error:
        make_config(within_map(cls, name, "x"))
    assert advice[1:] in str(error.value)
    with pytest.raises(UserError):
        make_config(within_map(cls, name, True))
    for off in (None, False, 0, "", [], *HARMLESS.get(name, ())):
        assert make_config(within_map(cls, name, off)) == make_config(within_map(cls, name, None))


OLD = {
    "evaluation_strategy": ("no", "no"),
    "noisy_embedding_alpha": (5, 5.0),
    "flash_attention": (True, "flash_attention_2"),
    "sdp_attention": (True, "sdpa"),
    "flex_attention": (True, "flex_attention"),
    "eager_attention": (True, "eager"),
    "bfloat16": (True, True),
    "float32": (True, False),
    "message_field_role": ("from", {"role": "from", "content": "content"}),
    "message_field_content": ("value", {"role": "role", "content": "value"}),
    "train_on_split": ("test", "test"),
    "bos": ("<s>", "<s>"),
    "eos": ("</s>", "</s>"),
    "pad": ("</s>", "</s>"),
    "unk": ("?", "?"),
}


@pytest.mark.parametrize(("cls", "old"), [(cls, old) for cls in MAPS for old in cls.fates.old])
def test_old_spelling_is_translated(cls, old):
    value, expected = OLD[old]
    c = make_config(within_map(cls, old, value))
    owner = {Config: c, DatasetConfig: c.datasets[0], SpecialTokens: c.special_tokens}[cls]
    assert getattr(owner, present_name(cls.fates.old[old])) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [(n, v, e) for n, values in Config.fates.old_values.items() for v, e in values.items()],
)
def test_old_value_is_translated(name, value, expected):
    assert getattr(make_config(least(**{name: value})), name) == expected


def test_old_and_new_spelling_may_agree_but_not_differ(tmp_path):
    assert make_config(least(sdp_attention=True, attn_implementation="sdpa")).attn_implementation == "sdpa"
    assert make_config(least(flash_attention=False)).attn_implementation is None
    with pytest.raises(UserError, match="contradicts"):
        make_config(least(sdp_attention=True, attn_implementation="eager"))
    with pytest.raises(UserError, match="true or false"):
        make_config(least(sdp_attention="maybe"))
    c = load_config([least_file(tmp_path, "flash_attention: true"), "--attn_implementation", "eager"])
    assert c.attn_implementation == "eager"  # an override wins over either spelling in the file


def test_both_message_fields_of_old_make_one_map():
    entry = {"path": "d", "type": "chat_template", "message_field_role": "from", "message_field_content": "value"}
    c = make_config(least(datasets=[entry]))
    assert c.datasets[0].message_property_mappings == {"role": "from", "content": "value"}


@pytest.mark.parametrize("entry", [{"type": "sharegpt"}, {"type": "sharegpt.load_role"}, {"conversation": "chatml"}])
def test_sharegpt_names_its_replacement(entry):
    with pytest.raises(UserError, match="chat_template.*message_property_mappings"):
        make_config(least(datasets=[{"path": "d", "type": "chat_template"} | entry]))


def test_keys_that_a_type_does_not_read_are_named():
    """And none where each is read, or has its default."""
    entry = {"path": "d", "type": "chat_template", "roles": {"user": ["q"]}, "field_messages": "chat", "field": "text"}
    for kind, unread in {
        "chat_template": None,
        "alpaca": "field_messages, roles",
        "completion": "field_messages, roles",
    }.items():
        notes = [
            note for note in make_config(least(datasets=[entry | {"type": kind}])).notes if "does not read" in note
        ]
        assert notes == ([f"data d: {unread} ignored, which type: {kind} does not read"] if unread else [])
    custom = {"path": "d", "type": {"field_output": "a"}, "field": "x"}
    assert "data d: field ignored, which type: a map does not read" in make_config(least(datasets=[custom])).notes


def test_a_split_of_a_single_file_is_named(tmp_path):
    """It has none; unless its name tells the same, or a part of its rows is all that is meant."""
    for name in ("a.jsonl", "test.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')

    def notes(path: str, split: str) -> list[str]:
        entry = {"path": str(path), "type": "completion", "split": split}
        return [note for note in make_config(least(datasets=[entry])).notes if "split" in note.partition(":")[2][:7]]

    assert notes(tmp_path / "a.jsonl", "test[:5]") == [
        f"data {tmp_path}/a.jsonl: split test ignored: a single file has no splits"
    ]
    for path, split in (("a.jsonl", "train"), ("a.jsonl", "train[:5]"), ("test.jsonl", "test"), ("", "test")):
        assert notes(tmp_path / path, split) == []


def test_plugins_that_only_make_things_faster_may_stay():
    assert make_config(least(plugins=list(HARMLESS["plugins"])))
    with pytest.raises(UserError, match="plugins"):
        make_config(least(plugins=[HARMLESS["plugins"][0], "my.Plugin"]))


@pytest.mark.parametrize(("one", "other"), EXCLUSIVE)
def test_two_ways_to_say_one_thing(tmp_path, one, other):
    """Both in one file is an error; the command line wins over the file, and says so; zero asks for nothing."""
    on = {"test_datasets": LEAST["datasets"], "warmup_ratio": 0.5, "auto_resume_from_checkpoints": True}
    on |= {"overwrite_output_dir": True}
    values = {name: on.get(name, "x" if name == "resume_from_checkpoint" else 2) for name in (one, other)}
    with pytest.raises(UserError, match=f"{one} and {other}"):
        make_config(least(**values))
    for mine, theirs in ((one, other), (other, one)):
        path = least_file(tmp_path, yaml.safe_dump({theirs: values[theirs]}))
        c = load_config([path, f"--{mine}", yaml.safe_dump(values[mine], default_flow_style=True)])
        assert getattr(c, mine) and not getattr(c, theirs)
        assert any(f"{theirs} gives way to --{mine}" in note for note in c.notes)
        assert getattr(load_config([path, f"--{mine}="]), theirs)


BROKEN = {
    "adapter: qlora": least(load_in_4bit=False),
    "keep_gguf_blocks trains over the few": least(adapter="lora", keep_gguf_blocks=True, base_model="m.gguf"),
    "keep_gguf_blocks trains over the blocks": least(keep_gguf_blocks=True),
    "fp8 multiplies": least(keep_gguf_blocks=True, base_model="m.gguf", fp8=True),
    "fp8 rounds": least(fp8=True, load_in_4bit=False, adapter="lora"),
    "fp8 is for": least(fp8="backward", bf16=False),
    "fp8 needs": least(fp8=True, peft_use_dora=True, lora_dropout=0.1),
    "lora_r is": least(lora_r=None),
    "lora_alpha is": least(lora_alpha=None),
    "lora_target_linear is": least(lora_target_linear=False),
    "chat_template is": least(chat_template="jinja"),
    "field_instruction and": least(datasets=[{"path": "d", "type": "alpaca", "field_instruction": "q"}]),
    "shard_optimizer_state cuts": least(shard_optimizer_state=True, loraplus_lr_ratio=16),
    "offload_params keeps": least(fsdp=["replicate"], fsdp_config={"offload_params": True}),
    "fsdp asks": least(fsdp=["full_shard", "replicate"]),
    "fsdp_version: 2 shards": least(fsdp_version=2, fsdp="replicate"),
    "eval_strategy contradicts": least(eval_strategy="epoch", eval_steps=5, val_set_size=0.1),
    "save_strategy contradicts": least(save_strategy="steps"),
    "eval_steps and": least(save_steps=2.5),
    "val_set_size is": least(val_set_size=2.5),
    "early_stopping_patience and": least(early_stopping_patience=2),
    "cosine_min_lr_ratio": least(cosine_min_lr_ratio=0.1, lr_scheduler="linear"),
}


@pytest.mark.parametrize(
    ("keys", "sharding", "offload"),
    [
        ({}, "auto", False),
        ({"fsdp": "auto"}, "auto", False),
        ({"fsdp": ["full_shard", "auto_wrap"]}, "full_shard", False),
        ({"fsdp": ["full_shard", "auto_wrap", "offload"]}, "full_shard", True),
        ({"fsdp": "hybrid_shard"}, "full_shard", False),
        ({"fsdp": ["shard_grad_op", "auto_wrap"]}, "replicate", False),
        ({"fsdp": "no_shard"}, "replicate", False),
        ({"fsdp": "replicate"}, "replicate", False),
        ({"fsdp_config": {"fsdp_offload_params": True}, "fsdp_version": 2}, "full_shard", True),
        ({"fsdp_version": 2}, "full_shard", False),
        ({"fsdp_version": 1}, "auto", False),
        ({"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}}, "replicate", False),
        ({"fsdp_config": {"reshard_after_forward": True}}, "full_shard", False),
        ({"fsdp_config": {"reshard_after_forward": False}}, "replicate", False),
        ({"fsdp_config": {"fsdp_sharding_strategy": "FULL_SHARD"}}, "full_shard", False),
        ({"fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}}, "replicate", False),
        ({"fsdp_config": {"sharding_strategy": "SHARD_GRAD_OP"}}, "replicate", False),
        ({"fsdp": "auto", "fsdp_config": {"activation_checkpointing": True}}, "auto", False),
    ],
)
def test_where_the_base_goes(keys, sharding, offload):
    """Axolotl's keys: what is kept gathered takes the memory of a whole base on every GPU, so it is one."""
    c = make_config(least(**keys))
    assert (c.sharding, c.offload_params) == (sharding, offload)


@pytest.mark.parametrize("message", CHECKS)
def test_every_check_can_fail(message):
    values = next(values for start, values in BROKEN.items() if message.startswith(start))
    with pytest.raises(UserError) as error:
        make_config(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, {"load_in_4bit": True, "lora_target_linear": True, "eval_strategy": "no", "save_strategy": "epoch"}),
        ({"adapter": "lora"}, {"load_in_4bit": False}),
        ({"lora_target_modules": "q_proj"}, {"lora_target_linear": False, "lora_target_modules": ("q_proj",)}),
        ({"chat_template_jinja": "{{ x }}"}, {"chat_template": "jinja"}),
        ({"sample_packing": True}, {"eval_sample_packing": True}),
        ({"micro_batch_size": 3}, {"eval_batch_size": 3}),
        ({"val_set_size": 10}, {"eval_strategy": "epoch"}),
        ({"val_set_size": 10, "eval_steps": 5}, {"eval_strategy": "steps"}),
        ({"val_set_size": 10, "evals_per_epoch": 0}, {"eval_strategy": "no"}),
        ({"val_set_size": 10, "evals_per_epoch": 4, "eval_strategy": False}, {"eval_strategy": "no"}),
        ({"evals_per_epoch": 4}, {"eval_strategy": "no"}),
        ({"saves_per_epoch": 2}, {"save_strategy": "steps"}),
        ({}, {"gradient_checkpointing": False}),
        ({"fsdp_config": {"activation_checkpointing": True}}, {"gradient_checkpointing": True}),
    ],
)
def test_unset_keys_follow_the_others(more, expected):
    c = make_config(least(**more))
    assert {name: getattr(c, name) for name in expected} == expected


def test_nothing_to_evaluate_is_said():
    assert any("nothing will be evaluated" in note for note in make_config(least(evals_per_epoch=4)).notes)


# ---- types, ranges, spelling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "2e-4", 2e-4),  # what YAML makes of 2e-4
        ("sequence_len", 512.0, 512),
        ("sequence_len", "512", 512),
        ("sequence_len", "1e3", 1000),
        ("num_epochs", 3, 3.0),
        ("sample_packing", "yes", True),
        ("sample_packing", "OFF", False),
        ("sample_packing", 1, True),
        ("bf16", "auto", "auto"),
        ("bf16", "false", False),
        ("gradient_checkpointing", "offload", "offload"),
        ("gradient_checkpointing", "true", True),
        ("val_set_size", 0.05, 0.05),
        ("val_set_size", 100.0, 100),
        ("lora_alpha", 0.5, 0.5),
        ("lora_target_modules", ["q_proj", "v_proj"], ("q_proj", "v_proj")),
        ("lora_target_modules", "q_proj", ("q_proj",)),
        ("fsdp_version", "2", 2),
        ("save_strategy", False, "no"),  # what YAML makes of a bare no
        ("output_dir", 2024, "2024"),
        ("max_steps", None, None),
        ("max_steps", "", None),
    ],
)
def test_value_is_converted(name, value, expected):
    got = getattr(make_config(least(**{name: value})), name)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", "fast"),
        ("learning_rate", True),
        ("learning_rate", [1]),
        ("sequence_len", 512.5),
        ("sequence_len", True),
        ("sequence_len", "1e400"),
        ("sample_packing", "maybe"),
        ("sample_packing", 2),
        ("bf16", "sometimes"),
        ("output_dir", True),
        ("output_dir", {"a": 1}),
        ("optimizer", "sgd"),
        ("lr_scheduler", "polynomial"),
        ("lora_target_modules", [None]),
        ("datasets", "data.jsonl"),
        ("datasets", [{"path": "d", "type": "oasst"}]),
        ("special_tokens", "<pad>"),
        ("fsdp_config", [1]),
        ("resume_from_checkpoint", True),
        ("fsdp_version", True),
    ],
)
def test_wrong_type_names_key_value_and_what_fits(name, value):
    with pytest.raises(UserError, match=rf"configuration: {name}.* is .*, but it takes .*: ."):
        make_config(least(**{name: value}))


def limits(name: str) -> dict[str, float]:
    """The limits of a number as it declares them: ge, gt, le, lt."""
    ends = ("ge", "gt", "le", "lt")
    return {end: getattr(one, end) for one in keys_of(Config)[name].metadata for end in ends if hasattr(one, end)}


RANGED = [name for name in keys_of(Config) if limits(name)]


@pytest.mark.parametrize("name", RANGED)
def test_ranges(name):
    """Just outside either end is refused, NaN and infinity always; the default lies inside."""
    ends, field = limits(name), keys_of(Config)[name]
    step = 1 if int in kinds_of(field.annotation) else 1e-6
    outside = ["nan", "inf", "-inf", *(ends[end] for end in ("gt", "lt") if end in ends)]
    outside += [ends[end] - step for end in ("ge", "gt") if end in ends]
    outside += [ends[end] + step for end in ("le", "lt") if end in ends]
    assert len(outside) > 3
    for value in outside:
        with pytest.raises(UserError, match=name):
            make_config(least(**{name: value}))
    if not field.is_required() and field.default is not None:
        assert all(getattr(operator, end)(field.default, value) for end, value in ends.items())


def test_every_number_has_a_range():
    numbers = {name for name, field in keys_of(Config).items() if {int, float} & kinds_of(field.annotation)}
    assert numbers == set(RANGED)


@pytest.mark.parametrize(
    ("key", "home"),
    [("roles_to_train", "datasets or test_d"), ("split", "datasets or"), ("eos_token", "special_tokens")],
)
def test_a_key_outside_of_its_map_is_refused_with_the_name_of_the_map(tmp_path, key, home):
    with pytest.raises(UserError, match=f"command line: --{key} belongs inside {home}"):
        load_config([least_file(tmp_path), f"--{key}", "user"])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lora_ranks", "lora_r"), ("learning_rat", "learning_rate"), ("micro_batchsize", "micro_batch_size")],
)
def test_misspelt_key_gives_the_nearest_name(tmp_path, wrong, right):
    with pytest.raises(UserError, match=f"line [0-9]+: {wrong} .*nearest one is {right};"):
        load_config([least_file(tmp_path, f"{wrong}: 1")])
    with pytest.raises(UserError, match=f"command line: --{wrong} .*nearest one is {right};"):
        load_config([least_file(tmp_path), f"--{wrong.replace('_', '-')}=1"])


def test_misspelt_key_of_a_dataset_says_which():
    with pytest.raises(UserError, match=r"datasets\[1\]\.paht .*nearest one is path;"):
        make_config(least(datasets=[{"path": "d", "type": "alpaca"}, {"paht": "d", "type": "alpaca"}]))


def test_nested_key_gives_its_own_line(tmp_path):
    text = "test_datasets:\n  - path: a.jsonl\n    type: alpaca\n  - path: b.jsonl\n    typ: alpaca\n"
    path = least_file(tmp_path, text)
    line = Path(path).read_text().splitlines().index("    typ: alpaca") + 1
    with pytest.raises(UserError, match=rf"run.yml, line {line}: test_datasets\[1\]\.typ is no known key.* is type;"):
        load_config([path])


@pytest.mark.parametrize("name", ["base_model", "adapter", "datasets", "learning_rate"])
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_missing_key(name, empty):
    with pytest.raises(UserError, match=f"{name} is missing"):
        make_config(least(**{name: empty}))


# ---- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nlora_r: [1, 2\nb: 3\n", "run.yml, line 3"),
        ("a: 1\nb:\n\t- 2\n", "run.yml, line 3"),
        ("lora_r: 8\nseed: 1\nlora_r: 16\n", "line 3: lora_r is given twice .first in line 1"),
        ("datasets:\n  - path: a\n    path: b\n", "line 3: path is given twice"),
        ("- a\n- b\n", "holds a list"),
        ("seed 42\n", "holds a str"),
        ("", "base_model is missing"),
        ("1: x\n", "1 is no known key"),
        ("? [a, b]\n: c\n", "line 1"),
    ],
)
def test_broken_file_says_where(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_config([written(tmp_path, text)])


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="train.yml: no such file"):
        load_config([])
    with pytest.raises(UserError, match="cannot be read"):
        load_config([str(tmp_path)])
    (tmp_path / "train.yml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="cannot be read"):
        load_config([])


def test_merge_keys_and_anchors_are_plain_yaml(tmp_path):
    text = """
        test_datasets:
          - &one {path: a.jsonl, type: alpaca}
          - <<: *one
            path: b.jsonl
        """
    assert [d.path for d in load_config([least_file(tmp_path, text)]).test_datasets] == ["a.jsonl", "b.jsonl"]


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "output_dir: ~/out\nlora_model_dir: ~/a\ndataset_prepared_path: ~/p\nwandb_project: ~/w\n"
    file = "~/" + Path(least_file(tmp_path, text)).name
    for words in ([], ["--resume_from_checkpoint", "~/c", "--base_model=~/m"]):
        c = load_config([file, *words])
        assert (c.output_dir, c.lora_model_dir) == (f"{tmp_path}/out", f"{tmp_path}/a")
        assert (c.dataset_prepared_path, c.wandb_project) == (f"{tmp_path}/p", "~/w")
    assert (c.resume_from_checkpoint, c.base_model) == (f"{tmp_path}/c", f"{tmp_path}/m")
    assert load_command(Own, [file, "--model", "~/m"])[1].model == f"{tmp_path}/m"


# ---- the command line ---------------------------------------------------------------------------------------------


def test_overrides(tmp_path):
    """Either dash, either separator, anywhere; lists and maps as text; an empty one unsets; the last one counts."""
    path = least_file(tmp_path, "max_steps: 7\noutput_dir: a\n")
    words = ["--lora-r=4", "--lora_r", "2", path, "--datasets", '[{"path": "x.jsonl", "type": "completion"}]']
    words += ["--special_tokens", "{pad: <pad>}", "--max_steps=", "--learning-rate", "2e-4", "--sample_packing"]
    c = load_config(words + ["--default_system_message", "You are: {a pirate", "--output_dir", "null"])
    assert (c.lora_r, c.max_steps, c.learning_rate, c.sample_packing) == (2, None, 2e-4, True)
    assert c.datasets == (DatasetConfig(path="x.jsonl", type="completion"),)
    assert c.special_tokens.pad_token == "<pad>"
    assert c.default_system_message == "You are: {a pirate"  # text stays text, whatever YAML would make of it
    assert c.output_dir == "./model-out"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r", "[1"], "--lora_r: .* is neither YAML nor JSON"),
        (["--lora_r"], "--lora_r is true, but it takes whole number"),
        (["--lora_r", "x"], 'command line: --lora_r is "x"'),
        (["other.yml"], "are both files"),
        (["-v"], "--v is no known key"),
        (["--deepspeed", "zero3.json"], "command line: --deepspeed"),
    ],
)
def test_wrong_command_line(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        load_config([least_file(tmp_path), *words])


class Own(RunOptions):
    """Merge an adapter."""

    plan: bool = key("say what would happen", False)
    adapter: str | None = key("folder of the adapter", None)
    base: Literal["nf4", "original"] = key("weights to merge into", "nf4")
    model: PathText | None = key("folder of the base model", None)


class Alone(Own):
    alone: ClassVar = ("model adapter",)


class Never(Own):
    alone: ClassVar = ("",)


def test_own_options_come_back_apart(tmp_path):
    path = least_file(tmp_path)
    c, own = load_command(Own, ["--plan", path, "--adapter", "x: y", "--base=original", "--seed", "1"])
    assert own.plain() == {"file": path, "plan": True, "adapter": "x: y", "base": "original", "model": None}
    assert (c.adapter, c.seed) == ("qlora", 1)  # the option shadows the key of that name, it does not set it
    assert load_command(Own, [path, "--plan", "false"])[1].plan is False
    with pytest.raises(UserError, match="--base is .*nf4 | original"):
        load_command(Own, [path, "--base", "nf3"])


def test_command_without_a_file(tmp_path, monkeypatch):
    """Named models need no YAML: a train.yml that lies here belongs to another run, even a broken one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yml").write_text("not: a run")
    enough = ["--model", "m", "--adapter", "a"]
    config, own = load_command(Alone, enough)
    assert config is None
    assert own.plain() == {"file": "train.yml", "plan": False, "adapter": "a", "base": "nf4", "model": "m"}
    with pytest.raises(UserError, match="no known key"):
        load_command(Alone, enough[:2])
    with pytest.raises(UserError, match="--seed: no YAML file is read"):
        load_command(Alone, [*enough, "--seed", "1"])
    config, _ = load_command(Alone, [least_file(tmp_path), *enough])
    assert config.base_model == "m"
    assert load_command(Never, ["--plan"])[0] is None


def test_help_lists_every_key_and_option(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["merge.py"])
    with pytest.raises(SystemExit) as done:
        load_command(Own, ["--help"])
    assert not done.value.code
    text = capsys.readouterr().out
    assert text.startswith("Merge an adapter.")
    for cls in MAPS:
        for name, field in keys_of(cls).items():
            assert f"  {'--' if cls is Config else ''}{name}  " in text
            assert " ".join(field.description.split()) in " ".join(text.split())
    for name, field in keys_of(Own).items():
        assert f"  {'' if name == 'file' else '--'}{name}  " in text and field.description in text
    assert max(len(line) for line in text.splitlines()) <= 120
