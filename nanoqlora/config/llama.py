"""The numbers of a Llama, read from Hugging Face's config.json with the meaning that transformers gives to its keys.

Only what `model.py` computes is accepted. Every other feature (biases, another activation, a sliding window, other
kinds of RoPE) is an error that names the key, because a model that ignores a key computes something else in silence.
Here are no files and no PyTorch: a dict comes in, the checked numbers go out.
"""

from typing import Any

from .errors import short

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
MISTRAL_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
# Keys with a single value that is computed here.
ONLY = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "sliding_window": None}
ONLY |= {"partial_rotary_factor": 1.0}
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SIZES += ["max_position_embeddings"]
# The kinds of RoPE, each with the numbers that it needs.
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {"default": (), "linear": ("factor",)}
ROPE_NUMBERS["llama3"] = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"


def llama_numbers(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` from config.json as a dict.

    Raises:
        ValueError: an architecture or a feature that the model does not have, a number that is missing or out of
            range, or two keys that contradict each other; names the keys.
    """
    kind = _model_type(given)
    config = DEFAULTS | (MISTRAL_DEFAULTS if kind == "mistral" else {}) | given
    for key, value in ONLY.items():
        if config.get(key) not in (value, None):
            note = "" if key in given else f", which is the default of a {kind} without this key"
            raise ValueError(f"{key} is {config[key]!r}{note}; only {value!r} is computed here")
    tied = config["tie_word_embeddings"]
    if tied is not None and type(tied) is not bool:
        raise ValueError(f"tie_word_embeddings is {tied!r}, where true or false is expected")
    numbers = _sizes(config)
    numbers |= _rope(config, numbers["max_position_embeddings"])
    epsilon = _positive(config["rms_norm_eps"], "rms_norm_eps")
    return numbers | {"rms_norm_eps": epsilon, "tie_word_embeddings": bool(tied)}


def _model_type(config: dict[str, Any]) -> str:
    """llama or mistral, from the keys architectures and model_type."""
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    found = [kind for name in names for key, kind in ARCHITECTURES.items() if name == key]
    if names and not found:
        raise ValueError(f"architectures is {names}; {' and '.join(ARCHITECTURES)} are read")
    kind = config.get("model_type") or (found or ["llama"])[0]
    if kind not in list(ARCHITECTURES.values()):  # a list: also for what cannot be hashed
        raise ValueError(f"model_type is {kind!r}; {' and '.join(ARCHITECTURES.values())} are read")
    return kind


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    """The sizes, and head_dim, which transformers derives where it is missing."""
    sizes: dict[str, Any] = {key: config.get(key) for key in SIZES}
    if sizes["num_key_value_heads"] is None:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    for key, value in sizes.items():
        largest = 2**31 - 1 if key == "max_position_embeddings" else 2**24
        if type(value) is not int or not 0 < value <= largest:
            raise ValueError(f"{key} is {short(value)}, where a Llama needs a whole number from 1 to {largest}")
    heads, kv_heads, head_dim = sizes["num_attention_heads"], sizes["num_key_value_heads"], config.get("head_dim")
    head_dim = sizes["hidden_size"] // heads if head_dim is None else head_dim
    if type(head_dim) is not int or not 0 < head_dim <= 2**16 or heads % kv_heads or head_dim % 2:
        found = f"num_attention_heads is {heads}, num_key_value_heads {kv_heads} and head_dim {short(head_dim)}"
        raise ValueError(f"{found}: the first has to be a multiple of the second, and the third has to be even")
    return sizes | {"head_dim": head_dim}


def _rope(config: dict[str, Any], positions: int) -> dict[str, Any]:
    """rope_theta, and rope_scaling with `rope_type` and the numbers of its kind; empty for plain RoPE.

    transformers wrote `rope_theta` beside `rope_scaling`, and writes both as `rope_parameters` today. Where both are
    there, it reads `rope_scaling` and drops the other; here they must not contradict each other.
    """
    thetas = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    kinds: dict[str, dict[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{key} is {short(rope)}, where a map is expected")
        if rope:
            kind = _rope_kind(key, rope, config.get("original_max_position_embeddings"), positions)
            if not kinds or kind["rope_type"] != "default":
                kinds[key] = kind
        if "rope_theta" in rope:
            thetas[f"{key}.rope_theta"] = rope["rope_theta"]
        elif rope and key == "rope_scaling" and "rope_theta" not in config:
            thetas["rope_scaling.rope_theta, by default,"] = 10000.0
    theta = _same({name: _positive(value, name) for name, value in thetas.items()} or {"": 10000.0})
    kind = _same(kinds or {"": {"rope_type": "default"}})
    return {"rope_theta": theta, "rope_scaling": {} if kind["rope_type"] == "default" else kind}


def _same(found: dict[str, Any]) -> Any:
    """The value that several keys give. Raises ValueError if two of them differ."""
    (first, value), *others = found.items()
    for name, other in others:
        if other != value:
            raise ValueError(f"{first} is {short(value)} and {name} is {short(other)}, which contradict")
    return value


def _rope_kind(key: str, given: dict[str, Any], outside: Any, positions: int) -> dict[str, Any]:
    """`rope_type` and the numbers of this kind.

    Args:
        key: of this map in config.json. outside: original_max_position_embeddings beside it.
        positions: max_position_embeddings, which replaces that number where both places lack it.
    """
    rope, context = dict(given), "original_max_position_embeddings"
    kind = _same({f"{key}.{name}": rope[name] for name in ("rope_type", "type") if name in rope} or {"": "default"})
    if kind not in list(ROPE_NUMBERS):
        raise ValueError(f"{key}.rope_type is {kind!r}; known are {', '.join(ROPE_NUMBERS)}")
    if rope.get("partial_rotary_factor") not in (1.0, None):
        raise ValueError(f"{key}.partial_rotary_factor is {rope['partial_rotary_factor']!r}; only 1.0 is computed")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE_NUMBERS[kind]}
    for name, value in rope.items():
        if name not in known and value is not None:
            raise ValueError(f"{key}.{name} is {short(value)}, which RoPE of type {kind!r} has no use for")
    if kind == "llama3":
        found = {} if outside is None else {context: outside}
        found |= {f"{key}.{context}": rope[context]} if context in rope else {}
        rope[context] = _same(found or {"": positions})
    numbers = {name: rope.get(name) for name in ROPE_NUMBERS[kind]}
    checked = {name: _positive(value, f"{key}.{name}") for name, value in numbers.items()}
    if kind == "llama3" and checked["low_freq_factor"] >= checked["high_freq_factor"]:
        raise ValueError(f"{key}.low_freq_factor has to be below {key}.high_freq_factor")
    return {"rope_type": kind, **numbers}


def _positive(value: Any, key: str) -> float:
    """A number above zero, as a float. key: names it in the error."""
    if type(value) not in (int, float) or not 0 < value < 1e18:
        raise ValueError(f"{key} is {short(value)}, where a Llama needs a number above zero")
    return float(value)
