"""Loss and perplexity on a data file: `python -m nanoqlora.evaluate --model DIR --data FILE --out nll.jsonl`.

The loss is the mean over all supervised tokens of minus the logarithm of their probability, in nats; perplexity is
its exponential: between how many equally likely tokens the model hesitates.
"""

import json
import math

import torch

from . import distributed, ops
from .cli import Parser, UserError, run_command, write_text
from .data import Sample, collate
from .data_files import find_files
from .model import Llama
from .packing import pack
from .prepare import Encoding, read_samples
from .serving import load_for_use

BATCH_TOKENS = 1024  # of a row when the samples are short


@torch.no_grad()
def score_samples(model: Llama, samples: list[Sample], capacity: int = BATCH_TOKENS) -> list[tuple[float, int]]:
    """Each sample's loss, summed over its supervised tokens in nats, and their number.

    Args:
        model: in evaluation mode (no dropout).
        capacity: tokens of a packed row; a longer sample gets a row of its own.
    """
    device = model.model.norm.weight.device
    lengths = [len(sample) for sample in samples]
    scores: dict[int, tuple[float, int]] = {}
    for row in pack(lengths, list(range(len(samples))), max(capacity, max(lengths))):
        batch = collate([[samples[i] for i in row]]).to(device)
        hidden = model.model(batch.tokens, batch.segments).flatten(0, 1)  # (T, D)
        losses = ops.token_losses(hidden[batch.supervised], model.lm_head.weight, batch.targets).double().cpu()
        counts = [samples[i].num_targets for i in row]
        for i, part in zip(row, losses.split(counts), strict=True):
            scores[i] = part.sum().item(), len(part)
    return [scores[i] for i in range(len(samples))]


def mean_loss(scores: list[tuple[float, int]]) -> float:
    """Nats per supervised token over all samples."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def main() -> None:
    parser = Parser(prog="python -m nanoqlora.evaluate", description=__doc__.splitlines()[0])
    parser.add_model_options()
    parser.add_argument("--data", required=True, help="a file, folder or glob of JSON, CSV, Parquet or text")
    parser.add_argument("--out", help="write a row per sample there: nll in nats, number of supervised tokens")
    args = parser.parse_args()
    distributed.start()
    used = load_for_use(args)
    limit = used.model.config.max_position_embeddings
    reading = read_samples(find_files(args.data), Encoding(used.prompt_format, used.tokenizer, limit, "raise"))
    scores = score_samples(used.model, reading.samples)
    if args.out:
        rows = [json.dumps({"nll": nll, "tokens": tokens}) + "\n" for nll, tokens in scores]
        write_text(args.out, "".join(rows))
    loss = mean_loss(scores)
    if not math.isfinite(loss):
        raise UserError(f"model {args.model}: its loss on {args.data} is {loss}, so its weights are damaged.")
    tokens = sum(tokens for _, tokens in scores)
    print(f"loss {loss:.4f}  perplexity {math.exp(loss):.3f}  tokens {tokens}")


if __name__ == "__main__":
    run_command(main)
