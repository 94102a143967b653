"""Ranks as processes on this machine, and what the tests have them do."""

import contextlib
import io
import math
import os
import pickle
import resource
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import context

import train
from nanoqlora import ops
from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import Failed, UserError
from nanoqlora.data.batches import Batch, Sample
from nanoqlora.fast.block import fuse_blocks
from nanoqlora.fast.memory import held_bytes
from nanoqlora.ops import Segments
from nanoqlora.parallel import collectives, distributed
from nanoqlora.parallel.fsdp import BlockStore, fill_over_ranks, frozen_tensors
from nanoqlora.parallel.fully_shard import FullyShardStore
from nanoqlora.qlora import ALL_LINEAR, flatten_trainable, inject_lora
from nanoqlora.run import build, checks, output_dir, scoring
from nanoqlora.weights.pretrained import load_model, open_model

LAYERS = 5  # more than the two slots, and no multiple of 2 or 3 ranks


def _be_rank(rank: int, ranks: int, port: int, pipe: Any, work: Callable, arguments: tuple) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    pipe.send_bytes(pickle.dumps(work(*arguments)))  # by value: torch would share memory that ends with the process


def on_ranks(ranks: int, work: Callable, *arguments: Any) -> list[Any]:
    """What `work(*arguments)`, a function of a module, gives on each rank; it joins the others by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context().Pipe() for _ in range(ranks)]
    processes = [
        context().Process(target=_be_rank, args=(rank, ranks, port, pipe, work, arguments))
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        for receiver, sender in pipes:
            sender.close()
            assert receiver.poll(300), "a rank has not answered for 300 s"
        return [pickle.loads(receiver.recv_bytes()) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


# ------------------------------------------------------------------------------------------------ what they do


def load_spread(path: Path, load_in_4bit: bool, offload: int = 0) -> tuple[Any, Any]:
    return load_on(distributed.start(), path, load_in_4bit, offload=offload)


def load_on(place: tuple[int, int, torch.device], path: Path, load_in_4bit: bool, **more: Any) -> tuple[Any, Any]:
    rank, ranks, device = place
    kept = path.suffix == ".gguf"  # in its blocks
    form = {"load_in_4bit": load_in_4bit and not kept, "keep_gguf_blocks": kept}
    model, fill = open_model(path, **form, dtype=torch.float32, device=device)
    options = {"sharding": "full_shard", "rank": rank, "ranks": ranks, "device": device}
    return model, fill_over_ranks(model, fill, **options, **more)


def brought_blocks(path: Path, load_in_4bit: bool, offload: int = 0) -> dict[str, Any]:
    """Every block as it stands in its slot, asked for in the order of a step, twice, and out of order."""
    model, store = load_spread(path, load_in_4bit, offload)
    there_and_back = [*range(LAYERS), *reversed(range(LAYERS))]
    seen = []
    for i in there_and_back * 2 + [3, 0, 4, 1]:
        store.unshard(i)
        blocks = frozen_tensors(model.model.layers[i])
        seen.append((i, [tensor.detach().clone() for _, _, tensor, _ in blocks]))
    seen = [(i, [tensor.cpu() for tensor in tensors]) for i, tensors in seen]
    parts = [store.shard(i).nbytes for i in range(LAYERS)]
    rest = {name: p.detach().cpu() for name, p in model.named_parameters() if not name.endswith("_proj.weight")}
    return {"seen": seen, "parts": parts, "held": held_bytes(model), "rest": rest}


ROWS = [(9, 4), (3, 14), (20, 0), (5, 5), (11, 2)]  # tokens before and among those that count


def gradient(model: torch.nn.Module, rank: int, ranks: int) -> torch.Tensor:
    """Of the sum of losses over ROWS, dealt to the ranks; the last ones have one less, and score one for nothing."""
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.05, generator=g)
    flat = flatten_trainable(model)
    backward(model, rank, ranks, 1)
    return collectives.sum_over_ranks(flat.grad)


def loss_of_row(model: torch.nn.Module, i: int) -> torch.Tensor:
    unseen, seen = ROWS[i % len(ROWS)]
    tokens = torch.arange(1, unseen + seen + 2)[None] * 7 % 300
    hidden = model.model(tokens, Segments.one_per_row(*tokens.shape))[0, unseen:-1]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), tokens[0, unseen + 1 :], reduction="sum")


def backward(model: torch.nn.Module, rank: int, ranks: int, divisor: float) -> torch.Tensor:
    """The sum of the losses of this rank's rows, whose gradients are divided and added."""
    total = torch.zeros(())
    for i in range(rank, len(ROWS) + -len(ROWS) % ranks, ranks):
        loss = loss_of_row(model, i)
        (loss / (divisor if i < len(ROWS) else math.inf)).backward()
        total += loss.detach() * (i < len(ROWS))
    return total


