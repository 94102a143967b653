"""Which tokens of a chat the model has to learn to write.

In a chat the mask covers what the assistant says and the token that ends its turn. That token matters most: a model
that is never told to write it never learns to stop. In ChatML, with "^" below the tokens that count:

    <|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\nA pirate.<|im_end|>\\n
                                                                      ^^^^^^^^^^^^^^^^^^^^^

A chat template is a program, and does not say which part of its text is whose. So we let it run on the start of the
conversation: the messages before an answer, with the header for the answer behind them, must come out as the first part
of the whole text. Where that part ends, the answer begins. The whole text is encoded at once and never in parts, so the
ids are those that other programs get from the same template. A token that reaches from a header into an answer does not
count: the model is given it. Read next: prepare.py.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from os.path import commonprefix

from .chat_template import Messages
from .cli import UserError
from .tokenizer import Tokenizer

ENDS = ("turn", "last", "all", "none")  # end tokens that count: of every trained turn, of the last, of all turns, none


class Written:
    """A conversation as its template writes it, and where in the text and its tokens each turn is."""

    def __init__(self, tok: Tokenizer, render: Callable[[Messages, bool], str], messages: Messages, mark: str) -> None:
        self.tok, self.render, self.messages, self.mark = tok, render, messages, mark
        self.text = render(messages, False)
        self.ids, self.starts = tok.encode_guarded(self.text, mark)
        self.controls = set(tok.special_tokens.values())

    def token_at(self, character: int) -> int:
        """The first token that starts at this character of the text or behind it."""
        return bisect_left(self.starts, self.tok.width(self.text[:character].replace(self.mark, "")))

    def shared(self, count: int, header: bool = False) -> tuple[int, bool]:
        """How far the text of the first messages, with the header of an answer, is that of all; is it to its end?"""
        if count == len(self.messages):
            return len(self.text), True
        start = self.render(self.messages[:count], header)
        length = len(start) if self.text.startswith(start) else len(commonprefix([start, self.text]))
        return length, length == len(start)

    def begin_of(self, i: int) -> int | None:
        """The character at which what message i says begins; None where the template leaves such messages out."""
        message = self.messages[i]
        if message["role"] == "assistant":
            begin, is_whole = self.shared(i, header=True)
            if not is_whole:
                raise hidden(i)
            return begin
        # No template writes only the header of a question: put something findable in place of the question.
        before, _ = self.shared(i) if i else (0, True)
        start = self.render([*self.messages[:i], {**message, "content": self.mark}], False)
        begin = start.find(self.mark, before)
        if begin < 0:
            return None
        if not self.text.startswith(start[:begin]):
            raise hidden(i + 1)
        return begin

    def end_token(self, i: int, begin: int, turn_end: int) -> int | None:
        """The token that ends turn i: the first end token behind the content; behind tool calls, the last one."""
        message = self.messages[i]
        ends = [t for t in range(self.token_at(begin), self.token_at(turn_end)) if self.ids[t] in self.controls]
        if not message.get("tool_calls"):
            content = message.get("content") or ""
            content = (content[-1]["text"] if isinstance(content, list) else content).strip()  # templates strip it too
            found = self.text.find(content, begin, turn_end)
            content_end = self.token_at(begin if found < 0 else found + len(content))
            ends = [t for t in ends if t >= content_end][:1]
        return ends[-1] if ends else None


def hidden(count: int) -> UserError:
    return UserError(
        f"the chat template writes the first {count} messages in another way when more follow. So the "
        "answers cannot be found in its text. Give a plainer template with chat_template_jinja."
    )


def encode_chat(
    tok: Tokenizer,
    render: Callable[[Messages, bool], str],
    messages: Messages,
    mark: str,
    trained: Sequence[bool],
    train_on_eos: str,
    check: Callable[[str, dict[int, tuple[int, int]]], None],
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it counts.

    Args:
        render: the chat template, from messages and whether to add the header of an answer.
        messages: guarded by `mark`, so that what they say becomes no special token.
        trained: for each message, whether it shall be learnt.
        train_on_eos: one of `ENDS`.
        check: called with the text and, for the turns that were looked for, the characters from where one begins to
            where it ends.
    Raises:
        UserError: the template hides where an answer begins, or puts no token behind the last one.
    """
    written = Written(tok, render, messages, mark)
    mask = [False] * len(written.ids)
    last_trained = max((i for i, is_trained in enumerate(trained) if is_trained), default=-1)
    spans: dict[int, tuple[int, int]] = {}
    for i, message in enumerate(messages):
        if not trained[i] and train_on_eos != "all":
            continue
        begin = written.begin_of(i)
        if begin is None:
            continue
        turn_end, is_whole = written.shared(i + 1)
        spans[i] = begin, turn_end
        end = written.end_token(i, begin, turn_end)
        # Llama-3's first template writes the header of an answer behind whatever comes last. So the text goes on in
        # another way behind a turn, and only the token at its end tells where that is.
        if not is_whole and (end is None or message.get("tool_calls")):
            raise hidden(i + 1)
        if end is None and i == last_trained:
            raise UserError(
                "the chat template puts no special token behind the last answer. The model would never learn to "
                "stop. Use a template whose end token this tokenizer has, or a built-in one by its name under "
                "chat_template."
            )
        if trained[i]:
            first, stop = written.token_at(begin), written.token_at(turn_end) if end is None else end
            mask[first:stop] = [True] * (stop - first)
        if end is not None:
            mask[end] = train_on_eos in ("turn", "all") or train_on_eos == "last" and i == last_trained
    check(written.text, spans)
    return written.ids, mask
