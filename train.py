"""QLoRA fine-tuning, top to bottom: `python train.py [train.yml] [--key value ...]`, or under torchrun.

    configuration -> samples -> plan of all steps -> 4-bit model with LoRA
    for each step of the plan:
        for each of this rank's micro-batches:   hidden = model(tokens);  loss = head and cross-entropy
                                                 (loss / all tokens that count in the step).backward()
        sum the gradient over the ranks, clip, AdamW, one line in metrics.jsonl
    now and then: evaluate, save a checkpoint
    adapter, picture, report

The loss of a step is the sum over its supervised tokens, over all micro-batches and ranks, divided once by their
number. So neither accumulation nor the number of ranks changes what is learnt.
"""

import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nanoqlora.config.load import answer_early, load_command
from nanoqlora.config.options import TrainOptions

if __name__ == "__main__":
    answer_early(TrainOptions)  # --help and wrong settings, before PyTorch is imported

import torch
from tqdm import tqdm

from nanoqlora import ops
from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import Failed, Stopped, UserError, visible
from nanoqlora.config.files import check_writable
from nanoqlora.config.rules import without_effect
from nanoqlora.config.schema import Config
from nanoqlora.data.batches import collate, micro_batches
from nanoqlora.data.special_rows import check_special_rows
from nanoqlora.fast.block import can_fuse, fuse_blocks, keep_dense_weights
from nanoqlora.fast.graphs import GraphedBody, can_record
from nanoqlora.fast.memory import dense_fits, keeps_for, memory_budget
from nanoqlora.fast.sharding_choice import choose_sharding, embedding_waits
from nanoqlora.fast.stats import Stopwatch, memory_figures
from nanoqlora.model import Llama
from nanoqlora.parallel import collectives, devices, distributed
from nanoqlora.parallel.fsdp import BlockStore, fill_over_ranks
from nanoqlora.qlora import ALL_LINEAR, flatten_trainable, inject_lora, set_dropout_rows, start_magnitudes
from nanoqlora.run.cadence import evaluations, saves, warmup_steps
from nanoqlora.run.checkpoints import find_checkpoint, load_best, load_checkpoint, save_checkpoint
from nanoqlora.run.doubts import doubts
from nanoqlora.run.forecast import Forecast, measure
from nanoqlora.run.inputs import Data, prepare_data, same_on_all_ranks, tokenizer_of
from nanoqlora.run.log import Metrics
from nanoqlora.run.neftune import add_noise, set_noise_rows
from nanoqlora.run.not_finite import NotFinite, trace
from nanoqlora.run.optim import learning_rate_at, loraplus_groups, make_optimizer, set_learning_rate, state_bytes
from nanoqlora.run.optimizer_state import BLOCK, PartOptimizer, sum_and_clip
from nanoqlora.run.output_dir import checkpoint_to_resume, claim, is_finished, refuse_other_runs
from nanoqlora.run.preview import duration, plan_text
from nanoqlora.run.rehearsal import rehearse
from nanoqlora.run.results import judge, save_results
from nanoqlora.run.scoring import loss_over_ranks
from nanoqlora.run.state import Run
from nanoqlora.run.trackers import check_trackers, make_trackers
from nanoqlora.run.usable import check_vocabulary
from nanoqlora.tokenizer.tokenizer import Tokenizer
from nanoqlora.weights.adapter import continue_adapter
from nanoqlora.weights.adapter_files import read_trained
from nanoqlora.weights.checkpoint import fingerprint, open_weights
from nanoqlora.weights.pretrained import Fill, open_model


def forward_backward(run: Run, rows: list[list[int]], number: int, first: int, num_targets: float) -> torch.Tensor:
    """Add the gradient of one micro-batch, row `first` and on of step `number`. Returns the sum of its losses.

    Args:
        rows: the numbers of the samples in each. num_targets: what the losses are divided by for the gradient.
    """
    batch = collate([[run.samples[i] for i in row] for row in rows], run.config.row_width).to(run.device)
    seeds = row_seeds(run.config.seed, number, first, len(rows)).to(run.device)
    set_dropout_rows(run.model, seeds)
    set_noise_rows(run.model, seeds, batch.segments)
    hidden = run.body(batch.tokens, batch.segments).flatten(0, 1)  # (B * T, D)
    loss = ops.linear_cross_entropy(hidden[batch.supervised], run.model.lm_head.weight, batch.targets)
    (loss / num_targets).backward()
    return loss.detach()


