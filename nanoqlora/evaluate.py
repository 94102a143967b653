"""Loss and perplexity on a data file: `python -m nanoqlora.evaluate --model DIR --data FILE --out nll.jsonl`.

The loss is the mean over all supervised tokens of minus the logarithm of their probability, in nats; perplexity is
its exponential: between how many equally likely tokens the model hesitates.
"""

import json
import math
import sys
from types import ModuleType
from typing import Any

from .config.load import answer_early, load_options
from .config.options import EvaluateOptions

if __name__ == "__main__":
    answer_early(EvaluateOptions)  # --help and wrong settings, before PyTorch is imported

from .config.commands import run_command
from .config.errors import UserError
from .config.files import check_file, write_text
from .config.splits import split_and_part, split_without_effect
from .data.files import find_files
from .data.prepare import Encoding, InvalidRows, read_samples
from .parallel import distributed
from .run import from_python
from .run.scoring import mean_loss, score_samples
from .run.usable import load_for_use


def main() -> None:
    args = load_options(EvaluateOptions)
    if args.out:
        check_file(args.out, "--out")
    distributed.start()
    used = load_for_use(args)
    limit = used.model.config.max_position_embeddings
    split, part = split_and_part(args.split)
    encoding = Encoding(used.prompt_format, used.tokenizer, limit, "raise", part)
    try:
        reading = read_samples(find_files(args.data, split=split), encoding)
    except InvalidRows as error:
        kind = used.prompt_format.type if args.adapter and used.prompt_format else ""
        advice = f" Its rows have to be of the type that {args.adapter} was trained on: {kind}."
        raise UserError(f"--data: {error}{advice * bool(kind)}") from error
    lines = [split_without_effect(args.data, args.split), *(f"{args.data}: {x}" for x in reading.describe_notes())]
    for line in filter(None, lines):
        print(line, file=sys.stderr)
    scores = score_samples(used.model, reading.samples)
    loss = mean_loss(scores)
    if not math.isfinite(loss):
        raise UserError(f"model {args.model}: its loss on {args.data} is {loss}, so its weights are damaged.")
    tokens = sum(tokens for _, tokens in scores)
    for note in used.notes:
        print(note, file=sys.stderr)
    print(f"loss {loss:.4f}  perplexity {math.exp(loss):.3f}  tokens {tokens}")
    if args.out:
        write_text(args.out, "".join(json.dumps({"nll": nll, "tokens": tokens}) + "\n" for nll, tokens in scores))


class _Callable(ModuleType):
    """An import of this module puts it in the place of the function `nq.evaluate`, so it can be called like that."""

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, float]:
        return from_python.evaluate(*arguments, **options)


if __name__ == "__main__":
    run_command(main)
else:
    sys.modules[__name__].__class__ = _Callable
