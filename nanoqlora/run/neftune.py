"""NEFTune: uniform noise on the embeddings of training tokens, so that answers are learnt less to the letter.

Each number of an embedding gets noise from [-s, s), s = alpha / sqrt(L * D): for L tokens of a document of width D the
complete noise has a length of about alpha / sqrt(3), however long the document is. L is the document's own length, so
packing it with others or padding it changes nothing. Evaluation has no noise.
Source: NEFTune (arXiv:2310.05914), section 2.
"""

import torch
from torch import Tensor, nn

from ..model import Llama
from ..ops import Segments
from ..ops.lora import mix, to_32_bits

SALT = 0x4E45465475  # other bits than those that decide dropout


class Noise:
    """Added to what `embed_tokens` gives. It is a hash of the row's seed: the same on any rank and after a resume."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.row_seeds: Tensor  # (B,) int64; with places (B, T), as in `ops.Dropout`
        self.places: Tensor | None = None
        self.segments: Segments  # of the batch to come

    def __call__(self, embedding: nn.Module, tokens: tuple[Tensor], x: Tensor) -> Tensor:
        """x (B, T, D) with noise while training; the arguments are those of a forward hook."""
        if not embedding.training:
            return x
        _, T, D = x.shape
        seeds, places = self.row_seeds, self.places
        if places is None:
            seeds, places = seeds[:, None], torch.arange(T, device=x.device)[None]
        index = places.to(torch.int32)[..., None] * D + torch.arange(D, device=x.device, dtype=torch.int32)
        uniform = mix(mix(index) ^ to_32_bits(seeds ^ SALT)[..., None]).float() / 2**31  # [-1, 1)
        lengths = torch.tensor([[n for n in row for _ in range(n)] for row in self.segments.lengths], device=x.device)
        return (x + self.alpha * (lengths * D).rsqrt().unsqueeze(-1) * uniform).to(x.dtype)


def add_noise(model: Llama, alpha: float) -> None:
    """Have the embedding's result carry noise in training."""
    noise = Noise(alpha)
    vars(model.model)["noise"] = noise
    model.model.embed_tokens.register_forward_hook(noise)


def set_noise_rows(model: Llama, row_seeds: Tensor, segments: Segments, places: Tensor | None = None) -> None:
    """Set which rows the next batch holds, as `set_dropout_rows` does; without noise nothing happens."""
    if noise := getattr(model.model, "noise", None):
        noise.row_seeds, noise.places, noise.segments = row_seeds, places, segments
