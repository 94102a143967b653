"""The model of a run, as it trains on this rank: loaded, quantised, placed, with LoRA, its blocks fused.

    shapes of the model -> where the base goes -> load -> LoRA -> what each block keeps -> fused blocks -> flat buffer

`train.py` and `bench.py` build it here, so what is timed is what is trained. Read next: `fast/block.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..config.schema import Config
from ..data.batches import Samples
from ..data.packing import BatchSchedule
from ..fast.block import Keep, can_fuse, fuse_blocks, keep_dense_weights
from ..fast.graphs import GraphedBody, can_record
from ..fast.memory import dense_fits, keeps_for, memory_budget
from ..fast.projections import Fp8
from ..fast.sharding_choice import choose_sharding, embedding_waits
from ..fast.stats import stage
from ..model import Block, Llama
from ..parallel import collectives, devices
from ..parallel.fsdp import BlockStore, fill_over_ranks
from ..qlora import ALL_LINEAR, flatten_trainable, inject_lora, start_magnitudes
from ..weights.adapter import continue_adapter, read_trained
from ..weights.checkpoint import fingerprint, open_weights
from ..weights.pretrained import Fill
from .log import Metrics
from .neftune import add_noise
from .optim import loraplus_groups, make_optimizer, state_bytes
from .optimizer_state import BLOCK, Optimizer, PartOptimizer
from .state import Run


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that is ready to train, and what was decided for it."""

    model: Llama
    store: BlockStore | None  # of the base, where it is sharded over the ranks or waits in the host's memory
    keeps: list[Keep]  # what each block keeps for the backward pass


@stage("model")
def build_run(
    config: Config,
    empty: Callable[..., tuple[Llama, Fill]],
    *,
    samples: Samples,
    held_out: Samples,
    plan: BatchSchedule,
    metrics: Metrics,
    rank: int,
    ranks: int,
    device: torch.device,
    say: Callable[..., None],
) -> Run:
    """The model, its optimizer and all else that the loop works with.

    Args:
        empty: of a dtype and a device, gives the model without memory and the function that fills it: `open_model`.
        say: called with each line for the user.
    """
    torch.backends.cuda.matmul.allow_tf32 = config.tf32 is True  # auto: no, for matmuls are in bfloat16 anyway
    if config.full_determinism and device.type == "cuda":  # on a CPU every sum has a fixed order
        devices.add_in_fixed_order()
    empty = partial(empty, dtype=devices.compute_dtype(config.bf16, device), device=device)
    built = build_model(config, empty, rank=rank, ranks=ranks, device=device, say=say)
    flat, optimizer = build_optimizer(config, built.model, rank=rank, ranks=ranks)
    return Run(
        config=config,
        rank=rank,
        ranks=ranks,
        device=device,
        model=built.model,
        body=GraphedBody(built.model) if can_record(built.model) else built.model.model,
        store=built.store,
        keeps=built.keeps,
        flat=flat,
        optimizer=optimizer,
        samples=samples,
        held_out=held_out,
        plan=plan,
        metrics=metrics,
    )


