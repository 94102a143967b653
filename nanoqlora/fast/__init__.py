"""A faster training step in place of plain blocks, faster answers, and the memory that a step takes.

    block.py     a block with a hand-written backward pass         graphs.py             blocks as CUDA graphs
    memory.py    the memory of a step, and what blocks may save    sharding_choice.py    replicated or sharded
    stats.py     memory and speed, measured                        decode.py             answers, token by token

Not here: kernels (`ops/`), several GPUs (`parallel/`). Read first: `block.py`.
"""
