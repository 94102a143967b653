"""The fast twins that need no kernels of our own: PyTorch's and bitsandbytes' operations, on CPU and GPU.

Each file has the name of its reference in `ops/` and the same functions. `ops/__init__.py` chooses between them.
"""
