"""Chapter 3: several documents in a row that do not see each other.

`positions([3, 2])` is [0, 1, 2, 0, 1]. `mask([3, 2])` is a list of five lists: entry [t][u] is True where token t may
see token u, which is itself or an earlier token of the same document.
"""


def positions(lengths: list[int]) -> list[int]:
    raise NotImplementedError


def mask(lengths: list[int]) -> list[list[bool]]:
    raise NotImplementedError


def test_documents_are_alone() -> None:
    import torch
    import torch.nn.functional as F

    from nanoqlora.ops.elementwise import apply_rope

    def attend(x: torch.Tensor, places: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        angles = (places[:, None] * 100.0 ** -(torch.arange(8) / 8))[None]
        q, k = (apply_rope(x + shift, angles.cos(), angles.sin()).transpose(1, 2) for shift in (0.0, 0.5))
        return F.scaled_dot_product_attention(q, k, x.transpose(1, 2), seen, is_causal=seen is None)

    lengths = [5, 1, 7]
    x = torch.randn(1, 13, 2, 16, generator=torch.Generator().manual_seed(0))
    together = attend(x, torch.tensor(positions(lengths)), torch.tensor(mask(lengths)))
    alone = [attend(part, torch.arange(part.shape[1]), None) for part in x.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=2))
