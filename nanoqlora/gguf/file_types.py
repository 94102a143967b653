"""Which type each tensor of a GGUF file gets: llama.cpp's own mix, so that bytes can be those of its tool.

A file that is called Q4_K_M is not all Q4_K. Where an error does most harm there are more bits: in the head, and in
`attn_v` and `ffn_down` of the first and last eighth of the blocks and of every third one between. And where the length
of a row is not a multiple of 256, an older format with blocks of 32 is taken: all of SmolLM2's rows of 576 for example.
"""

from ..model import ModelConfig
from .ggml_blocks import FORMATS
from .names import gguf_name, tensor_shapes

# What `general.file_type` says of a file. Not the numbers of tensor types.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9},
    **{"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18},
}
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that do not split into blocks of 256


def tensor_types(config: ModelConfig, file_type: str) -> dict[str, str]:
    """The type of each tensor of a model, by Hugging Face's names."""
    is_gqa = config.num_key_value_heads < config.num_attention_heads
    model = file_type, config.tie_word_embeddings, config.num_hidden_layers, is_gqa
    return {name: tensor_type(gguf_name(name), shape, *model) for name, shape in tensor_shapes(config).items()}


def tensor_type(name: str, shape: tuple[int, ...], file_type: str, is_tied: bool, num_blocks: int, is_gqa: bool) -> str:
    """The type of one tensor, a key of `ggml_blocks.FORMATS`.

    Args:
        name: GGUF's, `blk.3.ffn_up.weight`.
        shape: in PyTorch's order.
        file_type: a key of `FILE_TYPES`.
        is_tied: the file has no output.weight; its embedding is the head as well.
        num_blocks: of the model.
        is_gqa: several query heads share a key/value head.
    """
    if len(shape) == 1:
        return "F32"  # norms, RoPE divisors: llama.cpp aborts on any other type
    ggml_type = file_type.removesuffix("_M").removesuffix("_S")
    if ggml_type in ("F32", "F16", "BF16"):
        return ggml_type
    block, _, part = name.removeprefix("blk.").partition(".")
    if name == "output.weight" or (is_tied and name == "token_embd.weight"):
        ggml_type = "Q8_0" if ggml_type == "Q8_0" else "Q6_K"  # every token's score comes out of this matrix
    elif part in ("attn_v.weight", "ffn_down.weight"):
        ggml_type = _sensitive_type(part, int(block), file_type, ggml_type, num_blocks, is_gqa)
    if shape[-1] % FORMATS[ggml_type].block_size:
        ggml_type = INSTEAD.get(ggml_type, "F16")
    return "F16" if shape[-1] % FORMATS[ggml_type].block_size else ggml_type


def _sensitive_type(part: str, block: int, file_type: str, ggml_type: str, num_blocks: int, is_gqa: bool) -> str:
    eighth = num_blocks // 8
    if file_type in ("Q4_K_M", "Q5_K_M"):
        if block < eighth or block >= 7 * num_blocks // 8 or (block - eighth) % 3 == 2:
            return "Q6_K"
    elif file_type == "Q4_K_S" and block < (4 if part == "attn_v.weight" else eighth):
        return "Q5_K"
    if part == "attn_v.weight" and ggml_type == "Q4_K" and num_blocks == 80 and is_gqa:
        return "Q5_K"  # Llama 70B: 8 heads read the same attn_v, which is small
    return ggml_type
