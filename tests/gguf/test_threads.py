"""in_threads: results in order, few at once, one PyTorch thread within, and all as before when something fails."""

import threading
import time
from functools import partial

import pytest
import torch

from nanoqlora.gguf.threads import in_threads


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_order_and_how_many_at_once(threads: int):
    now, most, lock = 0, 0, threading.Lock()

    def piece(i: int) -> tuple[int, int]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01 * (i % 3))
        with lock:
            now -= 1
        return i, torch.get_num_threads()

    found = list(in_threads(partial(piece, i) for i in range(20)))
    assert found == [(i, 1) for i in range(20)]
    assert most == threads and torch.get_num_threads() == threads


def test_no_result_is_made_long_before_it_is_wanted(threads: int):
    started = []
    results = in_threads(partial(started.append, i) for i in range(50))
    next(results)
    time.sleep(0.05)
    assert len(started) <= threads + 1
    results.close()
    assert torch.get_num_threads() == threads


def test_faults_come_out(threads: int):
    def fail() -> None:
        raise ValueError("the third")

    pieces = [lambda: 0, lambda: 0, fail, lambda: 0]
    with pytest.raises(ValueError, match="the third"):
        list(in_threads(pieces))
    assert torch.get_num_threads() == threads
