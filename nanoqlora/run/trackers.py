"""Where the rows of metrics.jsonl also go when keys ask for it: TensorBoard, Weights & Biases.

Their packages are imported only then. Names are those that Hugging Face's trainer uses there, so that curves of both
lie in one picture: train/loss, train/grad_norm, eval/loss.
"""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config.errors import UserError

Tracker = Callable[[dict[str, Any]], None]


def check_trackers(config: dict[str, Any], rank: int = 0) -> None:
    """Raises UserError if the package that a key of the configuration needs is missing, or on rank 0 the login."""
    for key, package in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if config[key] and not find_spec(package):
            raise UserError(
                f"{key} needs the package {package}, which is not there. pip install {package}, or set {key}: false."
            )
    mode = config["wandb_mode"] or os.environ.get("WANDB_MODE", "online")
    if config["use_wandb"] and rank == 0 and mode == "online":
        import wandb

        try:
            problem = "" if wandb.login(prompt=False) else "no API key is configured"
        except Exception as error:  # of the key, the network, the service
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        if problem:
            raise UserError(no_wandb(config, problem))


def no_wandb(config: dict[str, Any], problem: str) -> str:
    return (
        f"wandb_project {config['wandb_project']}: W&B cannot be used ({problem}). Log in by `wandb login` or "
        f"WANDB_API_KEY, or write wandb_mode: offline, or use_wandb: false."
    )


def make_trackers(config: dict[str, Any], start: int = 0) -> list[Tracker]:
    """What each row is given to.

    Args:
        config: the resolved configuration, as plain values. use_tensorboard, wandb_project and those below it decide.
        start: steps taken already; a resumed run goes on in the same TensorBoard folder and as a new W&B run.
    Raises:
        UserError: W&B does not begin the run. TensorBoard's folder is not touched before the first row.
    """
    trackers: list[Tracker] = []
    if config["use_wandb"]:
        import wandb

        Path(config["output_dir"]).mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=config["wandb_project"],
                entity=config["wandb_entity"],
                name=config["wandb_name"],
                mode=config["wandb_mode"],
                id=config["wandb_run_id"],
                resume="allow",
                dir=config["output_dir"],
                config=config,
            )
        except wandb.Error as error:
            raise UserError(no_wandb(config, str(error).splitlines()[0])) from error

        def wandb_log(row: dict[str, Any]) -> None:
            run.log(named(row), step=row["step"])

        trackers.append(wandb_log)
    if config["use_tensorboard"]:
        from torch.utils.tensorboard import SummaryWriter

        @cache
        def writer() -> SummaryWriter:
            return SummaryWriter(Path(config["output_dir"]) / "tensorboard", purge_step=start or None)

        def tensorboard(row: dict[str, Any]) -> None:
            for name, value in named(row).items():
                writer().add_scalar(name, value, row["step"])
            writer().flush()

        trackers.append(tensorboard)
    return trackers


def named(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names of Hugging Face's trainer."""
    row = {name: value for name, value in row.items() if isinstance(value, int | float)}
    parts = {name: "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else name for name in row}
    names = {name: part if "/" in part else f"train/{part}" for name, part in parts.items() if name != "step"}
    return {names[name]: row[name] for name in names}
