"""Notice when a rank is gone, and say which.

A rank that is killed takes its connections along, and torchrun ends the others. But a host that is cut off, or a
process that hangs, leaves the rest waiting in an exchange, where a GPU waits forever. So a thread of every rank counts
up in the store that torchrun keeps for them, and looks at how the others count; who stands still for LIMIT_S is
named, and this process ends. A main thread that waits for an exchange cannot do that itself.
"""

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PAUSE_S, LIMIT_S = 1.0, 30.0
LEFT = -(10**12)  # added to the count of a rank that is done


class Heartbeat:
    """Counts for this rank, and watches the others, until `stop`."""

    def __init__(self, rank: int, ranks: int, end: Callable[[int], None] = os._exit) -> None:
        """end: is given the exit code."""
        self.rank, self.ranks, self.limit_s, self.end = rank, ranks, LIMIT_S, end
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.counts, self.last_change = [0] * ranks, [time.monotonic()] * ranks
        self.last_answer, self.stopped, self.done = time.monotonic(), threading.Event(), False
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._watch)]
        for thread in self.threads:
            thread.start()
        atexit.register(self.stop, done=False)

    def stop(self, done: bool = True) -> None:
        """End the threads: in one that is inside the store, the end of the process would be an abort.

        done: leave in order, so that the others do not miss this rank.
        """
        self.done |= done
        self.stopped.set()
        for thread in self.threads:
            thread.join(2 * PAUSE_S)

    def _talk(self) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # ranks that were restarted count anew
        try:
            store = dist.TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=self.limit_s))
            while not self.stopped.wait(PAUSE_S):
                store.add(f"alive/{attempt}/{self.rank}", 1)
                for other in range(self.ranks):
                    count = store.add(f"alive/{attempt}/{other}", 0)
                    if count != self.counts[other] or count < 0:
                        self.counts[other], self.last_change[other] = count, time.monotonic()
                self.last_answer = time.monotonic()
            if self.done:
                store.add(f"alive/{attempt}/{self.rank}", LEFT)
        except RuntimeError:
            return  # the store is gone, as `_watch` will see

    def _watch(self) -> None:
        while not self.stopped.wait(PAUSE_S):
            # How long a rank is silent is what the store said of it last: without an answer nobody knows.
            known = self.last_answer
            silent = [other for other in range(self.ranks) if known - self.last_change[other] > self.limit_s]
            if time.monotonic() - known > self.limit_s:
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
