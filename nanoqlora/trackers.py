"""Where the rows of metrics.jsonl also go when keys ask for it: TensorBoard, Weights & Biases.

Their packages are imported only then. Names are those that Hugging Face's trainer uses there, so that curves of both
lie in one picture: train/loss, train/grad_norm, eval/loss.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cli import UserError

Tracker = Callable[[dict[str, Any]], None]


def check_packages(config: dict[str, Any]) -> None:
    """Raises UserError if the package that a key of the configuration needs is not installed."""
    for key, package in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if config[key] and not find_spec(package):
            raise UserError(
                f"{key} needs the package {package}, which is not there. pip install {package}, or set {key}: false."
            )


def make_trackers(config: dict[str, Any], start: int = 0) -> list[Tracker]:
    """What each row is given to.

    Args:
        config: the resolved configuration, as plain values. use_tensorboard, wandb_project and those below it decide.
        start: steps taken already; a resumed run goes on in the same TensorBoard folder and as a new W&B run.
    """
    trackers: list[Tracker] = []
    if config["use_tensorboard"]:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(config["output_dir"]) / "tensorboard", purge_step=start or None)

        def to_tensorboard(row: dict[str, Any]) -> None:
            for name, value in named(row).items():
                writer.add_scalar(name, value, row["step"])
            writer.flush()

        trackers.append(to_tensorboard)
    if config["use_wandb"]:
        import wandb

        Path(config["output_dir"]).mkdir(parents=True, exist_ok=True)
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
        trackers.append(lambda row: run.log(named(row), step=row["step"]))
    return trackers


def named(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names of Hugging Face's trainer."""
    row = {name: value for name, value in row.items() if isinstance(value, int | float)}
    parts = {name: "eval/" + name.removeprefix("eval_") if name.startswith("eval_") else name for name in row}
    names = {name: part if "/" in part else f"train/{part}" for name, part in parts.items() if name != "step"}
    return {names[name]: row[name] for name in names}
