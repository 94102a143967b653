from typing import Any


def kept_bytes(config: Any, num_tokens: int, r: int) -> int:
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, KV = config.num_attention_heads, config.num_key_value_heads
    values = 2 * D + 2 * H * hd + 2 * KV * hd + 7 * r + 2 * FF
    return num_tokens * (2 * values + 4 * H)


def adapter_bytes(config: Any, r: int) -> int:
    D, FF, hd = config.hidden_size, config.intermediate_size, config.head_dim
    H, KV = config.num_attention_heads, config.num_key_value_heads
    widths = [(D, H * hd), (D, KV * hd), (D, KV * hd), (H * hd, D), (D, FF), (D, FF), (FF, D)]
    return 16 * config.num_hidden_layers * sum(r * (n_in + n_out) for n_in, n_out in widths)
