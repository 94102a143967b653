"""`keep_gguf_blocks`: training over the blocks of a .gguf file, as they are in it."""

import re
from pathlib import Path

import pytest
import torch
from kept_gguf import save_in_blocks
from ranks import LAYERS, brought_blocks, end_of_run, gradient, on_ranks, spread_gradient
from safetensors.torch import load_file
from small_runs import alpaca_rows, assert_refused, run_here, steps_of, write_rows, write_run

import nanoqlora as nq
import train
from nanoqlora.config.errors import UserError
from nanoqlora.fast.block import fuse_blocks
from nanoqlora.fast.memory import base_bytes, held_bytes
from nanoqlora.gguf.ggml_blocks import FORMATS
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.ops import Segments
from nanoqlora.parallel.fsdp import frozen_tensors
from nanoqlora.qlora import ALL_LINEAR, block_linears, inject_lora, lora_layers, set_dropout_rows
from nanoqlora.weights.kept_blocks import BlockLinear
from nanoqlora.weights.pretrained import load_model, open_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a layer of every type that a file can have."""
    return save_in_blocks(tmp_path_factory.mktemp("mixed") / "model.gguf", "mixed", LAYERS)


def test_layers_have_the_bytes_of_the_file_and_its_values(mixed):
    """Read by the gguf package; rows of q and k are put back into Hugging Face's order."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(mixed).tensors}
    names = dict(zip(ALL_LINEAR, "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split(), strict=True))
    seen = set()
    for name, layer in block_linears(load_model(mixed, keep_gguf_blocks=True)):
        *_, number, _, kind = name.split(".")
        tensor = tensors[f"blk.{number}.{names[kind]}.weight"]
        order = torch.arange(len(tensor.data))
        if kind in ("q_proj", "k_proj"):  # row 2i of a head is row i here, row 2i + 1 is row i + 16
            order = order.view(-1, 16, 2).transpose(1, 2).flatten()
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())[order]
        seen.add(tensor.tensor_type.name)
        if isinstance(layer, BlockLinear):
            assert torch.equal(layer.packed, torch.from_numpy(tensor.data.copy())[order]), name
            assert torch.equal(layer.rebuild(torch.float32), values), name
            assert torch.equal(layer.rebuild(torch.bfloat16, slice(7, 20)), values[7:20].bfloat16()), name
        else:
            assert FORMATS[tensor.tensor_type.name].block_size == 1 and torch.equal(layer.weight, values), name
    assert seen == {*FORMATS}


def test_the_model_is_that_of_the_dequantised_weights(mixed):
    kept, plain = load_model(mixed, keep_gguf_blocks=True), load_model(mixed)
    tokens = torch.arange(60).view(2, 30) * 4
    assert torch.equal(kept(tokens), plain(tokens))
    rows = next(layer for _, layer in block_linears(kept) if isinstance(layer, BlockLinear))
    x = torch.randn(3, rows.in_features)
    assert torch.equal(rows.frozen(x), x @ rows.rebuild(torch.float32).T)


def trained(file: Path, mode: str, **options: object) -> nq.Llama:
    """With LoRA of random values; the masks of dropout are those of two rows."""
    model = load_model(file, device=DEVICE, **options)
    dropout, dtype = 0.05 if mode == "dropout" else 0.0, model.model.norm.weight.dtype
    inject_lora(model, 8, 4, dropout, use_dora=mode == "DoRA")
    g = torch.Generator().manual_seed(5)
    for layer in lora_layers(model).values():
        for p in (layer.lora_A, layer.lora_B):
            p.data = (torch.randn(p.shape, generator=g) / 10).to(DEVICE, torch.promote_types(dtype, torch.float32))
        if layer.magnitude is not None:
            layer.magnitude.data = layer.magnitude.data.double().mul(1.1).to(p.dtype)
    set_dropout_rows(model, torch.tensor([11, 12], device=DEVICE))
    return model.train()


def results(model: nq.Llama) -> list[torch.Tensor]:
    """Hidden states, and every gradient, in float64."""
    tokens = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    y = model.model(tokens, Segments(((5, 28), (30, 3))))
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, y.dtype))
    return [x.detach().double().cpu() for x in (y, *(p.grad for p in model.parameters() if p.requires_grad))]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["plain", "all", "no_mlp", "input", "offload"])
@pytest.mark.parametrize("mode", ["no dropout", "dropout", "merged", "DoRA"])
def test_gradients_are_those_of_float64(mixed, mode, keep):
    """Autograd through a plain model with the dequantised weights; ours in float32, as plain and as fused blocks."""
    exact = results(trained(mixed, mode, dtype=torch.float64))
    model = trained(mixed, mode, keep_gguf_blocks=True, dtype=torch.float32)
    if keep != "plain":
        fuse_blocks(model, [keep] * LAYERS, merge=mode == "merged")
    for i, (ours, true) in enumerate(zip(results(model), exact, strict=True)):
        assert (ours - true).abs().max() <= 3e-5 * true.abs().max() + 1e-12, f"result {i}"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["no dropout", "dropout", "merged", "DoRA"])
def test_a_gpu_in_bfloat16_errs_as_over_plain_weights(mixed, mode):
    """The fused block over blocks and over the same weights in bfloat16, both against float64."""
    exact = results(trained(mixed, mode, dtype=torch.float64))
    errors = []
    for kept in (True, False):
        model = trained(mixed, mode, keep_gguf_blocks=kept, dtype=torch.bfloat16)
        fuse_blocks(model, ["all"] * LAYERS, merge=mode == "merged")
        errors.append([(a - b).norm() / b.norm() for a, b in zip(results(model), exact, strict=True)])
    assert all(ours <= 1.5 * theirs + 1e-3 for ours, theirs in zip(*errors, strict=True)), errors


# ------------------------------------------------------------------------------------------------ ranks and runs


def test_gathered_blocks_are_those_of_one_process(mixed):
    """Blocks whose layers have other types, and so other sizes, on 3 ranks; what each holds was predicted."""
    whole = load_model(mixed, keep_gguf_blocks=True)
    empty, _ = open_model(mixed, keep_gguf_blocks=True, dtype=torch.float32)
    assert held_bytes(whole) == base_bytes(empty, "replicate", 3)
    expected = [[tensor for _, _, tensor, _ in frozen_tensors(block)] for block in whole.model.layers]
    assert len({sum(tensor.nbytes for tensor in tensors) for tensors in expected}) == LAYERS
    for rank in on_ranks(3, brought_blocks, mixed, True):
        for i, tensors in rank["seen"]:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors, expected[i], strict=True)), i
        assert rank["held"] == base_bytes(empty, "full_shard", 3)


@pytest.mark.parametrize("targets, keep", [(ALL_LINEAR, "all"), (ALL_LINEAR, "input"), (("q_proj",), "recompute")])
def test_gradient_over_gathered_blocks(mixed, targets, keep):
    whole = load_model(mixed, keep_gguf_blocks=True)
    torch.manual_seed(0)
    inject_lora(whole, 4, 8, target_modules=targets)
    expected = gradient(whole.train(), 0, 1)
    for ours, *_ in on_ranks(2, spread_gradient, mixed, True, targets, keep):
        assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_memory_is_that_of_the_file(mixed):
    """What is held of the linear layers is what the file has of them, but 16 bits of what has 32."""
    model, _ = open_model(mixed, keep_gguf_blocks=True, dtype=torch.bfloat16)
    held = sum(tensor.nbytes for block in model.model.layers for _, _, tensor, _ in frozen_tensors(block))
    stored = [info for name, info in read_gguf(mixed).tensors.items() if re.search("attn_[qkvo]|ffn_[gud]", name)]
    stored = [info for info in stored if len(info.shape) == 2]
    assert len(stored) == 7 * LAYERS
    assert held == sum(info.num_bytes // (2 if info.ggml_type == "F32" else 1) for info in stored)


@pytest.fixture(scope="module")
def run(mixed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = write_rows(folder / "data.jsonl", alpaca_rows(24, seed=2))
    keys = {"micro_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}
    return write_run(folder / "run.yml", mixed, data, **keys, keep_gguf_blocks=True, lora_dropout=0.05)


def test_a_run_resumes_bit_for_bit_and_is_the_same_in_parts(run, tmp_path):
    resume = ("--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2")
    for name, words in {"whole": (), "again": resume}.items():
        ended = run_here(train.main, run, "--output_dir", tmp_path / name, *words)
        assert ended.code == 0, ended.err
    spread = {"copies": ("--fsdp", "replicate"), "parts": ("--fsdp", "full_shard"), "theirs": ("--fsdp_version", 2)}
    for name, words in spread.items():
        words += ("--gradient_accumulation_steps", 1, "--output_dir", tmp_path / name)
        ranks = on_ranks(2, end_of_run, run, *words)
        assert all(code == 0 for code, _, _ in ranks), ranks[0][2]
    whole, again, *others = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "again", *spread)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.equal(others[0][name], other[name]) for other in others for name in whole)
    assert max((whole[name] - others[0][name]).abs().max() for name in whole) < 1e-4, "of values that moved by 0.008"
    losses = [[row["loss"] for row in steps_of(tmp_path / name)] for name in ("whole", *spread)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[1] == losses[2] == losses[3]


@pytest.mark.parametrize("rows", ["packed", pytest.param("recorded", marks=pytest.mark.gpu)])
def test_a_run_learns_as_over_the_dequantised_weights(run, tmp_path, rows):
    """On a CPU the same numbers; on a GPU, where the blocks are rebuilt for each matmul and recorded, to bfloat16."""
    plain = ("--keep_gguf_blocks", "false", "--adapter", "lora", "--load_in_4bit", "false")
    words = ("--bf16", "auto", "--lora_dropout", 0.0, "--max_steps", 8, "--sample_packing", str(rows == "packed"))
    losses = []
    for name, more in {"kept": (), "plain": plain}.items():
        ended = run_here(train.main, run, "--output_dir", tmp_path / name, *words, *more)
        assert ended.code == 0, ended.err
        losses.append([row["loss"] for row in steps_of(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6 if DEVICE == "cpu" else 0.02)


def test_a_checkpoint_of_the_other_kind_is_refused(run, tmp_path):
    assert run_here(train.main, run, "--output_dir", tmp_path / "kept").code == 0
    resume = ("--resume_from_checkpoint", tmp_path / "kept" / "checkpoint-2", "--output_dir", tmp_path / "nf4")
    ended = run_here(train.main, run, "--keep_gguf_blocks", "false", *resume)
    assert_refused(ended, "keep_gguf_blocks: True", "this one has False")


@pytest.mark.parametrize(
    "words, said",
    [
        (("--fp8", "true"), "fp8 multiplies NF4 weights"),
        (("--adapter", "lora", "--load_in_4bit", "false"), "load_in_4bit: false asks for 16"),
        (("--base_model", "models/folder"), "base_model is none"),
    ],
)
def test_what_it_does_not_go_with_is_refused(run, words, said):
    assert_refused(run_here(train.main, run, *words), said)


def test_a_folder_has_no_blocks_and_nan_in_them_is_named(mixed, tmp_path):
    with pytest.raises(UserError, match=r"floats: is no \.gguf file, so there are no blocks to keep"):
        nq.Llama.from_pretrained(mixed.with_name("floats"), keep_gguf_blocks=True)
    file = tmp_path / "nan.gguf"
    info = read_gguf(mixed).tensors["blk.1.ffn_up.weight"]
    raw = bytearray(mixed.read_bytes())
    first, end = FORMATS[info.ggml_type].halves
    raw[info.offset + first : info.offset + end] = b"\xff\x7f" * ((end - first) // 2)
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"nan\.gguf: tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        nq.Llama.from_pretrained(file, keep_gguf_blocks=True)
