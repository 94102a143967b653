"""Small models of sentencepiece's own trainer."""

import io

import sentencepiece
from hard_texts import HARD
from small_runs import PIRATE


def train(**options) -> bytes:
    """A small sentencepiece model of Llama-2's kind, learnt from the pirate chats and the hard texts."""
    lines = [
        *(line for text in PIRATE[:200] for line in text.splitlines()),
        *(line for t in HARD for line in t.splitlines()),
    ]
    model = io.BytesIO()
    options = {
        **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 900, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "character_coverage": 0.98},
        **{"split_digits": True, "minloglevel": 2, **options},
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()
