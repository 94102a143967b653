"""A few steps of `python -m tests.parity` on a tiny model: loss, gradient norm and rate as in transformers + PEFT."""

import pytest
from parity import TOLERANCES, compare
from small_runs import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("parity") / "model"))


@pytest.mark.parametrize("base", ["dequantised", "4bit"])
def test_five_steps_agree_in_float32(model, base):
    """Two micro-batches a step; the figures are logged with six decimals: 1e-5 relative."""
    result = compare(model, steps=5, accumulation=2, sequence_len=160, base=base)
    assert result["agree"] and result["steps"] == 5
    assert result["loss"] < 1e-5 and result["grad_norm"] < 1e-4 and result["learning_rate"] < 1e-9


def test_five_steps_agree_in_bfloat16_within_its_rounding(model):
    result = compare(model, steps=5, sequence_len=160, base="4bit", dtype="bfloat16")
    assert result["agree"], result
    assert result["grad_norm"] > 1e-4, "it was not bfloat16"


def test_another_run_would_be_seen(model, monkeypatch):
    """A rate of 1.01e-3 in place of 1e-3 in the other loop breaks the tolerance."""
    import parity

    read = parity.load_config
    monkeypatch.setattr(parity, "load_config", lambda words: read([*words, "--learning_rate", "1.01e-3"]))
    result = compare(model, steps=3, sequence_len=160)
    assert not result["agree"] and result["learning_rate"] > TOLERANCES["float32"]["learning_rate"]