def build_model(
    config: Config,
    empty: Callable[[], tuple[Llama, Fill]],
    *,
    rank: int,
    ranks: int,
    device: torch.device,
    say: Callable[..., None],
) -> Built:
    """Build the model of a run on this rank.

    Args:
        empty: gives the model without memory, and the function that fills it.
    Raises:
        UserError: on all ranks, what a file or the adapter of lora_model_dir has.
    """
    if config.fp8:
        devices.check_fp8(device)
    num_tokens = config.micro_batch_size * config.sequence_len
    optimizer_bytes = state_bytes(config.optimizer) / (ranks if config.shard_optimizer_state else 1)
    model, fill = empty()
    shapes, _ = empty()
    with collectives.together():  # reads the adapter of lora_model_dir
        add_lora(config, shapes, lambda *_: None)
    sharding, num_offloaded, why = choose_sharding(
        shapes,
        num_tokens,
        ranks,
        memory_budget(device),
        config.gradient_checkpointing,
        optimizer_bytes,
        config.sharding,
        config.offload_params,
        on_gpu=device.type == "cuda",
    )
    if ranks > 1 or num_offloaded:
        say(why)
    store_type = BlockStore
    if config.fsdp_version == 2 and "full_shard" in (sharding, config.sharding):
        from ..parallel.fully_shard import FullyShardStore  # takes long to import

        say("the base is sharded by PyTorch's fully_shard (fsdp_version: 2)")
        sharding, store_type = "full_shard", FullyShardStore
    store = fill_over_ranks(
        model,
        fill,
        store_type=store_type,
        sharding=sharding,
        rank=rank,
        ranks=ranks,
        device=device,
        offload=num_offloaded,
        host_embedding=embedding_waits(config.gradient_checkpointing, num_offloaded),
    )
    add_lora(config, model, say)
    if config.neftune_noise_alpha:
        add_noise(model, config.neftune_noise_alpha)
    model.train()
    keeps = keeps_for(model, config.gradient_checkpointing, num_tokens, optimizer_bytes=optimizer_bytes)
    make_fast(model, keeps, store is None, say, config.fp8)
    if store:
        store.attach(model)
        for i, block in enumerate(model.model.layers if config.peft_use_dora and not config.lora_model_dir else ()):
            store.unshard(i)
            start_magnitudes(block)
    return Built(model=model, store=store, keeps=keeps)


def add_lora(config: Config, model: Llama, say: Callable[..., None]) -> None:
    """Inject the run's LoRA, or that of lora_model_dir to train it further."""
    torch.manual_seed(config.seed)
    if not config.lora_model_dir:
        assert config.lora_r is not None and config.lora_alpha is not None
        targets = (*(ALL_LINEAR if config.lora_target_linear else ()), *config.lora_target_modules)
        variants = config.peft_use_rslora, config.peft_use_dora
        inject_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets, *variants)
        return
    keys = ("lora_r", "lora_alpha", "lora_target_modules", "peft_use_rslora", "peft_use_dora")
    wanted = {key: getattr(config, key) for key in keys}
    say(continue_adapter(model, config.lora_model_dir, config.lora_dropout, **wanted))
    if read_trained(config.lora_model_dir).base not in (None, fingerprint(open_weights(config.base_model))):
        say(f"warning: it was trained on other weights than {config.base_model}'s, where it may mean nothing")


def make_fast(model: Llama, keeps: list[Keep], is_resident: bool, say: Callable[..., None], fp8: Fp8 = False) -> None:
    """Put fused blocks in place of plain ones, where that is possible, each with its entry of `keeps`."""
    if not can_fuse(model):
        recomputed = ", and recomputed in the backward pass" if set(keeps) != {"all"} else ""
        say(f"plain blocks are used, which is slower{recomputed}: the fused one takes DoRA with lora_dropout: 0 only")
        for block, keep in zip(model.model.layers, keeps, strict=True):
            assert isinstance(block, Block)
            block.recompute = keep != "all"
        return
    # With the update merged into W a GPU's step is shorter; a CPU keeps dense weights instead. Dropout forbids it.
    fuse_blocks(model, keeps, merge=model.model.norm.weight.device.type == "cuda", fp8=fp8)
    if is_resident and dense_fits(model):
        keep_dense_weights(model)
    if set(keeps) != {"all"}:
        say("kept for the backward pass: " + ", ".join(f"{keeps.count(k)} x {k}" for k in dict.fromkeys(keeps)))


def build_optimizer(config: Config, model: Llama, *, rank: int, ranks: int) -> tuple[torch.nn.Parameter, Optimizer]:
    """The flat buffer of all trained values, and AdamW on it or on this rank's part of it."""
    sharded = config.shard_optimizer_state and ranks > 1
    flat = flatten_trainable(model, multiple=ranks * BLOCK if sharded else 1)
    betas = config.adam_beta1, config.adam_beta2
    adamw: dict[str, Any] = {"betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
    if sharded:
        return flat, PartOptimizer(config.optimizer, flat, num_trained(model), rank, ranks, **adamw)
    groups = loraplus_groups(model, config.loraplus_lr_ratio) if config.loraplus_lr_ratio else None
    return flat, make_optimizer(config.optimizer, flat, groups=groups, **adamw)


def num_trained(model: Llama) -> int:
    """How many values are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
