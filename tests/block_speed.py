"""A training step over the blocks of a .gguf file beside one over NF4: `python -m tests.block_speed [options of bench]`

8B has random bytes for blocks, with the types of each tensor as --file_type has them. Prints a line for NF4, one for
the blocks, and their ratio. NF4 is measured twice, around the blocks.
"""

import gc
import sys

import torch

import bench
from nanoqlora.config.load import load_options
from nanoqlora.config.options import BenchOptions
from nanoqlora.gguf.file_types import tensor_types
from nanoqlora.gguf.ggml_blocks import FORMATS
from nanoqlora.gguf.names import tensor_shapes
from nanoqlora.model import ModelConfig
from nanoqlora.parallel import distributed
from nanoqlora.weights import pretrained
from nanoqlora.weights.kept_blocks import BlockLinear


def random_blocks(config: ModelConfig, file_type: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """As `bench.random_model`, its linear layers in blocks of random codes."""
    types, shapes = tensor_types(config, file_type), tensor_shapes(config)

    def kept(name: str, where: torch.device) -> BlockLinear:
        fmt, (n_out, n_in) = FORMATS[types[name]], shapes[name]
        packed = torch.randint(256, (n_out, fmt.num_bytes(n_in)), dtype=torch.uint8, device=where)
        if where.type != "meta":
            first, end = fmt.halves
            d = 1e-5 if types[name] == "Q6_K" else 1e-4  # weights of about 0.02
            scales = torch.full((len(packed), n_in // fmt.block_size, (end - first) // 2), d, device=where)
            packed.view(n_out, -1, fmt.block_bytes)[..., first:end] = scales.half().view(torch.uint8)
        return BlockLinear(packed, types[name])

    def make(name: str, shape: torch.Size) -> torch.Tensor:
        w = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
        return w.to(device, dtype)

    return pretrained.empty_model(config, make, load_in_4bit=False, dtype=dtype, device=device, kept=kept)


def main() -> None:
    file_type = "Q4_K_M"
    if "--file_type" in sys.argv:
        at = sys.argv.index("--file_type")
        file_type = sys.argv[at + 1].upper()
        del sys.argv[at : at + 2]
    args, place, found = load_options(BenchOptions), distributed.start(), []
    nf4 = bench.random_model
    for name, model in (("NF4", nf4), (file_type, None), ("NF4", nf4)):
        bench.random_model = model or (lambda config, dtype, device: random_blocks(config, file_type, dtype, device))
        figures = bench.measure(args, *place)
        found.append(figures["step_ms"])
        shown = ("step_ms", "step_ms_min", "tokens_per_second", "base_gib", "predicted_gib", "memory/peak_gib")
        print(name, {key: figures[key] for key in figures if key in shown or key.startswith("active")}, flush=True)
        print(name, figures["breakdown_ms"], flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    before, blocks, after = found
    print(
        f"{file_type}: {blocks / min(before, after) - 1:+.1%} of the step over NF4 (which varied by "
        f"{abs(before - after) / before:.1%})"
    )


if __name__ == "__main__":
    main()
