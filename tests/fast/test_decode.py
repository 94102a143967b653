"""Decoding with a cache, in batches and recorded, against the model's own forward pass over all tokens so far."""

from pathlib import Path

import pytest
import torch
from tiny import save_random_llama
from tiny_qlora import DEVICE, randomise

import nanoqlora as nq
from nanoqlora.fast import decode
from nanoqlora.fast.decode import Decoder
from nanoqlora.qlora import lora_layers

PROMPTS = [[5, 17, 250, 3], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [100, 200, 100, 200, 100]]
KINDS = ("plain", "nf4", "lora", "qlora", "dora", "some layers")
NEW = 24


def model_of(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> nq.Llama:
    save_random_llama(folder, tie_word_embeddings=kind == "nf4")
    in_4bit = kind not in ("plain", "lora")
    model = nq.Llama.from_pretrained(folder, load_in_4bit=in_4bit, dtype=dtype, device=DEVICE)
    if kind not in ("plain", "nf4"):
        targets = ("q_proj", "down_proj") if kind == "some layers" else "all-linear"
        nq.inject_lora(model, r=8, alpha=4, target_modules=targets, use_dora=kind == "dora")
        randomise(model)
        for layer in lora_layers(model).values():
            if layer.magnitude is not None:
                layer.magnitude.data *= torch.linspace(0.5, 1.5, len(layer.magnitude), device=DEVICE)
    return model.to(DEVICE).eval()


@torch.no_grad()
def greedy(model: nq.Llama, prompt: list[int], count: int = NEW) -> list[int]:
    """Without a cache: the model reads everything again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens], device=DEVICE))[0, -1].argmax()))
    return tokens[len(prompt) :]


def rows(decoder: Decoder, prompts: list[list[int]], stop_ids: set[int] | None = None) -> list[list[int]]:
    steps = list(decoder.generate(prompts, stop_ids or set(), NEW))
    return [[token for step in steps if (token := step[row]) is not None] for row in range(len(prompts))]


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "as held"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_plain_forward_pass(tmp_path, kind, is_dense):
    """In float32, prompts of four lengths together and each alone, over the valid part of the cache and all of it."""
    model = model_of(kind, tmp_path)
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 15, "varied enough to see a wrong position"
    decoder = Decoder(model, is_dense)
    for complete in (True, False) if DEVICE == "cpu" else (True,):
        decoder.complete = complete
        assert rows(decoder, PROMPTS) == expected
        assert [rows(decoder, [prompt])[0] for prompt in PROMPTS] == expected
    assert rows(decoder, PROMPTS) == expected, "a cache that held other rows"


def test_answers_in_a_run_with_full_determinism(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model = model_of("qlora", tmp_path)
    expected = rows(Decoder(model), PROMPTS)
    torch.use_deterministic_algorithms(True)
    try:
        assert rows(Decoder(model), PROMPTS) == expected and torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_row_ends_at_its_own_stop_token(tmp_path):
    model = model_of("qlora", tmp_path)
    complete = rows(Decoder(model), PROMPTS)
    stop = complete[2][3]
    ended = rows(Decoder(model), PROMPTS, {stop})
    assert ended == [row[: row.index(stop)] if stop in row else row for row in complete] and len(ended[2]) <= 3
    assert list(Decoder(model).generate(PROMPTS, set(range(300)), NEW)) == []
    assert [len(row) for row in zip(*Decoder(model).generate(PROMPTS, set(), 1), strict=True)] == [1] * 4


def test_drawn_tokens_are_given_to_the_model(tmp_path):
    """The second best token every time, written out with the plain forward pass."""
    model, tokens = model_of("lora", tmp_path), list(PROMPTS[2])
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model(torch.tensor([tokens], device=DEVICE))[0, -1].topk(2).indices[1]))
    drawn = Decoder(model).generate([PROMPTS[2]], set(), NEW, draw=lambda logits: logits.topk(2).indices[:, 1])
    assert [step[0] for step in drawn] == tokens[len(PROMPTS[2]) :]


def test_row_norms_of_dora_are_computed_once(tmp_path, monkeypatch):
    model, calls = model_of("dora", tmp_path), []
    delta = type(next(iter(lora_layers(model).values()))).delta
    monkeypatch.setattr("nanoqlora.qlora.QLoRALinear.delta", lambda layer: calls.append(1) or delta(layer))
    rows(Decoder(model), PROMPTS)
    assert len(calls) == len(lora_layers(model))


def test_half_precision_weights_of_16_bit_models_are_exact():
    """bfloat16's values from 2^-14 to 65504 are values of float16 too, so the products are those of float32."""
    w = (torch.randn(96, 128, generator=torch.Generator().manual_seed(0)) / 8).bfloat16().float()
    w[w.abs() < 2.0**-14] = 0
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    bound = 128 * 2.0**-24 * (x.abs().double() @ w.abs().double().t())  # of float32 sums in any order
    assert ((decode.matmul(w)(x).double() - x.double() @ w.double().t()).abs() <= bound).all()


@pytest.mark.gpu
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "4 bits"])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_are_those_launched_one_by_one(tmp_path, monkeypatch, kind, is_dense):
    """In bfloat16: the same bits, and logits near those of the model's own forward pass."""
    model = model_of(kind, tmp_path, torch.bfloat16)
    recorded = Decoder(model, is_dense)
    tokens = rows(recorded, PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "record", lambda step: step)
        launched = Decoder(model, is_dense)
        assert rows(launched, PROMPTS) == tokens
    assert torch.equal(recorded.logits, launched.logits)
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens[i][:-1]], device=DEVICE))[0, -1].float()
        assert (recorded.logits[i].float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_answers_end_with_the_context(tmp_path):
    """However many tokens are asked for, the cache holds no more than the model's context."""
    save_random_llama(tmp_path)
    decoder = Decoder(nq.Llama.from_pretrained(tmp_path).eval())
    decoder.limit = 40
    assert len([*decoder.generate([[1] * 10], set(), 10**12)]) == 30 and decoder.cache.shape[2] == 64


def test_a_copy_that_does_not_fit_is_left_out(tmp_path, monkeypatch):
    """The system may allow less than is free: the weights are then used as they are held."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path).eval()
    expected = [*Decoder(model, dense=False).generate([[1, 2, 3]], set(), 5)]
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(decode, "merged", fails)
    assert [*Decoder(model).generate([[1, 2, 3]], set(), 5)] == expected
    error = RuntimeError("another fault")
    with pytest.raises(RuntimeError, match="another"):
        Decoder(model)


def test_weights_beyond_half_precision_stay_as_they_are(tmp_path):
    weight = torch.tensor([[1e7, 1.0], [3.0, 4.0]])
    assert torch.equal(decode.matmul(weight)(torch.ones(1, 2)), torch.ones(1, 2) @ weight.t())
