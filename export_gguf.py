"""A Hugging Face folder to one .gguf file for llama.cpp and Ollama, and a Modelfile beside it.

    python export_gguf.py [train.yml] [--type q8_0]              what merge.py made of the run in train.yml
    python export_gguf.py --model FOLDER [--out FILE] [--type TYPE]
    python export_gguf.py --adapter FOLDER --model BASE          the adapter alone, for a base model's .gguf
    ollama create my-model -f output_dir/Modelfile

How the file is made is in nanoqlora/export/gguf_model.py, and how `--prove` compares
it with what was trained in proof.py. From Python: `nanoqlora.export_gguf`.
"""

import shlex
from pathlib import Path

from nanoqlora.config.load import answer_early, load_command
from nanoqlora.config.options import ExportOptions

if __name__ == "__main__":
    answer_early(ExportOptions)  # --help and wrong settings, before PyTorch is imported

from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import UserError
from nanoqlora.config.schema import Config
from nanoqlora.config.scripts import script_command
from nanoqlora.export.gguf_model import export_adapter, export_gguf, own_folder
from nanoqlora.export.importance import imatrix_file
from nanoqlora.export.proof import export_and_prove, export_and_prove_adapter
from nanoqlora.weights.adapter import check_merged
from nanoqlora.weights.hub import local_path


def main() -> None:
    config, asked = load_command(ExportOptions)
    unused, how = ("data", "with") if asked.adapter and not asked.prove else ("other_base", "without")
    if asked.imatrix and (asked.adapter or (asked.type or "q8_0") in ("f32", "f16", "bf16", "q8_0")):
        print("--imatrix: without effect on an adapter, and on q8_0 and larger types.")
        asked = asked.model_copy(update={"imatrix": None})
    if (value := getattr(asked, unused)) and not (asked.adapter and asked.prove):
        print(f"--{unused} {value}: without effect {how} --adapter.")
    if asked.adapter:
        write_adapter(asked.adapter, asked, config)
    else:
        write_model(asked, config)


def write_adapter(adapter: str, asked: ExportOptions, config: Config | None) -> None:
    """The adapter alone, for the base of --model, of the run's YAML, or the one that it names."""
    file_type = asked.type or "f32"
    out = asked.out or own_folder(adapter) / f"adapter-{file_type}.gguf"
    base = asked.model or (config.base_model if config else None)
    if asked.prove:
        export_and_prove_adapter(adapter, base, out, file_type, config, asked)
    else:
        export_adapter(adapter, base, out, file_type, asked.other_base)


def write_model(asked: ExportOptions, config: Config | None) -> None:
    """The model of --model, else what merge.py wrote into the run's folder."""
    run = Path(config.output_dir) if config else own_folder(str(asked.model))
    model, file_type = asked.model or str(run / "merged"), asked.type or "q8_0"
    check_merged(model, run if config else None)
    if not asked.model and not Path(model).exists() or not local_path(model).exists():  # ours is no hub name
        first = f"{script_command('merge.py')} {shlex.quote(asked.file)}" if config else script_command("merge.py")
        raise UserError(f"{model}: no such folder, so there is no model to export. Run {first} first, or use --model.")
    out = asked.out or run / f"model-{file_type}.gguf"
    imatrix = imatrix_file(asked.imatrix, model, Path(out), config, asked.data) if asked.imatrix else None
    if asked.prove:
        export_and_prove(model, out, file_type, config, asked, imatrix)
        return
    export_gguf(model, out, file_type, imatrix)
    if asked.data and (config or asked.imatrix != "true"):
        print(f"--data {asked.data}: without effect, because nothing is scored without --prove.")


if __name__ == "__main__":
    run_command(main)
