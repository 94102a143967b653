"""Does a run here learn what a plain transformers + PEFT loop learns? `python -m tests.parity [--steps 50]`

Both start from one adapter that PEFT made, take the same rows in the same order, without dropout, and train with AdamW,
warm-up, cosine and clipping. Here that is `train.py` as it is; there it is the loop below, in which everything is
theirs: model, LoRA, loss, optimizer, schedule, clip, and bitsandbytes' four bits. Every step's loss, gradient norm and
learning rate are compared:

    --base dequantised   float32 over bitsandbytes' dequantised NF4 weights         1e-3 relative, at every step
    --base 4bit          float32 over bitsandbytes' Linear4bit                      the same
    --dtype bfloat16     bfloat16 there by autocast, here as always                 2 % of the loss, 10 % of the norm

In bfloat16 each number has 8 bits, a relative error of up to 0.4 %, in other places of either loop, so the two runs
part ways slowly, like two runs of one loop on two machines. Prints a row for each step and one JSON line; ends with 1
when a tolerance is broken.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

import nanoqlora as nq
import train
from nanoqlora.config.load import load_config
from nanoqlora.qlora import ALL_LINEAR
from nanoqlora.run.inputs import prepare_data
from nanoqlora.weights.checkpoint import open_weights

FIGURES = ("loss", "grad_norm", "learning_rate")
TOLERANCES = {
    "float32": {"loss": 1e-3, "grad_norm": 1e-3, "learning_rate": 1e-3},
    "bfloat16": {"loss": 2e-2, "grad_norm": 1e-1, "learning_rate": 1e-3},
}
ROOT = Path(__file__).resolve().parent.parent


def build_theirs(model: str, base: str) -> transformers.LlamaForCausalLM:
    """transformers' model with the checkpoint's weights, those of its blocks through bitsandbytes' double NF4."""
    config = {k: v for k, v in open_weights(model).config.items() if k not in ("architectures", "model_type")}
    if not config.get("rope_parameters"):
        rope = config.pop("rope_scaling", None) or {"rope_type": "default"}
        config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    theirs.load_state_dict(nq.Llama.from_pretrained(model).state_dict(), strict=False)
    for name, linear in list(theirs.named_modules()):
        if isinstance(linear, torch.nn.Linear) and ".layers." in name:
            layer = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
            if base == "4bit":
                theirs.set_submodule(name, layer)
            else:
                linear.weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return theirs


def write_run(
    folder: Path, model: str, steps: int, rows: int, accumulation: int, sequence_len: int, bf16: bool
) -> Path:
    """Short rows of the demo's conversations as instruction and output, and the YAML of the run."""
    conversations = [json.loads(line)["messages"] for line in (ROOT / "data/pirate.jsonl").read_text().splitlines()]
    texts = [{"instruction": turns[-2]["content"][:80], "output": turns[-1]["content"]} for turns in conversations]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts[: rows * accumulation * steps]))
    run = {
        **{"base_model": model, "adapter": "qlora", "bf16": bf16, "output_dir": str(folder / "ours")},
        **{"datasets": [{"path": str(folder / "rows.jsonl"), "type": "alpaca"}], "sequence_len": sequence_len},
        **{"excess_length_strategy": "truncate", "max_steps": steps, "num_epochs": steps, "save_strategy": "no"},
        **{
            "micro_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "lora_model_dir": str(folder / "start"),
        },
        **{"learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "max_grad_norm": 1.0},
    }
    (folder / "run.yml").write_text(yaml.safe_dump(run))
    return folder / "run.yml"


def run_ours(file: Path) -> list[dict[str, float]]:
    """`python train.py FILE`, in this process."""
    argv, sys.argv = sys.argv, ["train.py", str(file)]
    try:
        train.main()
    finally:
        sys.argv = argv
    lines = (file.parent / "ours" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def run_theirs(file: Path, theirs: peft.PeftModel, autocast: bool) -> list[dict[str, float]]:
    """A plain training loop over the same steps."""
    config = load_config([str(file)])
    data = prepare_data(config, nq.load_tokenizer(config.base_model), ranks=1)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
    warmup = math.ceil(config.warmup_ratio * len(data.plan))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(data.plan))
    lines = []
    for step in data.plan:
        rows = [[data.samples[i] for i in row] for row in step.rows]
        assert all(len(row) == 1 for row in rows), "not packed"
        counted = sum(sum(row[0].supervised[1:]) for row in rows)
        loss = 0.0
        for start in range(0, len(rows), config.micro_batch_size):
            batch = [row[0] for row in rows[start : start + config.micro_batch_size]]
            width = max(len(sample.tokens) for sample in batch)
            tokens, labels, mask = (torch.full((len(batch), width), fill) for fill in (0, -100, 0))
            for i, sample in enumerate(batch):
                n = len(sample.tokens)
                tokens[i, :n], mask[i, :n] = torch.tensor(list(sample.tokens)), 1
                labels[i, :n] = tokens[i, :n].where(torch.tensor(list(sample.supervised), dtype=torch.bool), -100)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = theirs(input_ids=tokens, attention_mask=mask).logits
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            (losses / counted).backward()
            loss += losses.item() / counted
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
        lines.append({"loss": loss, "grad_norm": norm, "learning_rate": schedule.get_last_lr()[0]})
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return lines


def compare(
    model: str,
    *,
    steps: int,
    rows: int = 2,
    accumulation: int = 1,
    sequence_len: int = 64,
    base: str = "dequantised",
    dtype: str = "float32",
    say=lambda _: None,
) -> dict[str, Any]:
    """Both runs. Returns, for each figure, the largest relative difference of a step, and whether all are small."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(build_theirs(model, base), config).train()
        theirs.save_pretrained(folder / "start")
        file = write_run(folder, model, steps, rows, accumulation, sequence_len, dtype == "bfloat16")
        ours, plain = run_ours(file), run_theirs(file, theirs, dtype == "bfloat16")
    worst = dict.fromkeys(FIGURES, 0.0)
    say(f"{'step':>5} " + " ".join(f"{f'{figure} here':>19} {'there':>11}" for figure in FIGURES))
    for step, (mine, other) in enumerate(zip(ours, plain, strict=True), start=1):
        say(f"{step:5} " + " ".join(f"{mine[figure]:19.6g} {other[figure]:11.6g}" for figure in FIGURES))
        for figure in FIGURES:
            scale = abs(other[figure]) or 1.0  # the first rate of a warm-up is zero
            worst[figure] = max(worst[figure], abs(mine[figure] - other[figure]) / scale)
    agree = all(worst[figure] <= TOLERANCES[dtype][figure] for figure in FIGURES)
    learnt = round(ours[-1]["loss"] / ours[0]["loss"], 4)
    return {"steps": len(ours), "base": base, "dtype": dtype, "loss_last_over_first": learnt, **worst, "agree": agree}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2, help="rows in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches in a step")
    parser.add_argument("--sequence_len", type=int, default=64)
    parser.add_argument("--base", choices=["dequantised", "4bit"], default="dequantised")
    parser.add_argument("--dtype", choices=list(TOLERANCES), default="float32")
    result = compare(**vars(parser.parse_args()), say=print)
    print(json.dumps(result))
    sys.exit(not result["agree"])


if __name__ == "__main__":
    main()
