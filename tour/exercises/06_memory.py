"""Chapter 6: predict memory, in bytes.

config has hidden_size (D), intermediate_size (FF), num_hidden_layers (L), num_attention_heads (H), num_key_value_heads
(KV) and head_dim (hd). All seven linear layers of a block have an update of rank r.
"""

from typing import Any


def kept_bytes(config: Any, num_tokens: int, r: int) -> int:
    """What one block keeps if nothing is recomputed: 2 bytes for each value of the chapter's list, and 4 bytes for
    each query head and token."""
    raise NotImplementedError


def adapter_bytes(config: Any, r: int) -> int:
    """A, B, their gradients and AdamW's two moments, of all blocks, in float32."""
    raise NotImplementedError


def test_memory() -> None:
    import torch

    import bench
    import nanoqlora as nq
    from nanoqlora.fast import memory
    from nanoqlora.model import Llama

    for name in ("llama3-1b", "llama3-8b"):
        config = bench.GEOMETRIES[name]
        assert kept_bytes(config, 1000, 16) == memory.kept_bytes(config, 1000, 7 * 16, "all")
        with torch.device("meta"):
            model = Llama(config)
        nq.inject_lora(model, r=16, alpha=16)
        assert adapter_bytes(config, 16) == 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
