"""llama.cpp's own quantizer of whole files, as a witness for the types and bytes that export_gguf.py writes.

The library in xllamacpp leaves this function out; the one in an npm package has it. Where that is not installed, the
tests that ask it are skipped. To have it, in the project's folder:

    npm install --no-save --prefix node @node-llama-cpp/linux-x64@3.22.1
    python tests/helpers/llama_quantize.py MODEL-F32.gguf OUT.gguf TYPE [THREADS]

It runs as a process of its own, because this library and xllamacpp's have the same names inside.
"""

import ctypes
import struct
import subprocess
import sys
import time
from pathlib import Path

LIBRARIES = Path(__file__).parents[2] / "node" / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins" / "linux-x64"
FILE_TYPES = {  # include/llama.h
    **{"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9},
    **{"Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18},
    **{"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "IQ4_NL": 25, "IQ4_XS": 30},
}


class Params(ctypes.Structure):
    """llama_model_quantize_params; larger than it, and the library reads the front."""

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]


def quantize_file(source: Path, out: Path, file_type: str, threads: int = 1) -> float:
    """Let llama.cpp write `out` from a file of floats. Returns the seconds that it took."""
    words = [sys.executable, __file__, source, out, file_type, str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


def main(source: str, out: str, file_type: str, threads: str = "1") -> None:
    open_library = lambda name: ctypes.CDLL(str(next(LIBRARIES.glob(name))), mode=ctypes.RTLD_GLOBAL)  # noqa: E731
    open_library("libggml-base.so*")
    ggml = open_library("libggml.*so*")
    llama = open_library("libllama.*so*")
    ggml.ggml_backend_load_all_from_path(str(LIBRARIES).encode())
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = Params
    params = llama.llama_model_quantize_default_params()
    struct.pack_into("<ii", params.bytes, 0, int(threads), FILE_TYPES[file_type])
    start = time.perf_counter()
    failed = llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    print(f"{time.perf_counter() - start:.3f}")
    sys.exit(failed)


if __name__ == "__main__":
    main(*sys.argv[1:])
