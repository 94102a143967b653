"""Which tokens of a chat the model has to learn to write.

In a chat the mask covers the text of the assistant and the token that ends its turn. That token matters most: a model
that does not learn to write it does not stop. In ChatML, with "^" below the supervised tokens:

    <|im_start|>user\\nWho are you?<|im_end|>\\n<|im_start|>assistant\\nA pirate.<|im_end|>\\n
                                                                      ^^^^^^^^^^^^^^^^^^^^^

A chat template is a program, and does not tell which part of its text is whose. But the texts of messages are traced
(tokenizer/traced.py), so we know where each of them is. What the model is given in front of an answer is known from
letting the template run on the messages before, with the header of an answer behind them: where that text is the
beginning of the complete one, the answer begins at its end. Some templates refuse to write such a beginning, or write
it in another way; then the answer begins behind the last such header in front of its text. The complete text is encoded
at once and never in parts, so the ids are those that other programs get from the same template. A token that reaches
from a header into an answer is not supervised: the model is given it. Read next: data/prepare.py.
"""

from bisect import bisect_left
from collections.abc import Iterable
from os.path import commonprefix

from ..config.errors import UserError
from ..tokenizer.chat_template import Messages, guard
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.traced import plain, spans_of
from .messages import Chat, Note

Spans = dict[int, tuple[int, int]]  # number of a message -> first and last character of its turn


class Written:
    """A conversation as its template writes it, and where in the text and its tokens each turn is."""

    def __init__(self, tok: Tokenizer, template: str | None, chat: Chat, roles: Iterable[str]) -> None:
        self.tok, self.template, self.messages, self.tools = tok, template, chat.messages, chat.tools
        guarded, tools = guard(chat.messages, chat.tools, roles)
        text = tok.render_chat(guarded, False, template, tools)
        self.ids, self.starts = tok.encode_guarded(text)
        self.text, self.spans = plain(text), spans_of(text)
        self.notes: set[str] = set()  # what the user should know
        self.controls = set(tok.special_tokens.values())

    def render(self, messages: Messages, header: bool = False) -> str | None:
        """The text of other messages, not traced, which is faster; None where the template refuses them."""
        return self.tok.render_if_possible(messages, header, self.template, self.tools)

    def token_at(self, character: int) -> int:
        """The first token that starts at this character of the text or after it."""
        return bisect_left(self.starts, self.tok.width(self.text[:character]))

    def place(self, i: int) -> tuple[int, int] | None:
        """Start and end of the texts of message i, its calls too; None where the template leaves it out.

        Of a message that is written twice, the last place.
        """
        found = None
        for start, stop, source in reversed(self.spans):
            if source == i:
                found = (start, found[1] if found else stop)
            elif found:
                break
        return found

    def begin_of(self, i: int) -> int | None:
        """The character at which the text of message i begins; None where the template leaves such messages out."""
        place = self.place(i)
        if self.messages[i]["role"] != "assistant":
            return place and place[0]
        headers = self.tok.answer_headers(self.template, self.tools)
        start = self.render(self.messages[:i], header=True)
        if start is not None and not self.text.startswith(start):
            start = None
        if start is not None and (place is None or headers and start.endswith(headers[0])):
            return len(start)
        if place is None:
            found = f"message {i + 1}: the chat template leaves this answer out, or changes it beyond recognition"
            raise UserError(f"{found}. Give a plainer template with chat_template_jinja.")
        before = max((stop for _, stop, source in self.spans if source != i and stop <= place[0]), default=0)
        between = self.text[before : place[0]]
        header = next((header for header in headers if header in between), None)
        if header is None:
            if start is not None and i:
                return len(start)
            if headers:
                return place[0]
            # A template that has no header, as Mistral's: what ends a question is a special token.
            end = self.tok.find_special(between) if i else None
            return before + (end or len(between.rstrip()))
        if header != headers[0]:
            missing = headers[0].removeprefix(header)
            self.notes.add(
                f"the answer does not begin with {missing!r}, with which the generation prompt of the chat template "
                "ends: training and prompts differ. Put it into the answers, or change chat_template_jinja"
            )
        return before + between.rindex(header) + len(header)

    def end_of_turn(self, i: int) -> tuple[int, bool]:
        """Where the text of turn i ends, and whether that is exact; else it is where the next message's text begins."""
        if i == len(self.messages) - 1:
            return len(self.text), True
        start = self.render(self.messages[: i + 1])
        if start is not None and self.text.startswith(start):
            return len(start), True
        place = self.place(i)
        if place is None:
            return len(commonprefix([start or "", self.text])), False
        return next((a for a, _, source in self.spans if a >= place[1] and source != i), len(self.text)), False

    def end_token(self, i: int, begin: int, turn_end: int, is_exact: bool) -> int | None:
        """The token that ends turn i: the first end token behind its text. Behind tool calls, which have special
        tokens of their own, the last one; or, where the text may reach into the next header, the one that ends turns.
        """
        place = self.place(i) or (begin, begin)
        behind = range(self.token_at(max(begin, min(place[1], turn_end))), self.token_at(turn_end))
        ends = [t for t in behind if self.ids[t] in self.controls]
        if ends and self.messages[i].get("tool_calls"):
            if is_exact:
                return ends[-1]
            known = (self.tok.turn_end_id(self.template), self.tok.eos_id)
            return next((t for t in ends if self.ids[t] in known), ends[0])
        return ends[0] if ends else None


def encode_chat(
    tok: Tokenizer, template: str | None, chat: Chat, train_on_eos: str, roles: Iterable[str], note: Note
) -> tuple[list[int], list[bool], str, Spans]:
    """The tokens of a conversation, and which are supervised; its text, and the turns that were looked for.

    Args:
        template: Jinja; None: the tokenizer's own.
        train_on_eos: one of `ENDS`.
        roles: names of roles that the configuration gives, which are not the row's text.
        note: called with what the user should know of this conversation.
    Raises:
        UserError: the template hides where an answer begins, or puts no token behind the last one.
    """
    written, trained = Written(tok, template, chat, roles), chat.trained
    mask = [False] * len(written.ids)
    last_trained = max((i for i, is_trained in enumerate(trained) if is_trained), default=-1)
    turns: Spans = {}
    for i in range(len(trained)):
        if not trained[i] and train_on_eos != "all":
            continue
        begin = written.begin_of(i)
        if begin is None:
            continue
        turn_end, is_exact = written.end_of_turn(i)
        end = written.end_token(i, begin, turn_end, is_exact)
        if end is None and i == last_trained:
            found = "no special token ends the last answer in the chat template, so the model would never learn to stop"
            raise UserError(f"{found}. Use a template whose end token this tokenizer has, or name a built-in one.")
        turns[i] = begin, turn_end
        if trained[i]:
            stop = turn_end if is_exact else (written.place(i) or (begin, begin))[1]
            first, stop = written.token_at(begin), written.token_at(stop) if end is None else end
            mask[first:stop] = [True] * (stop - first)
        if end is not None:
            mask[end] = train_on_eos in ("turn", "all") or train_on_eos == "last" and i == last_trained
    for text in written.notes:
        note(text)
    return written.ids, mask, written.text, turns
