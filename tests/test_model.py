"""The model against transformers, in float32, on random configurations; its cache and its packing against itself."""

import math

import pytest
import torch
from tiny import save_random_llama

import nanoqlora as nq
from nanoqlora import ops
from nanoqlora.config.errors import UserError
from nanoqlora.model import KVCache, ModelConfig, rope_frequencies
from nanoqlora.ops import Segments

CASES = {
    "grouped heads": {},
    "one key/value head": {"num_key_value_heads": 1},
    "no grouping, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
    "head_dim apart from the width": {"head_dim": 48},
    "large theta": {"rope_theta": 500000.0, "num_hidden_layers": 1},
    "linear rope": {"rope": {"rope_type": "linear", "factor": 4.0}},
    "llama3 rope": {
        "rope_theta": 500000.0,
        "rope": {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 64,
        },
    },
}


@pytest.mark.parametrize("case", CASES, ids=list(CASES))
@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_logits_equal_transformers(tmp_path, case, mode):
    """Same file, same logits: 1e-4 in float32, where logits have a standard deviation of about 1."""
    theirs = save_random_llama(tmp_path, **CASES[case])
    ops.use(mode)
    try:
        ours = nq.Llama.from_pretrained(tmp_path)
        for T in (1, 33, 150):
            tokens = torch.randint(300, (2, T), generator=torch.Generator().manual_seed(T))
            with torch.no_grad():
                difference = (ours(tokens) - theirs(tokens).logits).abs().max().item()
            assert difference < 1e-4, f"T={T}: logits differ by {difference:.1e}"
    finally:
        ops.use("fast")


def test_wrong_rope_pairing_would_be_seen(tmp_path):
    """The test above can fail: rotating neighbours in place of halves moves logits by far more than 1e-4."""
    theirs = save_random_llama(tmp_path)
    ours = nq.Llama.from_pretrained(tmp_path)
    tokens = torch.arange(33)[None]
    for layer in ours.model.layers:
        w = layer.self_attn.q_proj.weight.data
        w.copy_(w.view(4, 2, 16, 128).transpose(1, 2).reshape(w.shape))
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 0.01


def test_cache_gives_the_same_logits(tmp_path):
    """Token by token, and in uneven pieces, with the cache: what the whole sequence gives at once."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        for pieces in ([1] * 40, [17, 1, 5, 17]):
            cache = KVCache()
            parts = torch.cat([model(part, cache=cache) for part in tokens.split(pieces, dim=1)], dim=1)
            assert (parts - whole).abs().max() < 1e-4
            assert len(cache) == 40


@pytest.mark.parametrize("mode", ["fast", "reference"])
def test_packed_documents_do_not_see_each_other(tmp_path, mode):
    """Documents in one row give the logits that each gives alone, and gradients too."""
    save_random_llama(tmp_path)
    ops.use(mode)
    try:
        model = nq.Llama.from_pretrained(tmp_path)
        lengths = ((5, 1, 140, 33), (150, 29))
        tokens = torch.randint(300, (2, 179), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            packed = model(tokens, Segments(lengths))
            for row, start, end in Segments(lengths).documents:
                alone = model(tokens[row : row + 1, start:end])
                assert (packed[row, start:end] - alone[0]).abs().max() < 1e-4
            unmarked = model(tokens)
        assert (packed - unmarked).abs().max() > 0.1, "without segments the documents would see each other"
    finally:
        ops.use("fast")


def test_positions_and_mask_of_segments():
    segments = Segments(((2, 3), (5,)))
    assert segments.positions.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert segments.mask[0, 0].int().tolist() == [
        *([1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]),
    ]
    assert Segments.one_per_row(1, 2, offset=7).positions.tolist() == [[7, 8]]


def test_rope_frequencies_of_llama3_leave_fast_pairs_alone():
    """Against the definition written out per pair, in float64."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192}
    config = ModelConfig.from_hf(HF | {"rope_theta": 500000.0, "rope_scaling": scaling, "head_dim": 128})
    for i, frequency in enumerate(rope_frequencies(config).tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            expected = plain
        elif wavelength > 8192 / 1:
            expected = plain / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert frequency == pytest.approx(expected, rel=1e-5)


HF = {
    **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"vocab_size": 300, "rms_norm_eps": 1e-5},
}


@pytest.mark.parametrize(
    "change, word",
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
    ],
)
def test_other_models_are_refused_by_name(change, word):
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_hf(HF | change)


def test_missing_and_damaged_files_are_told(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        nq.Llama.from_pretrained(tmp_path / "absent")
    save_random_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors"):
        nq.Llama.from_pretrained(tmp_path)
    save_random_llama(tmp_path, seed=1)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"hidden_size": 128', '"hidden_size": 64'))
    with pytest.raises(UserError, match="shape"):
        nq.Llama.from_pretrained(tmp_path)
