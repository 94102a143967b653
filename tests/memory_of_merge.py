"""How much memory of its own a merge takes: `python -m tests.memory_of_merge MODEL ADAPTER OUT [nf4 | original]`.

Prints the peak above the process before the first tensor, in bytes. Pages of mapped files are the system's.
"""

import re
import sys
import threading
import time
from pathlib import Path

import torch

from nanoqlora.export.forms import Merged
from nanoqlora.export.merge import write_weights
from nanoqlora.weights.adapter import read_updates
from nanoqlora.weights.checkpoint import open_weights


def own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def main() -> None:
    model, adapter, out, base = *sys.argv[1:4], *(sys.argv[4:] or ["nf4"])
    merged = Merged(
        open_weights(model),
        read_updates(Path(adapter)),
        base == "nf4",
        torch.bfloat16,
        torch.bfloat16,
        torch.device("cpu"),
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    start, peak, done = own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], own_memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    write_weights(merged, Path(out), int(5e9))
    done.set()
    thread.join()
    print(peak[0] - start)


if __name__ == "__main__":
    main()
