"""A LoRA adapter as a .gguf file, which llama.cpp adds to the base model's file at run time.

For each layer two tensors, in PyTorch's shapes: NAME.lora_a (r, n_in) and NAME.lora_b (n_out, r), NAME being the base
tensor's. llama.cpp computes y = W x + (alpha / r) B A x, with r taken from B and one alpha for the file. What
does not fit into one alpha, rsLoRA's alpha / sqrt(r) or ranks and alphas that differ by layer, is multiplied into B.

The rows of B are rows of W, so those of q_proj and k_proj stand in llama.cpp's order; A's columns are inputs and stay.
"""

import os
from functools import partial
from pathlib import Path

import torch

from ..config.errors import UserError
from ..config.files import read_json
from ..config.scripts import script_command
from ..data.prompts import PromptFormat
from ..gguf.config import model_config
from ..gguf.container import Metadata
from ..gguf.file_types import FILE_TYPES
from ..gguf.ggml_blocks import quantize_checked
from ..gguf.modelfile import Recipe, file_value, jinja_wins
from ..gguf.names import gguf_name, heads_to_permute, permute_rows, tensor_shapes
from ..gguf.writer import NewTensor
from ..model import ModelConfig
from ..run.usable import talking
from ..tokenizer.tokenizer import Tokenizer, load_tokenizer
from ..weights.adapter import Update, read_updates
from ..weights.adapter_files import adapter_file, check_base, read_trained
from ..weights.checkpoint import fingerprint, open_weights
from ..weights.generation import end_ids, ollama_parameters, read_generation
from ..weights.hub import is_hub_name, local_path
from .gguf_file import name_of, prompt_format, usual_format, write_file
from .gguf_model import check_type
from .go_template import go_template, stop_texts
from .tokenizer_metadata import jinja_of_text

TYPES = ("F32", "F16", "BF16")


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
    metadata = adapter_metadata(name_of(adapter), alpha, file_type)
    files = [f"FROM {file_value(base_file(base, out))}", f"ADAPTER {file_value(f'./{out.name}')}"]
    recipe = Recipe(files, stops=stop_texts(fmt, tok, end_ids(generation)), parameters=ollama_parameters(generation))
    write_file(out, metadata, tensors, *adapter_recipe(recipe, fmt, tok, base))


def base_of(adapter: str | Path) -> str:
    """The base model that an adapter names: a hub name, or a path where the fingerprint proves that it is the base.

    The file may come from anybody, so no other path is taken from it.
    """
    where = adapter_file(adapter).with_name("adapter_config.json")
    base, trained_on = read_json(where).get("base_model_name_or_path"), read_trained(adapter).base
    if isinstance(base, str) and is_hub_name(base):
        return base
    try:
        if isinstance(base, str) and trained_on and fingerprint(open_weights(base)) == trained_on:
            return base
    except UserError:
        pass  # there is no model
    raise UserError(
        f"{where}: names {base!r} as the base model, and nothing proves that the adapter was trained on "
        f"it. The file may come from anybody. Give the base with --model, or the YAML file of the run first."
    )


def base_file(base: str | Path, out: Path) -> str:
    """The path of the base's .gguf file for the Modelfile; if it does not exist yet, the command that writes it."""
    if Path(base).suffix == ".gguf":
        relative = os.path.relpath(base, out.parent)
        return relative if relative.startswith(("./", "../")) else f"./{relative}"
    path = out.parent / "base-bf16.gguf"
    if not path.exists():
        command = script_command("export_gguf.py", "--model", base, "--type", "bf16", "--out", path)
        print(f"The base is needed too: {command}")
    return f"./{path.name}"


def adapter_recipe(
    recipe: Recipe, fmt: PromptFormat, tok: Tokenizer, base: str | Path
) -> tuple[Recipe | None, list[str]]:
    """The Modelfile of an adapter, and lines for the user. Ollama sees the chat template of the base's file."""
    base_tok = load_tokenizer(base)
    served = prompt_format(local_path(base), base_tok).jinja(base_tok) or ""
    is_trained = served.endswith(fmt.jinja(tok) or jinja_of_text(fmt, tok))
    try:
        template, system, stops = go_template(fmt, tok)
    except UserError as problem:
        if is_trained and jinja_wins(served):
            return recipe, []
        return None, [f"No Modelfile, as Ollama would write other prompts than training did; merge it: {problem}"]
    notes = []
    if jinja_wins(served) and not is_trained:
        notes.append(
            "Ollama 0.30 and newer run the chat template of the base's file instead of TEMPLATE, because it mentions "
            "tools or thinking. Start its server with OLLAMA_GO_TEMPLATE=1, or merge the adapter."
        )
    return recipe._replace(template=template, system=system, stops=recipe.stops or stops), notes


def adapter_metadata(name: str, alpha: float, file_type: str) -> Metadata:
    return {
        "general.architecture": ("string", "llama"),
        "general.type": ("string", "adapter"),
        "general.name": ("string", name),
        "general.file_type": ("u32", FILE_TYPES[file_type]),
        "adapter.type": ("string", "lora"),
        "adapter.lora.alpha": ("f32", alpha),
    }


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
        why = f"an adapter is small and is written as {', '.join(TYPES).lower()}"
        raise UserError(f"--type {file_type.lower()}: {why}. Choose one of them; f32 is the default.")
    shapes = tensor_shapes(config)
    first = next(iter(updates.values()))
    alpha = float(torch.tensor(first.scaling * len(first.lora_A)))  # as float32, which the file has
    tensors = []
    for layer, update in updates.items():
        if update.magnitude is not None:
            what = f"{layer} was trained with DoRA, whose row lengths no adapter file of llama.cpp can hold"
            raise UserError(f"{where}: {what}. Merge it ({script_command('merge.py')}) and export the merged model.")
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
            tensors.append(NewTensor(f"{name}.{part}", tuple(w.shape), file_type, partial(torch.clone, raw)))
    return alpha, tensors
