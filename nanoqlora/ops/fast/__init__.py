"""The fast twins that use existing kernels: PyTorch's and bitsandbytes', on CPU and GPU.

Each file has the name of its reference in `ops/` and the same functions. `ops/__init__.py` chooses between them.
"""
