"""Notice when a rank is dead, and report which.

When a rank is killed its connections close, and torchrun ends the other ranks. But when a host loses its network or a
process hangs, the other ranks wait in a collective, on a GPU forever. So a thread of every rank increments a counter
in torchrun's store and reads the counters of the others. A rank whose counter does not change while the store answers
LIMIT_S times, a second apart, is reported, and this process ends. The main thread waits in a collective and cannot do
that. Answers are counted, not seconds, because no rank is dead in a run that was stopped (Ctrl-Z) and continued.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PAUSE_S, LIMIT_S = 1.0, 30.0
LEFT = -(10**12)  # added to the counter of a rank that has ended in order


class Heartbeat:
    """Increments this rank's counter and watches those of the others, until `stop`."""

    def __init__(self, rank: int, ranks: int, end: Callable[[int], None] = os._exit) -> None:
        """end: called with the exit code."""
        self.rank, self.ranks, self.limit_s, self.end = rank, ranks, LIMIT_S, end
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
        self.counts, self.quiet = [0] * ranks, [0] * ranks  # each rank's counter, and answers since it changed
        self.unanswered, self.store_is_dead = 0, False  # pauses since the store answered
        self.stopped, self.done = threading.Event(), False
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop, done=False)

    def stop(self, done: bool = True) -> None:
        """End the threads: a thread that is inside the store at the end of the process would abort it.

        done: this rank ends in order, so the others must not report it.
        """
        self.done |= done
        self.stopped.set()
        for thread in self.threads:
            thread.join(2 * PAUSE_S)

    def _talk(self) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # restarted ranks have new counters
        try:
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.limit_s))
            while not self.stopped.wait(PAUSE_S):
                store.add(f"alive/{attempt}/{self.rank}", 1)
                for other in range(self.ranks):
                    count = store.add(f"alive/{attempt}/{other}", 0)
                    self.quiet[other] = 0 if count != self.counts[other] or count < 0 else self.quiet[other] + 1
                    self.counts[other] = count
                self.unanswered = 0
            if self.done:
                store.add(f"alive/{attempt}/{self.rank}", LEFT)
        except RuntimeError:
            self.store_is_dead = True

    def _watch(self) -> None:
        while not self.stopped.wait(PAUSE_S):
            self.unanswered += 1
            silent = [other for other in range(self.ranks) if self.quiet[other] * PAUSE_S > self.limit_s]
            # On one host the network cannot fail: a store that does not answer is then a torchrun that was stopped.
            if self.unanswered * PAUSE_S > self.limit_s and (self.store_is_dead or not self.one_host):
                found = f"the store on {self.host}, where rank 0 is, cannot be reached"
            elif silent and not self.stopped.is_set():
                found = f"rank {', '.join(map(str, silent))} has given no sign of life"
            else:
                continue
            print(
                f"error: rank {self.rank} ends: {found} for {self.limit_s:.0f} s. Was it killed, or its host cut off? "
                f"Start again with --auto_resume_from_checkpoints true.",
                file=sys.stderr,
                flush=True,
            )
            return self.end(1)
