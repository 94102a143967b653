"""What the training loop works with."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config.schema import Config
from ..data.batches import Samples
from ..data.packing import BatchSchedule
from ..model import Llama
from ..ops import Segments
from ..parallel.fsdp import BlockStore
from ..weights.adapter_files import Trained
from ..weights.checkpoint import fingerprint, open_weights
from .early_stopping import Progress
from .log import Metrics
from .optimizer_state import PartOptimizer


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    rank: int
    ranks: int
    device: torch.device
    model: Llama
    body: Callable[[torch.Tensor, Segments], torch.Tensor]  # model.model, or the same from recorded graphs
    samples: Samples
    held_out: Samples
    plan: BatchSchedule
    flat: torch.nn.Parameter  # every trained value, and its gradient
    optimizer: torch.optim.Optimizer | PartOptimizer
    metrics: Metrics
    store: BlockStore | None  # where the base is spread over the ranks
    before: dict[str, Any] = field(default_factory=dict)  # what the untrained model could do, for the report
    progress: Progress = field(default_factory=Progress)
    base: str = ""  # `fingerprint` of the base model's weights

    def __post_init__(self) -> None:
        self.base = fingerprint(open_weights(self.config.base_model))

    @property
    def trained(self) -> Trained:
        """What an adapter keeps of its training."""
        return Trained(self.config.load_in_4bit, self.model.model.embed_tokens.weight.dtype, self.base)


def plan_fingerprint(samples: Samples, plan: BatchSchedule) -> str:
    """A hash of everything that decides which tokens stand in which step."""
    return hashlib.sha256((samples.fingerprint + plan.fingerprint()).encode()).hexdigest()
