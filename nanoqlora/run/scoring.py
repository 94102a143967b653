"""The loss of samples under a model: in one process, and over the ranks of a run."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .. import ops
from ..data.batches import Sample, collate
from ..data.packing import Rows, pack
from ..fast.block import adapter_changed
from ..fast.graphs import recorded_width
from ..fast.stats import stage
from ..model import Llama
from ..ops import Segments
from ..parallel import collectives

Body = Callable[[Tensor, Segments], Tensor]  # token ids to hidden states, as `model.model` computes them
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


def score_rows(
    model: Llama, samples: Sequence[Sample], rows: Iterable[list[int]], body: Body | None = None
) -> dict[int, tuple[float, int]]:
    """The same, by the sample's number, of the samples in these packed rows.

    Args:
        body: `Run.body`, for rows that are not longer than sequence_len.
    """
    device = model.model.norm.weight.device
    scores: dict[int, tuple[float, int]] = {}
    adapter_changed(model)
    for row in rows:
        width = sum(len(samples[i]) for i in row)
        width = recorded_width(width) if device.type == "cuda" else width
        batch = collate([[samples[i] for i in row]], width).to(device)
        hidden = (body or model.model)(batch.tokens, batch.segments).flatten(0, 1)  # (T, D)
        losses = ops.token_losses(hidden[batch.supervised], model.lm_head.weight, batch.targets).double().cpu()
        counts = [samples[i].num_targets for i in row]
        for i, part in zip(row, losses.split(counts), strict=True):
            scores[i] = part.sum().item(), len(part)
    return scores


@stage("evaluation")
@torch.no_grad()
def loss_over_ranks(
    model: Llama, samples: Sequence[Sample], capacity: int, rank: int, ranks: int, body: Body | None = None
) -> float:
    """Nats per supervised token. Each rank scores its share of the rows, and all get the same figure."""
    rows = packed_rows(samples, capacity)
    mine = [rows[i] for i in range(rank, len(rows), ranks)]
    scores = score_rows(model, samples, mine, body)
    if len(mine) < len(range(0, len(rows), ranks)):  # sharded blocks are gathered by all ranks or none
        score_rows(model, samples, [rows[0]])
    sums = torch.tensor([*scores.values()] or [(0.0, 0)], dtype=torch.float64, device=model.model.norm.weight.device)
    nll, tokens = collectives.sum_over_ranks(sums.sum(0)).tolist()
    return nll / tokens


def mean_loss(scores: list[tuple[float, int]]) -> float:
    """Nats per supervised token over all samples."""
    return sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores)