def train_step(run: Run, number: int) -> tuple[float, float, float, int]:
    """Take optimizer step `number` (from 0). Returns loss, gradient norm, learning rate, tokens of all ranks."""
    config, step = run.config, run.plan[number]
    everyones = [i for row in step.rows for i in row]
    num_targets, num_tokens = (int(x[everyones].sum()) for x in (run.samples.num_targets, run.samples.lengths))
    share = dict(micro_batches(step.rows, config.micro_batch_size, run.rank, run.ranks))
    run.flat.grad.zero_()
    losses = {first: forward_backward(run, rows, number, first, num_targets) for first, rows in share.items()}
    total = sum(losses.values(), torch.zeros((), device=run.device))
    if run.store:  # in an epoch's last step the first rank may have more rows: the blocks travel for all ranks or none
        for _ in range(math.ceil(len(step.rows) / (config.micro_batch_size * run.ranks)) - len(share)):
            forward_backward(run, step.rows[:1], number, 0, math.inf)  # a gradient of zero
    own_norm = run.flat.grad.norm()
    grad_norm = sum_and_clip(run.flat, run.optimizer, config.max_grad_norm)
    loss, grad_norm = collectives.sum_over_ranks(total).item() / num_targets, grad_norm.item()
    if not math.isfinite(loss + grad_norm):
        own = {first: x.item() for first, x in losses.items()}
        raise NotFinite(trace(number + 1, step, run.rank, own, config.micro_batch_size, own_norm.item()))
    rate = learning_rate_at(
        number,
        len(run.plan),
        warmup_steps(config, run.plan),
        config.learning_rate,
        config.lr_scheduler,
        config.cosine_min_lr_ratio or 0.0,
    )
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    return loss, grad_norm, rate, num_tokens


def row_seeds(seed: int, step: int, first: int, count: int) -> torch.Tensor:
    """(count,) int64, a number for each row that decides its dropout: the same row of the same step, on any rank."""
    return (seed & 0x1FFFFF) << 42 | step << 16 | torch.arange(first, first + count)


def evaluate(run: Run, step: int) -> float:
    """Held-out loss in nats per token, logged."""
    run.model.eval()
    loss = loss_over_ranks(run.model, run.held_out, run.config.sequence_len, run.rank, run.ranks)
    run.model.train()
    run.metrics.write({"step": step, "eval_loss": round(loss, 6), "eval_perplexity": round(math.exp(loss), 4)})
    return loss


def log_step(run: Run, number: int, loss: float, grad_norm: float, rate: float, tokens_per_second: float) -> None:
    """The line of metrics.jsonl for step `number` (from 0)."""
    step = run.plan[number]
    line = {"step": number + 1, "epoch": round(step.epoch, 4), "loss": round(loss, 6)}
    line |= {"grad_norm": round(grad_norm, 6), "learning_rate": rate}
    line |= {"supervised_tokens": int(run.samples.num_targets[sum(step.rows, [])].sum())}
    run.metrics.write(line | {"tokens_per_second": round(tokens_per_second, 1)} | memory_figures(run.device))


