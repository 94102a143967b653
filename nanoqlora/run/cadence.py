"""When something happens in a run: which steps warm up, evaluate, save. All of it follows from the plan."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ..config.schema import Config
from ..data.packing import BatchSchedule
from .optim import learning_rate_at


def warmup_steps(config: Config, plan: BatchSchedule) -> int:
    """Steps with a rising learning rate."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * len(plan))


def learning_rates(config: Config, plan: BatchSchedule) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0."""
    schedule: dict[str, Any] = {"scheduler": config.lr_scheduler, "min_ratio": config.cosine_min_lr_ratio or 0.0}
    schedule |= {"num_steps": len(plan), "warmup": warmup_steps(config, plan), "peak": config.learning_rate}
    return partial(learning_rate_at, **schedule)


def evaluations(config: Config, plan: BatchSchedule) -> list[int]:
    """The steps after which held-out data is scored, if there is any."""
    cadence = config.evals_per_epoch, config.eval_steps, config.eval_strategy
    return [step for step in range(1, len(plan) + 1) if due(step, plan, *cadence)]


def saves(config: Config, plan: BatchSchedule) -> list[int]:
    """The steps after which a checkpoint is written."""
    cadence = config.saves_per_epoch, config.save_steps, config.save_strategy
    return [s for s in range(1, len(plan) + 1) if (s == 1 and config.save_first_step) or due(s, plan, *cadence)]


def due(step: int, plan: BatchSchedule, per_epoch: int | None, every: float | None, strategy: str | None) -> bool:
    """Whether something that happens so often happens after `step` (from 1)."""
    if strategy == "no":
        return False
    if every:
        return step % (max(1, round(every * len(plan))) if every < 1 else int(every)) == 0
    times = 1 if per_epoch is None else per_epoch
    before = plan.epoch_after(step - 2) if step > 1 else 0.0
    return int(plan.epoch_after(step - 1) * times + 1e-9) > int(before * times + 1e-9)
