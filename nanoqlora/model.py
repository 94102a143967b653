"""Llama-3 in plain PyTorch: everything between token ids and logits, and nothing else.

    tokens (B, T)
      -> embed_tokens                                  (B, T, D)      the residual stream x
      -> num_hidden_layers times:
           x = x + self_attn(input_layernorm(x))       tokens look at earlier tokens
           x = x + mlp(post_attention_layernorm(x))    each token by itself
      -> norm -> lm_head                               (B, T, V)      a score for every possible next token

The same code is Llama 1 to 3.3, TinyLlama, SmolLM and Mistral: they differ in the numbers of `ModelConfig` only.
Modules and tensors have Hugging Face's names, so a checkpoint loads without a table of names. Four bits, LoRA, GPUs
and files are left out: `qlora.py` replaces the linear layers, `weights/` reads their values. Norm, RoPE, attention and
SwiGLU are in `ops/`, each in plain PyTorch beside its fast twin.

Dimensions: B rows, T tokens in a row, D model width, FF width of the MLP, H query heads, KV key/value heads, hd width
of a head, V vocabulary. Read next: `ops/nf4.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .config.llama import llama_numbers
from .ops import Segments


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The numbers that make one Llama different from another, named as in Hugging Face's config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] = field(default_factory=dict)  # empty: plain RoPE
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "ModelConfig":
        """From config.json as a dict. Raises ValueError: `config/llama.py` says for what."""
        return cls(**llama_numbers(config))


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The RoPE frequency of each pair of a head's dimensions, (hd / 2,) float32, in radians per token.

    Pair i rotates by theta^(-2i / hd) per token: the first pairs rotate fast and separate neighbours, the last ones
    rotate once in thousands of tokens. For longer contexts `linear` divides all frequencies by a factor; `llama3` only
    the low ones, whose wavelength is longer than the context of pre-training, and interpolates in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: high frequency, unchanged; 0: low, divided by the factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class KVCache:
    """Keys and values of the earlier tokens, one pair per layer, so that generation computes each token once."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, KV, hd) keys and values and return all of them, (B, earlier + T, KV, hd)."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        self.layers[layer] = k, v
        return k, v


class RMSNorm(nn.Module):
    """Scale each token's vector to length sqrt(D), then every dimension by a learned weight (D,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention. Several query heads share one key/value head, which makes the KV cache smaller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        D, H, KV, hd = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(D, H * hd, bias=False)
        self.k_proj = nn.Linear(D, KV * hd, bias=False)
        self.v_proj = nn.Linear(D, KV * hd, bias=False)
        self.o_proj = nn.Linear(H * hd, D, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, hd)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, KV, hd)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, KV, hd)
        q, k = ops.apply_rope(q, *rope), ops.apply_rope(k, *rope)
        if cache is None:
            y = ops.attention(q, k, v, segments)  # (B, T, H, hd)
        else:
            y = ops.attention_to_past(q, *cache.append(self.layer, k, v))
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: silu(gate) scales up elementwise, and down_proj brings the result back to the model's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, FF = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, FF, bias=False)
        self.up_proj = nn.Linear(D, FF, bias=False)
        self.down_proj = nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One transformer block: attention, then MLP, each added to the residual stream x (B, T, D)."""

    recompute = False  # activation checkpointing: only x is saved, and the backward pass recomputes the block

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], segments: Segments, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """From token ids to the last norm; everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # In float32 whatever the model's dtype: in bfloat16 the angle of position 1000 is off by up to 2 radians.
        self.rope_frequencies = rope_frequencies(config)

    def forward(self, tokens: Tensor, segments: Segments | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D), the hidden states that the head reads."""
        B, T = tokens.shape
        segments = segments or Segments.one_per_row(B, T, offset=len(cache or ()))
        rope = self.rope(segments.positions.to(tokens.device))
        x = self.embed_tokens(tokens)
        for block in self.layers:
            if block.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, segments, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, segments, cache)
        return self.norm(x)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, T, hd / 2) float32, of the RoPE angles at these positions (B, T)."""
        angles = positions.unsqueeze(-1).float() * self.rope_frequencies.to(positions.device)
        return angles.cos(), angles.sin()


class Llama(nn.Module):
    """A Llama with its language-model head: `model(tokens)` gives logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, segments: Segments | None = None, cache: KVCache | None = None) -> Tensor:
        """Scores for the next token at every position.

        Args:
            tokens: (B, T) int64.
            segments: where documents begin in packed rows; without it every row is one document.
            cache: keys and values of the earlier tokens of the same rows.
        Returns:
            (B, T, V) logits in the model's dtype. Training does not call this: it gives the hidden states of
            `self.model` to `ops.linear_cross_entropy`, which never holds all logits at once.
        """
        return self.lm_head(self.model(tokens, segments, cache))
