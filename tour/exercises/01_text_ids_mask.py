"""Chapter 1: from the tokens of a chat and its mask to the targets.

At position i the model has read the tokens 0 to i and predicts token i + 1. So the target at position i is token i + 1
if that token is supervised, else IGNORED. The last position has no next token.
"""

IGNORED = -100


def targets(ids: list[int], supervised: list[bool]) -> list[int]:
    """As many as there are ids."""
    raise NotImplementedError


def test_targets() -> None:
    from pathlib import Path

    import torch

    from nanoqlora.data.batches import Sample, collate
    from nanoqlora.tokenizer.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    for question, answer in (("What is 17 times 24?", "408, ye sharp-eyed swab!"), ("", "Arr"), ("Aye?", "")):
        given, wanted = tokenizer.encode(question + "\n"), [*tokenizer.encode(answer), tokenizer.eos_id]
        ids, supervised = given + wanted, [False] * len(given) + [True] * len(wanted)
        batch = collate([[Sample(ids, supervised)]])
        expected = torch.full((len(ids),), IGNORED)
        expected[batch.supervised] = batch.targets
        assert targets(ids, supervised) == expected.tolist()
