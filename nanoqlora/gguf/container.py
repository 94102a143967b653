"""What a GGUF file consists of.

A GGUF file is a small header, a dictionary, a table of tensors, and then the tensors themselves:

    "GGUF"                                     4 bytes
    version, tensor count, metadata count      u32, u64, u64, little-endian like everything below
    metadata                                   per entry: key, type of the value, value
    tensor table                               per tensor: name, dimensions, type, offset into the data
    zeros up to a multiple of 32
    data                                       each tensor, then zeros up to a multiple of 32

Strings are their length as u64 and their bytes. Names and sizes stand before the data, so a writer has to know them
all before the first weight, but never needs more than a few tensors in memory: see `writer.py`.

The tokenizer travels in the metadata too; so do all numbers of config.json, as `llama.*` (`config.py`).

Read next: `reader.py`, `names.py`, and `ggml_blocks.py` for what is inside the tensors.
"""

from typing import Any

MAGIC = b"GGUF"
VERSION = 3  # version 2 is the same for what we use
ALIGNMENT = 32  # of a file that does not say otherwise; ours never does

# Types of metadata values, each with its number in a file. An array of u32 is called "u32[]" below.
VALUE_TYPES = {
    **{"u8": 0, "i8": 1, "u16": 2, "i16": 3, "u32": 4, "i32": 5, "f32": 6, "bool": 7},
    **{"string": 8, "array": 9, "u64": 10, "i64": 11, "f64": 12},
}
TYPE_NAMES = {number: kind for kind, number in VALUE_TYPES.items()}
STRUCT_CODES = {  # how `struct` packs those of a fixed size
    **{"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?"},
    **{"u64": "Q", "i64": "q", "f64": "d"},
}
Metadata = dict[str, tuple[str, Any]]  # key -> (type, value): ("u32", 32), ("string", "llama"), ("i32[]", [1, 3, 3])


def align(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment
