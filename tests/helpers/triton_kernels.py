"""Triton's kernels on any machine: compiled on a GPU, else run by Triton's interpreter in NumPy, program by program.

The interpreter computes the same arithmetic at the same addresses, in another schedule and without races.
"""

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from nanoqlora.ops import lora
from nanoqlora.ops.lora_parts import RowDropout
from nanoqlora.ops.triton import elementwise, fp8, ggml, loss, mlp_backward, nf4
from nanoqlora.ops.triton import lora as lora_triton

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
KERNELS = (elementwise, fp8, ggml, lora_triton, loss, mlp_backward, nf4)
U = 2.0**-8  # unit roundoff of bfloat16: 8 significant bits
STEP = 2.0**-23  # of a float32 sum whose additions truncate, as a tensor core's may


def interpret(patch: pytest.MonkeyPatch) -> None:
    """Run the kernels by the interpreter until the patch is undone, with what Triton 3.6's interpreter lacks.

    That is: bfloat16 in `tl.dot`, its correct rounding and that of e4m3, and loop bounds under NumPy 2.4.
    """
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def widen(bits: np.ndarray) -> np.ndarray:
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widen(data)
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, rounding)

    def create_dot(self, a, b, d, *rest):
        a, b = (
            interpreter.TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, d, *rest)

    def patch_lang_tensor(tensor, scope) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setenv("TRITON_INTERPRET", "1")  # read by what the interpreter imports
    patch.setattr(interpreter, "_convert_float", convert_float)
    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    for module in [*KERNELS, *(m for name, m in sys.modules.items() if name.startswith("triton.language"))]:
        for name, function in list(vars(module).items()):
            if isinstance(function, triton.JITFunction):
                patch.setattr(module, name, interpreter.InterpretedFunction(function.fn))


class Case:
    """Random bfloat16 operands of one shape, and the mask in float64."""

    def __init__(self, B: int, T: int, n_in: int, R: int, p: float = 0.0) -> None:
        self.g = torch.Generator().manual_seed(B * T + n_in + R)
        self.N, self.n_in, self.R = B * T, n_in, R
        self.x, self.dx = self.random(self.N, n_in), self.random(self.N, n_in)
        self.A, self.dxa = self.random(R, n_in), self.random(self.N, R)
        seed = torch.randint(-(2**62), 2**62, (B,), generator=self.g)
        self.dropout = RowDropout(p, lora.token_numbers(seed, T).flatten().to(DEVICE)) if p else None
        self.mask = torch.ones(self.N, n_in, dtype=torch.float64, device=DEVICE)
        if p:
            self.mask = lora.dropout_mask((B, T, n_in), p, seed, torch.float64).view(self.N, n_in).to(DEVICE)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.g).bfloat16().to(DEVICE)


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
