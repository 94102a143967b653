"""A Hugging Face folder to one .gguf file for llama.cpp and Ollama, and a Modelfile beside it.

    python export_gguf.py [train.yml] [--type q8_0]              what merge.py made of the run in train.yml
    python export_gguf.py --model FOLDER [--out FILE] [--type TYPE]
    python export_gguf.py --adapter FOLDER --model BASE          the adapter alone, for a base model's .gguf
    ollama create my-model -f output_dir/Modelfile

Weights that are right are half of it. The other half is that the model is prompted the way it was trained, and that it
stops where it learnt to stop. Both come from prompt.json, which training wrote: its chat template goes into the file
and, in Go's template language, into the Modelfile; the token that ends an answer becomes the end token of the file.

One tensor at a time is read, brought into llama.cpp's row order, quantized and written. Read next:
nanoqlora/gguf/container.py.
"""

import itertools
import math
import os
from pathlib import Path

from nanoqlora.config.load import answer_early, load_command
from nanoqlora.config.options import ExportOptions

if __name__ == "__main__":
    answer_early(ExportOptions)  # --help and wrong settings, before PyTorch is imported

from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import UserError
from nanoqlora.config.files import check_file, check_space, read_json, whole_file
from nanoqlora.config.schema import Config
from nanoqlora.config.scripts import script_command
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.export.gguf_adapter import adapter_metadata, plan_adapter
from nanoqlora.export.gguf_model import plan_tensors
from nanoqlora.export.go_template import go_template, stop_texts
from nanoqlora.export.held_out import held_out_texts
from nanoqlora.export.proof import Proof, prove_file
from nanoqlora.export.tokenizer_metadata import jinja_of_words, tokenizer_metadata, unnamed_ends
from nanoqlora.gguf.config import model_metadata
from nanoqlora.gguf.container import Metadata
from nanoqlora.gguf.ggml_blocks import FORMATS
from nanoqlora.gguf.modelfile import (
    Recipe,
    file_value,
    is_ours,
    jinja_wins,
    no_guess,
    own_name,
    quoted,
    write_modelfiles,
)
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.gguf.writer import NewTensor, write_gguf
from nanoqlora.run.usable import talking
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer
from nanoqlora.weights.adapter import read_updates
from nanoqlora.weights.adapter_files import adapter_file, adapter_hash, check_base, check_merged, read_trained
from nanoqlora.weights.checkpoint import fingerprint, model_config, open_weights
from nanoqlora.weights.generation import end_ids, ollama_parameters, read_generation
from nanoqlora.weights.hub import is_hub_name, local_path


def main() -> None:
    config, options = load_command(ExportOptions)
    file_type = (options.type or ("f32" if options.adapter else "q8_0")).upper()
    unused, how = ("data", "with") if options.adapter else ("other_base", "without")
    if value := getattr(options, unused):
        print(f"--{unused} {value}: without effect {how} --adapter.")
    if options.adapter:
        if options.prove:
            raise UserError(
                "--prove compares a whole model with what was trained; merge the adapter and prove that file."
            )
        adapter = options.adapter
        out = Path(options.out or own_folder(adapter) / f"adapter-{file_type.lower()}.gguf")
        base = options.model or (config.base_model if config else base_of(adapter))
        export_adapter(adapter, base, out, file_type, options.other_base)
        return
    model = options.model or Path(config.output_dir) / "merged"
    check_merged(model, config.output_dir if config else None)
    if not options.model and not Path(model).exists() or not local_path(model).exists():  # ours is no hub name
        first = script_command("merge.py")
        raise UserError(f"{model}: no such folder, so there is no model to export. Run {first} first, or use --model.")
    folder = Path(config.output_dir) if config else own_folder(model)
    out = Path(options.out or folder / f"model-{file_type.lower()}.gguf")
    if not options.prove:
        export(model, out, file_type)
        if options.data:
            print(f"--data {options.data}: without effect, because nothing is scored without --prove.")
        return
    tok, fmt = trained_talk(model, config)
    texts = options.max_tokens and held_out_texts(config, tok, fmt, options.data, options.max_tokens) or None
    export(model, out, file_type)
    prove_file(Proof(out, file_type, local_path(model), tok, fmt, config), texts)


def trained_talk(model: str | Path, config: Config | None) -> tuple[Tokenizer, PromptFormat]:
    """Tokenizer and prompt format of the run that the user named; without one, of the model.

    Raises:
        UserError: among others, the run's base cannot be opened, which is to be known before a file is written.
    """
    if config is None or adapter_hash(Path(config.output_dir).absolute()) is None:  # which is no hub name
        tok = load_tokenizer(model)
        return tok, prompt_format(local_path(model), tok)
    base = open_weights(config.base_model)
    tok, fmt, _ = talking(config.base_model, config.output_dir, model_config(base.config, base.where).vocab_size)
    return tok, fmt or usual_format(tok)


def export(model: str | Path, out: Path, file_type: str) -> None:
    """Write `out` and its Modelfile. What can be wrong, except the weights' values, is found before.

    Args:
        model: a folder, a .gguf file or a hub name.
    """
    weights, folder = open_weights(model), local_path(model)
    config, generation = model_config(weights.config, model), read_generation(weights)
    tok = load_tokenizer(model)
    fmt = prompt_format(folder, tok)
    tensors = plan_tensors(weights, config, file_type, folder)
    ends = end_ids(generation, first=(fmt.end_id(tok), tok.eos_id))
    metadata = model_metadata(config, name_of(model), file_type)
    metadata |= tokenizer_metadata(tok, fmt, config.vocab_size, folder, ends)
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
    write(out, metadata, tensors, recipe, notes)


def name_of(model: str | Path) -> str:
    """What a model is called: its folder, or that of the run which it was merged in."""
    path = Path(model) if is_hub_name(model) else Path(model).resolve()
    name = path.stem if path.suffix == ".gguf" else path.parent.name if path.name == "merged" else path.name
    return name.encode("utf-8", "replace").decode()


def own_folder(path: str | Path) -> Path:
    """Where results go by default: to what was given, of a file beside it, of a hub name to a folder of its name."""
    if is_hub_name(path):
        return Path(Path(path).name)
    return Path(path).parent if Path(path).is_file() else Path(path)


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


def export_adapter(adapter: str | Path, base: str | Path, out: Path, file_type: str, other_base: bool = False) -> None:
    """Write the adapter alone as `out`, and beside it a Modelfile that puts it on the base model."""
    _, updates = read_updates(adapter)
    weights = open_weights(base)
    if note := check_base(adapter, base, weights, other_base):
        print(note)
    config, generation = model_config(weights.config, base), read_generation(weights)
    tok, fmt, note = talking(base, adapter, config.vocab_size)
    if note:
        print(note)
    fmt = fmt or usual_format(tok)
    alpha, tensors = plan_adapter(updates, config, file_type, adapter)
    metadata = adapter_metadata(name_of(adapter), alpha, file_type)
    if Path(base).suffix == ".gguf":
        base_file = os.path.relpath(base, out.parent)
    else:
        base_file = "base-bf16.gguf"
        path = out.parent / base_file
        if not path.exists():
            command = script_command("export_gguf.py", "--model", base, "--type", "bf16", "--out", path)
            print(f"The base is needed too: {command}")
    base_file = base_file if base_file.startswith(("./", "../")) else f"./{base_file}"
    files = [f"FROM {file_value(base_file)}", f"ADAPTER {file_value(f'./{out.name}')}"]
    recipe = Recipe(files, stops=stop_texts(fmt, tok, end_ids(generation)), parameters=ollama_parameters(generation))
    write(out, metadata, tensors, *adapter_recipe(recipe, fmt, tok, base))


def adapter_recipe(recipe: Recipe, fmt: PromptFormat, tok: Tokenizer, base: str | Path) -> tuple[Recipe | None, list]:
    """The Modelfile of an adapter, and what is to be said. Ollama sees the chat template of the base's file."""
    base_tok = load_tokenizer(base)
    served = prompt_format(local_path(base), base_tok).jinja(base_tok) or ""
    is_trained = served.endswith(fmt.jinja(tok) or jinja_of_words(fmt, tok))
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


def write(out: Path, metadata: Metadata, tensors: list[NewTensor], recipe: Recipe | None, notes: list[str]) -> None:
    """The file, its Modelfile, and a line for each of `notes`."""
    own, is_model = own_name(out), metadata["general.type"][1] == "model"
    check_file(out, "--out")
    if not is_ours(own):
        raise UserError(
            f"{own}: is not one that export_gguf.py wrote, or was changed since, and the Modelfile of {out.name} would "
            f"take its place. Rename it, or choose another --out."
        )
    check_space(out, sum(FORMATS[t.ggml_type].num_bytes(math.prod(t.shape)) for t in tensors))
    with whole_file(out) as fresh:
        write_gguf(fresh, metadata, tensors)
        if out.exists() and not is_like_ours(out, metadata):
            names = (out.with_name(f"{out.name}.old{number or ''}") for number in itertools.count())
            os.rename(out, kept := next(name for name in names if not name.exists()))
            print(f"{out}: the file of this name was not written by export_gguf.py and is kept as {kept}")
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")
    if recipe:
        write_modelfiles(out, recipe.text(), is_model)
        missing = [stop for stop in recipe.stops if quoted(stop) is None]
        if missing:
            notes.append(f"no stop line for {', '.join(map(ascii, missing))}, which a Modelfile cannot hold")
    elif own.exists():
        own.unlink()
        notes.append(f"{own}, of an earlier export, is removed")
    for note in notes:
        print(f"{own}: {note}" if recipe else note)


def is_like_ours(path: Path, metadata: Metadata) -> bool:
    """Whether a file begins as one of ours does, which other programs' files do not."""
    try:
        return list(read_gguf(path).metadata)[:5] == list(metadata)[:5]
    except UserError:
        return False


def prompt_format(model: Path, tok: Tokenizer) -> PromptFormat:
    """How the model was trained to be prompted; of a model without prompt.json, what its tokenizer says."""
    path = model / "prompt.json"
    if path.is_file():
        return PromptFormat.from_json(path.read_text(encoding="utf-8"))
    return usual_format(tok)


def usual_format(tok: Tokenizer) -> PromptFormat:
    return PromptFormat(type="chat_template" if tok.chat_template else "completion")


if __name__ == "__main__":
    run_command(main)
