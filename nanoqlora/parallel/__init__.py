"""Several processes, one run, and memory beyond one GPU's.

    distributed.py    start and end under torchrun        collectives.py    sums and gathers over the ranks
    fsdp.py           the frozen base over the ranks      host_memory.py    tensors that wait in the host's memory
    heartbeat.py      notice a rank that died             devices.py        allocators, and which dtype computes

Not here: the optimizer's state in parts (`run/optimizer_state.py`). Read first: `fsdp.py`.
"""
