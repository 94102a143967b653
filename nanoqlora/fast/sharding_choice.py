"""Whether the frozen base is replicated or sharded over the ranks, and what waits in the host's memory."""

from ..model import Llama
from ..parallel.fsdp import Sharding
from .block import Keep
from .memory import base_bytes, step_bytes
from .stats import GIB


def embedding_waits(checkpointing: bool | str, offload: int) -> bool:
    """Whether the embedding stays in the host's memory: where memory is so short that other things do already."""
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
    """Where the base goes: on every rank if then nothing has to be computed twice for lack of memory, else spread.

    Args:
        model: empty, with LoRA injected. N, optimizer_bytes: as for `step_bytes`. budget: of the smallest device.
        wanted: replicate or full_shard where that is decided. offload_all: and so is host memory for every block.
        on_gpu: so that memory of the host is other memory.
    Returns:
        The mode; of how many blocks a rank keeps its part in host memory, because even spread they are too large; and
        why, for the user.
    """
    L, level = model.config.num_hidden_layers, str(checkpointing).lower()

    def needed(keep: Keep, sharding: Sharding, offload: int = 0) -> int:
        keeps: list[Keep] = [keep] * (L - 1) + ["input" if keep == "offload" else keep]
        base = base_bytes(model, sharding, ranks, offload, embedding_waits(checkpointing, offload))
        return step_bytes(model, N, keeps, optimizer_bytes, base)

    most: dict[str, Keep] = {"true": "input", "offload": "offload"}
    whole = needed(most.get(level, "all"), "replicate")
    needs = f"a step with the base on every rank needs {whole / GIB:.1f} of {budget / GIB:.1f} GiB"
    least = (most | {"false": "all"}).get(level, "input")
    fewest = next((n for n in range(L + 1) if needed(least, "full_shard", n) <= budget), L)
    offload = L if offload_all else fewest * on_gpu
    fits = wanted == "auto" and not offload_all and whole <= budget
    if wanted == "replicate" or fits or (ranks == 1 and not offload):
        return "replicate", 0, f"every rank holds the whole base: {needs}"
    why = f"each of {ranks} ranks holds its part of the base: {needs}"
    if offload:
        why += f"; the parts of {offload} of {L} blocks stay in host memory"
    return "full_shard", offload, why
