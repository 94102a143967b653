"""A LoRA adapter as a .gguf file, which llama.cpp adds to the base model's file at run time.

For each layer two tensors, in PyTorch's shapes: NAME.lora_a (r, n_in) and NAME.lora_b (n_out, r), NAME being the base
tensor's. llama.cpp computes y = W x + (alpha / r) B A x, with r taken from B and one alpha for the whole file. What
does not fit into one alpha, rsLoRA's alpha / sqrt(r) or ranks and alphas that differ by layer, is multiplied into B.

The rows of B are rows of W, so those of q_proj and k_proj stand in llama.cpp's order; A's columns are inputs and stay.
"""

from pathlib import Path

import torch

from ..config.errors import UserError
from ..config.scripts import script_command
from ..gguf.container import Metadata
from ..gguf.file_types import FILE_TYPES
from ..gguf.ggml_blocks import quantize_checked
from ..gguf.names import gguf_name, heads_to_permute, permute_rows, tensor_shapes
from ..gguf.writer import NewTensor
from ..model import ModelConfig
from ..weights.adapter import Update

TYPES = ("F32", "F16", "BF16")


def adapter_metadata(name: str, alpha: float, file_type: str) -> Metadata:
    return {
        "general.architecture": ("string", "llama"),
        "general.type": ("string", "adapter"),
        "general.name": ("string", name),
        "general.file_type": ("u32", FILE_TYPES[file_type]),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("f32", alpha),
    }


def plan_adapter(
    updates: dict[str, Update], config: ModelConfig, file_type: str, where: Path
) -> tuple[float, list[NewTensor]]:
    """The file's alpha, and its tensors.

    Args:
        updates: by the name of the layer.
        config: of the base model.
        file_type: F32, F16 or BF16.
    Raises:
        UserError: such a file cannot express this adapter, or it is not one of this model.
    """
    if file_type not in TYPES:
        raise UserError(
            f"--type {file_type.lower()}: an adapter is small and is written as {', '.join(TYPES).lower()}, since "
            f"rounding it further would cost more than it saves. Choose one of them; f32 is the default."
        )
    shapes = tensor_shapes(config)
    first = next(iter(updates.values()))
    alpha = float(torch.tensor(first.scaling * len(first.lora_A)))  # as float32, which the file has
    tensors = []
    for layer, update in updates.items():
        if update.magnitude is not None:
            raise UserError(
                f"{where}: {layer} was trained with DoRA, whose row lengths no adapter file of llama.cpp can hold. "
                f"Merge it ({script_command('merge.py')}) and export the merged model."
            )
        found, shape = (update.lora_B.shape[0], update.lora_A.shape[1]), shapes.get(f"{layer}.weight")
        if shape != found:
            raise UserError(
                f"{where}: the update of {layer} is for a weight of shape {found}, and the base model has "
                f"{shape or 'no such layer'}. So it is an adapter of another model; name its base with --model."
            )
        name = gguf_name(f"{layer}.weight")
        heads = heads_to_permute(name, config.num_attention_heads, config.num_key_value_heads)
        b = update.lora_B * (update.scaling * len(update.lora_A) / alpha)  # times 1 in the first layer, and most others
        b = permute_rows(b, heads) if heads else b
        for part, w in (("lora_a", update.lora_A), ("lora_b", b)):
            raw = quantize_checked(w.contiguous(), file_type, f"{where}: {part} of {layer}")
            tensors.append(NewTensor(f"{name}.{part}", tuple(w.shape), file_type, lambda raw=raw: raw))
    return alpha, tensors
