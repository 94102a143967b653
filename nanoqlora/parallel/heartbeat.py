"""Notice when a rank is gone, and say which.

A rank that is killed takes its connections along, and torchrun ends the others. But a host that is cut off, or a
process that hangs, leaves the rest waiting in an exchange, where a GPU waits forever. So a thread of every rank counts
up in the store that torchrun keeps for them, and looks at how the others count; who stands still while the store
answers LIMIT_S times, a second apart, is named, and this process ends. A main thread that waits for an exchange cannot
do that itself. Answers are counted, not seconds, because a run that was stopped (Ctrl-Z) and goes on has lost nobody.
"""

import atexit
import os
import sys
import threading
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
        self.one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(ranks)
        self.counts, self.quiet = [0] * ranks, [0] * ranks  # how each counts, and for how many answers it has not
        self.unanswered, self.store_is_gone = 0, False  # for how many pauses
        self.stopped, self.done = threading.Event(), False
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
                    self.quiet[other] = 0 if count != self.counts[other] or count < 0 else self.quiet[other] + 1
                    self.counts[other] = count
                self.unanswered = 0
            if self.done:
                store.add(f"alive/{attempt}/{self.rank}", LEFT)
        except RuntimeError:
            self.store_is_gone = True

    def _watch(self) -> None:
        while not self.stopped.wait(PAUSE_S):
            self.unanswered += 1
            silent = [other for other in range(self.ranks) if self.quiet[other] * PAUSE_S > self.limit_s]
            # On one host no cable can be cut: a store that is silent, but there, is a torchrun that was stopped.
            if self.unanswered * PAUSE_S > self.limit_s and (self.store_is_gone or not self.one_host):
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
