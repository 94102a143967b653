from torch import Tensor

MicroBatch = tuple[Tensor, Tensor, Tensor]


def accumulate(w: Tensor, micro_batches: list[MicroBatch]) -> None:
    num_targets = sum(int(is_supervised.sum()) for _, _, is_supervised in micro_batches)
    for x, y, is_supervised in micro_batches:
        loss = (x @ w - y)[is_supervised].square().sum()
        (loss / num_targets).backward()
