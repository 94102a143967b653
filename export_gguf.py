"""A Hugging Face folder to one .gguf file for llama.cpp and Ollama, and a Modelfile beside it.

    python export_gguf.py [train.yml] [--type q8_0]              what merge.py made of the run in train.yml
    python export_gguf.py --model FOLDER [--out FILE] [--type TYPE]
    python export_gguf.py --adapter FOLDER --model BASE          the adapter alone, for a base model's .gguf
    ollama create my-model -f output_dir/Modelfile

Weights that are right are half of it. The other half is that the model is prompted the way it was trained, and that it
stops where it learnt to stop. Both come from prompt.json, which training wrote: its chat template goes into the file
and, in Go's template language, into the Modelfile; the token that ends an answer becomes the end token of the file.

One tensor at a time is read, brought into llama.cpp's row order, quantized and written. Read next: nanoqlora/gguf.py.
"""

import math
import os
import sys
from pathlib import Path

from nanoqlora import gguf
from nanoqlora.adapter import read_updates
from nanoqlora.checkpoint import model_config, open_weights
from nanoqlora.cli import UserError, check_space, read_json, run_command, write_text
from nanoqlora.config import Option, load_command
from nanoqlora.file_types import FILE_TYPES
from nanoqlora.ggml_blocks import FORMATS
from nanoqlora.gguf_adapter import adapter_metadata, plan_adapter
from nanoqlora.gguf_model import plan_tensors
from nanoqlora.hub import ADAPTER_FILES, is_hub_name, local_path
from nanoqlora.ollama import GoTemplate, go_template, tokenizer_metadata
from nanoqlora.prompts import PromptFormat
from nanoqlora.proof import prove_file
from nanoqlora.tokenizer import Tokenizer, load_tokenizer

OPTIONS = {
    "model": Option("the Hugging Face folder to export; default: merged, in the run's output_dir"),
    "out": Option("the file to write; default: model-TYPE.gguf in output_dir, or in the folder given by --model"),
    "type": Option(f"how weights are stored: {', '.join(FILE_TYPES).lower()}; default: q8_0, of an adapter f32"),
    "prove": Option("read the file back and compare it with what was trained; the result goes into merge.json", bool),
    "data": Option("held-out texts for --prove; default: those of the run in the YAML file"),
    "max_tokens": Option("held-out tokens for --prove", int, 1024),
    "adapter": Option(
        "folder of a trained adapter, to be written alone; its base is --model, that of the YAML, or a hub name in it"
    ),
}


def main() -> None:
    given = next(
        (name for name in ("adapter", "model") if any(w.split("=")[0] == f"--{name}" for w in sys.argv)), "model"
    )
    config, options = load_command(None, OPTIONS, "Write a model as .gguf with a Modelfile.", yaml_unless=[given])
    file_type = (options["type"] or ("f32" if options["adapter"] else "q8_0")).upper()
    if file_type not in FILE_TYPES:
        raise UserError(
            f"command line: --type {options['type']} is not a type that can be written here, so there is no file to "
            f"make. Choose one of {', '.join(FILE_TYPES).lower()}."
        )
    if options["adapter"]:
        if options["prove"]:
            raise UserError(
                "--prove compares a whole model with what was trained; merge the adapter and prove that file."
            )
        adapter = Path(options["adapter"])
        out = Path(options["out"] or adapter / f"adapter-{file_type.lower()}.gguf")
        export_adapter(adapter, options["model"] or (config.base_model if config else base_of(adapter)), out, file_type)
        return
    model = Path(options["model"] or Path(config.output_dir) / "merged")
    if not model.exists():
        raise UserError(f"{model}: no such folder, so there is no model to export. Run merge.py first, or use --model.")
    folder = Path(config.output_dir) if config else model if model.is_dir() else model.parent
    out = Path(options["out"] or folder / f"model-{file_type.lower()}.gguf")
    export(model, out, file_type)
    if options["prove"]:
        tok = load_tokenizer(model)
        texts = options["data"], options["max_tokens"]
        prove_file(out, model, config, tok, prompt_format(model, tok), file_type, *texts)


