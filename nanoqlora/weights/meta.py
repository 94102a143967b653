"""Meta's own folder of a Llama, with the interface of the other kinds of checkpoint.

    params.json               a few numbers
    consolidated.00.pth, ...  the weights, in as many parts as Meta used GPUs
    tokenizer.model

Three things differ from a Hugging Face folder:

names       `layers.3.attention.wq.weight` is `model.layers.3.self_attn.q_proj.weight`.
parts       each holds a slice of every matrix: some of its rows, or some of its columns where the layer sums over
            them. Norms are complete in every part.
row order   RoPE turns neighbouring dimensions of a head here, and dimension i with i + hd / 2 in Hugging Face's
            models. So the rows of wq and wk are put in the other order inside each head, as for GGUF files.

The files are pickles. They are read with `weights_only=True`, which makes tensors and nothing else, and mapped, so that
memory holds the tensor at hand.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from ..config.errors import UserError
from ..config.files import read_json
from ..gguf.config import model_config
from ..gguf.names import check_tensors, meta_name, tensor_shapes, unpermute_rows
from .tensor_files import load_tensors

SPLIT_COLUMNS = ("attention.wo", "feed_forward.w2")  # of these each part has some columns, of other matrices some rows

# The tensors show these, or they are of Meta's own program.
UNUSED = "hidden_dim vocab_size multiple_of ffn_dim_multiplier max_batch_size max_seq_len model_parallel_size".split()
Size = Annotated[int, pydantic.Field(gt=0, le=2**24)]
Positive = Annotated[float, pydantic.Field(gt=0, lt=1e30)]


class Params(pydantic.BaseModel):
    """params.json."""

    model_config = pydantic.ConfigDict(extra="allow")
    dim: Size
    n_layers: Size
    n_heads: Size
    norm_eps: Positive
    n_kv_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: Positive | None = None
    use_scaled_rope: bool | None = None
    rope_scaling_factor: Positive | None = None


def is_meta_folder(folder: Path) -> bool:
    return (folder / "params.json").is_file() and not (folder / "config.json").exists()


class MetaWeights:
    """An open folder of Meta's. `config` is what config.json would say."""

    def __init__(self, folder: Path) -> None:
        self.where = folder / "params.json"
        self.params: Params = read_json(self.where, Params)
        self.parts = [load_tensors(path, mmap=True) for path in _paths(folder)]
        self.config = self._config()
        config = model_config(self.config, self.where)
        self.shapes = tensor_shapes(config)
        unused = {"rope.freqs"} | ({"output.weight"} if config.tie_word_embeddings else set())
        check_tensors(self.where, config, dict.fromkeys(self.parts[0].keys() - unused), meta_name)

    def names(self) -> list[str]:
        return list(self.shapes)

    def load(self, name: str) -> Tensor:
        """One tensor by Hugging Face's name, joined from its parts, its rows in Hugging Face's order."""
        meta, slices = meta_name(name), [w for w, _ in self.stored(name)]
        w = slices[0]
        if len(slices) > 1 and w.ndim == 2:
            by_columns = any(layer in meta for layer in SPLIT_COLUMNS)
            if meta == "tok_embeddings.weight":  # Llama 1 and 2 split each token's vector, Llama 3 the vocabulary
                by_columns = w.shape[1] != self.params.dim
            w = torch.cat(slices, dim=1 if by_columns else 0)
        if tuple(w.shape) != self.shapes[name]:
            raise UserError(f"{self.where}: {name} has shape {tuple(w.shape)}, not {self.shapes[name]} by params.json.")
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return unpermute_rows(w, self.config[heads]) if heads else w

    def stored(self, name: str) -> list[tuple[Any, Sequence[int]]]:
        meta = meta_name(name)
        if not all(meta in part for part in self.parts):
            raise UserError(f"{self.where.parent}: a part has no {meta}, so the parts are of different models.")
        return [(part[meta], part[meta].shape) for part in self.parts]

    def _config(self) -> dict[str, Any]:
        params, part, count = self.params, self.parts[0], len(self.parts)
        for key, value in (params.model_extra or {}).items():
            if key not in UNUSED and value not in (None, False):
                raise UserError(f"{self.where}: {key} is {str(value)[:60]}, which is not built in.")
        names = ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "layers.0.attention.wq.weight")
        if missing := [name for name in names if name not in part or part[name].ndim != 2]:
            raise UserError(f"{self.where}: the weights have no matrix {missing[0]}, so they are not of a Llama.")
        (rows, columns), (ff_rows, _), (q_rows, _) = (part[name].shape for name in names)
        heads, tied, is_scaled = params.n_heads, self._is_tied(), bool(params.use_scaled_rope)
        head_dim = params.head_dim or params.dim // heads
        if q_rows * count != heads * head_dim:
            found = f"its {count} consolidated.*.pth make a wq of {q_rows * count} rows where n_heads of params.json"
            raise UserError(f"{self.where.parent}: {found} gives {heads * head_dim}. Some are missing: get all.")
        vocab_size = rows * count if columns == params.dim else rows
        # Neither is in params.json: what each generation was trained on (1e-6: Llama 1), and the factor in the
        # published configurations, 32 of 3.2 (tied), 8 of 3.1.
        context = 131072 if is_scaled else 8192 if vocab_size > 100_000 else 4096
        factor = params.rope_scaling_factor or (32.0 if tied else 8.0)
        scaled = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaled |= {"original_max_position_embeddings": 8192}
        config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        config |= {"hidden_size": params.dim, "intermediate_size": ff_rows * count}
        config |= {"num_hidden_layers": params.n_layers, "num_attention_heads": heads}
        config |= {"num_key_value_heads": params.n_kv_heads or heads, "head_dim": head_dim}
        config |= {"vocab_size": vocab_size, "max_position_embeddings": 2048 if params.norm_eps == 1e-6 else context}
        config |= {"rms_norm_eps": params.norm_eps, "rope_theta": params.rope_theta or 10000.0}
        return config | {"rope_scaling": scaled if is_scaled else None, "tie_word_embeddings": tied}

    def _is_tied(self) -> bool:
        """Whether the head is the embedding: left out of the file, or there with the same values."""
        embedding, head = self.parts[0]["tok_embeddings.weight"], self.parts[0].get("output.weight")
        if head is None or embedding.shape != head.shape:
            return head is None
        return torch.equal(embedding[0], head[0]) and torch.equal(embedding, head)


def _paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    wanted = [folder / f"consolidated.{i:02d}.pth" for i in range(max(1, len(paths)))]
    if missing := [path for path in wanted if path not in paths]:
        raise UserError(f"{missing[0]}: this part is missing, so not all weights are there. Download it again.")
    return paths
