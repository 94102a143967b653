"""How the trained values move: AdamW over one flat buffer, the learning rate of a step, and the clip.

The optimizers themselves are PyTorch's and bitsandbytes'. The schedule is a function of the step number, with no
state of its own to save or lose.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn


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


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """The rate of the next step; a group with an `lr_ratio` takes so many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def make_optimizer(
    name: str, flat: nn.Parameter, *, groups: list[dict[str, Any]] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """AdamW on the flat buffer. Its learning rate is set before each step.

    Args:
        name: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit or paged_adamw_32bit.
        groups: views of the buffer that learn at rates of their own, in its place.
        options: betas, eps, weight_decay.
    """
    params: list[Any] = [flat] if groups is None else [*groups]
    options |= {"lr": 0.0}
    if name.startswith("adamw_torch"):
        return torch.optim.AdamW(params, fused=name.endswith("fused"), **options)
    from bitsandbytes import optim

    kinds = {"adamw_8bit": optim.AdamW8bit, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return (kinds | {"paged_adamw_32bit": optim.PagedAdamW32bit})[name](params, **options)


def state_bytes(name: str) -> float:
    """GPU memory of an optimizer's two moments for each trained value; a scale for 256 values in 8 bits."""
    return 2 + 2 * 4 / 256 if name.endswith("8bit") else 8


def gradient_norm(grad: Tensor) -> Tensor:
    """The norm of norms of 4096 values each: on a CPU one float32 sum over 40 million squares loses 0.3 %."""
    n = grad.numel() // 4096 * 4096
    return torch.cat((grad[:n].view(-1, 4096).norm(dim=1), grad[n:].norm()[None])).norm()


def clip_gradient(grad: Tensor, max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Scale a gradient down to `max_norm` where it is longer, in place; 0 leaves it. Returns its norm before.

    norm: if it is known, or is that of more than this part.
    """
    norm = gradient_norm(grad) if norm is None else norm
    if max_norm > 0:
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
