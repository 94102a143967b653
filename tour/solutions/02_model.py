from typing import Any


def num_parameters(config: Any) -> int:
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    attention = D * hd * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    block = attention + 3 * D * FF + 2 * D
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * block + tables * config.vocab_size * D + D