def loop(run: Run, start: int, stop: list[bool], bar: tqdm) -> int:
    """All steps from `start` on, evaluations and checkpoints between them. Returns the last step that was taken.

    Raises Stopped when `stop` is filled.
    """
    config, plan = run.config, run.plan
    when_to_evaluate, when_to_save = set(evaluations(config, plan) if run.held_out else ()), set(saves(config, plan))
    watch, folder, step = Stopwatch(), Path(config.output_dir), start
    above = partial(bar.write, file=sys.stderr) if run.rank == 0 else lambda _: None  # a line of its own above the bar
    if reason := start and run.progress.reason_to_stop(config):  # a kill came between the decision and the results
        above(f"step {start}: ends here, {reason}")
        return start
    began = time.perf_counter()
    for number in range(start, len(plan)):
        step = number + 1
        try:
            with watch:
                loss, grad_norm, rate, tokens = train_step(run, number)
        except NotFinite as found:  # on all ranks, before anything was changed
            if not config.skip_nonfinite_steps:
                raise Failed(
                    f"{found}. Nothing was learnt from it. Look at these samples, or go on from an earlier checkpoint "
                    f"with a lower learning_rate, or set skip_nonfinite_steps: true.",
                    everywhere=True,
                ) from found
            run.metrics.write({"step": step, "skipped": str(found)})
            above(f"skipped {found}")
        else:
            watch.tokens += tokens
            if step % config.logging_steps == 0 or step == len(plan):
                speed = watch.rate_since_last()
                log_step(run, number, loss, grad_norm, rate, speed)
                run.progress.logged(loss, config.loss_watchdog_threshold)
                bar.set_postfix(loss=f"{loss:.3f}", norm=f"{grad_norm:.2f}", lr=f"{rate:.1e}", tok_s=f"{speed:.0f}")
                if bar.disable:  # no terminal: a line for each logged step
                    left = (time.perf_counter() - began) / (step - start) * (len(plan) - step)
                    above(
                        f"step {step}/{len(plan)}  epoch {plan[number].epoch:.2f}  loss {loss:.4f}  "
                        f"norm {grad_norm:.2f}  lr {rate:.1e}  {speed:.0f} tok/s  {duration(left)} left"
                    )
        if step % 8 == 0 and run.device.type == "cpu":
            devices.return_freed_memory()
        bar.update()
        if step in when_to_evaluate:
            held_out = evaluate(run, step)
            run.progress.evaluated(step, held_out)
            above(f"step {step}: held-out loss {held_out:.4f}")
        is_best = config.load_best_model_at_end and step in when_to_evaluate and step == run.progress.best_step
        reason = run.progress.reason_to_stop(config)
        # Any rank may have got the signal; of the rest rank 0 decides, whose log is the one on the disk.
        flags = [bool(stop), bool(is_best) and run.rank == 0, bool(reason) and run.rank == 0]
        stopped, is_best, ends = collectives.any_has(flags, run.device)
        if stopped or step in when_to_save or is_best:
            save_checkpoint(run, step)
        if stopped:
            distributed.stop()
            raise Stopped(
                f"stopped after step {step} of {len(plan)}; it is saved. To go on: "
                f"--resume_from_checkpoint {shlex.quote(str(folder / f'checkpoint-{step}'))}"
            )
        if ends:
            above(f"step {step}: ends here, {reason}")
            break
    return step


def prepare_model(
    config: Config, rank: int, ranks: int, device: torch.device, dtype: torch.dtype, say: Callable[..., None]
) -> tuple[Llama, BlockStore | None]:
    """The model as it will train, on this rank, and where it is spread over the ranks its store."""

    def add_lora(model: Llama, say: Callable[..., None]) -> None:
        torch.manual_seed(config.seed)
        if config.lora_model_dir:
            keys = ("lora_r", "lora_alpha", "lora_target_modules", "peft_use_rslora", "peft_use_dora")
            wanted = {key: getattr(config, key) for key in keys}
            say(continue_adapter(model, config.lora_model_dir, config.lora_dropout, **wanted))
            if read_trained(config.lora_model_dir).base not in (None, fingerprint(open_weights(config.base_model))):
                say(f"warning: it was trained on other weights than {config.base_model}'s, where it may mean nothing")
        else:
            targets = (*(ALL_LINEAR if config.lora_target_linear else ()), *config.lora_target_modules)
            variants = config.peft_use_rslora, config.peft_use_dora
            inject_lora(model, config.lora_r, config.lora_alpha, config.lora_dropout, targets, *variants)

    def empty() -> tuple[Llama, Fill]:
        return open_model(config.base_model, load_in_4bit=config.load_in_4bit, dtype=dtype, device=device)

    N = config.micro_batch_size * config.sequence_len
    model, fill = empty()
    shapes, _ = empty()
    with collectives.together():  # reads the adapter of lora_model_dir
        add_lora(shapes, lambda *_: None)
    budget, state = memory_budget(device), state_bytes(config.optimizer)
    state /= ranks if config.shard_optimizer_state else 1
    wanted = config.gradient_checkpointing, state, config.sharding, config.offload_params, device.type == "cuda"
    sharding, offload, why = choose_sharding(shapes, N, ranks, budget, *wanted)
    if ranks > 1 or offload:
        say(why)
    options = {"sharding": sharding, "rank": rank, "ranks": ranks, "device": device, "offload": offload}
    if config.fsdp_version == 2 and "full_shard" in (sharding, config.sharding):
        from nanoqlora.parallel.fully_shard import FullyShardStore  # takes long to import

        say("the base is sharded by PyTorch's fully_shard (fsdp_version: 2)")
        options |= {"sharding": "full_shard", "store_type": FullyShardStore}
    host_embedding = embedding_waits(config.gradient_checkpointing, offload)
    store = fill_over_ranks(model, fill, **options, host_embedding=host_embedding)
    add_lora(model, say)
    if config.neftune_noise_alpha:
        add_noise(model, config.neftune_noise_alpha)
    model.train()
    keeps = keeps_for(model, config.gradient_checkpointing, N, optimizer_bytes=state)
    if can_fuse(model):
        # With the update merged into W a GPU's step is shorter; a CPU keeps dense weights instead. Dropout forbids it.
        fuse_blocks(model, keeps, merge=device.type == "cuda")
        if store is None and dense_fits(model):
            keep_dense_weights(model)
        if set(keeps) != {"all"}:
            say("kept for the backward pass: " + ", ".join(f"{keeps.count(k)} x {k}" for k in dict.fromkeys(keeps)))
    else:
        again = ", and computed again in the backward pass" if set(keeps) != {"all"} else ""
        say(f"plain blocks are used, which is slower{again}: the fused one needs all seven linear layers, without DoRA")
        for block, keep in zip(model.model.layers, keeps, strict=True):
            block.recompute = keep != "all"
    if store:
        store.attach(model)
        for i, block in enumerate(model.model.layers if config.peft_use_dora and not config.lora_model_dir else ()):
            store.unshard(i)
            start_magnitudes(block)
    return model, store


