from typing import Any

from tour.one_file import AdamW


def state_of(optimizer: AdamW) -> dict[str, Any]:
    return {"t": optimizer.t, "m": optimizer.m, "v": optimizer.v}


def restore(optimizer: AdamW, state: dict[str, Any]) -> None:
    optimizer.t, optimizer.m, optimizer.v = state["t"], state["m"], state["v"]
