"""Out of memory: what was asked for, where, and which settings need less, with what they are predicted to need."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.errors import Failed, asked, is_out_of_memory
from ..fast.block import Keep, can_fuse
from ..fast.memory import step_bytes
from ..fast.stats import GIB
from .optim import state_bytes
from .output_dir import what_is_saved
from .state import Run


def dials(run: Run) -> str:
    """The settings that need less memory than this run's, each with the predicted peak of its step."""
    config, L = run.config, run.model.config.num_hidden_layers
    rows, width = config.micro_batch_size, config.sequence_len
    optimizer = state_bytes(config.optimizer) / (run.ranks if config.shard_optimizer_state else 1)
    least: list[Keep] = ["input"] * L
    offloaded: list[Keep] = ["offload"] * (L - 1)
    settings = {"gradient_checkpointing: true": (rows, width, least)}
    if can_fuse(run.model) and run.device.type == "cuda":
        settings["gradient_checkpointing: offload"] = (rows, width, offloaded + least[:1])
    if rows > 1:
        settings[f"micro_batch_size: {rows // 2}"] = (rows // 2, width, run.keeps)
    settings[f"sequence_len: {width // 2}"] = (rows, width // 2, run.keeps)
    now = step_bytes(run.model, rows * width, run.keeps, optimizer)
    needs = {text: step_bytes(run.model, B * T, keeps, optimizer) for text, (B, T, keeps) in settings.items()}
    less = [f"{text} ({num_bytes / GIB:.1f} GiB)" for text, num_bytes in needs.items() if num_bytes < now]
    return f"A step of this run is predicted to need {now / GIB:.1f} GiB; less needs " + ", ".join(less)


@contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn a failed allocation within into one line: the step, what was asked, the settings, the last checkpoint."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = f"step {run.step}: {run.device} is out of memory: {asked(error)}. {dials(run)}"
        raise Failed(f"{what}. {what_is_saved(Path(run.config.output_dir))}.") from error
