"""How the trained values move: AdamW over one flat buffer, the learning rate of a step, and the clip.

The optimizers themselves are PyTorch's and bitsandbytes'. The schedule is a function of the step number, with no
state of its own to save or lose.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed


def learning_rate_at(step: int, num_steps: int, warmup: int, peak: float, scheduler: str, min_ratio: float) -> float:
    """The rate of step `step` of `num_steps`, counted from 0.

    Linear warm-up from 0: step 0 uses 0 / warmup of the peak, step `warmup` all of it. After that `cosine` goes along
    half a wave to min_ratio * peak, `linear` to 0, and the constant kinds stay; `constant` has no warm-up.
    """
    if scheduler == "constant":
        return peak
    if step < warmup:
        return peak * step / warmup
    if scheduler == "constant_with_warmup":
        return peak
    done = (step - warmup) / max(1, num_steps - warmup)
    if scheduler == "linear":
        return peak * (1 - done)
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done)))


def loraplus_groups(model: nn.Module, ratio: float) -> list[dict[str, Any]]:
    """LoRA+ (arXiv:2402.12354): every B learns `ratio` times as fast as what else is trained.

    The parameters are views of the flat buffer, so its norm, its clip and its sum over ranks hold for both groups.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if not name.endswith("lora_B")]},
        {"params": [p for name, p in trained if name.endswith("lora_B")], "lr_ratio": ratio},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The rate of the next step; a group with an `lr_ratio` takes so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def make_optimizer(
    name: str,
    flat: nn.Parameter,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    groups: list[dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """AdamW on the flat buffer. Its learning rate is set before each step.

    Args:
        name: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit.
        groups: views of the buffer that learn at rates of their own, in its place.
    """
    params = groups or [flat]
    options = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(params, fused=name.endswith("fused"), **options)
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return (kinds | {"paged_adamw_32bit": optim.PagedAdamW32bit})[name](params, **options)


BLOCK = 256  # values that share a scale in bitsandbytes' 8-bit state
WHOLE, PER_BLOCK = ("exp_avg", "exp_avg_sq", "state1", "state2"), ("absmax1", "absmax2")


class PartOptimizer:
    """AdamW for this rank's part of the flat buffer, so that a rank keeps 1 / ranks of its state (ZeRO, stage 1).

    Each rank gets the sum of its part of the gradient (`sum_and_clip`), and all parts are put together after a step.
    """

    def __init__(self, name: str, flat: nn.Parameter, num_trained: int, rank: int, ranks: int, **options: Any) -> None:
        """flat: (n,) with n a multiple of ranks * BLOCK, of which the first `num_trained` are in use."""
        self.flat, self.num_trained, self.rank, self.ranks = flat, num_trained, rank, ranks
        self.part = nn.Parameter(flat.data.view(ranks, -1)[rank])
        self.part.grad = flat.grad.view(ranks, -1)[rank]
        self.inner = make_optimizer(name, self.part, **options)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self) -> None:
        self.inner.step()
        wait = distributed.all_gather(self.flat.data, self.part.data)
        if wait:
            wait()

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as one rank would have it. Every rank has to ask for it."""
        state = dict(self.state[self.part])
        for key in (*WHOLE, *PER_BLOCK):
            if key in state:
                size = self.num_trained if key in WHOLE else math.ceil(self.num_trained / BLOCK)
                state[key] = torch.cat(distributed.everyones(state[key].flatten()))[:size].cpu()
        return {"state": {0: state}, "param_groups": self.inner.state_dict()["param_groups"]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take this rank's part of it; another number of ranks may have saved it."""
        state = dict(saved["state"][0])
        state |= state.pop("__bnb_optimizer_quant_state__", {})  # where bitsandbytes has it, if saved whole
        for key in (*WHOLE, *PER_BLOCK):
            if key in state:
                size = len(self.flat) if key in WHOLE else len(self.flat) // BLOCK
                whole = F.pad(state[key], (0, size - len(state[key])))
                state[key] = whole.view(self.ranks, -1)[self.rank].to(self.flat.device, copy=True)
        self.state[self.part] = state


def state_bytes(name: str) -> float:
    """GPU memory of an optimizer's two moments for each trained value; a scale for 256 values in 8 bits."""
    return 2 + 2 * 4 / 256 if name.endswith("8bit") else 8


def state_kind(name: str) -> str:
    """Optimizers of one kind can take up each other's state."""
    return "8 bits" if "8bit" in name else "32 bits of bitsandbytes" if "32bit" in name else "32 bits of PyTorch"


def state_problem(optimizer: torch.optim.Optimizer | PartOptimizer, saved: Any) -> str:
    """How a saved state differs from what this optimizer keeps, in words; empty: in nothing.

    Kernels take sizes and types for granted: a moment that is too short would be read, and written, beyond its end.
    """
    is_part = isinstance(optimizer, PartOptimizer)
    params = [] if is_part else [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [(optimizer.num_trained,)] if is_part else [tuple(p.shape) for p in params]
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or (states and set(states) != set(range(len(shapes)))):
        return f"it does not hold the state of {len(shapes)} parameters"
    for i, state in states.items():
        nested = state.get("__bnb_optimizer_quant_state__", {}) if isinstance(state, dict) else None
        if not isinstance(nested, dict):
            return f"the state of parameter {i} is no map"
        found = {key: _kind(value) for key, value in (state | nested).items() if key != "__bnb_optimizer_quant_state__"}
        n, moments = math.prod(shapes[i]), (shapes[i], torch.float32)
        if isinstance(optimizer.inner if is_part else optimizer, torch.optim.AdamW):
            wanted = {"step": ((), torch.float32), "exp_avg": moments, "exp_avg_sq": moments}
        elif found.get("state1") == (shapes[i], torch.uint8):  # which few values do not get
            moments, scales = (shapes[i], torch.uint8), ((math.ceil(n / BLOCK),), torch.float32)
            wanted = {"step": int, "state1": moments, "state2": moments, "absmax1": scales, "absmax2": scales}
            wanted |= dict.fromkeys(("qmap1", "qmap2"), ((256,), torch.float32))
        else:
            wanted = {"step": int, "state1": moments, "state2": moments}
        for key in sorted(found.keys() | wanted.keys() if found else ()):
            if found.get(key) != wanted.get(key):
                return f"{key} of parameter {i} is {found.get(key)} where {wanted.get(key)} is needed"
    return ""


def _kind(value: Any) -> Any:
    """Shape and dtype of a tensor, the type of anything else."""
    return (tuple(value.shape), value.dtype) if torch.is_tensor(value) else type(value)


def load_state(optimizer: torch.optim.Optimizer | PartOptimizer, saved: dict[str, Any]) -> None:
    """Take up a state that `state_problem` finds right. Betas, weight decay and the rest stay as they are now."""
    if not isinstance(optimizer, PartOptimizer):
        saved = {"state": saved["state"], "param_groups": optimizer.state_dict()["param_groups"]}
    optimizer.load_state_dict(saved)


def sum_and_clip(flat: nn.Parameter, optimizer: torch.optim.Optimizer | PartOptimizer, max_norm: float) -> Tensor:
    """Sum the flat gradient over the ranks, or this rank's part of it where each rank has a part; then clip it.

    Returns:
        The norm of the whole gradient before, ().
    """
    if not isinstance(optimizer, PartOptimizer):
        return clip_gradient(distributed.sum_over_ranks(flat.grad), max_norm)
    part = distributed.sum_to_parts(flat.grad)
    norm = distributed.sum_over_ranks(gradient_norm(part).square()).sqrt()
    return clip_gradient(part, max_norm, norm)


def gradient_norm(grad: Tensor) -> Tensor:
    """The norm of norms of 4096 values each: on a CPU one float32 sum over 40 million squares loses 0.3 %."""
    whole = grad.numel() // 4096 * 4096
    return torch.cat((grad[:whole].view(-1, 4096).norm(dim=1), grad[whole:].norm()[None])).norm()


def clip_gradient(grad: Tensor, max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Scale a gradient down to `max_norm` where it is longer, in place; 0 leaves it. Returns its norm before.

    norm: if it is known, or is that of more than this part.
    """
    norm = gradient_norm(grad) if norm is None else norm
    if max_norm > 0:
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
