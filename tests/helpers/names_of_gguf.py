"""The inverse of `gguf_name`, for tests that compare files with folders."""

import re

from nanoqlora.gguf.names import NAMES


def hf_name(gguf_name: str) -> str:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`."""
    number = (re.findall(r"^blk\.(\d+)\.", gguf_name) or [""])[0]
    general = gguf_name.replace(f"blk.{number}.", "blk.N.").removesuffix(".weight")
    (name,) = [hf for hf, (gguf, _) in NAMES.items() if gguf == general]
    return name.replace(".N.", f".{number}.") + ".weight"
