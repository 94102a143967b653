from torch import Tensor


def mean_kl(p_logits: Tensor, q_logits: Tensor) -> float:
    log_p, log_q = p_logits.double().log_softmax(1), q_logits.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().item()
