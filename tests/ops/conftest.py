"""Kernels that run on any machine."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[None]:
    """Without a GPU, Triton's interpreter runs the kernels until the last test of the file."""
    from triton_kernels import interpret

    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            interpret(patch)
        yield
