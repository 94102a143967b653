"""Small models as GGUF files whose linear layers are in blocks: of one type as files have them, or of every type."""

from itertools import cycle
from pathlib import Path
from unittest.mock import patch

from small_runs import save_tiny_model

from nanoqlora.export import gguf_model
from nanoqlora.gguf.file_types import tensor_types
from nanoqlora.gguf.ggml_blocks import FORMATS
from nanoqlora.model import ModelConfig
from nanoqlora.weights.pretrained import block_of

WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8}
WIDE |= {"num_key_value_heads": 4}


def every_type(config: ModelConfig, file_type: str, has_imatrix: bool = False) -> dict[str, str]:
    """Types of tensors, as `tensor_types` gives them, with all there are in turn in the linear layers."""
    types = cycle(FORMATS)
    return {name: old if block_of(name) is None else next(types) for name, old in tensor_types(config, "Q8_0").items()}


def save_in_blocks(file: Path, file_type: str, num_layers: int) -> Path:
    """A random model with a tokenizer. file_type: as for export_gguf.py, or "mixed"."""
    folder = save_tiny_model(file.parent / "floats", **WIDE, num_hidden_layers=num_layers)
    with patch.object(gguf_model, "tensor_types", every_type if file_type == "mixed" else tensor_types):
        gguf_model.export_gguf(folder, file, "q8_0" if file_type == "mixed" else file_type)
    return file
