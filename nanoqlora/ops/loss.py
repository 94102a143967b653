"""The language-model head and its loss. The reference, in plain PyTorch.

Cross-entropy: the negative logarithm of the probability that the model gives to the target token, in nats,

    loss = logsumexp(logits) - logits[target]          logits = hidden weight^T
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of each token.

    Args:
        hidden: (N, D), the supervised positions only. weight: (V, D), the head, frozen. targets: (N,) int64.
    Returns:
        (N,) float32, in nats (float64 for float64).
    """
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of the tokens' losses, (), with a gradient for `hidden`."""
    return token_losses(hidden, weight, targets).sum()
