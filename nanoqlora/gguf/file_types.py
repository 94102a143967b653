"""Which type each tensor of a GGUF file gets: llama.cpp's own mix, so that bytes can be those of its tool.

A file that is called Q4_K_M is not all Q4_K. Where an error does most harm there are more bits: in the head, and in
`attn_v` and `ffn_down` of the first and last eighth of the blocks and of every third one between. And where the length
of a row is not a multiple of 256, an older format with blocks of 32 is taken: all of SmolLM2's rows of 576 for example.
With an importance matrix a few tensors get other types.
"""

from ..model import ModelConfig
from .ggml_blocks import FORMATS
from .names import gguf_name, tensor_shapes

# What `general.file_type` says of a file. Not the numbers of tensor types.
FILE_TYPES = {
    **{"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9},
    **{"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18},
    **{"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "IQ4_NL": 25, "IQ4_XS": 30},
}
INSTEAD = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}  # for rows that do not split into blocks of 256
INSTEAD |= {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "IQ4_XS": "IQ4_NL"}
RAISED = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}  # attn_v, ffn_down and attn_output of most blocks


def tensor_types(config: ModelConfig, file_type: str, weighed: bool = False) -> dict[str, str]:
    """The type of each tensor of a model, by Hugging Face's names."""
    how = file_type, config, weighed
    return {name: tensor_type(gguf_name(name), shape, *how) for name, shape in tensor_shapes(config).items()}


def tensor_type(name: str, shape: tuple[int, ...], file_type: str, config: ModelConfig, weighed: bool = False) -> str:
    """The type of one tensor, a key of `ggml_blocks.FORMATS`.

    Args:
        name: GGUF's, `blk.3.ffn_up.weight`.
        shape: in PyTorch's order.
        file_type: a key of `FILE_TYPES`.
        config: of the model. If it is tied, the file has no output.weight; its embedding is the head as well.
        weighed: the file is made with an importance matrix.
    """
    if len(shape) == 1:
        return "F32"  # norms, RoPE divisors: llama.cpp aborts on any other type
    ggml_type = base = file_type.removesuffix("_L").removesuffix("_M").removesuffix("_S")
    if base in ("F32", "F16", "BF16"):
        return base
    block, _, part = name.removeprefix("blk.").partition(".")
    num_blocks, shared = config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
    if name == "output.weight" or (config.tie_word_embeddings and name == "token_embd.weight"):
        ggml_type = "Q8_0" if base == "Q8_0" else "Q6_K"  # every token's score comes out of this matrix
    elif part in ("attn_v.weight", "ffn_down.weight", "attn_output.weight"):
        ggml_type = _sensitive_type(part, int(block), file_type, num_blocks, shared, weighed) or base
        if part == "attn_v.weight" and ggml_type in ("Q3_K", "Q4_K") and num_blocks == 80 and shared > 1:
            ggml_type = "Q5_K"  # Llama 70B: 8 heads read the same attn_v, which is small
    if shape[-1] % FORMATS[ggml_type].block_size:
        ggml_type = INSTEAD.get(ggml_type, "F16")
    return "F16" if shape[-1] % FORMATS[ggml_type].block_size else ggml_type


def _sensitive_type(part: str, block: int, file_type: str, num_blocks: int, shared: int, weighed: bool) -> str | None:
    """More bits than most tensors of the file have, or None."""
    eighth, is_value = num_blocks // 8, part == "attn_v.weight"
    if file_type in RAISED:
        if file_type == "Q2_K" and is_value and shared >= 4:
            return "Q4_K"
        first = 2 if is_value else num_blocks // 16 if part == "ffn_down.weight" else 0
        return "Q5_K" if file_type == "Q3_K_M" and block < first else RAISED[file_type]
    if part == "attn_output.weight":
        return None
    if file_type in ("Q4_K_M", "Q5_K_M"):
        is_end = block < eighth or block >= 7 * num_blocks // 8
        return "Q6_K" if is_end or (block - eighth) % 3 == 2 else None
    if file_type == "Q4_K_S":
        return "Q5_K" if block < (4 if is_value else eighth) else None
    if file_type in ("IQ4_NL", "IQ4_XS"):
        return "Q5_K" if (shared >= 4 if is_value else block < eighth and not weighed) else None
    if file_type in ("Q4_0", "Q5_0") and weighed and not is_value and block < eighth:
        return f"{file_type[:2]}_1"
    return None
