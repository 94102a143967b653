"""Plans that cannot be meant. Each is warned of with its numbers, by `--plan` and at the start; none is refused."""

from collections.abc import Iterator

import numpy as np

from ..config.schema import Config
from ..data.batches import SUPERVISED, Samples
from ..model import ModelConfig
from ..tokenizer.tokenizer import Tokenizer
from .cadence import evaluations, saves, warmup_steps
from .inputs import Data


def doubts(config: Config, data: Data, tokenizer: Tokenizer, model: ModelConfig) -> Iterator[str]:
    """A line for each thing in a run's plan that nobody would ask for."""
    yield from _rate(config, data)
    yield from _positions(data, model)
    yield from _repeated(config, data)
    if count := shared(data.samples, data.held_out):
        found = f"{count} of {len(data.held_out)} evaluation samples are in the training data too, token for token"
        yield f"{found}: the held-out loss will look better than it is"
    yield from _end(config, data, tokenizer)
    yield from _cadence(config, data)


def _rate(config: Config, data: Data) -> Iterator[str]:
    n, warmup = len(data.plan), warmup_steps(config, data.plan)
    if config.lr_scheduler == "constant" or warmup < n:
        return
    if n == 1:
        yield f"the only step has learning rate 0, as the first of {warmup} warm-up steps: nothing will be learnt"
        return
    peak, last = config.learning_rate, config.learning_rate * (n - 1) / warmup
    end = f"the rate ends at {last:.3g} and never reaches learning_rate {peak:g}"
    yield f"the warm-up takes {warmup} steps and the run has {n}, so {end}"


def _positions(data: Data, model: ModelConfig) -> Iterator[str]:
    scaling, limit = model.rope_scaling, model.max_position_embeddings
    if scaling.get("rope_type") == "linear":  # config.json has the length before it was stretched
        limit = int(limit * scaling.get("factor", 1))
    lengths = np.concatenate([data.samples.lengths, data.held_out.lengths])
    if count := int((lengths > limit).sum()):
        found = f"{count} of {len(lengths)} samples are longer than the {limit} positions that the model was made for"
        yield f"{found} (the longest has {lengths.max()} tokens). A sequence_len of at most {limit} avoids that"


def _repeated(config: Config, data: Data) -> Iterator[str]:
    """A line for each data set that has samples of an earlier one; within one, data/prepare.py counts rows."""
    seen: set[int] = set()
    for name, reading in [*data.readings.items()][: len(config.datasets)] if len(config.datasets) > 1 else []:
        own = _hashes(reading.samples, np.arange(len(reading.samples)))
        if count := sum(map(seen.__contains__, own)):
            yield f"{count} samples of {name} are in an earlier data set too, so they are learnt more than once"
        seen.update(own)


def shared(samples: Samples, held_out: Samples) -> int:
    """How many of `held_out` are in `samples` too, with the same tokens and mask."""
    alike = np.flatnonzero(np.isin(samples.lengths, held_out.lengths))
    seen = {*_hashes(samples, alike)}
    return sum(map(seen.__contains__, _hashes(held_out, np.arange(len(held_out)))))


def _hashes(samples: Samples, which: np.ndarray) -> list[int]:
    """Of the tokens of some samples, with their mask."""
    places = zip(samples.source[which], samples.starts[which], samples.lengths[which], strict=True)
    return [hash(samples.words[source][start : start + length].tobytes()) for source, start, length in places]


def _end(config: Config, data: Data, tokenizer: Tokenizer) -> Iterator[str]:
    ids = {id for id in (data.prompt_format.end_id(tokenizer), tokenizer.eos_id) if id is not None}
    learnt = np.array([*ids], np.uint32) | SUPERVISED
    unwanted = all(dataset.train_on_eos == "none" for dataset in config.datasets)
    if not unwanted and not any(np.isin(words, learnt).any() for words in data.samples.words):
        names = " or ".join(tokenizer.decode([id]) for id in sorted(ids)) or "the tokenizer has none"
        yield f"no sample teaches the end token ({names}): the model will not learn to stop"


def _cadence(config: Config, data: Data) -> Iterator[str]:
    n, num_evals, patience = len(data.plan), len(evaluations(config, data.plan)), config.early_stopping_patience
    if len(data.held_out) and config.eval_strategy == "steps" and config.eval_steps and not num_evals:
        yield f"eval_steps is {config.eval_steps} and the run has {n} steps: nothing is evaluated between them"
    elif patience and num_evals <= patience:
        yield f"early_stopping_patience is {patience} and there are {num_evals} evaluations: it stops nothing"
    if config.save_strategy == "steps" and config.save_steps and not saves(config, data.plan):
        yield f"save_steps is {config.save_steps} and the run has {n} steps: no checkpoint will be written"
