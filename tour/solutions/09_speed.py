from typing import Any


def operations(config: Any, num_tokens: int) -> int:
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    attention = D * hd * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    weights = config.num_hidden_layers * (attention + 3 * D * FF) + config.vocab_size * D
    return 4 * num_tokens * weights
