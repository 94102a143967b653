"""A model with all that is needed to use it: weights, adapter, tokenizer and the prompt format it was trained with."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..config.errors import UserError
from ..config.options import ModelOptions
from ..data.prompts import PromptFormat
from ..fast.decode import Decoder
from ..model import Llama
from ..parallel import devices
from ..tokenizer.files import read_chat_template
from ..tokenizer.tokenizer import Tokenizer, brings_tokenizer, load_tokenizer
from ..weights.adapter import check_base, check_merged, load_adapter
from ..weights.checkpoint import open_weights
from ..weights.hub import ADAPTER_FILES, local_path
from ..weights.pretrained import load_model

VOCABULARIES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Usable:
    """What `load_for_use` gives. prompt_format is None when neither adapter nor model has one."""

    model: Llama
    tokenizer: Tokenizer
    prompt_format: PromptFormat | None
    notes: tuple[str, ...] = ()  # what the user should know, to be printed when nothing can be wrong any more

    @cached_property
    def decoder(self) -> Decoder:
        """Writes answers with the weights that the model has when this is first used."""
        return Decoder(self.model)


def load_for_use(args: ModelOptions) -> Usable:
    """Load the model that the options name, ready to score and to chat."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = devices.compute_dtype(args.bf16, device)
    check_merged(args.model)
    weights = open_weights(args.model)
    about_base = check_base(args.adapter, args.model, weights, args.other_base) if args.adapter else None
    kind = {"load_in_4bit": args.load_in_4bit, "keep_gguf_blocks": args.keep_gguf_blocks}
    model = load_model(args.model, **kind, dtype=dtype, device=device, weights=weights)
    tokenizer, prompt_format, about_prompts = talking(args.model, args.adapter, model.config.vocab_size)
    if args.adapter:
        load_adapter(model, args.adapter)
    model.requires_grad_(False).eval()
    return Usable(model, tokenizer, prompt_format, tuple(note for note in (about_base, about_prompts) if note))


def talking(
    base: str | Path, adapter: str | Path | None, num_rows: int
) -> tuple[Tokenizer, PromptFormat | None, str | None]:
    """How base and adapter are talked to: tokenizer, prompt format, and a line about them if there is one to know.

    Of an adapter of ours prompt.json decides. Another one may bring the tokenizer and the chat template that its author
    talked to it with. What an adapter leaves open is the base's.

    Args:
        num_rows: of the embedding.
    Raises:
        UserError: the tokenizer does not fit the embedding, or a file is damaged.
    """
    folder, tokenizer = local_path(adapter, ADAPTER_FILES) if adapter else None, load_tokenizer(base, adapter)
    brings = folder is not None and brings_tokenizer(folder)
    check_vocabulary(tokenizer, num_rows, adapter if brings and adapter else base)
    note: str | None = None
    saved: Path | None = local_path(base) / "prompt.json"
    if folder is not None and (folder / "prompt.json").is_file():
        saved = folder / "prompt.json"
    elif brings:
        end, and_template = tokenizer.named_texts.get("eos_token"), " and chat template" * bool(tokenizer.chat_template)
        note, saved = f"{adapter}: its own tokenizer{and_template} are used; the end token is {end!r}.", None
    elif folder is not None:
        unused = [name for name in VOCABULARIES if (folder / name).is_file()]
        if read_chat_template(folder):
            note, saved = f"{adapter}: its own chat template is used, with the tokenizer of {base}.", None
        if unused:
            note = f"{adapter}: {unused[0]} is not used without tokenizer_config.json; the tokenizer of {base} is"
            note += "." if saved else ", with the chat template of the adapter."
    prompt_format = PromptFormat.from_json(saved.read_bytes(), saved) if saved and saved.is_file() else None
    return tokenizer, prompt_format, note


def check_vocabulary(tokenizer: Tokenizer, num_rows: int, path: str | Path) -> None:
    """Refuse a tokenizer that has more tokens than the embedding of the model has rows; fewer are usual."""
    if tokenizer.vocab_size > num_rows:
        sizes = f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding {num_rows} rows"
        raise UserError(f"{path}: {sizes}, so some tokens would have no vector. Take both from one model.")
