"""Linear layers whose frozen weight stays in the blocks of its GGUF file, as it is there (`keep_gguf_blocks`).

Quantised to NF4, the weights of a Q4_K_M file would be rounded a second time, and the adapter would learn to work with
values that no file has. Over the file's own blocks it learns for that file: with the adapter as a second file
(`export_gguf.py --adapter`), llama.cpp computes with the weights of training, bit for bit.

A weight in blocks is one tensor of bytes, `packed`, which is rebuilt for each matmul as NF4 is. Types may differ from
layer to layer. A layer that the file has in 16 or 32 bits is a plain one, as with `adapter: lora`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..config.errors import UserError
from ..gguf.ggml_blocks import FORMATS, halves
from ..gguf.names import gguf_name
from ..qlora import QLoRALinear
from .checkpoint import GGUFWeights


class BlockLinear(QLoRALinear):
    """As `QLoRALinear`, with W in one of GGUF's formats. Buffer: packed (n_out, bytes of a row) uint8."""

    def __init__(self, packed: Tensor, ggml_type: str) -> None:
        fmt = FORMATS[ggml_type]
        super().__init__(torch.empty(len(packed), packed.shape[1] // fmt.block_bytes * fmt.block_size, device="meta"))
        del self.weight
        self.ggml_type = ggml_type
        self.register_buffer("packed", packed)

    def rebuild(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """As `QLoRALinear.rebuild`."""
        if self.dense is not None:
            return self.dense[rows].to(dtype)
        packed = self.packed[rows]
        w = torch.empty(len(packed), self.in_features, dtype=dtype, device=packed.device)
        ops.dequantize_ggml_into(packed, self.ggml_type, w)
        return w

    def rebuild_into(
        self, out: Tensor, update: tuple[Tensor, Tensor] | None = None, row_scale: Tensor | None = None
    ) -> None:
        """As `QLoRALinear.rebuild_into`."""
        ops.dequantize_ggml_into(self.packed, self.ggml_type, out, update and (*update, 1.0), row_scale)

    def frozen(self, x: Tensor) -> Tensor:
        """As `QLoRALinear.frozen`; W is rebuilt, however few the rows are."""
        return F.linear(x, self.rebuild(x.dtype))


def kept_layer(weights: GGUFWeights, name: str, device: torch.device) -> BlockLinear | None:
    """The linear layer with a weight of this name, as the file has it; without values on the meta device.

    Returns:
        None for a weight that is in 16 or 32 bits there.
    Raises:
        UserError: a scale in its blocks is NaN or infinite.
    """
    info = weights.file.tensors[gguf_name(name)]
    if FORMATS[info.ggml_type].block_size == 1:
        return None
    if device.type == "meta":
        rows = info.shape[0], info.num_bytes // info.shape[0]
        return BlockLinear(torch.empty(rows, dtype=torch.uint8, device=device), info.ggml_type)
    packed = weights.file.raw_hf(name).to(device, copy=True)  # the file may be replaced while the run lasts
    if not torch.isfinite(halves(packed, info.ggml_type)).all():
        raise UserError(f"{weights.where}: tensor {name} holds NaN or infinite scales; training on it would give NaN.")
    return BlockLinear(packed, info.ggml_type)
