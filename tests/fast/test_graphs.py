"""Recorded graphs against the same blocks launched kernel by kernel."""

import gc

import pytest
import torch
from tiny import save_random_llama
from tiny_qlora import build, fuse, with_lora

from nanoqlora.fast.block import adapter_changed, fuse_blocks
from nanoqlora.fast.graphs import GraphedBody, can_record, no_collection, power_of_two, with_empty_rows
from nanoqlora.ops import Segments
from nanoqlora.ops.fast import loss as loss_fast
from nanoqlora.parallel.fsdp import fill_over_ranks
from nanoqlora.qlora import ALL_LINEAR, lora_layers, set_dropout_rows, start_magnitudes
from nanoqlora.weights.pretrained import open_model

CUDA = torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["all", "no_mlp", "input"])
@pytest.mark.parametrize("dropout, fold", [(0.0, True), (0.05, False)])
def test_replayed_equals_launched(tmp_path, keep, dropout, fold):
    """Over batches of other tokens, seeds, documents and numbers of documents: the same bits, forward and back."""
    save_random_llama(tmp_path)
    batches = [((64,), (64,)), ((40, 24), (10, 54)), ((64,), (64,)), ((20, 20, 24), (1, 63)), ((64,),)]
    models = [build(tmp_path, torch.bfloat16, dropout) for _ in range(2)]
    for model in models:
        fuse(model, keep, fold)
    assert can_record(models[1])
    bodies = models[0].model, GraphedBody(models[1])
    for i, lengths in enumerate(batches):
        count = len(lengths)
        tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(i)).cuda()
        filled = with_empty_rows(Segments(lengths), 2 - count)  # the last batch has a row less than the first
        results = []
        for is_graphed, (model, body) in enumerate(zip(models, bodies, strict=True)):
            rows, segments = (count, Segments(lengths)) if is_graphed else (2, filled)
            set_dropout_rows(model, torch.arange(rows, device="cuda") + 7 * i)
            y = body(tokens[:rows], segments)[:count]
            (y.float() * torch.linspace(-1, 1, y.shape[-1], device="cuda")).sum().backward()
            results.append([y.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        for ours, theirs in zip(*reversed(results), strict=True):
            assert torch.equal(ours, theirs), f"batch {i}"
    assert len(bodies[1].recordings) == 3 and all(layer.lora_A.grad.any() for layer in lora_layers(models[1]).values())


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["all", "input"])
@pytest.mark.parametrize("mode", ["plain", "dropout", "DoRA", "fp8", "second block"])
def test_blocks_that_are_gathered_have_graphs_of_their_own(tmp_path, mode, keep):
    """A sharded base: the same bits as launched, though the recording ran on what the slots held."""
    save_random_llama(tmp_path, num_hidden_layers=5)
    device, bodies, models = torch.device("cuda"), [], []
    for records in (True, False):
        model, fill = open_model(tmp_path, load_in_4bit=True, dtype=torch.bfloat16, device=device)
        store = fill_over_ranks(model, fill, sharding="full_shard", rank=0, ranks=1, device=device)
        targets = ("layers.1.self_attn.k_proj", "layers.3.mlp.gate_proj") if mode == "second block" else ALL_LINEAR
        models.append(with_lora(model, 0.05 if mode == "dropout" else 0.0, targets, mode == "DoRA"))
        fuse_blocks(model, [keep] * 5, True, mode == "fp8")
        store.attach(model)
        for number, block in enumerate(model.model.layers if mode == "DoRA" else ()):  # as `build_model` does
            store.unshard(number)
            start_magnitudes(block)
        assert can_record(model)
        bodies.append(GraphedBody(model) if records else model.model)
    for i, lengths in enumerate([((64,), (64,)), ((40, 24), (10, 54)), ((64,), (64,))]):
        tokens = torch.randint(300, (2, 64), generator=torch.Generator().manual_seed(i)).cuda()
        results = []
        for model, body in zip(models, bodies, strict=True):
            set_dropout_rows(model, torch.arange(2, device="cuda") + 7 * i)
            with torch.no_grad():
                evaluated = body(tokens, Segments(lengths)).clone()
            y = body(tokens, Segments(lengths))
            (y.float() * torch.linspace(-1, 1, y.shape[-1], device="cuda")).sum().backward()
            grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            results.append([evaluated, y.detach().clone(), *grads])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs), f"batch {i}"
    assert all(len(recording.forward) == 5 for recording in bodies[0].recordings)


@pytest.mark.gpu
def test_batches_that_come_later_need_no_more_memory(tmp_path):
    """Fewer rows, other documents, each kind of attention for the first time: hardly more than for the first batch.

    Measured on an H200: 1.10 times, which is another kernel's scratch memory; 1.4 to 1.6 times where a shorter batch
    runs outside of the graphs, or a block warms up beside them.
    """
    save_random_llama(tmp_path)
    model = build(tmp_path, torch.bfloat16, 0.0)
    fuse(model, "all")
    body, T, peaks = GraphedBody(model), 4096, []
    torch.cuda.empty_cache()  # of other tests
    for lengths in (((T,),) * 4, ((T,),) * 2, ((1000, 2000, T - 3000),) * 4, ((100,) * 40 + (96,),), ((1, T - 1),) * 3):
        tokens = torch.randint(300, (len(lengths), T), generator=torch.Generator().manual_seed(1)).cuda()
        set_dropout_rows(model, torch.arange(len(lengths), device="cuda"))
        body(tokens, Segments(lengths)).float().sum().backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_reserved())
    assert max(peaks) <= 1.2 * peaks[0], f"reserved bytes after each batch: {peaks}"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"targets": ("q_proj", "v_proj")}, {"dora": True}, {"dropout": 0.05}], ids=str)
