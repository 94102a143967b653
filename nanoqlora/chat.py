"""Talk to a model in the terminal: `python -m nanoqlora.chat --model DIR [--adapter DIR] [--load_in_4bit true]`."""

import sys

from .config.load import answer_early, load_options
from .config.options import ChatOptions

if __name__ == "__main__":
    answer_early(ChatOptions)  # --help and wrong settings, before PyTorch is imported

from .config.commands import run_command
from .config.errors import UserError
from .parallel import distributed
from .run.generate import answer
from .run.usable import load_for_use
from .weights.checkpoint import end_ids, open_weights, read_generation


def main() -> None:
    args = load_options(ChatOptions)
    distributed.start()
    ends = end_ids(read_generation(open_weights(args.model)))
    used = load_for_use(args)
    for note in used.notes:
        print(note, file=sys.stderr)
    messages = [{"role": "system", "content": args.system}] if args.system else []

    def reply(question: str) -> None:
        messages.append({"role": "user", "content": question})
        pieces = []
        for piece in answer(used, messages, args.max_new_tokens, args.temperature, args.seed + len(messages), ends):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})

    if args.prompt is not None:
        reply(args.prompt)
        return
    print("Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: {error}, so the question is not text. Give it in UTF-8.") from error
        if question:
            reply(question)


if __name__ == "__main__":
    run_command(main)
