"""The same training and scoring without our code: transformers, PEFT and torch's AdamW on the dequantised base."""

from pathlib import Path
from typing import Any, NamedTuple

import peft
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from nanoqlora.qlora import ALL_LINEAR
from nanoqlora.weights.pretrained import load_model


def dequantised_transformers(folder: Path) -> transformers.LlamaForCausalLM:
    """The model of a folder in transformers, with the values in its blocks that NF4 leaves of them; float64."""
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = load_model(folder, load_in_4bit=True)
    for name, parameter in theirs.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            parameter.data = ours.get_submodule(name.removesuffix(".weight")).rebuild(torch.float32)
    return theirs.double().eval()


def save_random_adapter(model: Path, folder: Path, seed: int = 0, r: int = 4, **changes: Any) -> Path:
    """An adapter as PEFT makes and saves it, with B not zero, so that it changes every layer."""
    torch.manual_seed(seed)
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"r": r, "lora_alpha": 2 * r, "target_modules": list(ALL_LINEAR), "init_lora_weights": False} | changes
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    theirs.save_pretrained(folder)
    return folder


def trained_in_float32(folder: Path) -> Path:
    """Give an adapter the metadata of a float32 run of ours."""
    path = folder / "adapter_model.safetensors"
    about = {"format": "pt", "load_in_4bit": "True", "computed_in": "float32"}
    save_file(load_file(path), path, metadata=about)
    return folder


def peft_on_dequantised(model: Path, adapter: Path, is_trainable: bool = False) -> peft.PeftModel:
    """PEFT's reading of an adapter on the dequantised base, float64."""
    theirs = peft.PeftModel.from_pretrained(dequantised_transformers(model), adapter, is_trainable=is_trainable)
    return theirs.double().eval()


class Encoded(NamedTuple):
    ids: list[int]
    counted: list[int]  # the places of the tokens whose loss counts


def encoded_by_tokenizers(model: Path, row: dict[str, str]) -> Encoded:
    """An alpaca row as the tokenizers package encodes Stanford's text."""
    tok = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    start = "Below is an instruction that describes a task"
    if row["input"]:
        start += ", paired with an input that provides further context"
    text = f"{start}. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    text += row["instruction"] + "\n\n"
    if row["input"]:
        text += f"### Input:\n{row['input']}\n\n"
    prompt = tok.encode(text + "### Response:\n").ids  # its post-processor puts BOS first
    answer = [*tok.encode(row["output"], add_special_tokens=False).ids, tok.token_to_id("<|im_end|>")]
    return Encoded(prompt + answer, list(range(len(prompt), len(prompt) + len(answer))))


def sum_of_losses(theirs: torch.nn.Module, row: Encoded) -> torch.Tensor:
    """A row's loss from logits, in nats, summed over the tokens that count; alone, without padding."""
    ids, places = torch.tensor(row.ids), torch.tensor(row.counted)
    return F.cross_entropy(theirs(ids[None]).logits[0, places - 1], ids[places], reduction="sum")


class Reference(NamedTuple):
    """What a training without our code gives: per step loss, gradient norm, rate, tokens; held-out loss; the model."""

    steps: list[tuple[float, float, float, int]]
    held_out: dict[int, float]  # after this many steps
    model: peft.PeftModel


def train_with_peft(
    model: Path, adapter: Path, batches: list[list[Encoded]], held_out: list[Encoded], peak: float, warmup: int
) -> Reference:
    """Train PEFT's adapter on the dequantised base in float64, with torch's AdamW and transformers' cosine schedule."""
    theirs = peft_on_dequantised(model, adapter, is_trainable=True)
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, len(batches))

    def score() -> float:
        with torch.no_grad():
            return sum(sum_of_losses(theirs, row).item() for row in held_out) / sum(
                len(row.counted) for row in held_out
            )

    steps, scores = [], {0: score()}
    for batch in batches:
        tokens = sum(len(row.counted) for row in batch)
        loss = sum(sum_of_losses(theirs, row) for row in batch) / tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        steps.append((loss.item(), norm.item(), schedule.get_last_lr()[0], tokens))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        scores[len(steps)] = score()
    return Reference(steps, scores, theirs)
