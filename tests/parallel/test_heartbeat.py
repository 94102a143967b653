"""Ranks that fall silent are noticed and named; ranks that are done, or only slow to begin, are not."""

import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from paths import ROOT

from nanoqlora.parallel import heartbeat
from nanoqlora.parallel.heartbeat import Heartbeat


@pytest.fixture
def store(monkeypatch) -> dist.TCPStore:
    """As torchrun keeps one for its ranks; and everybody in a hurry."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    monkeypatch.setattr(heartbeat, "PAUSE_S", 0.05)
    monkeypatch.setattr(heartbeat, "LIMIT_S", 1.0)
    return server


def watch_for(seconds: float, ended: list[int]) -> float:
    """How long it took until somebody ended, at most `seconds`."""
    start = time.monotonic()
    while not ended and time.monotonic() - start < seconds:
        time.sleep(0.02)
    return time.monotonic() - start


def test_a_rank_that_falls_silent_is_named_by_the_others(store, capfd):
    ended: list[int] = []
    ranks = [Heartbeat(rank, 3, ended.append) for rank in range(3)]
    assert watch_for(2.0, ended) >= 2.0, "all are alive, for longer than the limit"
    ranks[1].stop(done=False)  # as if it had been killed
    assert 0.8 < watch_for(60.0, ended) < 60
    assert ended[0] == 1
    line = capfd.readouterr().err.splitlines()[0]
    assert line.startswith("error: rank ") and "rank 1 has given no sign of life for 1 s" in line
    for rank in ranks:
        rank.stop()


def test_a_rank_that_is_done_is_not_missed(store, capfd):
    ended: list[int] = []
    first, second = (Heartbeat(rank, 2, ended.append) for rank in range(2))
    time.sleep(0.2)
    first.stop()
    assert watch_for(2.0, ended) >= 2.0 and not capfd.readouterr().err
    second.stop()


@pytest.mark.parametrize("count_seen_before", [0.0, 0.6], ids=["at-once", "a-while-before"])
def test_a_store_out_of_reach_ends_a_rank(count_seen_before, store, monkeypatch, capfd):
    """Its host is cut off: nothing comes back, and nothing says so. No rank is blamed for what nobody could hear.

    The other rank's count was last seen `count_seen_before` seconds before the cut.
    """
    ended: list[int] = []
    real = dist.TCPStore.add
    cut_off: list[bool] = []
    monkeypatch.setattr(dist.TCPStore, "add", lambda *args: time.sleep(3) if cut_off else real(*args))
    watching, other = Heartbeat(1, 2, ended.append), Heartbeat(0, 2, lambda code: None)
    assert watch_for(1.5, ended) >= 1.5
    other.stop(done=False)
    assert watch_for(count_seen_before, ended) >= count_seen_before
    cut_off.append(True)
    assert 0.8 < watch_for(60.0, ended) < 60
    assert "rank 1 ends: the store on 127.0.0.1, where rank 0 is, cannot be reached for 1 s" in capfd.readouterr().err
    watching.stopped.set()


def test_a_launcher_that_was_stopped_is_waited_for_on_one_host(store, monkeypatch, capfd):
    """Ctrl-Z stops torchrun and its store, not its ranks. When it goes on, nobody has been silent."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    ended: list[int] = []
    real = dist.TCPStore.add
    stopped_until = [0.0]

    def add(*args: object) -> int:
        time.sleep(max(0.0, stopped_until[0] - time.monotonic()))
        return real(*args)

    monkeypatch.setattr(dist.TCPStore, "add", add)
    ranks = [Heartbeat(rank, 2, ended.append) for rank in range(2)]
    assert watch_for(0.5, ended) >= 0.5
    stopped_until[0] = time.monotonic() + 3
    assert watch_for(4.0, ended) >= 4.0, capfd.readouterr().err
    ranks[1].stop(done=False)
    assert watch_for(60.0, ended) < 60, "the watch goes on"
    ranks[0].stop()


def test_a_launcher_that_was_killed_ends_the_ranks_of_its_host(store, monkeypatch, capfd):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    ended: list[int] = []
    rank = Heartbeat(0, 1, ended.append)
    assert watch_for(0.5, ended) >= 0.5

    def add(*_: object) -> int:
        raise dist.DistNetworkError("Connection reset by peer")

    monkeypatch.setattr(dist.TCPStore, "add", add)
    assert 0.8 < watch_for(60.0, ended) < 60
    assert "the store on 127.0.0.1, where rank 0 is, cannot be reached for 1 s" in capfd.readouterr().err
    rank.stop(done=False)


BOTH_RANKS = """
import os, time
import torch.distributed as dist
from nanoqlora.parallel import heartbeat

heartbeat.PAUSE_S, heartbeat.LIMIT_S = 0.05, 1.0
server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
ranks = [heartbeat.Heartbeat(rank, 2) for rank in range(2)]
print("begun", flush=True)
for _ in range(60):  # 3 s of its own time
    time.sleep(0.05)
"""


def test_a_process_that_was_stopped_takes_its_own_pause_for_nobodys_silence():
    with subprocess.Popen([sys.executable, "-c", BOTH_RANKS], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        for _ in range(2):
            time.sleep(0.3)
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)
            process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=240) == 0


LEAVES_FROM_WITHIN_THE_STORE = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from nanoqlora.parallel.heartbeat import Heartbeat

server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
dist.TCPStore.add = lambda store, *_: store.wait(["never"], timedelta(seconds=1))

class Slow:
    def __del__(self):
        time.sleep(2)

slow = Slow()  # of the things that Python takes apart at its end
Heartbeat(0, 1)
time.sleep(1.5)
sys.exit(3)
"""


def test_a_process_may_end_while_its_thread_is_in_the_store():
    """A thread that comes back from C++ when Python is being taken apart would abort the process: exit code -6."""
    ended = subprocess.run([sys.executable, "-c", LEAVES_FROM_WITHIN_THE_STORE], cwd=ROOT, capture_output=True)
    assert ended.returncode == 3, ended.stderr.decode()
