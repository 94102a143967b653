"""The same model, faster: what a training step uses in place of plain blocks, and the memory that this takes.

    block.py     a block with its backward pass written by hand    graphs.py             blocks as CUDA graphs
    memory.py    what a step needs, and what each block may keep   sharding_choice.py    replicated or sharded
    stats.py     memory and speed, measured

Not here: kernels (`ops/`), several GPUs (`parallel/`). Read first: `block.py`.
"""
