"""What a command does with a model, a tokenizer or a prompt format that it has read."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from right import tokenizer, work

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import PromptFormat

TEXTS = ("", " Hello  world 123\n\u00e9\U0001f642<|im_end|>", "\u2581a <0x0A>")
CHAT = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
ROW = {"messages": CHAT, "instruction": "i", "input": "c", "output": "o", "system": "s", "text": "t", "tools": None}
ROW |= {"prompt": "p", "completion": "c"}


def use_model(path: Path, rng: Random) -> None:
    from nanoqlora.weights.checkpoint import fingerprint, open_weights
    from nanoqlora.weights.pretrained import load_model

    weights = open_weights(path)
    load_model(path, load_in_4bit=rng.random() < 0.3, weights=weights)
    fingerprint(weights)


def use_tokenizer(path: Path, rng: Random, adapter: Path | None = None) -> None:
    from nanoqlora.tokenizer.tokenizer import load_tokenizer, save_tokenizer

    tok = load_tokenizer(path, adapter)
    for text in TEXTS:
        tok.decode(tok.encode(text))
        tok.encode(text, special=True)
    prompts = PromptFormat(type="chat_template" if tok.chat_template else "completion")
    prompts.encode_prompt(tok, [{"role": "user", "content": "Who <|im_end|>?"}])
    prompts.end_id(tok)
    if rng.random() < 0.15:
        export_prompts(prompts, tok)
        (work() / "saved").mkdir(exist_ok=True)
        save_tokenizer(tok, work() / "saved")


def export_prompts(prompts: PromptFormat, tok: object = None) -> None:
    from nanoqlora.export.go_template import go_template
    from nanoqlora.export.tokenizer_metadata import tokenizer_metadata

    tok = tok or tokenizer()
    tokenizer_metadata(tok, prompts, tok.vocab_size, work())
    go_template(prompts, tok)


def try_each(*steps: Callable[[], object]) -> None:
    """Take every step, though an earlier one may be refused; raises the last refusal."""
    wrong = None
    for step in steps:
        try:
            step()
        except UserError as error:
            wrong = error
    if wrong:
        raise wrong


def use_prompts(prompts: PromptFormat) -> None:
    """As answers, training and export do, each even where another one refuses it."""
    tok = tokenizer()
    try_each(
        lambda: prompts.end_id(tok),
        lambda: prompts.encode_prompt(tok, CHAT[:1]),
        lambda: prompts.encode_row(tok, ROW),
        lambda: prompts.question(ROW),
        lambda: prompts.last_question(ROW),
        lambda: export_prompts(prompts),
        lambda: prompts.to_json(),
    )