def test_rows_of_many_widths_share_the_memory_of_the_widest(tmp_path, options):
    """Rows laid into one of another width each time: the bits of launched blocks, also in evaluation."""
    save_random_llama(tmp_path)
    options = {"dropout": 0.0} | options
    models = [build(tmp_path, torch.bfloat16, **options) for _ in range(2)]
    for model in models:
        fuse(model, "all", fold=not options["dropout"])
    bodies, peaks = (models[0].model, GraphedBody(models[1])), []
    torch.cuda.empty_cache()
    for i, lengths in enumerate(
        [(3000, 1000, 96), (500, 12), (300, 300, 168), (100, 28), (128,), (3800, 296), (5, 123)]
    ):
        T = sum(lengths)
        tokens = torch.randint(300, (1, T), generator=torch.Generator().manual_seed(i)).cuda()
        results = []
        for model, body in zip(models, bodies, strict=True):
            adapter_changed(model)
            set_dropout_rows(model, torch.full((1, T), 7 * i).cuda(), torch.arange(T).cuda()[None])
            y = body(tokens, Segments((lengths,)))
            (y.float() * torch.linspace(-1, 1, y.shape[-1], device="cuda")).sum().backward()
            y = y.detach().clone()  # the next batch has the same place
            with torch.no_grad():
                evaluated = body(tokens, Segments((lengths,))).clone() if model.eval() else None
            model.train()
            grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            results.append([y, evaluated, *grads])
        for j, (ours, theirs) in enumerate(zip(*reversed(results), strict=True)):
            if j < 2:
                assert torch.equal(ours, theirs), f"batch {i}, result {j}"
            # A gradient: attention's backward adds parts of dq in an order that changes, and rounds to bfloat16.
            assert (ours - theirs).float().norm() <= 2.0**-8 * theirs.float().norm(), f"batch {i}, result {j}"
        del results, y, evaluated, grads
        peaks.append(torch.cuda.memory_reserved())
    assert max(peaks) <= 1.25 * peaks[0], f"reserved bytes after each batch: {peaks}"


@pytest.mark.gpu
def test_graphs_are_freed_while_others_are_recorded(tmp_path):
    """A garbage collection at every allocation of an object: what an earlier run left is not freed within a capture."""
    save_random_llama(tmp_path)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(3):
            model = build(tmp_path, torch.bfloat16, 0.05)
            fuse(model)
            body = GraphedBody(model)
            for lengths in ((100, 28), (300, 84), (600, 168)):
                tokens = torch.zeros(1, sum(lengths), dtype=torch.int64, device="cuda")
                set_dropout_rows(model, torch.zeros_like(tokens), torch.zeros_like(tokens))
                body(tokens, Segments((lengths,))).float().sum().backward()
            model.cycle = [body, model]  # freed by the collector alone
    finally:
        gc.set_threshold(*threshold)


def test_no_collection_restores_what_was():
    for was_enabled in (True, False):
        (gc.enable if was_enabled else gc.disable)()
        try:
            with pytest.raises(ValueError), no_collection():
                assert not gc.isenabled()
                raise ValueError
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()


@pytest.mark.parametrize("lengths", [((64,),), ((40, 24), (10, 54)), ((5, 5, 54),), ((1,) * 64,), ((33, 31),)], ids=str)
def test_empty_rows_are_of_the_same_kind(lengths):
    """A recording is chosen by its longest document, rounded up, and by whether each row is one document."""
    given, filled = Segments(lengths), with_empty_rows(Segments(lengths), 3)
    assert filled.lengths[: len(lengths)] == lengths and len(filled.lengths) == len(lengths) + 3
    assert {sum(row) for row in filled.lengths} == {64} and all(min(row) > 0 for row in filled.lengths)
    assert power_of_two(filled.longest) == power_of_two(given.longest) and filled.one_each == given.one_each


def test_a_cpu_records_nothing(tmp_path):
    save_random_llama(tmp_path)
    model = build(tmp_path, torch.float32, 0.0)
    assert not can_record(model), "plain blocks"
    fuse(model)
    assert not can_record(model), "float32: no kernel takes several documents"
    model = build(tmp_path, torch.bfloat16, 0.0)
    fuse(model)
    assert can_record(model) == CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dropout, fold", [(0.0, True), (0.05, False)])
def test_nothing_is_compiled_for_other_documents(tmp_path, dropout, fold):
    """Rows of one document, then of many: after these two, batches with any number of documents compile no kernel."""
    from nanoqlora.ops.triton import elementwise as elementwise_triton
    from nanoqlora.ops.triton import lora as lora_triton
    from nanoqlora.ops.triton import loss as loss_triton
    from nanoqlora.ops.triton import mlp_backward as mlp_backward_triton
    from nanoqlora.ops.triton import nf4 as nf4_triton

    modules = elementwise_triton, lora_triton, loss_triton, mlp_backward_triton, nf4_triton
    kernels = [x for m in modules for x in vars(m).values() if hasattr(x, "device_caches")]

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    save_random_llama(tmp_path)
    model = build(tmp_path, torch.bfloat16, dropout)
    fuse(model, "all", fold)
    counts = []
    for body in (model.model, GraphedBody(model)):
        for lengths in ((64,), (40, 24), (10, 20, 34), (1,) * 64, (5, 59), (16,) * 4):
            y = body(torch.arange(128, device="cuda").view(2, 64), Segments((lengths, lengths[::-1])))
            loss_fast.linear_cross_entropy(y.flatten(0, 1), model.lm_head.weight, torch.arange(128).cuda()).backward()
            counts.append(compiled())
    assert counts[0] > 10 and counts[-1] == counts[1], f"kernels compiled after each batch: {counts}"
