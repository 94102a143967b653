"""Where the rows of metrics.jsonl also go when keys ask for it: TensorBoard, Weights & Biases.

Their packages are imported only then. Names are those that Hugging Face's trainer uses there, so that curves of both
lie in one picture: train/loss, train/grad_norm, eval/loss.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
            raise UserError(f"{key} needs the package {package}. pip install {package}, or set {key}: false.")
    mode = config["wandb_mode"] or os.environ.get("WANDB_MODE", "online")
    if config["use_wandb"] and rank == 0 and mode == "online":
        with wandb_errors(config):
            import wandb

            if not wandb.login(prompt=False):
                raise RuntimeError("no API key is configured")


@contextmanager
def wandb_errors(config: dict[str, Any]) -> Iterator[None]:
    """Raises UserError for any error of the key, the network, the service."""
    try:
        yield
    except Exception as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"wandb_project {config['wandb_project']}: W&B cannot be used ({problem}). Log in by `wandb login` or"
        raise UserError(f"{what} WANDB_API_KEY, or write wandb_mode: offline, or use_wandb: false.") from error


def make_trackers(config: dict[str, Any], start: int = 0) -> list[Tracker]:
    """What each row is given to.

    Args:
        config: the resolved configuration, as plain values. use_tensorboard, wandb_project and those below it decide.
        start: steps taken already; a resumed run continues in the same TensorBoard folder and as a new W&B run.
    Raises:
        UserError: W&B does not begin the run. TensorBoard's folder is not touched before the first row.
    """
    trackers: list[Tracker] = []
    if config["use_wandb"]:
        import wandb

        Path(config["output_dir"]).mkdir(parents=True, exist_ok=True)
        own = {name: config[f"wandb_{name}"] for name in ("project", "entity", "name", "mode")}
        own |= {"id": config["wandb_run_id"], "dir": config["output_dir"]}
        with wandb_errors(config):
            run = wandb.init(**own, resume="allow", config=config)

        trackers.append(lambda row: run.log(named(row), step=row["step"]))
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
    numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    names = {key: re.sub("^eval_", "eval/", key) for key in numbers}
    return {name if "/" in name else f"train/{name}": numbers[key] for key, name in names.items()}
