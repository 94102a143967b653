"""QLoRA fine-tuning, top to bottom: `python train.py [train.yml] [--key value ...]`, or under torchrun.

    configuration -> samples -> schedule of all steps -> 4-bit model with LoRA
    for each step (`train_loop`):
        forward and backward over this rank's micro-batches
        sum the gradient over the ranks, clip, AdamW, one line in metrics.jsonl
        now and then: evaluate, save a checkpoint
    adapter, picture, report

The loss of a step is the sum over its supervised tokens, over all micro-batches and ranks, divided once by their
number. So neither accumulation nor the number of ranks changes what is learnt.
"""

import math
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

from nanoqlora import ops
from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import visible
from nanoqlora.config.schema import Config
from nanoqlora.fast.stats import Stopwatch, memory_figures
from nanoqlora.parallel import collectives, devices, distributed
from nanoqlora.run.build import build_run, num_trained
from nanoqlora.run.cadence import evaluations, learning_rates, saves, warmup_steps
from nanoqlora.run.checkpoints import load_best, save_checkpoint
from nanoqlora.run.checks import check_surroundings, describe_inputs, is_over, read_inputs, resume
from nanoqlora.run.forecast import Forecast, measure
from nanoqlora.run.inputs import Data
from nanoqlora.run.log import Display, Metrics
from nanoqlora.run.not_finite import skip_step
from nanoqlora.run.optim import set_learning_rate
from nanoqlora.run.optimizer_state import sum_and_clip
from nanoqlora.run.out_of_memory import explained
from nanoqlora.run.output_dir import checkpoint_to_resume, claim
from nanoqlora.run.preview import plan_text
from nanoqlora.run.rehearsal import rehearse
from nanoqlora.run.results import answer_table, judge, save_results
from nanoqlora.run.scoring import loss_over_ranks
from nanoqlora.run.state import Run
from nanoqlora.run.stopping import end_early, told_to_stop
from nanoqlora.run.trackers import make_trackers
from nanoqlora.tokenizer.tokenizer import Tokenizer
from nanoqlora.weights.pretrained import open_model

Ask = Callable[[int, Callable[[str], None]], None]


def train_loop(run: Run, start: int, stop: list[bool], display: Display, ask: Ask = lambda *_: None) -> int:
    """Take every step from `start` on. Returns the last one. Raises Stopped when `stop` is filled.

    ask: answers questions at an evaluation, given the step and what shows a line.
    """
    config, plan, model = run.config, run.plan, run.model
    evaluate_at, save_at = set(evaluations(config, plan) if run.held_out else ()), set(saves(config, plan))
    learning_rate, stopwatch, step = learning_rates(config, plan), Stopwatch(), start
    for number in range(start, len(plan)):
        step = number + 1
        in_step = [i for row in plan[number].rows for i in row]
        num_targets = int(run.samples.num_targets[in_step].sum())  # supervised tokens, of all ranks
        stopwatch.start()

        # Forward and backward over this rank's micro-batches.
        run.grad.zero_()
        losses: dict[int, torch.Tensor] = {}
        for first_row, batch in run.micro_batches(number):
            hidden = run.body(batch.tokens, batch.segments).flatten(0, 1)  # (B * T, D)
            loss = ops.linear_cross_entropy(hidden[batch.supervised], model.lm_head.weight, batch.targets)  # a sum
            is_stand_in = first_row < 0  # whose gradient is zero
            (loss / (math.inf if is_stand_in else num_targets)).backward()
            if not is_stand_in:
                losses[first_row] = loss.detach()

        # Sum over the ranks, clip, and AdamW's step. A number that is not finite changes nothing, on any rank.
        own_norm = run.grad.norm()
        grad_norm = sum_and_clip(run.flat, run.optimizer, config.max_grad_norm).item()
        total = collectives.sum_over_ranks(sum(losses.values(), torch.zeros((), device=run.device))).item()
        rate = learning_rate(number)
        is_finite = math.isfinite(total + grad_norm)
        if is_finite:
            set_learning_rate(run.optimizer, rate)
            run.optimizer.step()
        else:
            display.note(f"skipped {skip_step(run, number, losses, own_norm)}")
        stopwatch.stop(int(run.samples.lengths[in_step].sum()) if is_finite else 0)

        # A line in the log.
        if is_finite and (step % config.logging_steps == 0 or step == len(plan)):
            row = {"step": step, "epoch": round(plan[number].epoch, 4), "loss": round(total / num_targets, 6)}
            row |= {"grad_norm": round(grad_norm, 6), "learning_rate": rate, "supervised_tokens": num_targets}
            row |= {"tokens_per_second": round(stopwatch.rate_since_last(), 1)} | memory_figures(run.device)
            run.metrics.write(row)
            run.progress.logged(total / num_targets, config.loss_watchdog_threshold)
            display.logged(row)
        display.bar.update()
        if step % 8 == 0 and run.device.type == "cpu":
            devices.return_freed_memory()

        # Now and then the held-out loss and a checkpoint. Any rank may have got a signal; the rest rank 0 decides.
        if step in evaluate_at:
            held_out_loss = evaluate(run, step)
            run.progress.evaluated(step, held_out_loss)
            display.note(f"step {step}: held-out loss {held_out_loss:.4f}")
            ask(step, display.note)
        is_best = config.load_best_model_at_end and step in evaluate_at and step == run.progress.best_step
        reason = run.progress.reason_to_stop(config)
        flags = [bool(stop), is_best and run.rank == 0, bool(reason) and run.rank == 0]
        stopped, is_best, ends = collectives.any_rank(flags, run.device)
        if stopped or step in save_at or is_best:
            save_checkpoint(run, step)
        if stopped:
            end_early(run, step)
        if ends:
            display.note(f"step {step}: ends here, {reason}")
            break
    return step


