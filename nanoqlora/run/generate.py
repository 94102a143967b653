"""Answers: token by token, greedy or drawn, with a cache of keys and values."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import torch

from ..data.prompts import PromptFormat
from ..model import KVCache, Llama
from ..parallel import collectives
from ..qlora import dense_weights
from .usable import Usable


@torch.no_grad()
def generate(
    model: Llama,
    tokens: list[int],
    stop_ids: set[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new tokens one at a time until one of `stop_ids`, which is not yielded, or until enough are made.

    Args:
        temperature: 0 always takes the likeliest token; above, draws from softmax(logits / temperature).
    """
    device = model.model.norm.weight.device
    keep_dense = device.type == "cpu"  # where rebuilding every weight for every token is most of the work
    with dense_weights(model) if keep_dense else nullcontext():
        yield from _generate(model, tokens, stop_ids, max_new_tokens, temperature, generator, device)


def _generate(
    model: Llama,
    tokens: list[int],
    stop_ids: set[int],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    device: torch.device,
) -> Iterator[int]:
    cache, step = KVCache(), torch.tensor([tokens], device=device)
    for _ in range(max_new_tokens):
        logits = model.lm_head(model.model(step, cache=cache)[0, -1]).float()  # (V,)
        if temperature == 0:
            token = int(collectives.broadcast(logits.argmax()))
        else:
            token = int(torch.multinomial((logits / temperature).softmax(0).cpu(), 1, generator=generator))
        if token in stop_ids:
            return
        yield token
        step = torch.tensor([[token]], device=device)


def answer(
    used: Usable,
    messages: list[dict[str, str]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Iterable[int] = (),
) -> Iterator[str]:
    """Yield the model's answer to a conversation piece by piece, as text.

    Args:
        ends: tokens that end an answer besides those of the prompt format and the tokenizer.
    """
    prompt_format = used.prompt_format or PromptFormat(type="chat_template")
    ids = prompt_format.encode_prompt(used.tokenizer, messages)
    generator = torch.Generator().manual_seed(seed)
    usual = prompt_format.end_id(used.tokenizer), used.tokenizer.eos_id
    stop_ids = {*ends, *(id for id in usual if id is not None)}
    new: list[int] = []
    text, shown = "", ""
    for token in generate(
        used.model, ids, stop_ids, max_new_tokens=max_new_tokens, temperature=temperature, generator=generator
    ):
        new.append(token)
        text = used.tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # a character may need more than one token
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]  # it ended within a character
