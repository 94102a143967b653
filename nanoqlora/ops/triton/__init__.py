"""The fast twins that are GPU kernels, written in Triton. Imported only where a GPU runs them.

Each file has the name of its reference in `ops/` and the same functions. Read first: `elementwise.py`.
"""