def prepare_optimizer(
    config: Config, model: Llama, rank: int, ranks: int
) -> tuple[torch.nn.Parameter, torch.optim.Optimizer | PartOptimizer, int]:
    """The flat buffer of all that learns, AdamW on it or on this rank's part of it, and how many values learn."""
    sharded = config.shard_optimizer_state and ranks > 1
    flat = flatten_trainable(model, multiple=ranks * BLOCK if sharded else 1)
    betas = config.adam_beta1, config.adam_beta2
    adamw = {"betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
    groups = loraplus_groups(model, config.loraplus_lr_ratio) if config.loraplus_lr_ratio else None
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if sharded:
        return flat, PartOptimizer(config.optimizer, flat, num_trained, rank, ranks, **adamw), num_trained
    return flat, make_optimizer(config.optimizer, flat, groups=groups, **adamw), num_trained


def read_inputs(config: Config, rank: int, ranks: int) -> tuple[Tokenizer, Data]:
    """Whatever is wrong with the input is found here, before anything is written; on one rank, and all stop."""
    with collectives.together():
        tokenizer = tokenizer_of(config)
        check_vocabulary(tokenizer, open_model(config.base_model)[0].config.vocab_size, config.base_model)
    data = collectives.first_of_host_first(lambda: prepare_data(config, tokenizer, ranks))
    with collectives.together():
        find_checkpoint(config, data.samples, data.plan)
        if rank == 0:  # which reads the embedding and the head
            check_special_rows(tokenizer, data.samples, open_weights(config.base_model), config.base_model)
    same_on_all_ranks(config, data, ranks)
    return tokenizer, data


def check_surroundings(config: Config, options: TrainOptions, rank: int, say: Callable[..., None]) -> None:
    """What is wrong around the run, before anything is read: trackers that cannot be used, a folder that is taken."""
    with collectives.together():
        check_trackers(config.plain(), rank)
        if rank == 0:  # which writes
            check_writable(config.output_dir, "output_dir")
            try:
                refuse_other_runs(config)
            except UserError as error:
                if not options.rehearse:  # which writes nothing there
                    raise
                say(f"note: the run itself would end with: {error}")


def main() -> None:
    rank, ranks, device = distributed.start()
    with collectives.naming_lost_ranks():
        with collectives.together():
            config, options = load_command(TrainOptions)
        try:
            train(config, options, rank, ranks, device)
        except torch.OutOfMemoryError as error:
            raise Failed(
                f"{device}: {str(error).split('. ')[0]}. Set gradient_checkpointing to auto or true, or a smaller "
                f"micro_batch_size; a run with a checkpoint goes on with --auto_resume_from_checkpoints true."
            ) from error


def train(config: Config, options: TrainOptions, rank: int, ranks: int, device: torch.device) -> None:
    """A run, from its input to its results; or only what `options` ask for."""
    torch.backends.cuda.matmul.allow_tf32 = config.tf32 is True  # auto: no, for products are in bfloat16 anyway
    say = print if rank == 0 else lambda *_: None
    for note in config.notes:
        say(visible(note))
    check_surroundings(config, options, rank, say)
    tokenizer, data = read_inputs(config, rank, ranks)
    for path, reading in data.readings.items():
        say(visible(f"{path}: {reading.describe(config.sequence_len, config.excess_length_strategy)}"))
        for line in reading.describe_notes():
            say(visible(f"{path}: {line}"))

    model_config = open_model(config.base_model)[0].config
    for text in (*without_effect(config, ranks, device.type == "cuda"), *doubts(config, data, tokenizer, model_config)):
        say(f"warning: {text}")
    only_asks = options.plan or options.rehearse
    is_over = config.auto_resume_from_checkpoints and is_finished(Path(config.output_dir))
    if collectives.everyones_object(is_over)[0] and not only_asks:
        say(f"{config.output_dir}: its run is finished; nothing is left to do. Another run needs another output_dir.")
        return distributed.stop()

    dtype = devices.compute_dtype(config.bf16, device)
    model, store = prepare_model(config, rank, ranks, device, dtype, say)
    flat, optimizer, num_trained = prepare_optimizer(config, model, rank, ranks)
    metrics = Metrics(Path(config.output_dir) / "metrics.jsonl", writes=rank == 0)
    body = GraphedBody(model) if config.row_width and can_record(model) else model.model
    parts = body, data.samples, data.held_out, data.plan, flat, optimizer, metrics, store
    run = Run(config, rank, ranks, device, model, *parts)
    num_evals = len(evaluations(config, data.plan)) if data.held_out else 0
    forecast = measure(run, forward_backward, num_evals, len(saves(config, data.plan)))
    if options.plan:
        say(plan_text(run, tokenizer, forecast, warmup_steps(config, data.plan)))
        return distributed.stop()
    if options.rehearse:
        rehearse(run, data, tokenizer, say)
        return distributed.stop()
    with collectives.together():
        start = load_checkpoint(run)
    with collectives.together():
        if start != int(collectives.of_first_rank(torch.tensor(start, device=device))):
            raise UserError(
                f"output_dir {config.output_dir}: here the newest checkpoint is of step {start}, for rank 0 it is of "
                f"another. All hosts have to see one folder, or copies of it."
            )
    collectives.of_first_rank(flat.data)  # whatever each rank has read, all begin with the same
    with collectives.together():
        metrics.trackers += make_trackers(config.plain(), start) if rank == 0 else []
    with claim(config, rank, start, say):
        metrics.go_on_after(start)
        if start:
            say(f"goes on from step {start} of {len(run.plan)}, as saved in {checkpoint_to_resume(config)}")
        elif config.auto_resume_from_checkpoints:
            say(f"auto_resume_from_checkpoints: {config.output_dir} has no checkpoint, so the run begins with step 1")
        say(f"{num_trained:,} trained values, {len(run.plan)} steps, computing in {str(dtype).removeprefix('torch.')}")
        train_to_the_end(run, data, tokenizer, start, forecast, say)


def train_to_the_end(
    run: Run, data: Data, tokenizer: Tokenizer, start: int, forecast: Forecast, say: Callable[..., None]
) -> None:
    """The steps from `start` on, with what is asked of the model before and after, and the results."""
    stop: list[bool] = []
    for received in (signal.SIGINT, signal.SIGTERM):
        signal.signal(received, partial(stop_after_step, stop, run.rank))
    if start == 0 and run.held_out:
        evaluate(run, 0)
        run.before |= judge(run, data, tokenizer, 0)
    started = time.perf_counter()
    shown = {"disable": run.rank != 0 or not sys.stderr.isatty(), "unit": "step", "dynamic_ncols": True}
    with tqdm(total=len(run.plan), initial=start, smoothing=0.1, **shown) as bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # said already
        warnings.showwarning = lambda text, *_: bar.write(f"warning: {text}", file=sys.stderr)  # not into the bar
        last = loop(run, start, stop, bar)
    seconds = time.perf_counter() - started
    last_kept = load_best(run, last)
    after = judge(run, data, tokenizer, last_kept) if run.before else {}
    distributed.stop()
    if run.rank == 0:
        save_results(run, data, tokenizer, after, forecast.of_part((last - start) / len(run.plan)), seconds, say)


def stop_after_step(stop: list[bool], rank: int, number: int, frame: object) -> None:
    """Handle Ctrl-C or SIGTERM: the run ends after the step under way, with a checkpoint. Once more ends it at once."""
    stop.append(True)
    signal.signal(number, signal.default_int_handler)
    if rank == 0:  # not by print, which may be what was interrupted
        os.write(2, b"\nstopping after this step, with a checkpoint; once more ends at once\n")


if __name__ == "__main__":
    run_command(main)
