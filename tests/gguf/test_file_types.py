"""Which type each tensor gets: what llama.cpp's own tool gave, and, where it is installed, gives now, bytes too."""

from pathlib import Path
from typing import get_args

import pytest
import torch
from llama_quantize import LIBRARIES, quantize_file
from tiny import tiny_config

from nanoqlora.config.options import Types
from nanoqlora.export import gguf_model
from nanoqlora.gguf.file_types import FILE_TYPES, tensor_type
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.model import ModelConfig

LETTERS = {**{"Q4_0": "a", "Q5_0": "c", "Q5_1": "d"}, **{"Q8_0": "8", "Q4_K": "4", "Q5_K": "5", "Q6_K": "6"}}

# Taken from files that llama.cpp's tool (build 11549) wrote. A model's width, MLP width, blocks, whether heads are
# grouped and the head is tied; by file type: head, embedding, attn_q; attn_v of every block; ffn_down of every block.
MIXES = {
    (256, 512, 32, True, False): {
        "Q4_0": ("6aa", "a" * 32, "a" * 32),
        "Q4_K_S": ("644", "5555" + "4" * 28, "5555" + "4" * 28),
        "Q4_K_M": ("644", "66664464464464464464464464466666", "66664464464464464464464464466666"),
        "Q5_K_S": ("655", "5" * 32, "5" * 32),
        "Q5_K_M": ("655", "66665565565565565565565565566666", "66665565565565565565565565566666"),
        "Q6_K": ("666", "6" * 32, "6" * 32),
        "Q8_0": ("888", "8" * 32, "8" * 32),
    },
    (256, 512, 80, True, False): {  # counted as Llama 70B
        "Q4_K_S": ("644", "5" * 80, "5" * 10 + "4" * 70),
        "Q4_K_M": ("644", "6" * 10 + "556" * 20 + "6" * 10, "6" * 10 + "446" * 20 + "6" * 10),
        "Q5_K_M": ("655", "6" * 10 + "556" * 20 + "6" * 10, "6" * 10 + "556" * 20 + "6" * 10),
    },
    (256, 512, 80, False, False): {"Q4_K_S": ("644", "5555" + "4" * 76, "5" * 10 + "4" * 70)},  # Llama 65B
    (192, 512, 30, True, True): {  # rows of no whole block of 256, as SmolLM2's
        "Q4_0": ("88a", "a" * 30, "a" * 30),
        "Q4_K_S": ("88c", "dddd" + "c" * 26, "555" + "4" * 27),
        "Q4_K_M": ("88c", "888cc8cc8cc8cc8cc8cc8cc8cc8888", "666446446446446446446446446666"),
        "Q5_K_M": ("88d", "888dd8dd8dd8dd8dd8dd8dd8dd8888", "666556556556556556556556556666"),
        "Q6_K": ("888", "8" * 30, "6" * 30),
    },
    (512, 224, 12, False, True): {
        "Q4_K_S": ("664", "555544444444", "dccccccccccc"),
        "Q4_K_M": ("664", "644644644666", "8cc8cc8cc888"),
    },
    (256, 512, 5, True, False): {"Q4_K_S": ("644", "55554", "44444"), "Q4_K_M": ("644", "44646", "44646")},
}


def shape_of(blocks: int, is_tied: bool, kv_heads: int = 2) -> ModelConfig:
    sizes = {"num_hidden_layers": blocks, "num_attention_heads": 8, "num_key_value_heads": kv_heads}
    return tiny_config(tie_word_embeddings=is_tied, **sizes)


@pytest.mark.parametrize("model", MIXES)
def test_mixes_are_those_of_llama_cpp(model: tuple):
    D, FF, L, is_gqa, is_tied = model

    def letter(name: str, n_in: int, file_type: str) -> str:
        return LETTERS[tensor_type(name, (64, n_in), file_type, shape_of(L, is_tied, 1 if is_gqa else 8))]

    for file_type, (others, attn_v, ffn_down) in MIXES[model].items():
        names = ["token_embd.weight" if is_tied else "output.weight", "token_embd.weight", "blk.1.attn_q.weight"]
        assert "".join(letter(name, D, file_type) for name in names) == others, file_type
        assert "".join(letter(f"blk.{i}.attn_v.weight", D, file_type) for i in range(L)) == attn_v, file_type
        assert "".join(letter(f"blk.{i}.ffn_down.weight", FF, file_type) for i in range(L)) == ffn_down, file_type


def test_what_is_never_quantized():
    for file_type in FILE_TYPES:
        assert tensor_type("blk.0.ffn_norm.weight", (4096,), file_type, shape_of(32, False)) == "F32"
        expected = {"F32": "F32", "BF16": "BF16"}.get(file_type, "F16")  # rows that no block divides
        assert tensor_type("blk.0.ffn_up.weight", (64, 24), file_type, shape_of(32, False)) == expected
        assert tensor_type("token_embd.weight", (64, 24), file_type, shape_of(32, True)) == expected


@pytest.mark.skipif(not LIBRARIES.exists(), reason="llama.cpp's tool is not installed: helpers/llama_quantize.py")
@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q5_K_S"])
def test_real_model_is_quantized_as_by_llama_cpp(file_type: str, smollm2_path: Path, tmp_path_factory):
    """Of SmolLM2 as a file of float32, both make the same tensors: types and bytes."""
    source = tmp_path_factory.getbasetemp() / "smollm2-f32.gguf"
    if not source.exists():
        gguf_model.export_gguf(smollm2_path, source, "F32")
    ours, theirs = source.with_name("ours.gguf"), source.with_name("theirs.gguf")
    gguf_model.export_gguf(source, ours, file_type)
    quantize_file(source, theirs, file_type, torch.get_num_threads())
    a, b = read_gguf(ours), read_gguf(theirs)
    assert a.metadata["general.file_type"] == b.metadata["general.file_type"]
    assert a.tensors.keys() == b.tensors.keys() and len(a.tensors) == 272
    for name, info in a.tensors.items():
        other = b.tensors[name]
        assert (info.ggml_type, info.shape) == (other.ggml_type, other.shape), name
        data = a.data[info.offset : info.offset + info.num_bytes]
        assert data == b.data[other.offset : other.offset + other.num_bytes], name


def test_the_options_of_the_commands_know_every_type():
    """They are declared where PyTorch is not imported."""
    assert [name.upper() for name in get_args(Types)] == [*FILE_TYPES]
