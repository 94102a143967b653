"""What is found wrong before a run: surroundings, inputs, what the ranks have. One rank finds it, and all stop."""

import time
from pathlib import Path

import torch

from ..config.errors import UserError, visible
from ..config.files import check_writable
from ..config.load import began
from ..config.rules import without_effect
from ..config.schema import Config
from ..data.special_rows import check_special_rows
from ..fast.stats import stage, stages
from ..parallel import collectives
from ..parallel.devices import describe_threads
from ..tokenizer.tokenizer import Tokenizer
from ..weights.checkpoint import open_weights
from ..weights.pretrained import open_model
from .checkpoints import find_checkpoint, load_checkpoint
from .doubts import doubts
from .inputs import Data, prepare_data, same_on_all_ranks, tokenizer_of
from .log import Say
from .output_dir import is_finished, refuse_other_runs
from .state import Run
from .trackers import check_trackers
from .usable import check_vocabulary


@stage("data")
def check_surroundings(config: Config, rank: int, writes: bool, say: Say) -> None:
    """Before anything is read: trackers that cannot be used, a folder that is taken.

    Args:
        writes: whether this command will write to output_dir.
    """
    stages.clear()  # of an earlier run of this process
    if began:
        stages["imports"] = time.perf_counter() - began.pop()
    with collectives.together():
        check_trackers(config.plain(), rank)
        if rank == 0:  # which writes
            out = Path(config.output_dir)
            for folder in (out,) if writes else (out, out.parent):  # a rehearsal writes beside it
                check_writable(folder, "output_dir")
            try:
                refuse_other_runs(config)
            except UserError as error:
                if writes:
                    raise
                say(f"note: the run itself would end with: {error}")


@stage("data")
def read_inputs(config: Config, rank: int, ranks: int) -> tuple[Tokenizer, Data]:
    """Tokenizer and data of a run, checked before anything is written."""
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


def describe_inputs(config: Config, data: Data, tokenizer: Tokenizer, ranks: int, on_gpu: bool) -> list[str]:
    """Lines about threads and what was read, and warnings of settings that do nothing or cannot be meant."""
    lines = [] if on_gpu else [describe_threads()]
    for path, reading in data.readings.items():
        about = [reading.describe(config.sequence_len, config.excess_length_strategy), *reading.describe_notes()]
        lines += [visible(f"{path}: {line}") for line in about]
    model_config = open_model(config.base_model)[0].config
    warnings = *without_effect(config, ranks, on_gpu), *doubts(config, data, tokenizer, model_config)
    return lines + [f"warning: {text}" for text in warnings]


def is_over(config: Config) -> bool:
    """Whether rank 0 finds the run that was to be resumed finished."""
    here = config.auto_resume_from_checkpoints and is_finished(Path(config.output_dir))
    return collectives.gather_objects(here)[0]


def resume(run: Run) -> int:
    """Go on from the checkpoint that the configuration names. Returns the steps already taken, 0 for a new run.

    Raises:
        UserError: it is damaged, or a host sees another one than rank 0.
    """
    with collectives.together():
        start = load_checkpoint(run)
    with collectives.together():
        if start != int(collectives.broadcast(torch.tensor(start, device=run.device))):
            found = f"here the newest checkpoint is of step {start}, for rank 0 it is of another"
            raise UserError(f"output_dir {run.config.output_dir}: {found}. Give all hosts one folder, or copies of it.")
    collectives.broadcast(run.flat.data)  # whatever each rank has read, all begin with the same
    return start
