"""Several pieces of work at once, a thread for each.

On a CPU this is faster than many threads within every small operation, which wait for each other, spinning, thousands
of times a second, and on a busy machine wait for one that is not running.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(pieces: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order. As many pieces are under way as PyTorch may use threads, and one result waits at most.

    Within a piece PyTorch has one thread, so that a piece may itself call this.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            under_way = deque[Future[T]]()
            for piece in pieces:
                under_way.append(pool.submit(piece))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
    finally:
        torch.set_num_threads(threads)
