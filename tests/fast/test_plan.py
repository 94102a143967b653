"""What each block keeps under a limit of memory: as much as fits, and the cheapest sacrifice first."""

import pytest
import torch
from tiny import save_random_llama

import nanoqlora as nq
from nanoqlora.fast.memory import base_bytes, choose_keeps, step_bytes
from nanoqlora.fast.sharding_choice import embedding_waits
from nanoqlora.ops.fast.scratch import scratch
from nanoqlora.parallel.host_memory import HostEmbedding, embedding_to_host

N, L = 512, 7
COST = {"all": 0, "mlp_host": 1, "no_mlp": 2, "input": 3}  # what a block that keeps no more has to do again


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_random_llama(folder, num_hidden_layers=L)
    model = nq.Llama.from_pretrained(folder, load_in_4bit=True)
    nq.inject_lora(model, r=8, alpha=8)
    return model


@pytest.mark.parametrize("host_bytes", [0, 2**40])
def test_smaller_limits_are_met_at_higher_cost(model, host_bytes):
    most = step_bytes(model, N, ["all"] * L)
    least = step_bytes(model, N, ["input"] * L)
    before = 0
    for budget in range(most, least - 1, (least - most) // 40):
        keeps = choose_keeps(model, N, budget, host_bytes=host_bytes)
        assert step_bytes(model, N, keeps) <= budget, (budget, keeps)
        cost = sum(COST[keep] for keep in keeps)
        assert cost >= before, "a smaller limit may not be cheaper"
        before = cost
    assert choose_keeps(model, N, most, host_bytes=host_bytes) == ["all"] * L
    assert choose_keeps(model, N, 0, host_bytes=host_bytes) == ["input"] * L, "the least, if nothing fits"


def test_nothing_is_multiplied_twice_while_the_host_has_room(model):
    """Every other block may move gate and up, and not the last, whose backward pass comes at once."""
    wanted = ["mlp_host", "all", "mlp_host", "all", "mlp_host", "all", "all"]
    budget = step_bytes(model, N, wanted)
    assert choose_keeps(model, N, budget, host_bytes=2**40) == wanted
    assert "mlp_host" not in choose_keeps(model, N, budget, host_bytes=0)
    one = choose_keeps(model, N, budget, host_bytes=int(1.5 * 2 * model.config.intermediate_size * N * 4))
    assert one.count("mlp_host") == 1


def test_the_way_back_from_the_host_takes_two_places(model):
    """One block's gate and up leave the device, and two such tensors are there while they come back."""
    n = 16 * N  # so many tokens that the peak is inside a block and not in the loss
    gate_up = 2 * model.config.intermediate_size * n * 4
    moved = step_bytes(model, n, ["mlp_host", *["all"] * (L - 1)]) - step_bytes(model, n, ["all"] * L)
    assert moved == 2 * gate_up - gate_up


def test_the_embedding_waits_in_host_memory_where_inputs_do(tmp_path):
    """Then its bytes are no part of the base; the model gives the same, and a head that is the same tensor stays."""
    assert embedding_waits("offload", 0) and embedding_waits("auto", 1)
    assert not any(embedding_waits(level, 0) for level in ("auto", True, False))
    tokens = torch.arange(20)[None]
    for tied in (False, True):
        folder = tmp_path / str(tied)
        save_random_llama(folder, tie_word_embeddings=tied)
        model = nq.Llama.from_pretrained(folder)
        table, before = model.model.embed_tokens.weight.nbytes, model(tokens)
        less = base_bytes(model, "replicate", 1) - base_bytes(model, "replicate", 1, host_embedding=True)
        embedding_to_host(model)
        assert isinstance(model.model.embed_tokens, HostEmbedding) != tied and less == (0 if tied else table)
        assert torch.equal(model(tokens), before)


def test_scratch_is_one_memory():
    """What is asked for next lies where the last lay, unless it is larger."""
    cpu = torch.device("cpu")
    first, second = scratch(6, 7, torch.float64, cpu), scratch(3, 4, torch.float64, cpu)
    assert first.data_ptr() == second.data_ptr() and second.shape == (3, 4)
    assert scratch(100, 100, torch.float64, cpu).shape == (100, 100)
    assert scratch(1, 1, torch.float32, cpu).data_ptr() != scratch(1, 1, torch.float64, cpu).data_ptr()
