"""Whether the special tokens of the data were ever trained.

A base model has rows in its embedding and head for tokens that only its chat version uses: Llama-3's <|eot_id|> and
<|start_header_id|> are nearly zero there. LoRA leaves embedding and head as they are. So a model trained on such tokens
knows nothing of them, and never writes the one that ends an answer. (Rows that were left at their random start
cannot be distinguished from trained ones.)
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ..config.errors import UserError
from ..tokenizer.tokenizer import Tokenizer
from ..weights.checkpoint import Weights
from .batches import Samples

SAMPLES_READ = 1000  # the same template writes all of them
ROWS = 4096
UNTRAINED = 0.01  # of the usual norm; the smallest row of SmolLM2 has 0.57 of it


def check_special_rows(tokenizer: Tokenizer, samples: Samples, weights: Weights, path: str | Path) -> None:
    """Refuse data with special tokens that the base model has no trained rows for.

    Raises:
        UserError: names the tokens, and formats that need none of them.
    """
    special = list(tokenizer.special_tokens.values())
    read: set[int] = set()
    written: set[int] = set()
    for sample in islice(samples, SAMPLES_READ):
        tokens, is_special = np.asarray(sample.tokens), np.isin(sample.tokens, special)
        read.update(tokens[:-1][is_special[:-1]].tolist())  # nothing is read off the last one
        written.update(tokens[is_special & sample.supervised].tolist())
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    used = {embedding: read, head: written} if head in weights.names() else {embedding: read | written}
    for name, ids in used.items():
        if not ids:
            continue
        parts = weights.load(name).split(ROWS)  # as float32 the complete table would be the largest tensor of a run
        norms = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in parts])  # (V,)
        usual = norms.median()
        if untrained := [tokenizer.vocab[id] for id in sorted(ids) if norms[id] < UNTRAINED * usual]:
            found = f"the rows of {', '.join(untrained)} in {name} were never trained (norms under 1 % of {usual:.3g})"
            advice = "Use type or chat_template alpaca, or the version of the model that was trained on chats"
            raise UserError(f"{path}: {found}, and LoRA leaves them so. {advice}.")
