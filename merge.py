"""Fold an adapter into its base: W + s B A, written as a Hugging Face folder that any tool loads.

    python merge.py [train.yml]
    python merge.py --model DIR --adapter DIR --out DIR [--base nf4 | original]

Which W? Training saw the base through four bits, and the adapter learnt to work with exactly those values. So
`--base nf4`, the default, adds the update to the dequantised weights: what is written is what was trained and
measured. `--base original` adds it to the weights as they were before quantisation; that takes the quantisation noise
out, often for the better, but it is another model than the one that was evaluated.

So nothing has to be believed: all forms read the run's held-out texts, and the certificate, `merge.json`, says how far
each is from the trained model, those of the GGUF types in `--types` too. Over `--max_kl` nothing is written.

The sum is made in float32 and rounded once. Memory: about the largest tensor.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from nanoqlora.config.load import answer_early, load_command
from nanoqlora.config.options import MergeOptions

if __name__ == "__main__":
    answer_early(MergeOptions)  # --help and wrong settings, before PyTorch is imported

import torch

from nanoqlora.config.commands import run_command
from nanoqlora.config.errors import UserError, visible
from nanoqlora.config.files import check_space, check_writable, whole_folder, write_text
from nanoqlora.config.schema import Config
from nanoqlora.export.certificate import GGUF, MAX_KL, ON_NF4, ON_ORIGINAL, certify, verdict_of_merge
from nanoqlora.export.forms import Merged, all_forms, bytes_on_disk
from nanoqlora.export.held_out import held_out_texts
from nanoqlora.model import ModelConfig
from nanoqlora.run.usable import talking
from nanoqlora.tokenizer.tokenizer import save_tokenizer
from nanoqlora.weights.adapter import read_updates
from nanoqlora.weights.adapter_files import adapter_hash, check_base, read_trained
from nanoqlora.weights.checkpoint import ShardWriter, fingerprint, model_config, open_weights
from nanoqlora.weights.generation import end_ids, read_generation
from nanoqlora.weights.hub import is_hub_name

OURS = (  # files that a merge writes, all of which the next one into the same folder replaces
    r"(merge|config|generation_config|prompt|tokenizer|tokenizer_config|special_tokens_map)\.json|tokenizer\.model|"
    r"chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Plan(NamedTuple):
    """What the command line and the run's train.yml ask for."""

    base: str
    adapter: str  # folder or hub name
    out: Path
    in_4bit: bool  # W goes through NF4
    seen: torch.dtype  # W was rounded to it in training
    dtype: torch.dtype  # to write
    types: list[str]  # of GGUF, to score


def plan(config: Config | None, options: MergeOptions) -> Plan:
    base = options.model or (config and config.base_model)
    adapter = str(options.adapter or config.output_dir)
    folder = config.output_dir if config else Path(adapter).name if is_hub_name(adapter) else adapter
    out = Path(options.out or Path(folder) / "merged")
    trained_in_4bit, computed, _ = read_trained(adapter)
    in_4bit = (options.base or ("nf4" if trained_in_4bit else "original")) == "nf4"
    seen = torch.float32 if options.base == "original" else computed  # who asks for the original gets it unrounded
    if out.exists() and not (out / "merge.json").exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is no earlier merge, so nothing is written over it. Name another --out.")
    found = [path.name for path in out.iterdir()] if out.exists() else []
    if others := sorted(name for name in found if not re.fullmatch(OURS, name)):
        raise UserError(
            f"{out}: an earlier merge, and beside it {', '.join(map(visible, others[:3]))}, which would be removed "
            f"with it. Move what is to stay, or name another --out."
        )
    dtype = DTYPES[options.dtype] if options.dtype else computed
    return Plan(base, adapter, out, in_4bit, seen, dtype, [name.upper() for name in options.types])


def write_merged(merged: Merged, folder: Path, max_shard_bytes: int) -> dict[str, Any]:
    """All tensors of the model, in its order. Returns the facts for the certificate."""
    writer = ShardWriter(
        folder, {name: (shape, merged.dtype) for name, shape in merged.shapes.items()}, max_shard_bytes
    )
    for name in merged.names():
        writer.add(name, merged.load(name).cpu())
    writer.close()
    changes = merged.changes.values()
    assert len(changes) == len(merged.updates)
    return {
        "merged_layers": len(changes),
        "unchanged_layers": sum(change == 0 for change in changes),
        "mean_relative_change": sum(changes) / max(1, len(changes)),
    }


