"""Chapter 12: decode one ggml_block of Q4_K, 144 bytes, in plain Python.

    bytes 0-1     d, half precision; `struct.unpack("<e", raw[0:2])[0]` reads it
    bytes 2-3     dmin
    bytes 4-7     groups 0 to 3: low 6 bits the scale; top 2 bits are the top bits of the scale of groups 4 to 7
    bytes 8-11    the same for the minima
    bytes 12-15   groups 4 to 7: low 4 bits of the scale in the low half, low 4 bits of the minimum in the high half
    bytes 16-143  codes: 32 bytes for two groups, 0 and 1 first; low halves are the first of the two groups

w = d * scale * code - dmin * minimum
"""


def decode(raw: bytes) -> list[float]:
    """The 256 weights."""
    raise NotImplementedError


def test_decode() -> None:
    import torch

    from nanoqlora.gguf.ggml_blocks import quantize
    from nanoqlora.ops.ggml import dequantize
    from tour.recompute import q4_k_block

    w = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    for raw in (q4_k_block(), bytes(quantize(w, "Q4_K").flatten().tolist())):
        expected = dequantize(torch.tensor(list(raw), dtype=torch.uint8), "Q4_K", (1, 256))[0]
        torch.testing.assert_close(torch.tensor(decode(raw)), expected)
