"""A model with all that is needed to use it: weights, adapter, tokenizer and the prompt format it was trained with."""

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from . import distributed
from .adapter import load_adapter
from .checkpoint import load_model
from .cli import UserError
from .hub import ADAPTER_FILES, local_path
from .model import KVCache, Llama
from .prompts import PromptFormat
from .qlora import dense_weights
from .tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Usable:
    """What `load_for_use` gives. prompt_format is None when neither adapter nor model says one."""

    model: Llama
    tokenizer: Tokenizer
    prompt_format: PromptFormat | None


def load_for_use(args: argparse.Namespace) -> Usable:
    """Load what `--model`, `--adapter`, `--load_in_4bit` and `--bf16` name, ready to score and to chat."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = distributed.compute_dtype(args.bf16, device)
    model = load_model(args.model, load_in_4bit=args.load_in_4bit, dtype=dtype, device=device)
    adapter = args.adapter and local_path(args.adapter, ADAPTER_FILES)
    tokenizer = load_tokenizer(args.model, adapter)
    check_vocabulary(tokenizer, model.config.vocab_size, args.model)
    if adapter:
        load_adapter(model, adapter)
    model.requires_grad_(False).eval()
    files = [Path(folder) / "prompt.json" for folder in (adapter, local_path(args.model)) if folder]
    prompts = [PromptFormat.from_json(file.read_text("utf-8")) for file in files if file.is_file()]
    prompt_format = prompts[0] if prompts else None
    return Usable(model, tokenizer, prompt_format)


def check_vocabulary(tokenizer: Tokenizer, num_rows: int, path: str | Path) -> None:
    """Refuse a tokenizer that has more tokens than the embedding of the model has rows; fewer are usual."""
    if tokenizer.vocab_size > num_rows:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and the embedding {num_rows} rows, so some "
            f"tokens would have no vector. Take both from one model."
        )


@torch.no_grad()
def generate(
    model: Llama,
    tokens: list[int],
    stop_ids: set[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
):
    """Yield new tokens one at a time until one of `stop_ids`, which is not yielded, or until enough are made.

    Args:
        temperature: 0 always takes the likeliest token; above, draws from softmax(logits / temperature).
    """
    device = model.model.norm.weight.device
    keep_dense = device.type == "cpu"  # where rebuilding every weight for every token is most of the work
    with dense_weights(model) if keep_dense else nullcontext():
        yield from _generate(model, tokens, stop_ids, max_new_tokens, temperature, generator, device)


def _generate(model, tokens, stop_ids, max_new_tokens, temperature, generator, device):
    cache, step = KVCache(), torch.tensor([tokens], device=device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.model(step, cache=cache)[0, -1]).float()  # (V,)
        if temperature == 0:
            token = int(distributed.of_first_rank(logits.argmax()))
        else:
            token = int(torch.multinomial((logits / temperature).softmax(0).cpu(), 1, generator=generator))
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=device)
