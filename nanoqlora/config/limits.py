"""A limit of memory for what others' files and templates make this process do."""

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BYTES = 1 << 30
STATM = Path("/proc/self/statm")  # begins with the pages of this process
_one = threading.RLock()  # one at a time, as the limit is of the process; a forked one has its own
os.register_at_fork(after_in_child=lambda: globals().update(_one=threading.RLock()))


@contextmanager
def bounded_memory(more: int = 0) -> Iterator[None]:
    """In the block this process gets BYTES and `more` beyond what it has, then MemoryError. Only Linux counts them."""
    with _one:
        free = resource.getrlimit(resource.RLIMIT_AS)
        try:
            if STATM.exists():
                used = int(STATM.read_text().split()[0]) * resource.getpagesize()
                known = [limit for limit in free if limit != resource.RLIM_INFINITY]  # of the user's, such as ulimit -v
                resource.setrlimit(resource.RLIMIT_AS, (min([used + BYTES + more, *known]), free[1]))
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, free)