def steps(model: torch.nn.Module, rank: int, ranks: int) -> list[float]:
    """The losses per token of four steps, and after each of them of one row without gradients."""
    flat, count, losses = flatten_trainable(model), sum(seen for _, seen in ROWS), []
    optimizer = torch.optim.SGD([flat], lr=0.1)
    for _ in range(4):
        flat.grad.zero_()
        losses.append(collectives.sum_over_ranks(backward(model, rank, ranks, count)).item() / count)
        collectives.sum_over_ranks(flat.grad)
        optimizer.step()
        with torch.no_grad():
            losses.append(loss_of_row(model, 1).item())
    return losses


def add_lora(model: torch.nn.Module, targets: tuple[str, ...], keep: str) -> None:
    """With fused blocks where they can be."""
    torch.manual_seed(0)
    inject_lora(model, 4, 8, target_modules=targets)
    model.train()
    if targets == ALL_LINEAR:
        fuse_blocks(model, [keep] * LAYERS)
    for block in model.model.layers:
        block.recompute = keep == "recompute"


def steps_in_both_stores(path: Path, cases: dict[str, tuple]) -> dict[str, Any]:
    """`steps` for each case of (load_in_4bit, targets, keep); and what `fully_shard` holds of the blocks after them."""
    place, losses = distributed.start(), {}
    for case, (load_in_4bit, *rest) in cases.items():
        for store_type in (BlockStore, FullyShardStore):
            model, store = load_on(place, path, load_in_4bit, store_type=store_type)
            add_lora(model, *rest)
            store.attach(model)
            losses[f"{case}, {store_type.__name__}"] = steps(model, *place[:2])
        views = [tensor for block in model.model.layers for _, _, tensor, _ in frozen_tensors(block)]
        shards = [block.frozen.to_local().untyped_storage() for block in model.model.layers]
        losses[f"{case}, views"] = sum(view.untyped_storage().size() for view in views)
        losses[f"{case}, shards"] = sum({shard.data_ptr(): shard.size() for shard in shards}.values())
    return losses


def spread_gradient(
    path: Path, load_in_4bit: bool, targets: tuple[str, ...], keep: str
) -> tuple[torch.Tensor, int, int]:
    """And how many blocks this rank has gathered for it, and how many of them only when they were needed."""
    model, store = load_spread(path, load_in_4bit)
    add_lora(model, targets, keep)
    asked, gathered, unshard, gather = [], [], store.unshard, store._all_gather
    store.unshard = lambda i: asked.append(i) or unshard(i)  # None, as a hook has to give
    store._all_gather = lambda i: (gathered.append(i == asked[-1]), gather(i))
    store.attach(model)
    flat = gradient(model, torch.distributed.get_rank(), torch.distributed.get_world_size())
    return flat, len(gathered), sum(gathered)


