"""What files of others make a process take."""

from pathlib import Path
from typing import Any

from nanoqlora.config import limits
from nanoqlora.config.errors import UserError
from nanoqlora.data.files import find_files
from nanoqlora.data.rows import read_rows
from nanoqlora.weights.tensor_files import load_tensors


def peak() -> int:
    """The most bytes that this process has had in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def read(path: Path) -> str:
    """A file of tensors or of rows; why it is refused, or ""."""
    try:
        if path.suffix in (".pth", ".bin"):
            load_tensors(path)
        else:
            list(read_rows(find_files(path)))
    except UserError as error:
        return str(error)
    return ""


def read_each(right: list[Path], wrong: list[Path], share: int, pipe: Any) -> None:
    """For a process of its own. The pipe gets what `read` says, and for each wrong file the growth of the peak.

    Args:
        right: of every kind, which may need libraries. share: bytes for a file, in place of `limits.BYTES`.
    """
    limits.BYTES = share
    said, grown = [read(path) for path in right], []
    for path in wrong:
        before = peak()
        said.append(read(path))
        grown.append(peak() - before)
    pipe.send((said, grown))
