"""Loss and perplexity on a data file: `python -m nanoqlora.evaluate --model DIR --data FILE --out nll.jsonl`.

The loss is the mean over all supervised tokens of minus the logarithm of their probability, in nats; perplexity is
its exponential: between how many equally likely tokens the model hesitates.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence

import torch

from . import distributed, ops
from .cli import Parser, UserError, check_file, run_command, write_text
from .data import Sample, collate
from .data_files import find_files, split_and_part, split_without_effect
from .model import Llama
from .packing import Rows, pack
from .prepare import Encoding, InvalidRows, read_samples
from .scripts import script_command
from .serving import load_for_use

BATCH_TOKENS = 1024  # of a row when the samples are short


@torch.no_grad()
def score_samples(model: Llama, samples: Sequence[Sample], capacity: int = BATCH_TOKENS) -> list[tuple[float, int]]:
    """Each sample's loss, summed over its supervised tokens in nats, and their number.

    Args:
        model: in evaluation mode (no dropout).
        capacity: tokens of a packed row; a longer sample gets a row of its own.
    """
    scores = score_rows(model, samples, packed_rows(samples, capacity))
    return [scores[i] for i in range(len(samples))]


def packed_rows(samples: Sequence[Sample], capacity: int) -> Rows:
    lengths = [len(sample) for sample in samples]
    return pack(lengths, range(len(samples)), max(capacity, max(lengths)))


def score_rows(model: Llama, samples: Sequence[Sample], rows: Iterable[list[int]]) -> dict[int, tuple[float, int]]:
    """The same, by the sample's number, of the samples in these packed rows."""
    device = model.model.norm.weight.device
    scores: dict[int, tuple[float, int]] = {}
    for row in rows:
        batch = collate([[samples[i] for i in row]]).to(device)
        hidden = model.model(batch.tokens, batch.segments).flatten(0, 1)  # (T, D)
        losses = ops.token_losses(hidden[batch.supervised], model.lm_head.weight, batch.targets).double().cpu()
        counts = [samples[i].num_targets for i in row]
        for i, part in zip(row, losses.split(counts), strict=True):
            scores[i] = part.sum().item(), len(part)
    return scores


@torch.no_grad()
def loss_over_ranks(model: Llama, samples: Sequence[Sample], capacity: int, rank: int, ranks: int) -> float:
    """Nats per supervised token. Each rank scores its share of the rows, and all get the same figure."""
    rows = packed_rows(samples, capacity)
    mine = [rows[i] for i in range(rank, len(rows), ranks)]
    scores = score_rows(model, samples, mine)
    if len(mine) < math.ceil(len(rows) / ranks):  # blocks that are spread travel for all ranks or none
        score_rows(model, samples, [rows[0]])
    sums = torch.tensor([*scores.values()] or [(0.0, 0)], dtype=torch.float64, device=model.model.norm.weight.device)
    nll, tokens = distributed.sum_over_ranks(sums.sum(0)).tolist()
    return nll / tokens


def mean_loss(scores: list[tuple[float, int]]) -> float:
    """Nats per supervised token over all samples."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)


def main() -> None:
    parser = Parser(prog=script_command("nanoqlora.evaluate"), description=__doc__.splitlines()[0])
    parser.add_model_options()
    parser.add_argument("--data", required=True, help="a file, folder or glob of JSON, CSV, Parquet or text")
    parser.add_argument("--split", help="split of a folder, or a part of one, as test[:20%%]; default: train")
    meaning = "write a row per sample there: nll in nats, number of supervised tokens"
    parser.add_argument("--out", type=os.path.expanduser, help=meaning)
    args = parser.parse_args()
    if args.out:
        check_file(args.out, "--out")
    distributed.start()
    used = load_for_use(args)
    limit = used.model.config.max_position_embeddings
    split, part = split_and_part(args.split)
    encoding = Encoding(used.prompt_format, used.tokenizer, limit, "raise", part)
    try:
        reading = read_samples(find_files(args.data, split=split), encoding)
    except InvalidRows as error:
        trained = used.prompt_format if args.adapter else None
        kind = (
            f" Its rows have to be of the type that {args.adapter} was trained on: {trained.type}." if trained else ""
        )
        raise UserError(f"--data: {error}{kind}") from error
    unused = split_without_effect(args.data, args.split)
    for line in [unused] * bool(unused) + [f"{args.data}: {line}" for line in reading.describe_notes()]:
        print(line, file=sys.stderr)
    scores = score_samples(used.model, reading.samples)
    if args.out:
        rows = [json.dumps({"nll": nll, "tokens": tokens}) + "\n" for nll, tokens in scores]
        write_text(args.out, "".join(rows))
    loss = mean_loss(scores)
    if not math.isfinite(loss):
        raise UserError(f"model {args.model}: its loss on {args.data} is {loss}, so its weights are damaged.")
    tokens = sum(tokens for _, tokens in scores)
    for note in used.notes:
        print(note, file=sys.stderr)
    print(f"loss {loss:.4f}  perplexity {math.exp(loss):.3f}  tokens {tokens}")


if __name__ == "__main__":
    run_command(main)
