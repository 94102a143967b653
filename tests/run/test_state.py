"""How the rows of a micro-batch become tensors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import save_random_llama
from tiny_qlora import DEVICE, build, fuse

from nanoqlora import ops
from nanoqlora.data.batches import SUPERVISED, Samples, token_places
from nanoqlora.fast.graphs import recorded_width
from nanoqlora.qlora import lora_layers
from nanoqlora.run.neftune import add_noise
from nanoqlora.run.state import Run

LENGTHS = [5, 40, 1, 17, 33, 9]


def results(folder, row_width: int, parts: list[list[list[int]]], fused: bool) -> list[torch.Tensor]:
    """Loss and gradients of some rows of step 3, in float32, computed in one micro-batch for each of `parts`."""
    model = build(folder, torch.float32, 0.1)
    add_noise(model, 5.0)
    if fused:
        fuse(model)
    words = np.concatenate([(np.arange(n, dtype=np.uint32) + 7 * n) % 300 for n in LENGTHS]) | SUPERVISED
    lengths = np.array(LENGTHS)
    run = SimpleNamespace(
        config=SimpleNamespace(row_width=row_width, seed=7, micro_batch_size=4, sequence_len=64, lora_dropout=0.1),
        samples=Samples.of(words, lengths, lengths - 1, ""),
        device=torch.device(DEVICE),
        model=model,
    )
    loss, first = torch.zeros((), device=DEVICE), 0
    for rows in parts:
        batch = Run.use(run, Run.collate(run, rows, 3, first))
        hidden = model.model(batch.tokens, batch.segments).flatten(0, 1)
        part = ops.linear_cross_entropy(hidden[batch.supervised], model.lm_head.weight, batch.targets)
        part.backward()
        loss, first = loss + part.detach(), first + len(rows)
    return [loss, *(p.grad for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B))]


@pytest.mark.parametrize("fused", [True, False])
def test_rows_laid_into_one_are_the_padded_rows(tmp_path, fused):
    """Dropout, NEFTune, positions and targets are those of rows by themselves, whatever shares their micro-batch."""
    save_random_llama(tmp_path)
    rows = [[0, 3], [1], [2, 4], [5]]
    padded = results(tmp_path, 64, [rows], fused)
    for parts in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        for ours, theirs in zip(results(tmp_path, 0, parts, fused), padded, strict=True):
            assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_token_places():
    rows, places = token_places([3, 1, 2], 8)
    assert rows.tolist() == [[0, 0, 0, 1, 2, 2, 3, 3]] and places.tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]


def test_few_widths_hold_every_length():
    """At most half as many tokens again, from 128 on, and some twenty widths up to a quarter of a million."""
    lengths = np.arange(1, 2**18)
    widths = np.array([recorded_width(int(n)) for n in lengths])
    assert (widths >= lengths).all() and (widths[128:] < 1.5 * lengths[128:]).all()
    assert len(set(widths.tolist())) <= 23 and widths.min() == 128
