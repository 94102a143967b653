def gathered(num_blocks: int) -> list[int]:
    slots, found = [0, 1], list[int]()
    forward = [(i, i + 1) for i in range(num_blocks)]
    backward = [(i, i - 1) for i in reversed(range(num_blocks))]
    for block, following in forward + backward:
        for wanted in (block, following):
            if 0 <= wanted < num_blocks and slots[wanted % 2] != wanted:
                slots[wanted % 2] = wanted
                found.append(wanted)
    return found
