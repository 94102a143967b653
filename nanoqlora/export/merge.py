"""Fold an adapter into its base: W + s B A, written as a Hugging Face folder that any tool loads.

Which W? Training saw the base through four bits, and the adapter learnt to work with exactly those values. So
`base="nf4"`, the default, adds the update to the dequantised weights: what is written is what was trained and
measured. `base="original"` adds it to the weights as they were before quantisation; that takes the quantisation noise
out, often for the better, but it is another model than the one that was evaluated.

So nothing has to be believed: all forms read the run's held-out texts, and the certificate, `merge.json`, states how
far each is from the trained model, those of the GGUF types in `types` too. Over `max_kl` nothing is written.

The sum is made in float32 and rounded once. Memory: about the largest tensor. Read next: `forms.py`, `certificate.py`.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError, visible
from ..config.files import check_space, check_writable, whole_folder, write_text
from ..config.keys import build
from ..config.options import MergeOptions
from ..config.parser import Map
from ..config.schema import Config
from ..config.scripts import script_command
from ..data.prompts import PromptFormat
from ..gguf.config import model_config
from ..model import ModelConfig
from ..run.usable import talking
from ..tokenizer.tokenizer import Tokenizer, save_tokenizer
from ..weights.adapter import DTYPES, adapter_hash, check_base, read_trained, read_updates
from ..weights.checkpoint import Weights, end_ids, fingerprint, open_weights, read_generation, write_shards
from ..weights.hub import is_hub_name
from .certificate import GGUF, MAX_KL, ON_NF4, ON_ORIGINAL, certify, held_out_texts, verdict_of_merge
from .forms import Merged, all_forms, bytes_on_disk, is_two_files

OURS = (  # files that a merge writes, all of which the next one into the same folder replaces
    r"(merge|config|generation_config|prompt|tokenizer|tokenizer_config|special_tokens_map)\.json|tokenizer\.model|"
    r"chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
DTYPE_OPTIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32} | DTYPES


def merge(model: str | Path, adapter: str | Path, out: str | Path, **options: Any) -> dict[str, Any]:
    """Merge an adapter into its base and write the result to the folder `out`.

    Args:
        model: the base: a folder, a .gguf file or a hub name.
        adapter: folder or hub name.
        options: as `merge.py --help` lists them: base, dtype, data, types, max_kl, ...
    Returns:
        The certificate, which is in merge.json too; with `data`, each form of the model is scored in it.
    Raises:
        UserError: an option or a file is wrong, or the result is too far from the trained model.
    """
    given = Map("command line: --")
    for name, value in ({"model": str(model), "adapter": str(adapter), "out": str(out)} | options).items():
        given.put(name, value, f"command line: --{name}")
    return write_merge(build(MergeOptions, given))


def write_merge(asked: MergeOptions, config: Config | None = None) -> dict[str, Any]:
    """What `merge.py` does: merge, write, and score on held-out texts, where there are any.

    Args:
        config: of the run that the user named. It has what `asked` leaves open, held-out texts too.
    Returns, raises: as `merge`. The record's `verdict` begins with "verdict: NOT" for a bad merge.
    """
    model, adapter, out = places(asked, config)
    trained = read_trained(adapter)
    in_4bit = trained.in_4bit if asked.base is None else asked.base == "nf4"
    seen = torch.float32 if asked.base == "original" else trained.computed_in  # the original is wanted unrounded
    dtype = DTYPE_OPTIONS[asked.dtype] if asked.dtype else trained.computed_in
    check_out(out)
    weights, updates = open_weights(model), read_updates(adapter)
    tokenizer, fmt, note = talking(model, adapter, model_config(weights.config, model).vocab_size)
    notes = [note, check_base(adapter, model, weights, asked.other_base)]
    if not in_4bit and model.endswith(".gguf"):
        notes.append(f"note: `original` means the weights as they are in {model}, which that file may have rounded.")
        if is_two_files(weights, updates, trained.in_4bit):
            command = script_command("export_gguf.py", "--adapter", adapter, "--model", model)
            notes.append(f"note: that file and the adapter's own are what was trained, without a merge: {command}")
    for note in filter(None, notes):
        print(note)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    merged = Merged(weights, updates, in_4bit, seen, dtype, device)
    record: dict[str, Any] = {"base_model": model, "base": "nf4" if in_4bit else "original", "adapter": adapter}
    record |= {"adapter_sha256": adapter_hash(adapter), "base_fingerprint": fingerprint(weights)}
    record |= {"trained_on": trained.base, "dtype": str(dtype).removeprefix("torch.")}
    settings = model_settings(weights, dtype, tokenizer, fmt)
    check_space(out, merged.num_bytes)
    texts = held_out_texts(config, tokenizer, fmt, asked.data, asked.max_tokens) if asked.max_tokens else None
    if not texts:
        check_unscored(asked)

    with whole_folder(out) as folder:
        record |= write_weights(merged, folder, int(asked.max_shard_size * 1e9))
        for name, text in settings.items():
            write_text(folder / name, text)
        save_tokenizer(tokenizer, folder, fmt.jinja(tokenizer) if fmt else None)
        what = f"{record['merged_layers']} layers onto the {record['base']} weights of {model}"
        print(f"merged {what} ({record['dtype']}, mean change {record['mean_relative_change']:.2%})")
        if record["unchanged_layers"]:
            print(f"{record['unchanged_layers']} of them have an update of zero, so they are the base's")
        form, types = ON_NF4 if in_4bit else ON_ORIGINAL, [name.upper() for name in asked.types]
        if texts:
            forms = all_forms(merged, open_weights(folder), adapter, types, bytes_on_disk(folder))
            limits = {ON_NF4: MAX_KL} if in_4bit else {}
            if asked.max_kl is not None:
                limits = dict.fromkeys([form, *(GGUF + name for name in asked.types)], asked.max_kl)
            record |= certify(forms, *texts, limits, device)
        record["verdict"] = verdict_of_merge(out, form, record)
        write_text(folder / "merge.json", json.dumps(record, indent=2) + "\n")
    print(f"{out}: merged model and merge.json, its certificate\n{record['verdict']}")
    return record


def places(asked: MergeOptions, config: Config | None) -> tuple[str, str, Path]:
    """Base, adapter and the folder to write."""
    model, adapter = asked.model or config and config.base_model, asked.adapter or config and config.output_dir
    assert model and adapter
    folder = config.output_dir if config else Path(adapter).name if is_hub_name(adapter) else adapter
    return model, adapter, Path(asked.out or f"{folder}/merged")


def check_out(out: Path) -> None:
    """Only an earlier merge is replaced, and only if nothing else lies in its folder."""
    check_writable(out.parent, "--out", out.name)
    found = [path.name for path in out.iterdir()] if out.is_dir() else []
    if out.is_file() or out.is_mount() or (found and "merge.json" not in found):
        what = "is a disk, which is never replaced" if out.is_mount() else "exists and is no earlier merge"
        raise UserError(f"{out}: {what}, so nothing is written over it. Name another --out.")
    if others := ", ".join(sorted(visible(name) for name in found if not re.fullmatch(OURS, name))[:3]):
        raise UserError(f"{out}: an earlier merge, and beside it {others}. Move them, or name another --out.")


def check_unscored(asked: MergeOptions) -> None:
    """Where nothing is scored: name the options without effect, or refuse one that was to stop a bad merge."""
    remedy = "Give held-out texts with --data FILE, or the run's YAML file first"
    remedy += "" if asked.max_tokens else ", and no --max_tokens 0"
    if asked.max_kl is not None:
        raise UserError(f"--max_kl {asked.max_kl:g} cannot be checked, because nothing is scored. {remedy}.")
    for name, value in {"types": ",".join(asked.types), "data": asked.data}.items():
        if value:
            print(f"--{name} {value}: without effect, because nothing is scored. {remedy}.")


def model_settings(weights: Weights, dtype: torch.dtype, tok: Tokenizer, fmt: PromptFormat | None) -> dict[str, str]:
    """The JSON files of the merged model, without those of its tokenizer."""
    generation = read_generation(weights)
    ends = end_ids(generation, first=[fmt.end_id(tok) if fmt else tok.eos_id])
    ids: dict[str, Any] = {"bos_token_id": tok.bos_id, "pad_token_id": tok.pad_id}
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    generation |= {name: id for name, id in ids.items() if id is not None}
    files = {"config.json": merged_config(weights.config, dtype, ids), "generation_config.json": generation}
    texts = {name: json.dumps(values, indent=2) + "\n" for name, values in files.items()}
    return texts | ({"prompt.json": fmt.to_json()} if fmt else {})


def write_weights(merged: Merged, folder: Path, max_shard_bytes: int) -> dict[str, Any]:
    """All tensors of the model, in its order. Returns the facts for the certificate."""
    tensors = {name: (shape, merged.dtype) for name, shape in merged.shapes.items()}
    write_shards(folder, merged, tensors, max_shard_bytes)
    changes = merged.changes.values()
    assert len(changes) == len(merged.updates)
    facts: dict[str, Any] = {"merged_layers": len(changes), "unchanged_layers": sum(c == 0 for c in changes)}
    return facts | {"mean_relative_change": sum(changes) / max(1, len(changes))}


def merged_config(config: dict[str, Any], dtype: torch.dtype, ids: dict[str, Any]) -> dict[str, Any]:
    """config.json of the merged model: the base's, and every number as it was understood, under the keys that all
    readers know: RoPE as rope_theta and rope_scaling."""
    model = asdict(ModelConfig.from_hf(config))
    model["rope_scaling"] = model["rope_scaling"] or None
    dropped = ("rope_parameters", "dtype", "quantization_config", "transformers_weights")
    config = {key: value for key, value in config.items() if key not in (*dropped, "original_max_position_embeddings")}
    kind = config.get("model_type") or ("mistral" if "Mistral" in str(config.get("architectures")) else "llama")
    names = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"]}
    return config | names | model | ids | {"torch_dtype": str(dtype).removeprefix("torch.")}
