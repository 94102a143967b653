"""checkpoint-STEP: what a run needs to resume bit for bit. How it is written, checked and loaded."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError
from ..config.files import read_json, remove, whole_folder, write_text
from ..config.schema import Config
from ..data.batches import Samples
from ..data.packing import BatchSchedule
from ..parallel import collectives
from ..weights.adapter import fill_adapter, read_adapter, save_adapter
from ..weights.checkpoint import fingerprint, open_weights
from .early_stopping import Progress
from .optimizer_state import load_state, state_kind, state_problem
from .output_dir import STATE, checkpoint_to_resume, checkpoints
from .state import Run, plan_fingerprint

# What a run cannot change on its way: size and scale of what it has learnt, base below, groups of the optimizer.
FIXED = ("lora_r", "lora_alpha", "peft_use_rslora", "load_in_4bit", "loraplus_lr_ratio")


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
            torch.save(optimizer_state, temporary / "optimizer.pt")
            state = {"step": step, "plan": plan_fingerprint(run.samples, run.plan), "ranks": run.ranks}
            state |= {"before": run.before, "optimizer": run.config.optimizer, "base_fingerprint": run.base}
            state |= {"steps": len(run.plan), "progress": asdict(run.progress)}
            state["fixed"] = {key: getattr(run.config, key) for key in FIXED}
            write_text(temporary / "trainer_state.json", json.dumps(state) + "\n")
        best = run.progress.best_step if run.config.load_best_model_at_end else None
        for old in checkpoints(folder)[: -run.config.save_total_limit]:
            if old.name != f"checkpoint-{best}":
                remove(old)
    collectives.barrier()


# What trainer_state.json holds, those of older versions in parts; and what its maps hold, where they are not empty.
STATE_TYPES = {"step": int, "plan": str, "steps": int, "base": str, "optimizer": str}
STATE_TYPES |= {"fixed": dict, "before": dict, "progress": dict}
INNER_TYPES = {
    "before": {"loss": float, "plain_loss": float, "answers": list},
    "progress": {name: type(value) for name, value in asdict(Progress()).items()},
}


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json of a checkpoint.

    Raises:
        UserError: it does not have the shape that `save_checkpoint` gives it.
    """
    state = read_json(path / STATE)
    wrong = [key for key, kind in STATE_TYPES.items() if key in state and type(state[key]) is not kind]
    wrong += [key for key in ("step", "plan") if key not in state]
    for key, kinds in INNER_TYPES.items() if not wrong else ():
        inner = state.get(key) or {}
        is_right = not inner or {name: type(value) for name, value in inner.items()} == kinds
        if not is_right or not all(isinstance(text, str) for text in inner.get("answers", ())):
            wrong.append(key)
    if wrong or state["step"] < 1:
        key = (wrong or ["step"])[0]
        raise UserError(f"{path / STATE}: {key} is {state.get(key)!r}: it is damaged. Resume from another checkpoint.")
    return state


def find_checkpoint(config: Config, samples: Samples, plan: BatchSchedule) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that the configuration names, if any, and its trainer_state.json.

    Raises:
        UserError: it is not a checkpoint, or of another run.
    """
    path = checkpoint_to_resume(config)
    if path is None:
        return None
    state = read_state(path)
    steps, optimizer = state.get("steps", len(plan)), state.get("optimizer", config.optimizer)
    differences = {
        f"has {steps} steps, this one {len(plan)}, so the learning rates would differ": steps != len(plan),
        "had other data, another seed or other batches": state.get("plan") != plan_fingerprint(samples, plan),
        f"trained over other weights than those in base_model {config.base_model} now": (
            state.get("base_fingerprint") not in (None, fingerprint(open_weights(config.base_model)))
        ),
        f"had optimizer: {optimizer}, whose state ({state_kind(optimizer)}) {config.optimizer} cannot load": (
            state_kind(optimizer) != state_kind(config.optimizer)
        ),
    }
    for key, value in state.get("fixed", {}).items():
        differences[f"had {key}: {value}, this one has {getattr(config, key)}"] = value != getattr(config, key)
    for difference, is_found in differences.items():
        if is_found:
            advice = f"Resume with the same configuration, or start a new run with lora_model_dir: {path}"
            raise UserError(f"{path}: its run {difference}. {advice}.")
    return path, state


def load_checkpoint(run: Run) -> int:
    """Go on from the checkpoint that the configuration names, if any. Returns the number of steps already taken."""
    found = find_checkpoint(run.config, run.samples, run.plan)
    if found is None:
        return 0
    path, state = found
    _, adapter = read_adapter(path)
    file = path / "optimizer.pt"
    try:
        where = "cpu" if run.config.shard_optimizer_state else run.device  # of the complete state, before it is cut
        optimizer_state = torch.load(file, map_location=where, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # reading another file, torch's unpickler fails in any way
        raise UserError(f"{file}: cannot be read ({error}). Resume from another checkpoint.") from error
    if problem := state_problem(run.optimizer, optimizer_state):
        raise UserError(f"{file}: {problem}. Other layers were trained, or it is damaged. Use the same configuration.")
    fill_adapter(run.model, adapter, path)
    load_state(run.optimizer, optimizer_state)
    run.before.update(state.get("before", {}))
    if "progress" in state:
        run.progress = Progress(**state["progress"])
    return state["step"]


def load_best(run: Run, last: int) -> int:
    """Put the adapter of the best evaluation back, where the run asks for it. Returns the step that the model is of."""
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
