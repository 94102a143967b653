"""Files of tensors that may come from anybody: damaged ones are refused, and of a pickle only tensors are read."""

import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config.errors import UserError
from ..config.limits import bounded_memory


@contextmanager
def reading(path: Path, advice: str = "Download or copy it again") -> Iterator[None]:
    """Turn what the readers of such files raise into a line for the user."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of PyTorch's, in several lines, about other files than tensors
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a damaged file, they raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:  # its text advises to run the file
            reason = "more than tensors is in it, or it is damaged; nothing of it was run"
        raise UserError(f"{path}: not a complete file of tensors ({reason}). {advice}.") from error


def load_tensors(path: Path, mmap: bool = False) -> dict[str, Tensor]:
    """All tensors of a .safetensors, .pth or .bin file. Raises UserError: it is damaged, or holds something else."""
    with reading(path), bounded_memory(2 * path.stat().st_size):
        is_pickle = path.suffix != ".safetensors"
        if zipfile.is_zipfile(path) and sum(p.file_size for p in zipfile.ZipFile(path).filelist) > path.stat().st_size:
            raise ValueError("it unpacks to more than it is, and PyTorch compresses nothing")
        state = torch.load(path, "cpu", weights_only=True, mmap=mmap) if is_pickle else load_file(path)
    if not isinstance(state, dict) or not all(isinstance(w, Tensor) and isinstance(k, str) for k, w in state.items()):
        raise UserError(f"{path}: holds something else than named tensors. Download or copy it again.")
    for name, w in state.items():
        is_full = w.layout == torch.strided and w.device.type == "cpu" and w.nbytes <= w.untyped_storage().nbytes()
        if not is_full or w.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            found = f"{name} is of type {str(w.dtype)[6:]}, and not of a floating-point type, or not there in full"
            raise UserError(f"{path}: {found}. Save it again.")
    return {name: w.detach() for name, w in state.items()}