def export(model: Path, out: Path, file_type: str) -> None:
    """Write `out` and the Modelfile beside it. What can be wrong, except the weights' values, is found before."""
    weights = open_weights(model)
    config = model_config(weights.config, model)
    tok = load_tokenizer(model)
    fmt = prompt_format(model, tok)
    tensors = plan_tensors(weights, config, file_type, model)
    folder = model.resolve()
    name = folder.parent.name if folder.name == "merged" else folder.stem
    metadata = gguf.model_metadata(config, name, file_type) | tokenizer_metadata(tok, fmt, config.vocab_size, model)
    write(out, metadata, tensors, [f"FROM ./{out.name}"], tok, fmt)


def base_of(adapter: Path) -> str:
    """The base model that an adapter names, if that is a hub name: a path is for the user to name."""
    where = local_path(adapter, ADAPTER_FILES) / "adapter_config.json"
    base = read_json(where).get("base_model_name_or_path")
    if not isinstance(base, str) or not is_hub_name(base):
        raise UserError(
            f"{where}: names {base!r} as the base model. Only a hub name is taken from there, because the file may "
            f"come from anybody. Give the base with --model, or the YAML file of the run first."
        )
    return base


def export_adapter(adapter: Path, base: str | Path, out: Path, file_type: str) -> None:
    """Write the adapter alone as `out`, and beside it a Modelfile that puts it on the base model."""
    _, updates = read_updates(adapter)
    config = model_config(open_weights(base).config, base)
    tok = load_tokenizer(base, adapter)
    fmt = prompt_format(adapter, tok)
    alpha, tensors = plan_adapter(updates, config, file_type, adapter)
    if Path(base).suffix == ".gguf":
        path = os.path.relpath(base, out.parent)
        base_file = path if path.startswith(".") else f"./{path}"
    else:
        base_file = "./base-bf16.gguf"
        path = out.parent / base_file
        if not path.exists():
            print(f"The base is needed too: python export_gguf.py --model {base} --type bf16 --out {path}")
    head = [f"FROM {base_file}", f"ADAPTER ./{out.name}"]
    write(out, adapter_metadata(adapter.resolve().name, alpha, file_type), tensors, head, tok, fmt)


def write(out: Path, metadata: gguf.Metadata, tensors: list[gguf.NewTensor], head: list[str], tok, fmt) -> None:
    """The file, and the Modelfile, which begins with `head`."""
    recipe = out.parent / "Modelfile"
    try:
        text, problem = modelfile(head, go_template(fmt, tok)), None
    except UserError as error:
        text, problem = None, error
    check_space(out, sum(FORMATS[t.ggml_type].num_bytes(math.prod(t.shape)) for t in tensors))
    gguf.write_gguf(out, metadata, tensors)
    print(f"{out}: {len(tensors)} tensors, {out.stat().st_size / 1e6:.1f} MB")
    if text is not None:
        write_text(recipe, text)
        print(f"{recipe}: ollama create NAME -f {recipe}")
    else:
        # The .gguf is as good as ever, with the Jinja in it. But Ollama without a TEMPLATE guesses one, and the
        # Modelfile of an earlier export may hold another model's.
        recipe.unlink(missing_ok=True)
        print(f"No Modelfile: {problem}")


def prompt_format(model: Path, tok: Tokenizer) -> PromptFormat:
    """How the model was trained to be prompted; of a model without prompt.json, what its tokenizer says."""
    path = model / "prompt.json"
    if path.is_file():
        return PromptFormat.from_json(path.read_text(encoding="utf-8"))
    return PromptFormat(type="chat_template" if tok.chat_template else "completion")


def modelfile(head: list[str], template: GoTemplate) -> str:
    """The Modelfile: where the weights are, how messages become text, and at which texts an answer ends."""
    lines = [*head, f'TEMPLATE """{template.template}"""']
    if template.system is not None:
        lines.append(f'SYSTEM """{template.system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in template.stops]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
