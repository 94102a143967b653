"""Ctrl-C and SIGTERM: a run ends after the step under way, with a checkpoint."""

import os
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.errors import Stopped
from ..parallel import distributed
from .state import Run


@contextmanager
def told_to_stop(rank: int) -> Iterator[list[bool]]:
    """A list that Ctrl-C and SIGTERM fill. In a thread, which gets no signals, it stays empty."""
    stop: list[bool] = []

    def stop_after_step(number: int, frame: object) -> None:
        """The run ends after the step under way, with a checkpoint. Once more ends it at once."""
        stop.append(True)
        signal.signal(number, signal.default_int_handler)
        if rank == 0:  # not by print, which may be what was interrupted
            os.write(2, b"\nstopping after this step, with a checkpoint; once more ends at once\n")

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, stop_after_step) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_early(run: Run, step: int) -> None:
    """End a run that got a signal, after its checkpoint."""
    distributed.stop()
    words = shlex.join(("--resume_from_checkpoint", f"{Path(run.config.output_dir)}/checkpoint-{step}"))
    raise Stopped(f"stopped after step {step} of {len(run.plan)}; it is saved. To go on: {words}")
