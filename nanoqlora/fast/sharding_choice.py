"""Whether the frozen base is replicated or sharded over the ranks, and what is offloaded to host memory."""

from ..model import Llama
from ..parallel.fsdp import Sharding
from .block import Keep
from .memory import base_bytes, step_bytes
from .stats import GIB


def embedding_waits(checkpointing: bool | str, offload: int) -> bool:
    """Whether the embedding stays in host memory: where other tensors are offloaded already."""
    return offload > 0 or checkpointing == "offload"


def choose_sharding(
    model: Llama,
    N: int,
    ranks: int,
    budget: int,
    checkpointing: bool | str,
    optimizer_bytes: float = 8,
    wanted: str = "auto",
    offload_all: bool = False,
    on_gpu: bool = True,
) -> tuple[Sharding, int, str]:
    """Replicate the base if then nothing has to be recomputed for lack of memory, else shard it.

    Args:
        model: empty, with LoRA injected. N, optimizer_bytes: as for `step_bytes`. budget: of the smallest device.
        wanted: auto, or the user's choice. offload_all: the user wants all shards in host memory.
        on_gpu: whether host memory is other memory than the device's.
    Returns:
        The mode; the number of blocks whose shard is in host memory, because even sharded the base is too large; and
        the reason, for the user.
    """
    L, level = model.config.num_hidden_layers, str(checkpointing).lower()

    def needed(keep: Keep, sharding: Sharding, offload: int = 0) -> int:
        keeps: list[Keep] = [keep] * (L - 1) + ["input" if keep == "offload" else keep]
        base = base_bytes(model, sharding, ranks, offload, embedding_waits(checkpointing, offload))
        return step_bytes(model, N, keeps, optimizer_bytes, base)

    most: dict[str, Keep] = {"true": "input", "offload": "offload"}
    replicated = needed(most.get(level, "all"), "replicate")
    needs = f"a step with the base on every rank needs {replicated / GIB:.1f} of {budget / GIB:.1f} GiB"
    least: Keep = "all" if level == "false" else most.get(level, "input")
    fewest = next((n for n in range(L + 1) if needed(least, "full_shard", n) <= budget), L)
    offload = L if offload_all else fewest * on_gpu
    fits = wanted == "auto" and not offload_all and replicated <= budget
    if wanted == "replicate" or fits or (ranks == 1 and not offload):
        return "replicate", 0, f"the base is replicated on every rank: {needs}"
    why = f"the base is sharded over {ranks} ranks: {needs}"
    if offload:
        why += f"; the shards of {offload} of {L} blocks stay in host memory"
    return "full_shard", offload, why
