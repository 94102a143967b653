"""Talk to a model in the terminal: `python -m nanoqlora.chat --model DIR [--adapter DIR] [--load_in_4bit true]`."""

import sys

from .config.commands import Parser, run_command
from .config.errors import UserError
from .config.scripts import script_command
from .parallel import distributed
from .run.generate import answer
from .run.usable import load_for_use
from .weights.checkpoint import open_weights
from .weights.generation import end_ids, read_generation


def main() -> None:
    parser = Parser(prog=script_command("nanoqlora.chat"), description=__doc__)
    parser.add_model_options()
    parser.add_argument("--prompt", help="answer this once and leave")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.temperature < 0 or args.max_new_tokens < 1:
        raise UserError("--temperature must be 0 or more and --max_new_tokens at least 1.")
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
        if question:
            reply(question)


if __name__ == "__main__":
    run_command(main)