def check_unscored(options: MergeOptions) -> None:
    """Where nothing is scored: name what was asked for in vain, or refuse, where it was to stop a bad merge."""
    remedy = "Give held-out texts with --data FILE, or the run's YAML file first" + (
        "" if options.max_tokens else ", and no --max_tokens 0"
    )
    if options.max_kl is not None:
        raise UserError(f"--max_kl {options.max_kl:g} cannot be checked, because nothing is scored. {remedy}.")
    for name, value in {"types": ",".join(options.types), "data": options.data}.items():
        if value:
            print(f"--{name} {value}: without effect, because nothing is scored. {remedy}.")


def hf_config(config: dict, dtype: torch.dtype, ids: dict[str, Any]) -> dict:
    """config.json of the merged model: the base's, and every number as it was understood, under the keys that all
    readers know: RoPE as rope_theta and rope_scaling."""
    model = asdict(ModelConfig.from_hf(config))
    model["rope_scaling"] = model["rope_scaling"] or None
    dropped = ("rope_parameters", "dtype", "quantization_config", "transformers_weights")
    config = {key: value for key, value in config.items() if key not in (*dropped, "original_max_position_embeddings")}
    kind = config.get("model_type") or ("mistral" if "Mistral" in str(config.get("architectures")) else "llama")
    names = {"model_type": kind, "architectures": [f"{kind.title()}ForCausalLM"]}
    return config | names | model | ids | {"torch_dtype": str(dtype).removeprefix("torch.")}


def main() -> None:
    config, options = load_command(MergeOptions)
    asked = plan(config, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights, (_, updates) = open_weights(asked.base), read_updates(asked.adapter)
    num_rows = model_config(weights.config, asked.base).vocab_size
    tokenizer, prompt_format, about_prompts = talking(asked.base, asked.adapter, num_rows)
    if about_prompts:
        print(about_prompts)
    if note := check_base(asked.adapter, asked.base, weights, options.other_base):
        print(note)
    if not asked.in_4bit and str(asked.base).endswith(".gguf"):
        print(f"note: `original` means the weights as they are in {asked.base}, which that file may have rounded.")
    identity = {"adapter_sha256": adapter_hash(asked.adapter), "base_fingerprint": fingerprint(weights)}
    identity["trained_on"] = read_trained(asked.adapter).base
    end_id = prompt_format.end_id(tokenizer) if prompt_format else tokenizer.eos_id
    generation = read_generation(weights)
    ends = end_ids(generation, first=[end_id])
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    ids["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    generation |= {name: id for name, id in ids.items() if id is not None}
    merged = Merged(weights, updates, asked.in_4bit, asked.seen, asked.dtype, device)
    check_writable(asked.out.parent, "--out")
    check_space(asked.out, merged.num_bytes)
    texts = None
    if options.max_tokens:
        texts = held_out_texts(config, tokenizer, prompt_format, options.data, options.max_tokens)
    if not texts:
        check_unscored(options)
    with whole_folder(asked.out) as folder:
        facts = write_merged(merged, folder, int(options.max_shard_size * 1e9))
        described = hf_config(weights.config, asked.dtype, ids)
        write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")
        save_tokenizer(tokenizer, folder, prompt_format and prompt_format.jinja(tokenizer))
        if prompt_format:
            write_text(folder / "prompt.json", prompt_format.to_json())
        record = {
            "base_model": str(asked.base),
            "base": "nf4" if asked.in_4bit else "original",
            "adapter": asked.adapter,
            **identity,
            "dtype": str(asked.dtype).removeprefix("torch."),
            **facts,
        }
        print(
            f"merged {facts['merged_layers']} layers onto the {record['base']} weights of {asked.base} "
            f"({record['dtype']}, mean change {facts['mean_relative_change']:.2%})"
        )
        if facts["unchanged_layers"]:
            print(f"{facts['unchanged_layers']} of them have an update of zero, so they are the base's")
        form = ON_NF4 if asked.in_4bit else ON_ORIGINAL
        if texts:
            forms = all_forms(merged, open_weights(folder), asked.adapter, asked.types, bytes_on_disk(folder))
            limits = {ON_NF4: MAX_KL} if options.max_kl is None and asked.in_4bit else {}
            if options.max_kl is not None:
                names = (form, *(GGUF + name.lower() for name in asked.types))
                limits = dict.fromkeys(names, options.max_kl)
            record |= certify(forms, *texts, limits, device)
        record["verdict"] = verdict_of_merge(asked.out, form, record)
        write_text(folder / "merge.json", json.dumps(record, indent=2) + "\n")
    print(f"{asked.out}: merged model and merge.json, its certificate\n{record['verdict']}")
    if record["verdict"].startswith("verdict: NOT"):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
