"""The commands as functions: `nq.train`, `nq.evaluate`, `nq.generate`. They do what the command line does.

run = nq.train("train.yml", max_steps=100)
model, tok = nq.Llama.from_pretrained("base", load_in_4bit=True), nq.load_tokenizer(run.output_dir)
nq.load_adapter(model, run.output_dir)
print(nq.generate(model, tok, [{"role": "user", "content": "Why is the sea salty?"}], max_new_tokens=80))
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError
from ..config.keys import build
from ..config.load import make_config, override
from ..config.options import ChatOptions
from ..config.parser import located
from ..config.schema import Config
from ..config.scripts import load_program
from ..data.batches import Sample
from ..data.files import find_files
from ..data.prepare import Encoding, read_samples
from ..data.prompts import PromptFormat
from ..model import Llama
from ..parallel import distributed
from ..tokenizer.chat_template import Messages
from ..tokenizer.tokenizer import Tokenizer
from .generate import answer
from .output_dir import read_log
from .scoring import mean_loss, score_samples
from .usable import Usable


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    output_dir: Path
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    eval_loss: float | None  # held-out nats per supervised token at the end; None without held-out data


def train(config: str | Path | dict[str, Any] | Config, **overrides: Any) -> Trained:
    """Run what a YAML file, or a map of its keys, describes; `overrides` are keys too, and win.

    Raises:
        UserError: what the command line would print.
    """
    if isinstance(config, Config):
        config = config.plain()
    settings = make_config(config | overrides) if isinstance(config, dict) else override(config, overrides)
    program = load_program("train.py")
    try:
        program.train(settings, program.TrainOptions(), *distributed.start())
    finally:
        distributed.stop()
    rows = read_log(Path(settings.output_dir) / "metrics.jsonl")
    losses = [None, *(row["eval_loss"] for row in rows if "eval_loss" in row)]
    return Trained(Path(settings.output_dir), rows, losses[-1])


def evaluate(
    model: Llama, tok: Tokenizer, data: str | Path | Sequence[Sample], prompt_format: PromptFormat | None = None
) -> dict[str, float]:
    """Loss in nats per supervised token, perplexity and number of tokens, on a data file or on samples.

    Args:
        prompt_format: how rows become tokens; None: what the columns of each row tell.
    """
    if isinstance(data, str | Path):
        encoding = Encoding(prompt_format, tok, model.config.max_position_embeddings, "raise")
        data = read_samples(find_files(str(data)), encoding).samples
    was_training = model.training
    scores = score_samples(model.eval(), data)
    model.train(was_training)
    loss = mean_loss(scores)
    return {"loss": loss, "perplexity": math.exp(loss), "tokens": sum(tokens for _, tokens in scores)}


def generate(
    model: Llama,
    tok: Tokenizer,
    messages: Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Iterable[int] = (),
    prompt_format: PromptFormat | None = None,
) -> str:
    """The model's answer to a conversation.

    Args:
        temperature: 0 always takes the likeliest token. seed: of the tokens that are drawn otherwise.
        ends: tokens that end an answer besides the tokenizer's and the prompt format's.
        prompt_format: None takes the tokenizer's own chat template.
    Raises:
        UserError: an argument has no meaning.
    """
    numbers = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    build(ChatOptions, located({"model": "model"} | numbers, "nq.generate"))
    if not (messages and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)):
        raise UserError('messages: a list of maps is expected, such as [{"role": "user", "content": "Hello"}].')
    used = Usable(model, tok, prompt_format)
    was_training = model.training
    with torch.no_grad():
        model.eval()
        text = "".join(answer(used, messages, max_new_tokens, temperature, seed, ends))
    model.train(was_training)
    return text
