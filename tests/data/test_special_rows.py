"""Special tokens that a base model never learnt, in the data of a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import save_random_llama

from nanoqlora.config.errors import UserError
from nanoqlora.data.batches import SUPERVISED, Samples
from nanoqlora.data.messages import say
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.data.special_rows import check_special_rows
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer
from nanoqlora.weights.checkpoint import open_weights

CHAT = PromptFormat(type="chat_template")


@pytest.fixture(scope="module")
def tok(smollm2_path: Path) -> Tokenizer:
    """SmolLM2's tokenizer, cut short, with the markers of Llama-3."""
    tok = load_tokenizer(smollm2_path)
    names = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    vocab, size = [*names, *tok.vocab[len(names) :]], 2000
    known = set(vocab[:size])
    merges = [merge for merge in tok.merges if merge.replace(" ", "") in known and set(merge.split()) <= known]
    changes = {"vocab": vocab[:size], "kinds": tok.kinds[:size], "merges": merges, "original_files": {}}
    return replace(tok, bos_id=1, eos_id=0, add_bos=True, chat_template=CHAT_TEMPLATES["llama3"], **changes)


def samples_of(tok: Tokenizer, fmt: PromptFormat) -> Samples:
    row = {"messages": say("user", "Ahoy!", "assistant", "Arr."), "instruction": "Ahoy!", "output": "Arr."}
    ids, mask = fmt.encode_row(tok, row)
    words = np.array(ids, np.uint32) | np.where(mask, np.uint32(SUPERVISED), np.uint32(0))
    return Samples.of(words, np.array([len(ids)]), np.array([sum(mask)]), "")


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_were_never_trained_are_refused(tok, tmp_path, tied):
    save_random_llama(tmp_path, vocab_size=2000, tie_word_embeddings=tied)
    chat, alpaca = samples_of(tok, CHAT), samples_of(tok, PromptFormat(type="alpaca"))
    check_special_rows(tok, chat, open_weights(tmp_path), tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    sound = load_file(path)

    def refused(matrix: str, ids: list[int], samples: Samples, said: str) -> None:
        tensors = {name: w.clone() for name, w in sound.items()}
        tensors[matrix][ids] *= 1e-6
        save_file(tensors, path, metadata={"format": "pt"})
        if not said:
            return check_special_rows(tok, samples, open_weights(tmp_path), tmp_path)
        with pytest.raises(UserError, match=said):
            check_special_rows(tok, samples, open_weights(tmp_path), tmp_path)

    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    refused(
        embedding, [2, 3, 4], chat, r"rows of <\|eot_id\|>, <\|start_header_id\|>, <\|end_header_id\|> in model.embed"
    )
    refused(embedding, [2, 3, 4], alpaca, "")
    refused(embedding, [0], alpaca, r"<\|end_of_text\|> in model.embed" if tied else "")  # it is written, not read
    if not tied:
        refused(head, [2, 3, 4], chat, r"rows of <\|eot_id\|> in lm_head.weight were never trained")
        refused(head, [0], alpaca, r"<\|end_of_text\|> in lm_head")


def test_the_rows_of_a_real_model_are_trained(smollm2_path):
    tok = load_tokenizer(smollm2_path)
    check_special_rows(tok, samples_of(tok, CHAT), open_weights(smollm2_path), smollm2_path)
