"""Llama-3 in plain PyTorch: everything between token ids and logits, and nothing else.

    tokens (B, T)
      -> embed_tokens                                  (B, T, D)      the residual stream x
      -> num_hidden_layers times:
           x = x + self_attn(input_layernorm(x))       tokens look at earlier tokens
           x = x + mlp(post_attention_layernorm(x))    each token thinks for itself
      -> norm -> lm_head                               (B, T, V)      a score for every possible next token

The same code is Llama 1 to 3.3, TinyLlama, SmolLM and Mistral: they differ in the numbers of `ModelConfig` only.
Modules and tensors carry Hugging Face's names, so a checkpoint loads without a map. This file knows nothing of four
bits, LoRA, GPUs or files: `qlora.py` swaps the linear layers, `weights/checkpoint.py` fills them. Norm, rotation,
attention and SwiGLU stand in `ops/`, each written out plainly beside its fast twin.

Dims: B rows, T tokens in a row, D width, FF width of the MLP, H query heads, KV key/value heads, hd width of a head,
V vocabulary. Read next: `ops/nf4.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
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
        """Read config.json as a dict, with the meaning and the defaults that transformers gives to its keys.

        Raises:
            ValueError: an architecture or a feature that this model does not have, a number that is missing or out of
                range, or two keys that contradict each other; names the keys.
        """
        architectures = config.get("architectures") or []
        architectures = architectures if isinstance(architectures, list) else [architectures]
        kinds = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
        found = [kinds[name] for name in architectures if name in list(kinds)]  # a list: also for what cannot be a key
        if architectures and not found:
            raise ValueError(f"architectures is {architectures}; {' and '.join(kinds)} are read")
        kind = config.get("model_type") or (found or ["llama"])[0]
        if kind not in list(kinds.values()):
            raise ValueError(f"model_type is {kind!r}; {' and '.join(kinds.values())} are read")
        defaults = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        if kind == "mistral":
            defaults |= {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
        given, config = config, defaults | config
        plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "sliding_window": None}
        plain |= {"partial_rotary_factor": 1.0}
        for key, value in plain.items():
            if config.get(key) not in (value, None):
                note = "" if key in given else f", which is the default of a {kind} without this key"
                raise ValueError(f"{key} is {config[key]!r}{note}; only {value!r} is computed here")
        tied = config["tie_word_embeddings"]
        if tied not in (True, False, None) or isinstance(tied, int | float) and type(tied) is not bool:
            raise ValueError(f"tie_word_embeddings is {tied!r}, where true or false is expected")
        heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
        sizes = {key: config.get(key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads if kv_heads is None else kv_heads}
        sizes |= {key: config.get(key) for key in ("vocab_size", "max_position_embeddings")}
        for key, value in sizes.items():
            largest = 2**31 - 1 if key == "max_position_embeddings" else 2**24
            if type(value) is not int or not 0 < value <= largest:
                raise ValueError(f"{key} is {_short(value)}, where a Llama needs a whole number from 1 to {largest}")
        head_dim, kv_heads = config.get("head_dim"), sizes["num_key_value_heads"]
        head_dim = sizes["hidden_size"] // heads if head_dim is None else head_dim
        if type(head_dim) is not int or not 0 < head_dim <= 2**16 or heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"num_attention_heads is {heads}, num_key_value_heads {kv_heads} and head_dim {_short(head_dim)}: the "
                f"first has to be a multiple of the second, and the third has to be even"
            )
        theta, scaling = _read_rope(config, sizes["max_position_embeddings"])
        return cls(
            **sizes,
            head_dim=head_dim,
            rms_norm_eps=_number(config["rms_norm_eps"], "rms_norm_eps"),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(tied),
        )


# The kinds of RoPE, each with the numbers that it needs.
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _read_rope(config: dict[str, Any], positions: int) -> tuple[float, dict[str, Any]]:
    """rope_theta, and rope_scaling with `rope_type` and the numbers of its kind; empty for plain RoPE.

    transformers wrote `rope_theta` beside `rope_scaling`, and writes both as `rope_parameters` today. Where both are
    there, it reads `rope_scaling` and drops the other; here they must not contradict each other.
    """
    context = "original_max_position_embeddings"
    thetas = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    kinds: dict[str, dict[str, Any]] = {}  # by the key that describes it
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        if rope in (None, {}):
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{key} is {_short(rope)}, where a map is expected")
        rope = dict(rope)
        names = [rope[name] for name in ("rope_type", "type") if name in rope] or ["default"]
        if names[0] != names[-1]:
            raise ValueError(f"{key}.rope_type is {names[0]!r} and {key}.type is {names[1]!r}, which contradict")
        if names[0] not in list(ROPE_NUMBERS):
            raise ValueError(f"{key}.rope_type is {names[0]!r}; known are {', '.join(ROPE_NUMBERS)}")
        if rope.get("partial_rotary_factor") not in (1.0, None):
            raise ValueError(f"{key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is computed")
        known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_NUMBERS[names[0]]}
        for name, value in rope.items():
            if name not in known and value is not None:
                raise ValueError(f"{key}.{name} is {_short(value)}, which RoPE of type {names[0]!r} has no use for")
        if names[0] == "llama3":
            outside = config.get(context)
            inside = rope.setdefault(context, positions if outside is None else outside)
            if outside not in (None, inside):
                raise ValueError(f"{context} is {outside!r} and {key}.{context} is {inside!r}, which contradict")
        numbers = {name: rope.get(name) for name in ROPE_NUMBERS[names[0]]}
        for name, value in numbers.items():
            _number(value, f"{key}.{name}")
        if names[0] == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
            raise ValueError(f"{key}.low_freq_factor has to be below {key}.high_freq_factor")
        kinds[key] = {"rope_type": names[0], **numbers}
        if "rope_theta" in rope:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        elif key == "rope_scaling" and "rope_theta" not in config:
            thetas["rope_scaling.rope_theta, by default,"] = 10000.0
    for name, value in thetas.items():
        _number(value, name)
    places = list(thetas)
    for name in places[1:]:
        if thetas[name] != thetas[places[0]]:
            raise ValueError(f"{places[0]} is {thetas[places[0]]} and {name} is {thetas[name]}, which contradict")
    first, *others = [*kinds.values()] or [{"rope_type": "default"}]
    if others and others[0]["rope_type"] != "default" and others[0] != first:
        raise ValueError(f"rope_scaling is {first} and rope_parameters is {others[0]}, which contradict")
    return float(thetas[places[0]] if places else 10000.0), {} if first["rope_type"] == "default" else first


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{key} is {_short(value)}, where a Llama needs a number above zero")
    return float(value)


def _short(value: Any) -> str:
    """A value from a file, in a message."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of a head's dimensions, (hd / 2,) float32, in radians.

    Pair i turns by theta^(-2i / hd) a token: the first pairs spin fast and tell neighbours apart, the last ones turn
    once in thousands of tokens. `linear` stretches all of them for longer texts; `llama3` only the slow ones, whose
    turn is longer than the text that the model was first trained on, with a smooth passage between.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)  # in the first training's text
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, left alone; 0: slow, stretched by the whole factor
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]


