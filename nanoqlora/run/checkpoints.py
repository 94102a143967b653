"""checkpoint-STEP: what a run needs to resume bit for bit. How it is written, checked and loaded."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from safetensors.torch import load_file, save_file

from ..config.errors import UserError
from ..config.files import read_json, remove, whole_folder, write_text
from ..config.schema import Config
from ..data.batches import Samples
from ..data.packing import BatchSchedule
from ..parallel import collectives
from ..weights.adapter import fill_adapter, read_adapter, save_adapter
from ..weights.checkpoint import fingerprint, open_weights
from ..weights.tensor_files import reading
from .early_stopping import Progress
from .optimizer_state import as_tensors, load_state, state_kind, state_problem
from .output_dir import STATE, checkpoint_to_resume, checkpoints
from .state import Run, plan_fingerprint

OPTIMIZER = "optimizer.safetensors"
# What a run cannot change on its way: size and scale of what it has learnt, base below, groups of the optimizer.
FIXED = ("lora_r", "lora_alpha", "peft_use_rslora", "load_in_4bit", "loraplus_lr_ratio", "keep_gguf_blocks")


def save_checkpoint(run: Run, step: int) -> None:
    """Write checkpoint-STEP atomically: adapter, optimizer state and step; then drop the oldest ones.

    The data order, the schedule and the dropout masks are functions of the seed and the step, so nothing else is
    needed to resume bit for bit.
    """
    optimizer_state = run.optimizer.state_dict()  # to which every rank may have to add its part
    if run.rank == 0:
        folder = Path(run.config.output_dir)
        with whole_folder(folder / f"checkpoint-{step}") as temporary:
            save_adapter(run.model, temporary, run.config.base_model, run.trained)
            save_file(as_tensors(optimizer_state), temporary / OPTIMIZER)
            state = {"step": step, "plan": plan_fingerprint(run.samples, run.plan), "ranks": run.ranks}
            state |= {"before": run.before, "optimizer": run.config.optimizer, "base_fingerprint": run.base}
            state |= {"steps": len(run.plan), "progress": asdict(run.progress)}
            state["fixed"] = {key: getattr(run.config, key) for key in FIXED}
            write_text(temporary / "trainer_state.json", json.dumps(state) + "\n")
        drop_oldest(run)
    collectives.barrier()


def drop_oldest(run: Run) -> None:
    """Keep save_total_limit checkpoints and the best one. Called at the end too, because a kill may come before it."""
    best = run.progress.best_step if run.config.load_best_model_at_end else None
    for old in checkpoints(Path(run.config.output_dir))[: -run.config.save_total_limit]:
        if old.name != f"checkpoint-{best}":
            remove(old)


class Before(pydantic.BaseModel):
    """What the untrained model could do: `judge`."""

    loss: float
    plain_loss: float
    answers: list[str]


class TrainerState(pydantic.BaseModel):
    """trainer_state.json, as `save_checkpoint` writes it; older versions wrote the first two and some of the others."""

    step: int = pydantic.Field(ge=1, lt=2**31)
    plan: str
    steps: int = 0
    optimizer: str = ""
    base_fingerprint: str = ""
    fixed: dict[str, Any] = {}
    before: Annotated[Before | None, pydantic.BeforeValidator(lambda given: given or None)] = None
    progress: Progress | None = None


def find_checkpoint(config: Config, samples: Samples, plan: BatchSchedule) -> tuple[Path, TrainerState] | None:
    """The checkpoint that the configuration names, if any, and its trainer_state.json.

    Raises:
        UserError: it is not a checkpoint, or of another run.
    """
    path = checkpoint_to_resume(config)
    if path is None:
        return None
    state: TrainerState = read_json(path / STATE, TrainerState)
    steps, optimizer = state.steps or len(plan), state.optimizer or config.optimizer
    theirs, ours = state_kind(optimizer), state_kind(config.optimizer)
    base = fingerprint(open_weights(config.base_model))
    differences = {
        f"has {steps} steps, this one {len(plan)}, so the learning rates would differ": steps != len(plan),
        "had other data, another seed or other batches": state.plan != plan_fingerprint(samples, plan),
        f"trained over other weights than base_model {config.base_model} has": state.base_fingerprint not in ("", base),
        f"had optimizer: {optimizer}, whose state ({theirs}) {config.optimizer} cannot load": theirs != ours,
    }
    for key, value in ({"keep_gguf_blocks": False} | state.fixed).items():  # which older versions had not
        own = getattr(config, key, None)
        differences[f"had {key}: {value}, this one has {own}"] = value != own
    if found := [difference for difference, is_found in differences.items() if is_found]:
        advice = f"Resume with the same configuration, or start a new run with lora_model_dir: {path}"
        raise UserError(f"{path}: its run {found[0]}. {advice}.")
    return path, state


def load_checkpoint(run: Run) -> int:
    """Go on from the checkpoint that the configuration names, if any. Returns the number of steps already taken."""
    found = find_checkpoint(run.config, run.samples, run.plan)
    if found is None:
        return 0
    path, state = found
    _, adapter = read_adapter(path)
    file = path / OPTIMIZER
    where = "cpu" if run.config.shard_optimizer_state else run.device  # of the complete state, before it is cut
    with reading(file, "Resume from another checkpoint"):
        optimizer_state = load_file(file, str(where))
    if problem := state_problem(run.optimizer, optimizer_state):
        raise UserError(f"{file}: {problem}. Other layers were trained, or it is damaged. Use the same configuration.")
    fill_adapter(run.model, adapter, path)
    load_state(run.optimizer, optimizer_state)
    run.before |= state.before.model_dump() if state.before else {}
    run.progress = state.progress or run.progress
    return state.step


def load_best(run: Run, last: int) -> int:
    """Put the adapter of the best evaluation back, where the run asks for it. Returns the step that the model is of."""
    if not run.rank:
        drop_oldest(run)
    best = run.progress.best_step if run.config.load_best_model_at_end else 0
    path = Path(run.config.output_dir) / f"checkpoint-{best}"
    if best and not run.rank and not path.is_dir():
        print(f"load_best_model_at_end: the best step, {best}, has no {path}; the adapter of step {last} is kept")
    if not best or run.rank or not path.is_dir():
        best = last
    if best != last:
        fill_adapter(run.model, read_adapter(path)[1], path)
    collectives.broadcast(run.flat.data)  # which alone has written checkpoints
    return int(collectives.broadcast(torch.tensor(best, device=run.device)))
