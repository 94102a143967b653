"""Fold an adapter into its base: W + s B A, written as a Hugging Face folder that any tool loads.

    python merge.py [train.yml]
    python merge.py --model DIR --adapter DIR --out DIR [--base nf4 | original]

Which W? Training saw the base through four bits, and the adapter learnt to work with exactly those values. So
`--base nf4`, the default, adds the update to the dequantised weights: what is written is what was trained and
measured. `--base original` adds it to the weights as they were before quantisation; that takes the quantisation noise
out, often for the better, but it is another model than the one that was evaluated. Score both before choosing.

The sum is made in float32 and rounded once. Memory: about one shard of the output.
"""

import hashlib
import json
from pathlib import Path

import torch
import yaml
from torch import Tensor

from nanoqlora.adapter import read_updates
from nanoqlora.checkpoint import ShardWriter, Weights, model_config, open_weights
from nanoqlora.cli import UserError, run_command, whole_folder, write_text
from nanoqlora.config import Config, Option, load_command
from nanoqlora.gguf import tensor_shapes
from nanoqlora.prompts import PromptFormat
from nanoqlora.qlora import QLoRALinear
from nanoqlora.serving import check_vocabulary
from nanoqlora.tokenizer import load_tokenizer, save_tokenizer

OPTIONS = {
    "model": Option("the base: Hugging Face folder or .gguf file"),
    "adapter": Option("folder of the trained adapter"),
    "out": Option("folder to write; must not exist, or hold an earlier merge"),
    "base": Option("nf4: the values that training saw; original: the weights before quantisation"),
    "dtype": Option("bfloat16, float16 or float32; unset: what training computed in"),
    "max_shard_size": Option("GB in a file of the output", float, 5.0),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def as_training_saw(w: Tensor, in_4bit: bool, seen: torch.dtype) -> Tensor:
    """A linear layer's weight from the file -> its values in every product of the training, float32.

    Args:
        in_4bit: through NF4 and back first.
        seen: what training computed in; a weight was rounded to it before every product.
    """
    layer = QLoRALinear(w)
    if in_4bit:
        layer.quantize()
    return layer.rebuild(seen).float()


class Adapter:
    """The updates of an adapter's folder by layer, each handed out once."""

    def __init__(self, folder: Path) -> None:
        self.config, self.updates = read_updates(folder)
        self.used: set[str] = set()

    def merged(self, name: str, w: Tensor) -> Tensor:
        """Base and update of a layer as one weight, (n_out, n_in) float32, from the base's."""
        self.used.add(name)
        update = self.updates[name]
        a, b = update.lora_A, update.lora_B
        if (b.shape[0], a.shape[1]) != w.shape:
            raise UserError(
                f"adapter: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, which make no update of "
                f"{tuple(w.shape)}, the shape of its weight in the base model. Wrong base?"
            )
        return update.merged(w)


def write_merged(weights: Weights, adapter: Adapter, folder: Path, in_4bit: bool, seen, dtype, max_shard_bytes) -> dict:
    """All tensors of the model, in its order. Returns the facts for the certificate."""
    config = model_config(weights.config, "base model")
    writer = ShardWriter(folder, max_shard_bytes)
    changes = {}
    for name, shape in tensor_shapes(config).items():
        w = weights.load(name)
        if tuple(w.shape) != shape:
            raise UserError(f"base model: {name} has shape {tuple(w.shape)} where its configuration says {shape}.")
        layer = name.removesuffix(".weight")
        if ".layers." in name and w.ndim == 2:
            try:
                w = as_training_saw(w, in_4bit, seen)
            except ValueError as error:  # a width that four bits cannot split
                raise UserError(f"base model: {name}: {error}") from error
            if layer in adapter.updates:
                whole = adapter.merged(layer, w)
                merged = whole.to(dtype)
                changes[layer] = ((whole - w).norm() / w.norm()).item()
                if torch.equal(merged, w.to(dtype)):
                    raise UserError(
                        f"adapter: {layer} does not change its weight in {dtype}, so the merged model would be the "
                        f"base there. Train further, or leave this layer out of the adapter."
                    )
                w = merged
        else:
            w = w.to(seen)
        w = w.to(dtype)
        if not torch.isfinite(w).all():
            raise UserError(
                f"{name}: holds NaN or infinite values in {dtype}, which would be in every answer. Base or adapter is "
                f"damaged, or a value is too large for this --dtype."
            )
        writer.add(name, w)
    writer.close()
    left = sorted(adapter.updates.keys() - adapter.used)
    if left:
        raise UserError(f"adapter: {left[0]} and {len(left) - 1} more layers are not in the base model. Wrong base?")
    return {"merged_layers": len(changes), "mean_relative_change": sum(changes.values()) / max(1, len(changes))}


def hf_config(config: dict, dtype: torch.dtype, tokenizer, end_id: int | None) -> dict:
    """config.json of the merged model, in the older form that every reader knows."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    if rope:
        config["rope_theta"] = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
        config["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    config.pop("dtype", None)
    config.pop("quantization_config", None)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": end_id, "pad_token_id": tokenizer.pad_id}
    return config | ids | {"torch_dtype": str(dtype).removeprefix("torch.")}


def paths_and_modes(config: Config | None, options: dict) -> tuple[str, Path, Path, bool, torch.dtype, torch.dtype]:
    """(base, adapter, output, through 4 bits?, dtype that training saw, dtype to write) of a command line."""
    model = options["model"] or (config and config.base_model)
    adapter = Path(options["adapter"] or config.output_dir)
    out = Path(options["out"] or Path(config.output_dir if config else adapter) / "merged")
    run = adapter / "train.yml"  # the resolved configuration of the training, if the adapter is ours
    trained = yaml.safe_load(run.read_text("utf-8")) if run.exists() else {}
    if options["base"] not in (None, "nf4", "original"):
        raise UserError(f"--base {options['base']}: known are nf4 (what training saw) and original.")
    in_4bit = (options["base"] or ("nf4" if trained.get("load_in_4bit", True) else "original")) == "nf4"
    computed = torch.float32 if trained.get("bf16") is False else torch.bfloat16
    seen = torch.float32 if options["base"] == "original" else computed  # who asks for the original gets it unrounded
    if options["dtype"] and options["dtype"] not in DTYPES:
        raise UserError(f"--dtype {options['dtype']}: known are {', '.join(DTYPES)}.")
    return model, adapter, out, in_4bit, seen, DTYPES.get(options["dtype"], computed)


def main() -> None:
    config, options = load_command(None, OPTIONS, __doc__.splitlines()[0], yaml_unless=("model", "adapter"))
    base, adapter_folder, out, in_4bit, seen, dtype = paths_and_modes(config, options)
    if out.exists() and not (out / "merge.json").exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is no earlier merge, so nothing is written over it. Name another --out.")
    weights, adapter, tokenizer = open_weights(base), Adapter(adapter_folder), load_tokenizer(base)
    check_vocabulary(tokenizer, model_config(weights.config, base).vocab_size, base)
    saved = adapter_folder / "prompt.json"
    prompt_format = PromptFormat.from_json(saved.read_text("utf-8")) if saved.exists() else None
    end_id = prompt_format.end_id(tokenizer) if prompt_format else tokenizer.eos_id
    with whole_folder(out) as folder:
        facts = write_merged(weights, adapter, folder, in_4bit, seen, dtype, int(options["max_shard_size"] * 1e9))
        described = hf_config(weights.config, dtype, tokenizer, end_id)
        write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
        ids = {key: described[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_text(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
        save_tokenizer(tokenizer, folder, prompt_format and prompt_format.jinja(tokenizer))
        if prompt_format:
            write_text(folder / "prompt.json", prompt_format.to_json())
        certificate = {
            "base_model": str(base),
            "base": "nf4" if in_4bit else "original",
            "adapter": str(adapter_folder),
            "adapter_sha256": hashlib.sha256((adapter_folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "dtype": str(dtype).removeprefix("torch."),
            **facts,
        }
        write_text(folder / "merge.json", json.dumps(certificate, indent=2) + "\n")
    print(
        f"merged {facts['merged_layers']} layers onto the {certificate['base']} weights of {base} "
        f"({certificate['dtype']}, mean change {facts['mean_relative_change']:.2%}): {out}"
    )


if __name__ == "__main__":
    run_command(main)
