"""A complete model as a .gguf file: each tensor is read, brought into llama.cpp's row order and quantized in turn.

Weights that are right are half of it. The other half is that the model is prompted the way it was trained, and that it
stops where it learnt to stop. Both come from prompt.json, which training wrote: its chat template goes into the file
and, in Go's template language, into the Modelfile; the token that ends an answer becomes the end token of the file.

Names, row order and the file itself: gguf/container.py. Which type a tensor gets: gguf/file_types.py. Its bytes:
gguf/ggml_blocks.py. The vocabulary: `tokenizer_metadata.py`.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config.errors import UserError
from ..config.keys import build
from ..config.options import ExportOptions
from ..config.parser import Map
from ..gguf.config import model_config, model_metadata, rope_divisors
from ..gguf.file_types import tensor_types
from ..gguf.ggml_blocks import quantize, quantize_checked
from ..gguf.modelfile import Recipe, file_value, jinja_wins, no_guess
from ..gguf.names import ROPE_DIVISORS, gguf_name, heads_to_permute, permute_rows, tensor_shapes
from ..gguf.writer import NewTensor
from ..model import ModelConfig
from ..tokenizer.tokenizer import load_tokenizer
from ..weights.checkpoint import Weights, open_weights
from ..weights.generation import end_ids, ollama_parameters, read_generation
from ..weights.hub import local_path
from .gguf_file import name_of, prompt_format, write_file
from .go_template import go_template, stop_texts
from .tokenizer_metadata import tokenizer_metadata, unnamed_ends


def export_gguf(folder: str | Path, out: str | Path, type: str = "q8_0") -> None:
    """Write a model as the .gguf file `out`, and its Modelfile. All but the weights' values is checked before.

    Args:
        folder: the model: a folder, a .gguf file or a hub name.
        type: how weights are stored, a key of `gguf/file_types.py` in either case.
    Raises:
        UserError: an argument, a file or a weight is wrong, or the model cannot be expressed in a GGUF file.
    """
    file_type, out = check_type(type), Path(out)
    weights, path, tok = open_weights(folder), local_path(folder), load_tokenizer(folder)
    config, generation = model_config(weights.config, folder), read_generation(weights)
    fmt = prompt_format(path, tok)
    tensors = model_tensors(weights, config, file_type, path)
    ends = end_ids(generation, first=(fmt.end_id(tok), tok.eos_id))
    metadata = model_metadata(config, name_of(folder), file_type)
    metadata |= tokenizer_metadata(tok, fmt, config.vocab_size, path, ends)
    kind, jinja = metadata["tokenizer.chat_template"]
    recipe = Recipe([f"FROM {file_value(f'./{out.name}')}"], parameters=ollama_parameters(generation))
    notes = []
    try:
        template, system, stops = go_template(fmt, tok, ends)
        recipe = recipe._replace(template=template, system=system, stops=stops)
        if jinja_wins(jinja):
            note = "Ollama 0.30 and newer run the Jinja in the file instead, because it mentions tools or thinking."
            recipe = recipe._replace(note=note)
    except UserError as problem:
        metadata["tokenizer.chat_template"] = kind, no_guess(jinja)
        recipe = recipe._replace(stops=stop_texts(fmt, tok, ends))
        notes.append(f"no TEMPLATE, so it needs Ollama 0.30 or newer, which runs the Jinja in the file: {problem}")
    if more := unnamed_ends(tok, ends[1:])[2:]:
        names = ", ".join(ascii(tok.vocab[id]) for id in more)
        notes.append(f"llama.cpp goes on after {names}: a file can name three end tokens that it does not know")
    write_file(out, metadata, tensors, recipe, notes)


def check_type(given: str) -> str:
    """The key of FILE_TYPES that the user means; the command line has checked it already."""
    asked = Map()
    asked.put("type", given, "command line: --type")
    return str(build(ExportOptions, asked).type).upper()


def model_tensors(weights: Weights, config: ModelConfig, file_type: str, model: Path) -> list[NewTensor]:
    """Every tensor of the file, with its name, shape and type, in the order of the model; no weights are read yet."""
    shapes = tensor_shapes(config)

    def produce(name: str, ggml_type: str) -> Tensor:
        """The bytes of one tensor, called when its turn to be written has come."""
        w = weights.load(name).to(device)
        heads = heads_to_permute(gguf_name(name), config.num_attention_heads, config.num_key_value_heads)
        w = permute_rows(w, heads) if heads else w
        return quantize_checked(w, ggml_type, f"{model}: tensor {name}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = [
        NewTensor(gguf_name(name), shapes[name], ggml_type, partial(produce, name, ggml_type))
        for name, ggml_type in tensor_types(config, file_type).items()
    ]
    if config.rope_scaling.get("rope_type") == "llama3":
        divisors = quantize(rope_divisors(config), "F32")
        tensors.append(NewTensor(ROPE_DIVISORS, (config.head_dim // 2,), "F32", lambda: divisors))
    return tensors
