"""Chapter 9: the operations that no step of QLoRA can avoid.

Every weight of the linear layers in the blocks and of the head meets every token twice, forward and for the gradient of
the layer's input. A multiplication and an addition are two operations. The embedding is looked up, not multiplied; a
head that is the embedding is multiplied all the same.
"""

from typing import Any


def operations(config: Any, num_tokens: int) -> int:
    raise NotImplementedError


def test_operations() -> None:
    import bench

    for name in ("llama3-1b", "llama3-8b", "llama3-70b"):
        config = bench.GEOMETRIES[name]
        without_attention = bench.useful_flops(config, 0, 2, 2048) - 3 * config.num_hidden_layers * (
            2 * 4096 * config.num_attention_heads * config.head_dim * 2048
        )
        assert operations(config, 4096) == without_attention
    assert round(operations(bench.GEOMETRIES["llama3-8b"], 8192) / 1e12) == 246
