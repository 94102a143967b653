"""Tiny models in 4 bits with LoRA of random values, and the same weights in transformers."""

import torch
import transformers

import nanoqlora as nq
from nanoqlora.fast.block import can_fuse, fuse_blocks
from nanoqlora.qlora import ALL_LINEAR, block_linears, lora_layers, set_dropout_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = torch.arange(60).view(2, 30) * 4


def randomise(model: nq.Llama) -> None:
    """B starts at zero, which hides most mistakes: give it values."""
    g = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_A.data = torch.randn(layer.lora_A.shape, generator=g) / 10
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) / 10


def dequantised_copy(model: nq.Llama, folder) -> transformers.LlamaForCausalLM:
    """transformers' model with the values that our 4-bit layers compute with."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in block_linears(model):
        theirs.get_submodule(name).weight.data = layer.rebuild(torch.float32)
    return theirs


def build(
    folder, dtype: torch.dtype, dropout: float, targets=ALL_LINEAR, dora: bool = False, load_in_4bit: bool = True
) -> nq.Llama:
    model = nq.Llama.from_pretrained(folder, load_in_4bit=load_in_4bit, dtype=dtype, device=DEVICE)
    return with_lora(model, dropout, targets, dora)


def with_lora(model: nq.Llama, dropout: float, targets=ALL_LINEAR, dora: bool = False) -> nq.Llama:
    nq.inject_lora(model, r=8, alpha=4, dropout=dropout, target_modules=targets, use_dora=dora)
    g = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        layer.lora_A.data.copy_(torch.randn(layer.lora_A.shape, generator=g) / 10)
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=g) / 10)
        if dora:
            layer.magnitude.data.mul_(1 + torch.rand(layer.magnitude.shape, generator=g).to(DEVICE) / 10)
    set_dropout_rows(model, torch.tensor([11, 12], device=DEVICE))
    return model.train()


def fuse(model: nq.Llama, keep: str = "all", fold: bool = False) -> None:
    assert can_fuse(model)
    fuse_blocks(model, [keep] * model.config.num_hidden_layers, fold)
