"""What becomes of Axolotl's keys that are no fields of `schema.py`: old spellings, ignored, refused. Tables only.

    old        stands for a field; a function translates its value
    ignored    asks for something that happens anyway, or not at all: said in one line at start
    refused    would change the run in a way that we do not do: the text says what to write instead

`*` in a key stands for any characters. A refused key that is empty, false or 0 asks for nothing and may stay.
"""

from .parser import Fates, when_on

SHAREGPT = (
    "write type: chat_template, field_messages: conversations and message_property_mappings: "
    "{role: from, content: value}"
)
NO_CODE = "code that comes with a model or data set is never run: write false"

RUN = Fates(
    old={
        "evaluation_strategy": ("eval_strategy", None),
        "flash_attention": ("attn_implementation", when_on("flash_attention_2")),
        "sdp_attention": ("attn_implementation", when_on("sdpa")),
        "flex_attention": ("attn_implementation", when_on("flex_attention")),
        "eager_attention": ("attn_implementation", when_on("eager")),
        "noisy_embedding_alpha": ("neftune_noise_alpha", None),
        "bfloat16": ("bf16", when_on(True)),
        "float32": ("bf16", when_on(False)),
    },
    old_values={
        "optimizer": {"adamw_bnb_8bit": "adamw_8bit"},
        "gradient_checkpointing": {"unsloth": "offload"},
        "bf16": {"full": True},
    },
    ignored={
        "the model's own files say what it is": "model_type tokenizer_type type_of_model tokenizer_use_fast "
        "tokenizer_legacy tokenizer_use_mistral_common is_*_derived_model",
        "unknown keys are always refused": "strict",
        "--plan shows the data": "debug",
        "torchrun says how many processes there are": "local_rank world_size ddp*",
        "a GPU is used where there is one": "device device_map max_memory gpu_memory_limit torchdistx_path "
        "experimental_skip_move_to_device",
        "numbers are logged, not weights or gradients": "wandb_watch wandb_log_model",
        "kernels are chosen by measurement, and all compute the same": "lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel liger_* unsloth_* cut_cross_entropy chunked_cross_entropy* "
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp xformers_attention torch_compile* "
        "sdpa_varlen fused_attn_kernel use_kernels flex_attn_compile_kwargs",
        "memory is given back as it is freed": "gc_steps gc_collect_steps torch_empty_cache_steps",
        "data is prepared before step 1": "dataset_processes dataset_num_proc dataset_keep_in_memory dataloader_* "
        "remove_unused_columns num_dataset_shards_to_save skip_prepare_dataset preprocess_iterable "
        "sample_packing_mp_start_method sample_packing_eff_est total_num_tokens total_supervised_tokens",
        "rows are packed, or batched with others of like length": "group_by_length multipack_real_batches",
        "packing looks at all rows at once": "sample_packing_group_size sample_packing_bin_size",
        "it belongs to other commands": "axolotl_config_path is_preprocess gradio_* merge_lora merge_method "
        "tokenizer_save_jinja_files",
        "norms, softmax and loss are computed in float32": "fp32_norms fp32_norm_classes embeddings_skip_upcast",
        "there is one way to recompute": "gradient_checkpointing_kwargs",
        "weights are handled one tensor at a time": "low_cpu_mem_usage lora_on_cpu qlora_sharded_model_loading",
        "adapters are always saved whole, as safetensors": "save_safetensors fsdp_final_state_dict_type",
        "the embedding is not trained": "loraplus_lr_embedding",
        "trained values are always float32": "peft_autocast_adapter_dtype",
        "tokens per second are always logged": "include_tokens_per_second include_tkps",
        "there is one way to shard": "fsdp_use_orig_params fsdp_sync_module_states fsdp_limit_all_gathers "
        "fsdp_sharding_strategy",
        "a lower evaluation loss is better": "greater_is_better",
    },
    refused={
        "8-bit weights are not built in: write load_in_4bit: true with adapter: qlora": "load_in_8bit",
        "the base is quantised here: name the unquantised model and write load_in_4bit: true": "gptq gptq_* "
        "model_quantization_config* loftq_config use_onebitllms",
        "remove it: torchrun alone starts several GPUs, and fsdp_config shards the base": "deepspeed deepcompile "
        "accelerator_config use_ray ray_* resources_per_worker dp_shard_size dp_replicate_size",
        "write bf16: auto": "fp16 float16 fp8 fp8_*",
        "write adapter: qlora, which trains over the weights as they are rounded": "qat quantization",
        "only supervised fine-tuning is built in: remove it": "rl rl_* trl vllm ebft reward_model "
        "process_reward_model center_rewards_coefficient num_labels dpo_* rpo_* orpo_* simpo_* cpo_* kto_* "
        "precompute_ref_log_probs trainer_cls use_eaft eaft_*",
        "write datasets with type: completion": "pretraining_dataset pretrain_* pretraining_sample_concatenation",
        "the batch plan needs all lengths before step 1: write false": "streaming streaming_*",
        "the batch plan decides the order: remove it": "curriculum_sampling sample_packing_sequentially "
        "batch_flattening shuffle_before_merging_datasets dataset_shard_*",
        "a row must fit one GPU: write 1, and a smaller sequence_len": "context_parallel_size "
        "sequence_parallel_degree heads_k_stride ring_attn_func tiled_mlp tiled_mlp_*",
        "a layer must fit one GPU: write 1, and fsdp_config to shard the base": "tensor_parallel_size",
        "only one adapter is trained, from start to end: write a larger lora_r": "relora* jagged_* lisa* "
        "unfrozen_parameters peft_layer_replication",
        "write lora_target_modules with the names of linear layers": "lora_target_parameters peft_layers_* "
        "lora_fan_in_fan_out",
        "one rank for all layers: write lora_r and lora_alpha": "lora_rank_pattern lora_alpha_pattern peft",
        "the adapter starts as in PEFT, B at zero: remove it": "peft_init_lora_weights reinit_weights",
        "embedding and head stay frozen: use tokens that the tokenizer has, such as its reserved ones, in "
        "special_tokens or a chat template": "lora_modules_to_save added_tokens_overrides "
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings fix_untrained_tokens "
        "peft_trainable_token_indices peft_ensure_weight_tying embedding_lr embedding_lr_scale",
        "mixtures of experts are not built in: use a dense Llama or Mistral": "quantize_moe_experts "
        "experts_implementation llama4_* gemma4_*",
        "only text models are built in: remove it": "processor_type processor_kwargs image_* freeze_mm_modules "
        "cls_model_config",
        NO_CODE: "trust_remote_code",
        "plugins are not loaded: remove it": "plugins",
        "attention is always exact: remove it": "s2_attention sage_attention scaling_softmax* use_pose pose_* "
        "flash_optimum large_head_attention flash_attn_d512",
        "the model's config.json decides: change it there": "rope_scaling overrides_of_model_config "
        "overrides_of_model_kwargs model_config base_model_config",
        "the tokenizer is read from base_model's folder: put its files there": "tokenizer_config",
        "name a local folder of that revision as base_model": "revision_of_model",
        "one learning rate for all, and the schedules of lr_scheduler as they are: remove it": "lr_scheduler_kwargs "
        "lr_quadratic_warmup lr_div_factor lr_groups cosine_constant_lr_ratio",
        "AdamW is the only optimizer: remove it, or write adam_beta1, adam_beta2, adam_epsilon": "optim_args "
        "optim_target_modules adam_beta3 adam_epsilon2 dion_* qgalore_*",
        "write gradient_checkpointing: auto, which keeps what fits": "selective_checkpointing activation_offloading "
        "layer_offloading",
        "the numbers are in metrics.jsonl, and wandb_project or use_tensorboard send them on: remove it": "mlflow_* "
        " use_mlflow hf_mlflow_* comet_* use_comet use_trackio trackio_* use_otel_metrics otel_* swanlab_* use_swanlab",
        "nothing is uploaded: remove it, and when the run has ended: hf upload NAME output_dir": "hub_* push_to_hub "
        "push_dataset_to_hub",
        "log in with the hub's own command: remove it": "hf_use_auth_token",
        "the held-out loss and perplexity are what is computed: remove it": "do_causal_lm_eval "
        "eval_causal_lm_metrics do_bench_eval bench_* eval_table_size eval_max_new_tokens generate_samples "
        "num_generation_samples generation_*",
        "evaluation rows have sequence_len tokens too: remove it": "eval_sequence_len",
        "a checkpoint always has what a resume needs: remove it": "save_only_model dynamic_checkpoint",
        "remove it; bench.py measures a step": "profiler_*",
        "write batch sizes that fit; --plan says which do": "auto_find_batch_size",
        "drop short rows from the file itself": "min_sample_len max_prompt_len",
        "drop repeated rows from the file itself": "dataset_exact_deduplication",
        "write the values into the template: chat_template_jinja": "chat_template_kwargs",
        "rows are as wide as their longest, or write pad_to_sequence_len: true": "pad_to_multiple_of",
        "write roles_to_train and train_on_eos for each data set": "role_boundaries",
        "write micro_batch_size and gradient_accumulation_steps": "batch_size",
        "write sequence_len, and sample_packing: true": "max_packed_sequence_len",
        # Names of other trainers, which the nearest spelling would not lead to.
        "write learning_rate": "lr",
        "write num_epochs": "epochs num_train_epochs",
        "write optimizer": "optim",
        "write sequence_len": "max_seq_length max_length",
        "write micro_batch_size": "per_device_train_batch_size",
        "write eval_batch_size": "per_device_eval_batch_size",
    },
    harmless={
        "context_parallel_size": (1,),
        "sequence_parallel_degree": (1,),
        "tensor_parallel_size": (1,),
        "plugins": (
            "axolotl.integrations.liger.LigerPlugin",
            "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
        ),
    },
)

