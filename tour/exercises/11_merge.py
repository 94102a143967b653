"""Chapter 11: how far is one distribution from another?"""

from torch import Tensor


def mean_kl(p_logits: Tensor, q_logits: Tensor) -> float:
    """The mean over N tokens of KL(p, q) in nats; p = softmax(p_logits), q = softmax(q_logits), both (N, V)."""
    raise NotImplementedError


def test_mean_kl() -> None:
    import torch

    from nanoqlora.export.certificate import compare

    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(100, 50, generator=g) for _ in range(2))
    expected, _, _ = compare((p, torch.eye(50)), (q, torch.eye(50)), torch.zeros(100, dtype=torch.int64))
    assert abs(mean_kl(p, q) - expected) < 1e-4
    assert abs(mean_kl(p, p + 3.0)) < 1e-6, "logits that all move by the same number are the same distribution"
    assert mean_kl(p, q) != mean_kl(q, p), "it is not a distance: the order matters"
