"""Meta's own folder of a Llama, behind the same face as the other kinds of checkpoint.

    params.json               a few numbers
    consolidated.00.pth, ...  the weights, in as many parts as Meta used GPUs
    tokenizer.model

Three things differ from a Hugging Face folder:

names       `layers.3.attention.wq.weight` is `model.layers.3.self_attn.q_proj.weight`.
parts       each holds a slice of every matrix: some of its rows, or some of its columns where the layer sums over
            them. Norms are whole in every part.
row order   RoPE turns neighbouring dimensions of a head here, and dimension i with i + hd / 2 in Hugging Face's
            models. So the rows of wq and wk are put in the other order inside each head, as for GGUF files.

The files are pickles. They are read with `weights_only=True`, which makes tensors and nothing else, and mapped, so that
memory holds the tensor at hand.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.errors import UserError
from ..config.files import read_json
from ..gguf.names import unpermute_rows

TOP_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPLIT_COLUMNS = ("attention.wo", "feed_forward.w2")  # of these each part has some columns, of other matrices some rows

NUMBERS = {"dim", "n_layers", "n_heads", "norm_eps"}
MAY_BE_THERE = NUMBERS | {
    *("n_kv_heads", "head_dim", "hidden_dim", "rope_theta", "use_scaled_rope", "rope_scaling_factor", "vocab_size"),
    *("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "model_parallel_size"),
}


def is_meta_folder(folder: Path) -> bool:
    return (folder / "params.json").is_file() and not (folder / "config.json").exists()


class MetaWeights:
    """An open folder of Meta's. `config` is what config.json would say."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "params.json"
        self.params = read_json(self.where)
        self.parts = [_open(path) for path in _paths(folder)]
        self.files = {self.hf_name(name): name for name in self.parts[0] if not name.startswith("rope.")}
        self.config = self._config()

    def names(self) -> list[str]:
        tied = self.config["tie_word_embeddings"]
        return [name for name in self.files if not (tied and name == "lm_head.weight")]

    def hf_name(self, name: str) -> str:
        """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
        for hf, meta in TOP_NAMES.items():
            if name == meta:
                return hf
        for hf, meta in BLOCK_NAMES.items():
            if name.startswith("layers.") and name.endswith(f".{meta}.weight"):
                return f"model.{name.removesuffix(f'{meta}.weight')}{hf}.weight"
        return name

    def load(self, name: str) -> Tensor:
        """One tensor by Hugging Face's name, joined from its parts, its rows in Hugging Face's order."""
        if name not in self.files:
            raise UserError(f"{self.where.parent}: has no tensor {name}, which the model of its params.json needs.")
        meta = self.files[name]
        try:
            slices = [part[meta] for part in self.parts]
        except KeyError:
            raise UserError(
                f"{self.where.parent}: a part has no {meta}, so the parts are of different models."
            ) from None
        w = slices[0]
        if len(slices) > 1 and w.ndim == 2:
            by_columns = any(layer in meta for layer in SPLIT_COLUMNS)
            if meta == "tok_embeddings.weight":  # Llama 1 and 2 split each token's vector, Llama 3 the vocabulary
                by_columns = w.shape[1] != self.params["dim"]
            w = torch.cat(slices, dim=1 if by_columns else 0)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            w = unpermute_rows(w, heads)
        return w

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        slices = [part[self.files[name]] for part in self.parts if self.files[name] in part]
        return [(w, w.shape) for w in slices]

    def _config(self) -> dict[str, Any]:
        params = self.params
        unknown = sorted(key for key in params.keys() - MAY_BE_THERE if params[key] not in (None, False))
        if unknown:
            raise UserError(
                f"{self.where}: {unknown[0]} is {str(params[unknown[0]])[:60]}, which is not built in; without it the "
                f"model would compute something else. Use a dense text model."
            )
        for key in NUMBERS:
            if type(params.get(key)) not in (int, float) or not params[key] > 0:
                raise UserError(f"{self.where}: {key} is {params.get(key)!r}, and a Llama needs a number above zero.")
        for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
            if name not in self.parts[0]:
                raise UserError(f"{self.where.parent}: its weights have no {name}, so they are not those of a Llama.")
        embedding, heads = self.parts[0]["tok_embeddings.weight"], params["n_heads"]
        rows, columns = embedding.shape
        head_dim = params.get("head_dim") or params["dim"] // heads
        found = self.parts[0].get("layers.0.attention.wq.weight", embedding).shape[0] * len(self.parts)
        if found != heads * head_dim:
            raise UserError(
                f"{self.where.parent}: its {len(self.parts)} consolidated.*.pth make a wq of {found} rows where "
                f"n_heads of params.json says {heads * head_dim}: parts are missing or wrong. Get all parts."
            )
        tied = self._is_tied()
        scaled = {
            "rope_type": "llama3",
            # params.json does not say how far: 32 in the published configurations of 3.2 (tied), 8 in those of 3.1.
            "factor": params.get("rope_scaling_factor") or (32.0 if tied else 8.0),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        vocab_size = rows * len(self.parts) if columns == params["dim"] else rows
        # Not in the file either: what each generation was trained on.
        context = 131072 if params.get("use_scaled_rope") else 8192 if vocab_size > 100_000 else 4096
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": params["dim"],
            "intermediate_size": self.parts[0]["layers.0.feed_forward.w1.weight"].shape[0] * len(self.parts),
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "max_position_embeddings": 2048 if params["norm_eps"] == 1e-6 else context,  # Llama 1
            "rms_norm_eps": params["norm_eps"],
            "rope_theta": params.get("rope_theta") or 10000.0,
            "rope_scaling": scaled if params.get("use_scaled_rope") else None,
            "tie_word_embeddings": tied,
        }

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: left out of the file, or there with the same values."""
        part = self.parts[0]
        if "output.weight" not in part:
            return True
        embedding, head = part["tok_embeddings.weight"], part["output.weight"]
        return embedding.shape == head.shape and torch.equal(embedding[0], head[0]) and torch.equal(embedding, head)


def _paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise UserError(f"{folder}: has params.json but no consolidated.*.pth, so there are no weights to load.")
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02d}.pth":
            raise UserError(f"{folder / f'consolidated.{i:02d}.pth'}: this part is missing. Download it again.")
    return paths


def _open(path: Path) -> dict[str, Tensor]:
    try:
        part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path}: not a whole file of weights ({str(error).splitlines()[0]}). Nothing but tensors is read from it. "
            f"Download or copy it again."
        ) from error
    if not isinstance(part, dict) or not all(isinstance(w, Tensor) for w in part.values()):
        raise UserError(f"{path}: holds something else than named tensors, so it is no part of a Llama.")
    return part
