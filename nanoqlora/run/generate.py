"""Answers as text: conversations to token ids, new tokens to pieces of text."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from ..data.prompts import PromptFormat
from ..tokenizer.chat_template import Messages
from .usable import Usable

ROWS = 16  # conversations that are answered together


def answer(
    used: Usable, messages: Messages, max_new_tokens: int, temperature: float, seed: int, ends: Iterable[int]
) -> Iterator[str]:
    """Yield the model's answer to a conversation piece by piece, as text.

    Args:
        temperature: 0 always takes the likeliest token; above, draws from softmax(logits / temperature).
        ends: tokens that end an answer besides those of the prompt format and the tokenizer.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        probabilities = (logits.float() / max(temperature, 1e-6)).softmax(1).cpu()
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    prompts, end_ids = encoded(used, [messages])
    new: list[int] = []
    text, shown = "", ""
    for (token,) in used.decoder.generate(prompts, end_ids | {*ends}, max_new_tokens, draw if temperature else None):
        assert token is not None
        new.append(token)
        text = used.tokenizer.decode(new)
        if not text.endswith("\ufffd"):  # a character may need more than one token
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]  # it ended within a character


def answers(used: Usable, conversations: Sequence[Messages], max_new_tokens: int) -> list[str]:
    """The model's greedy answers to some conversations, decoded together."""
    prompts, end_ids = encoded(used, conversations)
    texts = []
    for first in range(0, len(prompts), ROWS):
        part = prompts[first : first + ROWS]
        steps = [*used.decoder.generate(part, end_ids, max_new_tokens)]
        new = [[token for step in steps if (token := step[row]) is not None] for row in range(len(part))]
        texts += [used.tokenizer.decode(tokens) for tokens in new]
    return texts


def encoded(used: Usable, conversations: Sequence[Messages]) -> tuple[list[list[int]], set[int]]:
    """The prompts as token ids, and the tokens that end an answer by the prompt format and the tokenizer."""
    prompt_format, tok = used.prompt_format or PromptFormat(type="chat_template"), used.tokenizer
    end_ids = {id for id in (prompt_format.end_id(tok), tok.eos_id) if id is not None}
    return [prompt_format.encode_prompt(tok, messages) for messages in conversations], end_ids
