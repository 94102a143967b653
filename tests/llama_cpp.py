"""llama.cpp as an outside witness; how it is reached stands in nanoqlora/llama_cpp.py."""

from nanoqlora.llama_cpp import LlamaCpp, quantize_chunk

__all__ = ["LlamaCpp", "quantize_chunk"]
