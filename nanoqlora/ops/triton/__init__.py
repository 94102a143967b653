"""The fast twins that are GPU kernels, written in Triton. Imported only where a GPU runs them.

`elementwise.py` is the twin of `ops/block_parts.py` and `lora.py` that of `ops/lora_parts.py`; the other files have the
name of their reference. Functions, shapes and dtypes are the same. Read first: `elementwise.py`.
"""
