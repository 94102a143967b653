"""LoRA+ and NEFTune against their formulas and against PEFT's and transformers' own; runs with every variant."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
import transformers
from paths import ROOT
from peft.optimizers import create_loraplus_optimizer
from peft_witness import save_random_adapter, trained_in_float32
from ranks import end_of_run, on_ranks
from small_runs import alpaca_rows, assert_refused, run_here, save_tiny_model, steps_of, write_rows, write_run
from tiny import save_random_llama
from tiny_qlora import TOKENS, dequantised_copy, randomise
from transformers.integrations.neftune import neftune_post_forward_hook

import merge
import nanoqlora as nq
import train
from nanoqlora.config.errors import UserError
from nanoqlora.ops import Segments
from nanoqlora.parallel.devices import check_fp8
from nanoqlora.qlora import ALL_LINEAR, flatten_trainable, lora_layers, set_dropout_rows
from nanoqlora.run.neftune import add_noise, set_noise_rows
from nanoqlora.run.optim import loraplus_groups, make_optimizer, set_learning_rate


def test_loraplus_steps_equal_peft(tmp_path, rng):
    """Ten steps of AdamW with a decreasing rate on the same gradients, B sixteen times as fast: PEFT's values."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    base = dequantised_copy(model, tmp_path)
    nq.inject_lora(model, r=4, alpha=8)
    randomise(model)
    nq.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, eps=1e-8)
    flat = flatten_trainable(model)
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = make_optimizer("adamw_torch", flat, groups=loraplus_groups(model, 16.0), **options)
    start, rates = flat.detach().clone(), [group["lr"] for group in reference.param_groups]
    values = {name.replace(".default", ""): p for name, p in theirs.named_parameters()}
    pairs = [
        (getattr(layer, part), values[f"base_model.model.{name}.{part}.weight"])
        for name, layer in lora_layers(model).items()
        for part in ("lora_A", "lora_B")
    ]
    for step in range(10):
        flat.grad.normal_(generator=rng)
        for ours, expected in pairs:
            expected.grad = ours.grad.clone()
        share = 1 - step / 10
        set_learning_rate(optimizer, 1e-3 * share)
        for group, rate in zip(reference.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        reference.step()
    assert all((ours - expected).abs().max() < 1e-6 for ours, expected in pairs)
    assert (flat - start).abs().max() > 0.02, "B moves faster than 1e-3 a step"


def noisy(tmp_path: Path, alpha: float = 5.0) -> nq.Llama:
    save_random_llama(tmp_path, tie_word_embeddings=True)
    model = nq.Llama.from_pretrained(tmp_path)
    add_noise(model, alpha)
    return model.train()


def noise_of(model: nq.Llama, seeds: list[int], lengths: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    segments = Segments(lengths)
    tokens = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.int64)
    set_noise_rows(model, torch.tensor(seeds), segments)
    return model.model.embed_tokens(tokens) - model.model.embed_tokens.weight[0]


def test_noise_is_uniform_and_as_long_as_the_paper_says(tmp_path):
    """Range, mean and variance of s * uniform(-1, 1), s = 5 / sqrt(L D), as transformers' hook makes it."""
    model = noisy(tmp_path)
    hook = torch.nn.Embedding(300, 128).train()
    hook.neftune_noise_alpha = 5.0
    L, D = 400, 128
    s, n = 5.0 / (L * D) ** 0.5, 2 * L * D
    theirs = neftune_post_forward_hook(hook, None, torch.zeros(2, L, D))
    for noise in (noise_of(model, [1, 2], ((L,), (L,))), theirs):
        assert 0.999 * s < noise.abs().max() <= s * (1 + 1e-5)
        assert abs(noise.mean()) < 5 * s / (3 * n) ** 0.5
        # the square of a uniform number has mean s^2 / 3 and a standard deviation of s^2 * sqrt(4 / 45)
        assert abs(noise.square().mean() - s * s / 3) < 5 * s * s * (4 / 45 / n) ** 0.5
    ours = noise_of(model, [1, 2], ((L,), (L,)))
    for other in (ours.roll(1, 0), ours.roll(1, 1), ours.roll(1, 2)):
        assert abs((ours * other).mean()) < 5 * s * s / 3 / n**0.5, "rows, tokens and dimensions are independent"


def test_noise_depends_on_the_row_and_the_documents_length_alone(tmp_path):
    model = noisy(tmp_path)
    alone = noise_of(model, [7], ((10,),))
    both = noise_of(model, [7, 8], ((10, 30), (40,)))
    assert torch.allclose(both[0, :10], alone[0], atol=1e-7), "packed with others: the same"
    assert (both[0, 10:].abs().max() / both[0, :10].abs().max()) == pytest.approx((10 / 30) ** 0.5, rel=0.02)
    assert torch.allclose(noise_of(model, [8, 7], ((40,), (10, 30)))[0], both[1], atol=1e-7), (
        "in another place: the same"
    )
    assert (noise_of(model, [9], ((10,),)) - alone).abs().max() > 0.01
    assert not noise_of(model.eval(), [7], ((10,),)).any(), "none in evaluation"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("variants")
    return save_tiny_model(root / "model"), write_rows(root / "data.jsonl", alpaca_rows(8))


def run(world: tuple[Path, Path], folder: Path, *words: str, **keys) -> tuple[list[dict], str]:
    """Four steps of a tiny run: its logged steps and what it said."""
    options = {"max_steps": 4, "output_dir": str(folder), "learning_rate": 1e-3, "saves_per_epoch": 2} | keys
    file = write_run(folder.parent / f"{folder.name}.yml", *world, **options)
    ended = run_here(train.main, file, *words)
    assert ended.code == 0, ended.err
    return steps_of(folder), ended.out


VARIANTS = {
    "plain": {},
    "DoRA": {"peft_use_dora": True, "lora_dropout": 0},
    "DoRA, dropout": {"peft_use_dora": True, "lora_dropout": 0.1},
    "LoRA+": {"loraplus_lr_ratio": 8},
    "NEFTune": {"neftune_noise_alpha": 5},
    "one kind": {"lora_target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_of_every_variant_learn_resume_and_load_in_peft(world, tmp_path, variant):
    keys = VARIANTS[variant]
    steps, said = run(world, tmp_path / "whole", save_steps=2, saves_per_epoch=None, **keys)
    assert said.count("plain blocks are used") == (variant == "DoRA, dropout")
    resumed, _ = run(
        world,
        tmp_path / "again",
        *("--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-2")),
        save_steps=2,
        saves_per_epoch=None,
        **keys,
    )
    figures = ("step", "loss", "grad_norm", "learning_rate")
    assert [[row[key] for key in figures] for row in resumed[-2:]] == [
        [row[key] for key in figures] for row in steps[2:]
    ]
    model = nq.Llama.from_pretrained(world[0], load_in_4bit=True)
    base = dequantised_copy(model, world[0])
    nq.load_adapter(model, tmp_path / "whole")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "whole").eval()
    with torch.no_grad():
        assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4
    config = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    assert config["use_dora"] == variant.startswith("DoRA")
    if variant != "plain":
        plain, _ = run(world, tmp_path / "plain")
        assert [row["loss"] for row in plain[1:]] != [row["loss"] for row in steps[1:]], "the variant changes the run"


def test_two_ranks_with_the_base_in_parts_are_the_same_run(world, tmp_path):
    """DoRA, LoRA+, NEFTune, dropout and recomputation at once: plain blocks over a base that is gathered."""
    keys = {"peft_use_dora": True, "loraplus_lr_ratio": 4, "neftune_noise_alpha": 5, "lora_dropout": 0.1}
    one, _ = run(world, tmp_path / "one", micro_batch_size=4, **keys)
    options = {"max_steps": 4, "output_dir": str(tmp_path / "two"), "learning_rate": 1e-3, "micro_batch_size": 2}
    options |= {"fsdp": ["full_shard"], "gradient_checkpointing": True}
    file = write_run(tmp_path / "two.yml", *world, **options, **keys)
    assert [code for code, _, _ in on_ranks(2, end_of_run, file)] == [0, 0]
    for a, b in zip(one, steps_of(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6) and a["learning_rate"] == b["learning_rate"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)


def saved_bytes(model: nq.Llama) -> int:
    """What autograd keeps for the backward pass, with the gradients left in the parameters."""
    sizes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model.model(TOKENS)
    y.square().sum().backward()
    return sum(sizes)


def test_plain_blocks_can_be_recomputed(tmp_path, world):
    """gradient_checkpointing where the fused block is not used: the same gradients, with dropout, and less is kept."""
    models = []
    for recompute in (False, True):
        model = nq.Llama.from_pretrained(world[0], load_in_4bit=True)
        nq.inject_lora(model, r=4, alpha=8, dropout=0.1, use_dora=True)
        randomise(model)
        set_dropout_rows(model.train(), torch.tensor([5, 6]))
        for block in model.model.layers:
            block.recompute = recompute
        models.append((saved_bytes(model), model))
    (much, plain), (little, again) = models
    assert little < much / 3
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    steps, _ = run(world, tmp_path / "kept", lora_target_modules=["v_proj"], lora_dropout=0.1)
    less, _ = run(
        world, tmp_path / "less", lora_target_modules=["v_proj"], lora_dropout=0.1, gradient_checkpointing=True
    )
    assert [(row["loss"], row["grad_norm"]) for row in steps] == [(row["loss"], row["grad_norm"]) for row in less]


def test_dora_merges_into_the_trained_model(world, tmp_path):
    """merge.py on a DoRA adapter: transformers' logits of the merged folder are those of base and adapter."""
    model = nq.Llama.from_pretrained(world[0], load_in_4bit=True)
    nq.inject_lora(model, r=4, alpha=8, use_dora=True)
    randomise(model)
    for layer in lora_layers(model).values():
        layer.magnitude.data *= 1.2
    nq.save_adapter(model, tmp_path / "adapter")
    trained_in_float32(tmp_path / "adapter")
    words = ("--model", world[0], "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged")
    ended = run_here(merge.main, *words, "--base", "nf4", "--dtype", "float32")
    assert ended.code == 0, ended.err
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4


def test_a_run_goes_on_from_an_adapter(world, tmp_path):
    """It starts where the adapter left, says its rank, and refuses another one."""
    adapter = save_random_adapter(world[0], tmp_path / "adapter", r=4)
    first, said = run(world, tmp_path / "on", lora_model_dir=str(adapter), lora_r=None, lora_alpha=None)
    assert "rank 4, alpha" in said and "on 14 layers" in said
    fresh, _ = run(world, tmp_path / "fresh")
    assert first[0]["loss"] != fresh[0]["loss"]
    file = write_run(tmp_path / "wrong.yml", *world, max_steps=1, lora_r=8, output_dir=str(tmp_path / "none"))
    ended = run_here(train.main, file, "--lora_model_dir", str(adapter))
    assert ended.code == 2 and "lora_r is 8" in ended.err and "has 4" in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_a_complete_run_takes_what_was_predicted(tmp_path, packed):
    """Two epochs, an uneven last batch, evaluations and answers: the allocator's figure is that before the first step.

    A copy of this model's weights in 16 bits would take 0.19 GiB more.
    """
    big = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 64}
    big |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 2048}
    model = save_tiny_model(tmp_path / "model", **big)
    rows, held_out = write_rows(tmp_path / "a.jsonl", alpaca_rows(77)), write_rows(tmp_path / "b.jsonl", alpaca_rows(9))
    keys = {"bf16": True, "sample_packing": packed, "micro_batch_size": 8, "eval_table_size": 2, "evals_per_epoch": 1}
    keys |= {"test_datasets": [{"path": str(held_out), "type": "alpaca"}], "lora_dropout": 0}
    file = write_run(tmp_path / "run.yml", model, rows, **keys)
    done = subprocess.run([sys.executable, ROOT / "train.py", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "out" / "report.md").read_text()
    predicted, taken = map(float, re.findall(r"max_mem_active_gib, GiB \| ([\d.]+) \| ([\d.]+)", report)[0])
    assert taken == pytest.approx(predicted, rel=0.03, abs=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [{}, {"sample_packing": True}, {"sample_packing": True, "fp8": True}], ids=str)
def test_full_determinism_is_bit_for_bit_on_a_gpu(tmp_path, own):
    """Rows of 1,024 tokens, whose gradients of q have eight parts: run twice, and stopped and resumed."""
    big = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "head_dim": 64}
    big |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    model = save_tiny_model(tmp_path / "model", **big)
    rows = write_rows(tmp_path / "a.jsonl", [{"text": "yes no " * 500}] * 40)
    keys = {"bf16": True, "sequence_len": 1024, "micro_batch_size": 8, "max_steps": 8, "num_epochs": 9} | own
    keys |= {"datasets": [{"path": str(rows), "type": "completion"}], "lora_dropout": 0.05, "full_determinism": True}
    keys |= {"save_steps": 4, "saves_per_epoch": None}
    found = []
    for name in "abc":
        more = {"resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-4")} if name == "c" else {}
        out = tmp_path / name
        file = write_run(tmp_path / f"{name}.yml", model, rows, **keys, **more, output_dir=str(out))
        done = subprocess.run([sys.executable, ROOT / "train.py", file], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append((out / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1], "twice"
    assert found[0] == found[2], "resumed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
@pytest.mark.parametrize("strength", [True, "backward"])
def test_fp8_is_refused_where_no_device_has_it(world, tmp_path, strength):
    file = write_run(tmp_path / "run.yml", *world, fp8=strength, bf16="auto", output_dir=str(tmp_path / "out"))
    ended = run_here(train.main, file)
    assert_refused(ended, "fp8", "CPU", "leave out fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("capability", "has_it"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_gpus_with_fp8(monkeypatch, capability, has_it):
    """Ampere has none; Ada and Hopper do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with nullcontext() if has_it else pytest.raises(UserError, match="NVIDIA A100 has no matmuls in fp8"):
        check_fp8(torch.device("cuda"))


LAYOUTS = {
    "packed": {"sample_packing": True},
    "padded": {"pad_to_sequence_len": True},
    "laid into one": {},
    "one row at a time": {"micro_batch_size": 1, "gradient_accumulation_steps": 2},
    "all in one": {"micro_batch_size": 16},
}
ON_A_GPU = {
    "all linear": {},
    "q and v": {"lora_target_modules": ["q_proj", "v_proj"]},
    "attention": {"lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "all but down": {"lora_target_modules": [name for name in ALL_LINEAR if name != "down_proj"]},
    "dropout": {"lora_dropout": 0.05},
    "DoRA": {"peft_use_dora": True},
    "DoRA, dropout": {"peft_use_dora": True, "lora_dropout": 0.05},
    "rsLoRA": {"peft_use_rslora": True, "lora_r": 96},
    "LoRA+": {"loraplus_lr_ratio": 8},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "16-bit base": {"adapter": "lora", "load_in_4bit": False},
    "checkpointing": {"gradient_checkpointing": True},
    "offload": {"gradient_checkpointing": "offload"},
    "DoRA, checkpointing": {"peft_use_dora": True, "gradient_checkpointing": True},
    "full_shard": {"fsdp": ["full_shard"]},
    "fp8": {"fp8": True},
    "fp8 backward": {"fp8": "backward"},
    "fp8, dropout, full_shard": {"fp8": True, "lora_dropout": 0.05, "fsdp": ["full_shard"]},
    "fp8, DoRA, checkpointing": {"fp8": True, "peft_use_dora": True, "gradient_checkpointing": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_variant_runs_on_a_gpu(world, tmp_path, layout):
    """B starts at zero, so every variant has the first loss of float32, to the roundings of bfloat16; and it learns."""
    keys = {"lora_dropout": 0, "max_steps": 8, "saves_per_epoch": None, "save_strategy": "no"} | LAYOUTS[layout]
    exact, _ = run(world, tmp_path / "exact", bf16=False, **keys)
    assert len(exact) == 8
    for i, (variant, own) in enumerate(ON_A_GPU.items()):
        steps, said = run(world, tmp_path / f"{i}", **keys | {"bf16": True} | own)
        if variant != "16-bit base":  # which has other weights
            assert steps[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05 if own.get("fp8") is True else 0.01), (
                variant
            )
            assert steps[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.1), variant
        assert sum(row["loss"] for row in steps[4:]) < sum(row["loss"] for row in steps[:4]), f"{variant} learns"
        assert said.count("plain blocks are used") == (variant == "DoRA, dropout"), variant
