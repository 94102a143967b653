"""How far each form of a trained model is from the model that was trained, on texts it has not seen.

The trained model is base and adapter as training computed with them, in float32. Every other form, merged, rounded to
bfloat16, quantized for a GGUF file, reads the same texts, and at each supervised token the two distributions over the
vocabulary are compared:

    KL = sum over tokens of p (log p - log q)     nats a token; 0: the same, 0.01: hardly ever another word,
                                                  0.1: often another word, 1: another model
    top-1                                         how often both find the same token the likeliest
    perplexity                                    of the right token, as in nanoqlora.evaluate

A form is streamed: one block of the model at a time is loaded, all texts go through it, and it is dropped. So a model
of any size can be compared with any other on any machine; what is kept are the hidden states of the texts, (N, D).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from ..config.errors import UserError
from ..config.schema import Config
from ..data.batches import Batch, Sample, collate
from ..data.files import find_files
from ..data.packing import pack
from ..data.prepare import Encoding, read_samples
from ..data.prompts import PromptFormat
from ..gguf.config import model_config
from ..model import rope_frequencies
from ..run.inputs import data_files, encoding_of, prepare_data
from ..tokenizer.tokenizer import Tokenizer
from ..weights.checkpoint import Tensors
from ..weights.pretrained import empty_model

ROW_TOKENS = 1024  # of a row when the samples are short
CHUNK_TOKENS = 64  # whose logits are held at once: for a vocabulary of 128,000 33 MB each
MAX_KL = 0.05  # of what differs by one rounding from the trained model, or by llama.cpp's own sums: 0.001 is usual
ENOUGH = 0.02  # nats a token: below it a form answers as the trained model does
GAIN = 0.01  # of perplexity, for which it is worth to ship another model than the one that was evaluated
TRAINED, ON_NF4, ON_ORIGINAL, GGUF = "adapter on 4-bit base", "merged on nf4", "merged on original", "GGUF "
BASE_AND_ADAPTER = f"{GGUF}base + adapter"  # two files


class Form(NamedTuple):
    """Something to score."""

    name: str
    weights: Tensors
    num_bytes: int  # that it takes on a disk
    states: tuple[Tensor, Tensor] | None = None  # what `hidden_states` gives, where that is known


class Score(NamedTuple):
    """One line of the certificate."""

    form: str
    mean_kl: float  # nats a token, against the trained model
    top1_agreement: float  # share of tokens
    perplexity: float
    num_bytes: int


class Texts(NamedTuple):
    """Held-out samples in rows."""

    rows: list[Batch]

    @classmethod
    def of(cls, samples: Iterable[Sample], max_tokens: int) -> "Texts":
        """The first samples, up to so many tokens in all, but at least one sample."""
        chosen, total = list[Sample](), 0
        for sample in samples:
            if chosen and total + len(sample) > max_tokens:
                break
            chosen.append(sample)
            total += len(sample)
        lengths = [len(sample) for sample in chosen]
        rows = pack(lengths, range(len(chosen)), max(ROW_TOKENS, *lengths))
        return cls([collate([[chosen[i] for i in row]]) for row in rows])

    @property
    def targets(self) -> Tensor:
        """(N,) the right tokens."""
        return torch.cat([row.targets for row in self.rows])


@torch.no_grad()
def hidden_states(
    weights: Tensors, texts: Texts, device: torch.device, watch: Callable[[int, nn.Module], None] | None = None
) -> tuple[Tensor, Tensor]:
    """What the head reads at the supervised positions, (N, D), and the head, (V, D); float32 on the device.

    Args:
        watch: sees each block, with its number, before it computes.
    """
    config = model_config(weights.config, weights.where)

    def load(name: str, shape: torch.Size) -> Tensor:
        return weights.load(name).to(device, torch.float32)

    model, fill = empty_model(config, load, load_in_4bit=False, dtype=torch.float32, device=device)
    fill(None)
    rows = [row.to(device) for row in texts.rows]
    streams = [model.model.embed_tokens(row.tokens) for row in rows]
    if not config.tie_word_embeddings:
        model.model.embed_tokens.to("meta")  # drops its weights
    angles = [row.segments.positions.to(device).unsqueeze(-1) * rope_frequencies(config).to(device) for row in rows]
    for layer, block in enumerate(model.model.layers):
        fill(layer)
        if watch:
            watch(layer, block)
        for i, row in enumerate(rows):
            streams[i] = block(streams[i], (angles[i].cos(), angles[i].sin()), row.segments, None)
        block.to("meta")
    hidden = [model.model.norm(x).flatten(0, 1)[row.supervised] for x, row in zip(streams, rows, strict=True)]
    return torch.cat(hidden), model.lm_head.weight


@torch.no_grad()
def compare(trained: tuple[Tensor, Tensor], form: tuple[Tensor, Tensor], targets: Tensor) -> tuple[float, float, float]:
    """(mean KL in nats, share of equal top tokens, mean loss of `form` in nats) from hidden states and heads."""
    total_kl = total_equal = total_loss = 0.0
    targets = targets.to(form[0].device)
    for i in range(0, len(targets), CHUNK_TOKENS):
        chunk = slice(i, i + CHUNK_TOKENS)
        log_p, log_q = (torch.log_softmax(hidden[chunk] @ head.T, dim=-1) for hidden, head in (trained, form))
        total_kl += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
        total_equal += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
        total_loss -= log_q.gather(1, targets[i : i + CHUNK_TOKENS, None]).sum(dtype=torch.float64).item()
    return total_kl / len(targets), total_equal / len(targets), total_loss / len(targets)


def score_forms(forms: list[Form], texts: Texts, device: torch.device) -> list[Score]:
    """Score every form against the first, the trained model, and print each line of the table when it is known."""
    print(f"{'':26}  {'KL, nats':>9}  {'top-1':>7}  {'perplexity':>10}  {'size':>10}")
    targets, scores, trained = texts.targets, [], None
    for form in forms:
        states = form.states or hidden_states(form.weights, texts, device)
        trained = trained or states
        if not torch.isfinite(states[0]).all():
            raise UserError(f"{form.name}: what it computes is NaN or infinite, so its weights are damaged.")
        kl, equal, loss = compare(trained, states, targets)
        scores.append(Score(form.name, max(0.0, kl), equal, math.exp(loss), form.num_bytes))
        numbers = f"{kl:9.5f}  {equal:7.2%}  {math.exp(loss):10.3f}  {form.num_bytes / 1e6:7.1f} MB"
        print(f"{form.name:26}  {numbers}", flush=True)
    return scores


def recommend(scores: list[Score], limit: float = ENOUGH) -> str:
    """Which merge to keep and which file to ship, each with its reason, in the words of the table."""
    by_name = {score.form: score for score in scores}
    nf4, original = by_name.get(ON_NF4), by_name.get(ON_ORIGINAL)
    words = []
    if nf4 and original:
        gain = 1 - original.perplexity / nf4.perplexity
        if gain > GAIN:
            gains = f"its perplexity is {gain:.1%} lower on the held-out texts"
            far = f"from which it is {original.mean_kl:.3g} nats a token away"
            words.append(f"--base original: {gains}. It is not the model that was evaluated in training, {far}.")
        else:
            change = f"{'gain only' if gain > 0 else 'lose'} {abs(gain):.1%} of perplexity"
            trained = f"it is what was trained ({nf4.mean_kl:.2g} nats a token away)"
            words.append(f"--base nf4: {trained}, and the original weights {change}.")
    files = sorted((score for score in scores if score.form.startswith(GGUF)), key=lambda score: score.num_bytes)
    if near := [score.form for score in files if score.mean_kl <= limit]:
        words.append(f"{near[0]}: the smallest file within {limit:g} nats a token of the trained model.")
    elif files:
        best = min(files, key=lambda score: score.mean_kl)
        far = f"none of these files is within {limit:g} nats a token of the trained model"
        words.append(f"{best.form}: {far}, and this one is nearest ({best.mean_kl:.3g}). Larger types lose less.")
    return " ".join(words)


def certify(
    forms: list[Form], data: str, texts: Texts, limits: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """Score all forms, print the table and the advice, and give both as an object for merge.json.

    Args:
        data: what the texts are called.
        limits: of mean KL, for the forms that the user relies on, by name.
    Raises:
        UserError: a form is further from the trained model than its limit.
    """
    print(f"against the trained model, on {len(texts.targets)} held-out tokens of {data}:")
    scores = score_forms(forms, texts, device)
    for score in scores:
        if not score.mean_kl <= (limit := limits.get(score.form, math.inf)):
            far = f"{score.mean_kl:.3g} nats a token from the trained model, where --max_kl allows {limit:g}"
            advice = "Leave it out, choose a larger --dtype or type, or set a higher --max_kl"
            raise UserError(f"{score.form}: {far}. Nothing is written. {advice}.")
    advice = recommend(scores, max(limits.values()) if len(limits) > 1 else ENOUGH)
    if advice:
        print(f"recommended: {advice}")
    found = {"held_out": {"data": data, "tokens": len(texts.targets)}, "forms": [score._asdict() for score in scores]}
    return found | {"recommendation": advice, "max_kl": limits}


def verdict_of_merge(out: object, form: str, record: dict[str, Any]) -> str:
    """The line that a merge ends with: whether what was written is what was trained, by its certificate.

    Args:
        form: what was written, ON_NF4 or ON_ORIGINAL; `record`: merge.json.
    """
    if record.get("trained_on") not in (None, record.get("base_fingerprint")):
        return f"verdict: {out} is what --other_base asks for, which is not the model that was trained"
    forms = record.get("forms", [])
    score = next((score for score in forms if score["form"] == form), None)
    if score is None:
        gap = "was not compared with the trained model; not asked: answers on held-out texts"
        return f"verdict: not proven: {out} {gap}"
    far = f"{score['mean_kl']:.2g} nats a token from it on {record['held_out']['tokens']} held-out tokens"
    if form == ON_ORIGINAL and forms[0]["form"] == TRAINED:
        return f"verdict: {out} is what --base original asks for, which is not the model that was trained: {far}"
    if not score["mean_kl"] <= MAX_KL:
        why = f"{far}, more than a rounding of its weights costs"
        return f"verdict: NOT what was trained: {out}: {why}. Do not serve it."
    return f"verdict: {out} is what was trained: {far}"


# ------------------------------------------------------------------------------------------------ the texts

# What the run kept away from training. They are named by the user: a file, or the YAML of the run on the command line.
# The train.yml in an adapter's folder is not asked: the folder may come from anybody, and a configuration decides which
# files are read and written.
LIMIT = 4096  # tokens of a text when no run says sequence_len


def held_out_texts(
    config: Config | None, tokenizer: Tokenizer, prompt_format: PromptFormat | None, data: str | None, max_tokens: int
) -> tuple[str, Texts] | None:
    """What was held out, by its name, or None with a line that names the reason.

    Args:
        config: of the run, from the YAML that the user named; None: no YAML was named.
        prompt_format: of the run, for `data`.
        data: a file that the user names; it wins.
        max_tokens: the first samples, up to so many tokens.
    Raises:
        UserError: `data` cannot be read. The run's own data may be missing by now.
    """
    if data:
        reading = read_samples(find_files(data), Encoding(prompt_format, tokenizer, LIMIT, "drop"))
        return data, Texts.of(reading.samples, max_tokens)
    if config is None:
        print("Nothing is scored: no held-out texts are named. Give a file with --data, or the run's YAML file first.")
        return None
    try:
        if config.test_datasets:
            dataset = config.test_datasets[0]
            encoding = replace(encoding_of(config, dataset, tokenizer), strategy="drop")
            return dataset.path, Texts.of(read_samples(data_files(dataset), encoding).samples, max_tokens)
        if config.val_set_size:
            held_out = prepare_data(config, tokenizer, 1).held_out
            return f"val_set_size {config.val_set_size}", Texts.of(held_out, max_tokens)
        reason = "its YAML has neither test_datasets nor val_set_size."
    except UserError as error:
        reason = str(error)
    print(f"Nothing is scored, because the run has no held-out data to read: {reason} Name a file with --data.")
    return None
