"""A faster training step in place of plain blocks, and the memory that it takes.

    block.py     a block with a hand-written backward pass         graphs.py             blocks as CUDA graphs
    memory.py    the memory of a step, and what blocks may save    sharding_choice.py    replicated or sharded
    stats.py     memory and speed, measured

Not here: kernels (`ops/`), several GPUs (`parallel/`). Read first: `block.py`.
"""