class KVCache:
    """Keys and values of the tokens seen so far, one pair a layer, so that chat computes each token once."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self.layers[0][0].shape[1] if self.layers else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add (B, T, KV, hd) keys and values and return all of them, (B, seen + T, KV, hd)."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat((old_k, k), dim=1), torch.cat((old_v, v), dim=1)
        self.layers[layer] = k, v
        return k, v


class RMSNorm(nn.Module):
    """Bring each token's vector to length sqrt(D), then scale every dimension by a learned weight (D,)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention. Several query heads share one key/value head, which makes the cache smaller."""

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
    """SwiGLU: one projection decides how much of the other passes, then both go back to the model's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, FF = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, FF, bias=False)
        self.up_proj = nn.Linear(D, FF, bias=False)
        self.down_proj = nn.Linear(FF, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream (B, T, D)."""

    recompute = False  # keep only x for the backward pass and run the block again there

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
    """The stack from token ids to the last norm; everything but the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # In float32 whatever the model's dtype: in bfloat16 the angle of position 1000 would be wrong by whole turns.
        self.rope_frequencies = rope_frequencies(config)

    def forward(self, tokens: Tensor, segments: Segments | None = None, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, D), the hidden states that the head reads."""
        segments = segments or Segments.one_per_row(*tokens.shape, offset=len(cache or ()))
        rope = self.rope(segments.positions.to(tokens.device))
        x = self.embed_tokens(tokens)
        for block in self.layers:
            if block.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, segments, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, segments, cache)
        return self.norm(x)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (B, T, hd / 2) float32, of the angles that heads at these positions (B, T) turn by."""
        angles = positions.unsqueeze(-1).float() * self.rope_frequencies.to(positions.device)
        return angles.cos(), angles.sin()


class Llama(nn.Module):
    """A Llama with its head: `model(tokens)` gives logits."""

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
            segments: where documents begin in each row; without it every row is one document.
            cache: earlier tokens of the same rows; the given ones come after them.
        Returns:
            (B, T, V) logits in the model's dtype. Training never calls this: it hands the hidden states of
            `self.model` to `ops.linear_cross_entropy`, which never holds all logits at once.
        """
        return self.lm_head(self.model(tokens, segments, cache))
