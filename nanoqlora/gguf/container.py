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

# Types of metadata values in the order of their numbers in a file, each with the letter by which `struct` packs it;
# strings and arrays have no fixed size. An array of u32 is called "u32[]" below.
STRUCT_CODES = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?"}
STRUCT_CODES |= {"string": "", "array": "", "u64": "Q", "i64": "q", "f64": "d"}
VALUE_TYPES = list(STRUCT_CODES)
Metadata = dict[str, tuple[str, Any]]  # key -> (type, value): ("u32", 32), ("string", "llama"), ("i32[]", [1, 3, 3])
