"""A complete model, or a LoRA adapter, as a .gguf file, and the Modelfile beside it.

Weights that are right are half of it. The other half is that the model is prompted the way it was trained, and that it
stops where it learnt to stop. Both come from prompt.json, which training wrote: its chat template goes into the file
and, in Go's template language, into the Modelfile; the token that ends an answer becomes the end token of the file.

A model      each tensor is read, brought into llama.cpp's row order and quantized in turn.
An adapter   llama.cpp adds it to the base model's file at run time. For each layer two tensors, in PyTorch's shapes:
             NAME.lora_a (r, n_in) and NAME.lora_b (n_out, r), NAME being the base tensor's. llama.cpp computes
             y = W x + (alpha / r) B A x, with r taken from B and one alpha for the file. What does not fit into one
             alpha, rsLoRA's alpha / sqrt(r) or ranks and alphas that differ by layer, is multiplied into B. The rows
             of B are rows of W, so those of q_proj and k_proj stand in llama.cpp's order; A's columns stay.

A file of another program and a Modelfile that the user edited are kept.

Names, row order and the file itself: gguf/container.py. Which type a tensor gets: gguf/file_types.py. Its bytes:
gguf/ggml_blocks.py. The vocabulary: `tokenizer_metadata.py`.
"""

import itertools
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..config.errors import UserError
from ..config.files import check_file, check_space, read_json, real, whole_file
from ..config.keys import build
from ..config.options import ExportOptions
from ..config.parser import Map
from ..config.scripts import script_command
from ..data.prompts import PromptFormat
from ..gguf.config import general_metadata, model_config, model_metadata, rope_divisors
from ..gguf.container import Metadata
from ..gguf.file_types import tensor_types
from ..gguf.ggml_blocks import FORMATS, quantize, quantize_checked
from ..gguf.imatrix import Imatrix, read_imatrix
from ..gguf.modelfile import (
    Recipe,
    file_value,
    is_ours,
    jinja_wins,
    no_guess,
    own_name,
    quoted,
    write_modelfiles,
    write_template,
)
from ..gguf.names import ROPE_DIVISORS, gguf_name, heads_to_permute, permute_rows, tensor_shapes
from ..gguf.reader import read_gguf
from ..gguf.writer import NewTensor, write_gguf
from ..model import ModelConfig
from ..run.usable import talking
from ..tokenizer.tokenizer import Tokenizer, load_tokenizer
from ..weights.adapter import Update, adapter_file, check_base, read_trained, read_updates
from ..weights.checkpoint import Weights, end_ids, fingerprint, ollama_parameters, open_weights, read_generation
from ..weights.hub import is_hub_name, local_path
from .forms import check_fits
from .go_template import go_template, stop_texts
from .tokenizer_metadata import jinja_of_text, tokenizer_metadata, unnamed_ends

TYPES = ("F32", "F16", "BF16")


def export_gguf(folder: str | Path, out: str | Path, type: str = "q8_0", imatrix: str | Path | None = None) -> None:
    """Write a model as the .gguf file `out`, and its Modelfile. All but the weights' values is checked before.

    Args:
        folder: the model: a folder, a .gguf file or a hub name.
        type: how weights are stored, a key of `gguf/file_types.py` in either case.
        imatrix: the file of an importance matrix, with which a type of few bits loses less.
    Raises:
        UserError: an argument, a file or a weight is wrong, or the model cannot be expressed in a GGUF file.
    """
    file_type, out = check_type(type), Path(out)
    weights, path, tok = open_weights(folder), local_path(folder), load_tokenizer(folder)
    config, generation = model_config(weights.config, folder), read_generation(weights)
    fmt = prompt_format(path, tok)
    measured = read_imatrix(imatrix) if imatrix else None
    tensors = model_tensors(weights, config, file_type, path, measured)
    ends = end_ids(generation, first=(fmt.end_id(tok), tok.eos_id))
    metadata = model_metadata(config, name_of(folder), file_type)
    metadata |= tokenizer_metadata(tok, fmt, config.vocab_size, path, ends)
    metadata |= measured.note(Path(imatrix)) if measured and imatrix else {}
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


def model_tensors(
    weights: Weights, config: ModelConfig, file_type: str, model: Path, imatrix: Imatrix | None = None
) -> list[NewTensor]:
    """Every tensor of the file, with its name, shape and type, in the order of the model; no weights are read yet."""
    shapes, types = tensor_shapes(config), tensor_types(config, file_type, imatrix is not None)
    importance = imatrix.of_model(shapes) if imatrix else {}

    def produce(name: str, ggml_type: str) -> Tensor:
        """The bytes of one tensor, called when its turn to be written has come."""
        w = weights.load(name).to(device)
        heads = heads_to_permute(gguf_name(name), config.num_attention_heads, config.num_key_value_heads)
        w = permute_rows(w, heads) if heads else w
        return quantize_checked(w, ggml_type, f"{model}: tensor {name}", importance.get(name))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = [NewTensor(gguf_name(n), shapes[n], kind, partial(produce, n, kind)) for n, kind in types.items()]
    if config.rope_scaling.get("rope_type") == "llama3":
        divisors = quantize(rope_divisors(config), "F32")
        tensors.append(NewTensor(ROPE_DIVISORS, (config.head_dim // 2,), "F32", lambda: divisors))
    return tensors


# ---------------------------------------------------------------------------------------------------- an adapter


def export_adapter(
    adapter: str | Path, base: str | Path | None, out: str | Path, type: str = "f32", other_base: bool = False
) -> None:
    """Write an adapter alone as the .gguf file `out`, and beside it a Modelfile that puts it on its base model.

    Args:
        adapter: folder or hub name.
        base: folder, .gguf file or hub name; None: the one that the adapter names, as far as that is safe.
        type: f32, f16 or bf16.
        other_base: `base` may have other weights than those that the adapter was trained on.
    Raises:
        UserError: as `export_gguf`, or the adapter is not one of this base.
    """
    file_type, out, base = check_type(type), Path(out), base or base_of(adapter)
    updates = read_updates(adapter)
    weights = open_weights(base)
    about_base = check_base(adapter, base, weights, other_base)
    config, generation = model_config(weights.config, base), read_generation(weights)
    tok, fmt, about_prompts = talking(base, adapter, config.vocab_size)
    for note in filter(None, (about_base, about_prompts)):
        print(note)
    fmt = fmt or usual_format(tok)
    alpha, tensors = adapter_tensors(updates, config, file_type, adapter)
    metadata = general_metadata("adapter", name_of(adapter), file_type)
    metadata |= {"adapter.type": ("string", "lora"), "adapter.lora.alpha": ("f32", alpha)}
    base_gguf = base_file(base, out)
    beside = os.path.relpath(base_gguf, out.parent)
    from_base = beside if beside.startswith("../") else f"./{beside}"
    files = [f"FROM {file_value(from_base)}", f"ADAPTER {file_value(f'./{out.name}')}"]
    recipe = Recipe(files, stops=stop_texts(fmt, tok, end_ids(generation)), parameters=ollama_parameters(generation))
    base_tok, template = load_tokenizer(base), out.with_suffix(".jinja")
    served = prompt_format(local_path(base), base_tok).jinja(base_tok) or ""
    is_trained = served.endswith(fmt.jinja(tok) or jinja_of_text(fmt, tok))
    if not is_ours(template):
        raise UserError(f"{template}: is not one that export_gguf.py wrote, or was changed. Rename it, or use --out.")
    write_file(out, metadata, tensors, *adapter_recipe(recipe, fmt, tok, served, is_trained))
    template.unlink(missing_ok=True)
    command = ["llama-server", "-m", str(base_gguf), "--lora", str(out), "--jinja"]
    if not is_trained:
        written = tokenizer_metadata(tok, fmt, config.vocab_size, local_path(base), end_ids(generation))
        write_template(template, written["tokenizer.chat_template"][1])
        command += ["--chat-template-file", str(template)]
    print(f"Ollama from 0.34.1 on is said to refuse adapters. Then merge it, or use {shlex.join(command)}")


def base_of(adapter: str | Path) -> str:
    """The base model that an adapter names: a hub name, or a path where the fingerprint proves that it is the base.

    The file may come from anybody, so no other path is taken from it.
    """
    where = adapter_file(adapter).with_name("adapter_config.json")
    base, trained = read_json(where).get("base_model_name_or_path"), read_trained(adapter).base
    with suppress(UserError):  # there is no model
        if isinstance(base, str) and (is_hub_name(base) or trained and fingerprint(open_weights(base)) == trained):
            return base
    raise UserError(f"{where}: names {base!r} as the base model, which is not proven. Give the base with --model.")


def base_file(base: str | Path, out: Path) -> Path:
    """The base's .gguf file; if it does not exist yet, the command that writes it is printed."""
    if Path(base).suffix == ".gguf":
        return Path(base)
    path = out.parent / "base-bf16.gguf"
    if not path.exists():
        command = script_command("export_gguf.py", "--model", base, "--type", "bf16", "--out", path)
        print(f"The base is needed too: {command}")
    return path


def adapter_recipe(
    recipe: Recipe, fmt: PromptFormat, tok: Tokenizer, served: str, is_trained: bool
) -> tuple[Recipe | None, list[str]]:
    """The Modelfile of an adapter, and lines for the user. Ollama sees `served`, the template of the base's file."""
    try:
        template, system, stops = go_template(fmt, tok)
    except UserError as problem:
        if is_trained and jinja_wins(served):
            return recipe, []
        return None, [f"No Modelfile, as Ollama would write other prompts than training did; merge it: {problem}"]
    recipe, notes = recipe._replace(template=template, system=system, stops=recipe.stops or stops), []
    if jinja_wins(served) and not is_trained:
        why = "instead of TEMPLATE, because it mentions tools or thinking. Start its server with OLLAMA_GO_TEMPLATE=1"
        notes.append(f"Ollama 0.30 and newer run the chat template of the base's file {why}, or merge the adapter.")
    return recipe, notes


def adapter_tensors(
    updates: dict[str, Update], config: ModelConfig, file_type: str, where: str | Path
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
        raise UserError(f"--type {file_type.lower()}: an adapter is written as f32, f16 or bf16. Choose one of them.")
    shapes = tensor_shapes(config)
    first = next(iter(updates.values()))
    alpha = float(torch.tensor(first.scaling * len(first.lora_A)))  # as float32, which the file has
    tensors = []
    for layer, update in updates.items():
        if update.magnitude is not None:
            raise UserError(f"{where}: {layer} has DoRA, which no such file can hold. Merge it, export the result.")
        check_fits(layer, update, shapes.get(f"{layer}.weight"), where, "the base model")
        name = gguf_name(f"{layer}.weight")
        heads = heads_to_permute(name, config.num_attention_heads, config.num_key_value_heads)
        b = update.lora_B * (update.scaling * len(update.lora_A) / alpha)  # times 1 in the first layer, and most others
        b = permute_rows(b, heads) if heads else b
        for part, w in (("lora_a", update.lora_A), ("lora_b", b)):
            raw = quantize_checked(w.contiguous(), file_type, f"{where}: {part} of {layer}")
            tensors.append(NewTensor(f"{name}.{part}", tuple(w.shape), file_type, partial(torch.clone, raw)))
    return alpha, tensors


# ------------------------------------------------------------------------------------------------ files on the disk


def write_file(
    out: Path, metadata: Metadata, tensors: list[NewTensor], recipe: Recipe | None, notes: Sequence[str] = ()
) -> None:
    """Write a .gguf file and its Modelfile, and print a line for each of `notes`.

    Args:
        recipe: what the Modelfile holds; None: no Modelfile can be right.
    Raises:
        UserError: before anything is written, a file of the user's is in the way, or the disk is too small.
    """
    own, is_model, notes = own_name(out), metadata["general.type"][1] == "model", list(notes)
    check_file(out, "--out")
    if not is_ours(own):
        raise UserError(f"{own}: is not one that export_gguf.py wrote, or was changed. Rename it, or use --out.")
    check_space(out, sum(FORMATS[t.ggml_type].num_bytes(math.prod(t.shape)) for t in tensors))
    with whole_file(out) as fresh:
        write_gguf(fresh, metadata, tensors)
        if out.exists() and not is_like_ours(out, metadata):
            names = (out.with_name(f"{out.name}.old{number or ''}") for number in itertools.count())
            kept = next(name for name in names if not name.exists() or name.samefile(out))
            with suppress(OSError):  # a disk without hard links, or it was kept before a kill
                os.link(out, kept)
            if not kept.exists():
                os.rename(out, kept)
            print(f"{out}: the file of this name was not written by export_gguf.py and is kept as {kept}")
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")
    if recipe:
        write_modelfiles(out, recipe.text(), is_model)
        if missing := [ascii(stop) for stop in recipe.stops if quoted(stop) is None]:
            notes.append(f"no stop line for {', '.join(missing)}, which a Modelfile cannot hold")
    elif own.exists():
        own.unlink()
        notes.append(f"{own}, of an earlier export, is removed")
    for note in notes:
        print(f"{own}: {note}" if recipe else note)


def is_like_ours(path: Path, metadata: Metadata) -> bool:
    """Whether a file begins as one of ours does, which other programs' files do not."""
    with suppress(UserError):
        return list(read_gguf(path).metadata)[:5] == list(metadata)[:5]
    return False


def name_of(model: str | Path) -> str:
    """The name of a model: its folder, or that of the run which it was merged in."""
    path = Path(model) if is_hub_name(model) else real(model)
    name = path.stem if path.suffix == ".gguf" else path.parent.name if path.name == "merged" else path.name
    return name.encode("utf-8", "replace").decode()


def own_folder(path: str | Path) -> Path:
    """Where results go by default: to what was given, of a file beside it, of a hub name to a folder of its name."""
    if is_hub_name(path):
        return Path(Path(path).name)
    return Path(path).parent if Path(path).is_file() else Path(path)


def prompt_format(model: Path, tok: Tokenizer) -> PromptFormat:
    """How the model was trained to be prompted; without prompt.json, as its tokenizer has it."""
    path = model / "prompt.json"
    return PromptFormat.from_json(path.read_bytes(), path) if path.is_file() else usual_format(tok)


def usual_format(tok: Tokenizer) -> PromptFormat:
    return PromptFormat(type="chat_template" if tok.chat_template else "completion")
