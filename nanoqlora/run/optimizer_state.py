"""The state of AdamW: each rank's part of it (ZeRO, stage 1), and whether a saved state fits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel import collectives
from .optim import clip_gradient, gradient_norm, make_optimizer

BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit state
NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes keeps a part of a state, if saved by one rank
WHOLE, PER_BLOCK = ("exp_avg", "exp_avg_sq", "state1", "state2"), ("absmax1", "absmax2")


def gradient_of(flat: nn.Parameter) -> Tensor:
    """The gradient of the flat buffer, which is always there."""
    assert flat.grad is not None
    return flat.grad


class PartOptimizer:
    """AdamW for this rank's part of the flat buffer, so that a rank keeps 1 / ranks of its state (ZeRO, stage 1).

    Each rank gets the sum of its part of the gradient (`sum_and_clip`), and all parts are put together after a step.
    """

    def __init__(self, name: str, flat: nn.Parameter, num_trained: int, rank: int, ranks: int, **options: Any) -> None:
        """flat: (n,) with n a multiple of ranks * BLOCK, of which the first `num_trained` are in use."""
        self.flat, self.num_trained, self.rank, self.ranks = flat, num_trained, rank, ranks
        self.part = nn.Parameter(flat.data.view(ranks, -1)[rank])
        self.part.grad = gradient_of(flat).view(ranks, -1)[rank]
        self.inner = make_optimizer(name, self.part, **options)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self) -> None:
        self.inner.step()
        if wait := collectives.all_gather(self.flat.data, self.part.data):
            wait()

    def state_dict(self) -> dict[str, Any]:
        """The complete state, as one rank would have it. Every rank has to ask for it."""
        state = dict(self.state[self.part])
        for key in (*WHOLE, *PER_BLOCK):
            if key in state:
                size = self.num_trained if key in WHOLE else math.ceil(self.num_trained / BLOCK)
                state[key] = torch.cat(collectives.gather_tensors(state[key].flatten()))[:size].cpu()
        return {"state": {0: state}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this rank's part of it; another number of ranks may have saved it."""
        state = dict(saved["state"].get(0, {}))
        for key in (*WHOLE, *PER_BLOCK):
            if key in state:
                size = len(self.flat) if key in WHOLE else len(self.flat) // BLOCK
                padded = F.pad(state[key], (0, size - len(state[key])))
                state[key] = padded.view(self.ranks, -1)[self.rank].to(self.flat.device, copy=True)
        self.state[self.part] = state


Optimizer = torch.optim.Optimizer | PartOptimizer


def state_kind(name: str) -> str:
    """Optimizers of one kind can load each other's state."""
    return "8 bits" if "8bit" in name else "32 bits of bitsandbytes" if "32bit" in name else "32 bits of PyTorch"


def as_tensors(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The state of an optimizer as a file of tensors holds it: "0.exp_avg" is exp_avg of its first parameter."""
    found = {i: values | values.get(NESTED, {}) for i, values in state_dict["state"].items()}
    every = {f"{i}.{key}": x for i, values in found.items() for key, x in values.items() if key != NESTED}
    return {name: torch.as_tensor(x).cpu().contiguous() for name, x in every.items()}


def state_problem(optimizer: Optimizer, saved: dict[str, Tensor]) -> str:
    """How a saved state differs from what this optimizer keeps, in words; empty: in nothing.

    Kernels take sizes and types for granted: a moment that is too short would be read, and written, beyond its end.
    """
    inner, shapes = optimizer, [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, PartOptimizer):
        inner, shapes = optimizer.inner, [(optimizer.num_trained,)]
    found = {name: (tuple(x.shape), x.dtype) for name, x in saved.items()}
    wanted: dict[str, Any] = {}
    for i, shape in enumerate(shapes):
        n, moments, step = math.prod(shape), (shape, torch.float32), ((), torch.int64)
        if isinstance(inner, torch.optim.AdamW):
            own: dict[str, Any] = {"step": ((), torch.float32), "exp_avg": moments, "exp_avg_sq": moments}
        elif found.get(f"{i}.state1") == (shape, torch.uint8):  # which few values do not get
            moments, scales = (shape, torch.uint8), ((math.ceil(n / BLOCK),), torch.float32)
            own = {"step": step, "state1": moments, "state2": moments, "absmax1": scales, "absmax2": scales}
            own |= dict.fromkeys(("qmap1", "qmap2"), ((256,), torch.float32))
        else:
            own = {"step": step, "state1": moments, "state2": moments}
        wanted |= {f"{i}.{key}": kind for key, kind in own.items()}
    for name in sorted(found.keys() | wanted.keys()) if found else ():
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)} where {wanted.get(name)} is needed"
        if saved[name].is_floating_point() and not saved[name].isfinite().all():
            return f"{name} has values that are no numbers, or infinite"
    return ""


def load_state(optimizer: Optimizer, saved: dict[str, Tensor]) -> None:
    """Take up a state that `state_problem` finds right. Betas, weight decay and the rest stay as they are now."""
    inner = optimizer.inner if isinstance(optimizer, PartOptimizer) else optimizer
    state: dict[int, dict[str, Any]] = {}
    for name, x in saved.items():
        i, _, key = name.partition(".")
        state.setdefault(int(i), {})[key] = x if isinstance(inner, torch.optim.AdamW) or x.ndim else int(x)
    optimizer.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def sum_and_clip(flat: nn.Parameter, optimizer: Optimizer, max_norm: float) -> Tensor:
    """Sum the flat gradient over the ranks, or this rank's part of it where each rank has a part; then clip it.

    Returns:
        The norm of the complete gradient before, ().
    """
    if not isinstance(optimizer, PartOptimizer):
        return clip_gradient(collectives.sum_over_ranks(gradient_of(flat)), max_norm)
    part = collectives.reduce_scatter(gradient_of(flat))
    norm = collectives.sum_over_ranks(gradient_norm(part).square()).sqrt()
    return clip_gradient(part, max_norm, norm)