DATASET = Fates(
    old={
        "message_field_role": ("message_property_mappings", lambda name: {"role": name}),
        "message_field_content": ("message_property_mappings", lambda name: {"content": name}),
        "train_on_split": ("split", None),
    },
    refused={
        SHAREGPT: "conversation",
        NO_CODE: "trust_remote_code",
        "not supported yet: remove it": "shards shards_idx preprocess_shards drop_system_message "
        "message_field_training_detail field_thinking template_thinking_key split_thinking "
        "train_on_eot input_transform input_format field_human field_model logprobs_field temperature",
    },
    refused_values={"type": {"sharegpt*": SHAREGPT}},
)

SPECIAL_TOKENS = Fates(old={name: (f"{name}_token", None) for name in ("bos", "eos", "pad", "unk")})

FSDP = Fates(
    prefix="fsdp_",
    ignored={
        "there is one way to shard": "version use_orig_params sync_module_states limit_all_gathers "
        "backward_prefetch forward_prefetch min_num_params cpu_offload_pin_memory",
        "bf16 decides": "mixed_precision_policy",
        "adapters are always saved whole, as safetensors": "final_state_dict_type",
    },
)

BNB = Fates(
    ignored={"bf16 decides": "bnb_4bit_compute_dtype", "there is one way to keep four bits": "bnb_4bit_quant_storage"},
    refused={"8-bit weights are not built in: remove it": "load_in_8bit llm_int8_*"},
)