SAMPLES = [Sample(np.arange(1, n + 1) * 7 % 300, np.arange(n) >= n // 3) for n in (9, 30, 4, 17, 25, 12, 40)]


def share_of_evaluation(path: Path, capacity: int) -> tuple[float, list[int]]:
    """The loss over SAMPLES, and the numbers of those that this rank has scored for it."""
    rank, ranks, _ = distributed.start()
    scored, whole = [], scoring.score_rows

    def score_rows(model: Any, samples: Any, rows: list[list[int]], *rest: Any) -> dict:
        scored.extend(i for row in rows for i in row)
        return whole(model, samples, rows, *rest)

    scoring.score_rows = score_rows
    return scoring.loss_over_ranks(load_model(path), SAMPLES, capacity, rank, ranks), scored


def wait_for_the_others() -> str:
    """What the first rank says of those that never come."""
    distributed.MEETING_LIMIT = timedelta(seconds=1)
    try:
        if os.environ["RANK"] == "0":
            distributed.start()
        return ""
    except Failed as failed:
        return str(failed)


def what_is_there(file: Path) -> bool:
    """Whether the file was there when it was this rank's turn; writes it."""
    distributed.start()

    def work() -> bool:
        there = file.exists()
        time.sleep(0.0 if there else 0.3)  # others that did not wait would not find it
        file.touch()
        return there

    return collectives.first_of_host_first(work)


def end_of_own_run(words_of_ranks: list[tuple]) -> tuple[int, str, str]:
    """Each rank with words of its own."""
    return end_of_run(*words_of_ranks[int(os.environ["RANK"])])


def end_of_run_without_adapter(bad_rank: int, *words: object) -> tuple[int, str, str]:
    """One host does not have the adapter that all are to go on from."""
    whole = build.continue_adapter

    def read(*arguments: Any, **wanted: Any) -> str:
        if os.environ["RANK"] == str(bad_rank):
            raise UserError("lora_model_dir: no such folder")
        return whole(*arguments, **wanted)

    build.continue_adapter = read
    return end_of_run(*words)


def end_of_run_with_other_values(*words: object) -> tuple[int, str, str]:
    """Rank 1 has read another adapter than rank 0."""
    whole = checks.load_checkpoint

    def load(run: train.Run) -> int:
        start = whole(run)
        run.flat.data += run.rank
        return start

    checks.load_checkpoint = load
    return end_of_run(*words)


def end_of_run_with_nan(bad_rank: int, bad_step: int, where: str, *words: object) -> tuple[int, str, str]:
    """One rank's loss, or only its gradient, is NaN in the last micro-batch of one step."""
    collate, cross_entropy, at = train.Run.collate, ops.linear_cross_entropy, []

    def collate_here(run: train.Run, rows: list[list[int]], number: int, first: int) -> Batch:
        at[:] = [run.rank, number + 1, first - run.ranks]
        return collate(run, rows, number, first)

    def spoilt(*arguments: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(*arguments)
        if at == [bad_rank, bad_step, bad_rank]:
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss * float("nan") if where == "loss" else loss
        return loss

    train.Run.collate, ops.linear_cross_entropy = collate_here, spoilt
    return end_of_run(*words)


def end_of_run_with_losses(losses_of_ranks: list[list[float]], *words: object) -> tuple[int, str, str]:
    """Held-out losses as if they were these, after step 0, 1, ... on each rank."""

    def evaluate(run: train.Run, step: int) -> float:
        run.metrics.write({"step": step, "eval_loss": losses_of_ranks[run.rank][step]})
        return losses_of_ranks[run.rank][step]

    train.evaluate = evaluate
    return end_of_run(*words)


def end_of_run_on_full_disk(space: int, *words: object) -> tuple[int, str, str]:
    """Once there is a checkpoint, no file may grow beyond `space` bytes."""
    whole = train.save_checkpoint

    def save_and_fill(run: train.Run, step: int) -> None:
        whole(run, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (space, space))

    train.save_checkpoint = save_and_fill
    return end_of_run(*words)


def end_of_run(*words: object) -> tuple[int, str, str]:
    """train.py with these words after its name: exit code, stdout, stderr."""
    out, err, sys.argv = io.StringIO(), io.StringIO(), ["train.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(train.main)
        return 0, out.getvalue(), err.getvalue()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()


def end_of_run_with_fault(kind: str, *words: object) -> tuple[int, str, str]:
    """All ranks fail in the first step, by a fault of ours or as a run may; a traceback is put where stderr is."""
    train.sum_and_clip = lambda *_: 1 / 0 if kind == "fault" else _raise(Failed("no way"))
    try:
        return end_of_run(*words)
    except ZeroDivisionError:
        return 1, "", traceback.format_exc()
    finally:
        time.sleep(2 * (os.environ["RANK"] == "0"))  # it keeps the store, which torchrun would


def hold_lock(folder: Path, pipe: Any) -> None:
    """Hold an output folder until this process is killed; one message once it is held."""
    with output_dir.lock(folder):
        pipe.send("locked")
        time.sleep(99)


def _raise(error: Exception) -> None:
    raise error
