"""llama.cpp's own programs llama-quantize and llama-imatrix, where they are on the PATH: they are built with it."""

import shutil
import subprocess

import pytest


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skips a test where one of them is missing."""
    missing = [name for name in programs if not shutil.which(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not on the PATH: {', '.join(missing)}, which come with llama.cpp")


def run(*words: object) -> str:
    """What a program prints."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr
