"""Chapter 10: two slots, and what is gathered when.

Block i goes to slot i % 2. Before a block computes, it must be in its slot; then the block that is needed next is
gathered, if it is in no slot: i + 1 in the forward pass, i - 1 in the backward pass. The backward pass begins with the
last block.
"""


def gathered(num_blocks: int) -> list[int]:
    """The blocks that are gathered in one forward and backward pass, in order; the slots hold blocks 0 and 1 before."""
    raise NotImplementedError


def test_gathered() -> None:
    from tour.recompute import events_of_micro_batch

    for num_blocks in (2, 3, 6, 33):
        assert gathered(num_blocks) == [
            block for kind, block, _ in events_of_micro_batch(num_blocks) if kind == "gather"
        ]
