"""LoRA injection and adapters, with PEFT as witness; the 4-bit model with transformers on the same weights."""

import peft
import pytest
import torch
import transformers
from tiny import save_random_llama
from tiny_qlora import TOKENS, dequantised_copy, randomise

import nanoqlora as nq
from nanoqlora.config.errors import UserError
from nanoqlora.qlora import (
    ALL_LINEAR,
    QLoRALinear,
    block_linears,
    flatten_trainable,
    inject_lora,
    lora_layers,
    set_dropout_rows,
)
from nanoqlora.weights.pretrained import load_model


def test_4bit_model_equals_transformers_on_the_dequantised_weights(tmp_path):
    save_random_llama(tmp_path, tie_word_embeddings=True)
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    assert sum(isinstance(layer, QLoRALinear) for _, layer in block_linears(model)) == 7 * 3
    assert not any(name.endswith("proj.weight") for name in model.state_dict())
    plain = nq.Llama.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = dequantised_copy(model, tmp_path)(TOKENS).logits
        assert (model(TOKENS) - theirs).abs().max() < 1e-4
        assert (model(TOKENS) - plain(TOKENS)).abs().max() > 0.05, "four bits must cost something"


@pytest.mark.parametrize("targets", [ALL_LINEAR, ("q_proj", "v_proj")], ids=["all", "q and v"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_our_adapter(tmp_path, targets, rslora):
    """The same logits from PEFT on the same base: 1e-4 in float32."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    nq.inject_lora(model, r=4, alpha=12, target_modules=targets, use_rslora=rslora)
    randomise(model)
    nq.save_adapter(model, tmp_path / "adapter")
    base = dequantised_copy(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        ours, logits = model(TOKENS), theirs(TOKENS).logits
        with theirs.disable_adapter():
            without = theirs(TOKENS).logits
    assert (ours - logits).abs().max() < 1e-4
    assert (ours - without).abs().max() > 0.1, "the adapter must do something"


def test_we_load_an_adapter_made_by_peft(tmp_path):
    save_random_llama(tmp_path)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=4, target_modules=list(ALL_LINEAR), init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = nq.Llama.from_pretrained(tmp_path)
    nq.load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        assert (model(TOKENS) - theirs(TOKENS).logits).abs().max() < 1e-4


def test_save_and_load_is_equal_not_close(tmp_path):
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path)
    nq.inject_lora(model, r=4, alpha=8)
    randomise(model)
    nq.save_adapter(model, tmp_path / "adapter")
    again = nq.Llama.from_pretrained(tmp_path)
    nq.load_adapter(again, tmp_path / "adapter")
    pairs = zip(lora_layers(model).values(), lora_layers(again).values(), strict=True)
    assert all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for a, b in pairs)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), again(TOKENS))


def test_injection_starts_at_the_base_and_trains_only_the_update(tmp_path):
    """B = 0, A as PEFT draws it (uniform within sqrt(1 / n_in)), and gradients for nothing else."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path, load_in_4bit=True)
    with torch.no_grad():
        before = model(TOKENS)
    nq.inject_lora(model, r=16, alpha=32, dropout=0.1)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)
    for name, layer in lora_layers(model).items():
        bound = (1 / layer.in_features) ** 0.5
        assert layer.scaling == 2.0 and not layer.lora_B.any(), name
        assert layer.lora_A.abs().max() <= bound
        assert layer.lora_A.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3 and all("lora_" in name for name in trained)


def test_flat_buffer_holds_every_value_and_gradient(tmp_path):
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path)
    nq.inject_lora(model, r=4, alpha=8)
    randomise(model)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(TOKENS).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    flat = flatten_trainable(model)
    assert flat.numel() == sum(v.numel() for v in values.values())
    model(TOKENS).square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.equal(p, values[name]) and torch.equal(p.grad, gradients[name])
    assert torch.equal(flat.grad, torch.cat([gradients[name].flatten() for name in values]))
    flat.data.zero_()
    assert not any(layer.lora_A.any() for layer in lora_layers(model).values()), "the layers must see the buffer"


def test_dropout_depends_on_row_and_layer_only(tmp_path):
    """The same rows in another batch get the same masks; other rows and other layers get others."""
    save_random_llama(tmp_path)
    model = nq.Llama.from_pretrained(tmp_path)
    nq.inject_lora(model, r=4, alpha=8, dropout=0.5)
    randomise(model)
    model.train()

    def run(rows: list[int]) -> torch.Tensor:
        set_dropout_rows(model, torch.tensor(rows))
        return model(TOKENS[: len(rows)] * 0 + TOKENS[0]).detach()

    first, both, swapped = run([7]), run([7, 8]), run([8, 7])
    assert torch.allclose(first[0], both[0], atol=1e-5) and torch.allclose(both[0], swapped[1], atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 0.01
    seeds = {layer.layer_seed for layer in lora_layers(model).values()}
    assert len(seeds) == 4 * 3, "one for each input of a block: q, k and v share theirs, as gate and up do"
    model.eval()
    assert torch.equal(run([7])[0], run([9])[0]), "no dropout in evaluation"


# ------------------------------------------------------------------------------------------------ which layers


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj|"
    r"o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward"
    r"|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|o_proj|gate_proj|up_proj|down_proj)))"
)  # what its get_peft_regex makes for all linear layers of a text model


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "down_proj"],
        ["model.layers.1.self_attn.q_proj"],
        ["layers.0.mlp.up_proj", "v_proj"],
        ["self_attn.q_proj", "self_attn.k_proj"],
        UNSLOTH,
        r"model\.layers\.[02]\.(self_attn|mlp)\.(q|v|up)_proj",
        r".*\.layers\.[0-1]\..*_proj",
        "all-linear",
    ],
)
def test_targets_are_those_of_peft(tmp_path, targets):
    """Names as a list, a regular expression as a text: what PEFT wraps of the same model."""
    theirs = save_random_llama(tmp_path)
    peft_model = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    expected = [name for name, module in peft_model.base_model.model.named_modules() if hasattr(module, "lora_A")]
    model = load_model(tmp_path)
    inject_lora(model, 4, 8, target_modules=targets)
    assert [*lora_layers(model)] == expected and expected
    again = load_model(tmp_path)
    inject_lora(again, 4, 8, target_modules=[targets] if isinstance(targets, str) else targets)  # as from YAML
    assert [*lora_layers(again)] == expected


@pytest.mark.parametrize(
    "targets, said",
    [
        (["q_proj", "k_pro"], ["'k_pro'", "k_proj?"]),
        (["model.layers.9.self_attn.q_proj"], ["layers.9"]),
        (["lm_head"], ["lm_head is no linear layer of a block"]),
        (["q_proj", "embed_tokens"], ["embed_tokens is no linear layer"]),
        ([".*"], ["is no linear layer of a block"]),
        ([r"model\.(layers"], ["no regular expression"]),
        (["self_attn"], ["self_attn is no linear layer"]),
        (["_proj"], ["'_proj': no layer's name ends so"]),
        ([r"model\.layers\.\d+\.self_attn\.q"], ["no layer's name ends so"]),
        ([], ["lora_target_modules"]),
    ],
)
def test_targets_that_name_nothing_are_refused_with_what_is_near(tmp_path, targets, said):
    save_random_llama(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(UserError) as refused:
        inject_lora(model, 4, 8, target_modules=targets)
    assert all(text in str(refused.value) for text in said), refused.value
    assert not lora_layers(model), "nothing was changed"