def evaluate(run: Run, step: int) -> float:
    """Held-out loss in nats per supervised token, logged."""
    run.model.eval()
    loss = loss_over_ranks(run.model, run.held_out, run.config.sequence_len, run.rank, run.ranks, run.body)
    run.model.train()
    run.metrics.write({"step": step, "eval_loss": round(loss, 6), "eval_perplexity": round(math.exp(loss), 4)})
    return loss


def main() -> None:
    rank, ranks, device = distributed.start()
    with collectives.naming_dead_ranks():
        with collectives.together():
            config, options = load_command(TrainOptions)
            assert config is not None  # there is always a file
        train(config, options, rank, ranks, device)


def train(config: Config, options: TrainOptions, rank: int, ranks: int, device: torch.device) -> None:
    """A run, from its input to its results; or only what `options` ask for."""
    say = print if rank == 0 else lambda *_: None
    for note in config.notes:
        say(visible(note))
    check_surroundings(config, rank, not options.rehearse, say)
    tokenizer, data = read_inputs(config, rank, ranks)
    for line in describe_inputs(config, data, tokenizer, ranks, device.type == "cuda"):
        say(line)
    if not (options.plan or options.rehearse) and is_over(config):
        say(f"{config.output_dir}: its run is finished; nothing is left to do. Another run needs another output_dir.")
        return distributed.stop()

    run = build_run(
        config,
        partial(open_model, config.base_model, **config.base_form),
        samples=data.samples,
        held_out=data.held_out,
        plan=data.plan,
        metrics=Metrics(Path(config.output_dir) / "metrics.jsonl", writes=rank == 0),
        rank=rank,
        ranks=ranks,
        device=device,
        say=say,
    )
    num_evals = len(evaluations(config, data.plan)) if data.held_out else 0
    forecast = measure(run, num_evals, len(saves(config, data.plan)))
    if options.plan:
        say(plan_text(run, tokenizer, forecast, warmup_steps(config, data.plan)))
        return distributed.stop()
    if options.rehearse:
        rehearse(run, data, tokenizer, say)
        return distributed.stop()

    start = resume(run)
    with collectives.together():
        run.metrics.trackers += make_trackers(config.plain(), start) if rank == 0 else []
    with claim(config, rank, start, say):
        run.metrics.go_on_after(start)
        if start:
            say(f"goes on from step {start} of {len(run.plan)}, as saved in {checkpoint_to_resume(config)}")
        elif config.auto_resume_from_checkpoints:
            say(f"auto_resume_from_checkpoints: {config.output_dir} has no checkpoint, so the run begins with step 1")
        dtype = str(run.model.model.embed_tokens.weight.dtype).removeprefix("torch.")
        say(f"{num_trained(run.model):,} trained values, {len(run.plan)} steps, computing in {dtype}")
        with told_to_stop(rank) as stop, explained(run):
            train_to_the_end(run, data, tokenizer, start, forecast, stop, say)


def train_to_the_end(
    run: Run,
    data: Data,
    tokenizer: Tokenizer,
    start: int,
    forecast: Forecast,
    stop: list[bool],
    say: Callable[..., None],
) -> None:
    """The steps from `start` on, with what is asked of the model before and after, and the results."""
    ask = partial(answer_table, run, data, tokenizer)
    if start == 0 and run.held_out:
        evaluate(run, 0)
        ask(0, say)
        run.before |= judge(run, data, tokenizer, 0)
    started, last = time.perf_counter(), start
    display = Display(len(run.plan), start, run.rank)
    with display.bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # reported already
        warnings.showwarning = lambda text, *_: display.note(f"warning: {text}")  # not into the bar
        if reason := start and run.progress.reason_to_stop(run.config):  # killed between the decision and the results
            display.note(f"step {start}: ends here, {reason}")
        else:
            last = train_loop(run, start, stop, display, ask)
    seconds = time.perf_counter() - started
    last_kept = load_best(run, last)
    after = judge(run, data, tokenizer, last_kept) if run.before else {}
    distributed.stop()
    if run.rank == 0:
        save_results(run, data, tokenizer, after, forecast.of_part((last - start) / len(run.plan)), seconds, say)


if __name__ == "__main__":
    run_command(main)
