"""Rows of data to tokens, and to a mask of the tokens that the model has to learn to write.

Five kinds of row:

    chat_template       {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    alpaca              {"instruction": ..., "input": ..., "output": ...}
    prompt_completion   {"prompt": ..., "completion": ...}
    custom              the same with columns and text around them of your own
    completion          {"text": ...}

A chat may have several turns, a system message, and `tools` with the calls and answers of them; masks.py decides which
of its tokens are supervised. The next three put the columns of a row into a frame of text (`Frame`), and the answer
behind them is supervised, with its end token. Of a completion every token is.

The format is saved beside what was trained, as prompt.json: the same file that made the training tokens makes the
prompt of a chat, and the template of an Ollama Modelfile (export/go_template.py).
Read next: data/messages.py, data/masks.py; data/prepare.py, which has all rows of a run encoded.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from ..config.errors import UserError
from ..tokenizer.chat_template import Messages, Tools, render
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.traced import spans_of, trace
from .completeness import check_complete
from .masks import encode_chat
from .messages import Note, chat_of, names_in, note_unread, plain, require, say, text_of, with_fields
from .row_format import FRAMES, TEMPLATES, Frame, RowFormat

# For models that bring none of their own; the tokenizer must know the special tokens. An answer in alpaca and mistral
# ends with the tokenizer's end token, and a system message comes before the first question.
CHAT_TEMPLATES = {
    name: (TEMPLATES / f"{name}.jinja").read_text("utf-8").removesuffix("\n")
    for name in ("chatml", "llama3", "alpaca", "mistral")
}


class PromptFormat(RowFormat):
    """How a row becomes tokens."""

    def for_tokenizer(self, tok: Tokenizer) -> "PromptFormat":
        """The same with the chat template written out, so that it no longer depends on the tokenizer's."""
        return dataclasses.replace(self, chat_template=self.jinja(tok))

    # Properties of the format with a tokenizer

    def jinja(self, tok: Tokenizer) -> str | None:
        """The chat template in effect; None when the format is not a chat."""
        return (self.chat_template or tok.chat_template) if self.type == "chat_template" else None

    def end_id(self, tok: Tokenizer) -> int | None:
        """The token that ends an answer, at which generation has to stop."""
        template = self.jinja(tok)
        return tok.turn_end_id(template) if template else tok.eos_id

    def add_bos(self, tok: Tokenizer) -> bool:
        """What the tokenizer of a GGUF file must do, so that the model sees as many BOS tokens as in training.

        Programs that serve a model drop the BOS that a chat template writes if the tokenizer adds one. So it may add
        one only if the template writes it too.
        """
        if not tok.add_bos or self.type != "chat_template":
            return tok.add_bos
        return self.encode_prompt(tok, say("user", "a question"))[:1] == [tok.bos_id]

    # Prompts

    def render(
        self, tok: Tokenizer, messages: Messages, add_generation_prompt: bool = False, tools: Tools = None
    ) -> str:
        """The text of a conversation; what alpaca and completion prompt with is the last message alone."""
        if self.type == "chat_template":
            return tok.render_chat(messages, add_generation_prompt, self.jinja(tok), tools)
        last = messages[-1]["content"]
        return trace(last, 0) if self.type == "completion" else self._frame.prompt(last)

    def encode_prompt(self, tok: Tokenizer, messages: Messages, tools: Tools = None) -> list[int]:
        """The tokens of a prompt, which the model continues with its answer."""
        if self.type == "chat_template":
            return tok.encode_chat(messages, add_generation_prompt=True, chat_template=self.jinja(tok), tools=tools)
        return self._prompt_ids(tok, self.render(tok, messages))

    def question(self, row: dict[str, Any]) -> Messages | None:
        """The messages before the first answer of a row; None without any."""
        if self.type == "completion":
            return None
        if self.type != "chat_template":
            return say("user", text_of(row, self._frame.field_instruction))
        messages = _as_texts(chat_of(row, self, note=lambda _: None).messages)
        return messages[: next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)] or None

    def last_question(self, row: dict[str, Any]) -> tuple[Messages, Tools]:
        """The messages before the last answer of a row, and its tools."""
        chat = chat_of(row, self, note=lambda _: None)
        last = max((i for i, is_trained in enumerate(chat.trained) if is_trained), default=0)
        return _as_texts(chat.messages[:last]), chat.tools

    # Training

    def encode_row(
        self, tok: Tokenizer, row: dict[str, Any], note: Callable[[str], object] = lambda _: None
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a row of data, and for each whether it is supervised.

        Args:
            note: called with everything that the user should know of this row. Rows with the same text are
                reported together in one line ("12 rows: TEXT (first: a.jsonl, line 3)"), so it holds no values.
        Raises:
            UserError: the row is not of this format. It does not name the row: the caller knows the file and the line.
        """
        if self.type == "chat_template":
            ids, mask = self._encode_chat(tok, row, note)
        else:
            if tok.eos_id is None:
                why = "Without it the model never learns to stop. Name one under special_tokens, eos_token"
                raise UserError(f"the tokenizer has no end token (eos). {why}.")
            prompt, answer = self._texts(row, note)
            if any(tok.find_special(text) for text in (*(prompt[a:b] for a, b, _ in spans_of(prompt)), answer)):
                note(MARKERS)
            ids = self._prompt_ids(tok, prompt)  # prompt and answer apart: no token may reach into both
            answer_ids = [*tok.encode(answer), tok.eos_id]
            ids, mask = ids + answer_ids, [False] * len(ids) + [True] * len(answer_ids)
        if self.train_on_inputs or self.type == "completion":
            mask = [position > 0 for position in range(len(ids))]  # no token before the first predicts it
        return ids, mask

    def _prompt_ids(self, tok: Tokenizer, prompt: str) -> list[int]:
        """The ids of a prompt that is not a chat, with BOS where the tokenizer adds it and the frame has none."""
        ids, _ = tok.encode_guarded(prompt)
        return [tok.bos_id, *ids] if tok.bos_id is not None and tok.add_bos and ids[:1] != [tok.bos_id] else ids

    def _texts(self, row: dict[str, Any], note: Note) -> tuple[str, str]:
        """Prompt and answer of a row that is not a chat."""
        if self.type == "completion":
            require((self.field,), row, self)
            note_unread(row, {self.field}, note)
            return "", text_of(row, self.field)
        frame = self._frame
        require((frame.field_instruction, frame.field_output), row, self)
        instruction, answer = text_of(row, frame.field_instruction), text_of(row, frame.field_output, empty=True)
        others = frame.field_input, frame.field_system
        context, system = (text_of(row, key, empty=True) if key and row.get(key) else "" for key in others)
        note_unread(row, {frame.field_instruction, frame.field_output, *others}, note)
        prompt = frame.prompt(instruction, context, system)
        texts = {frame.field_instruction: instruction, frame.field_input: context, frame.field_system: system}
        for column in (column for column, text in texts.items() if text not in prompt):
            note(f"the column {column} was not read: the format has no place for it")
        if not answer.strip():
            note(EMPTY_ANSWER)
        return prompt, answer

    @property
    def _frame(self) -> Frame:
        return self.frame or FRAMES[self.type]

    def _encode_chat(self, tok: Tokenizer, row: dict[str, Any], note: Note) -> tuple[list[int], list[bool]]:
        template = self.jinja(tok)
        keys = names_in(template or "")
        chat = chat_of(row, self, note, keys)
        roles = [message["role"] for message in chat.messages]
        wanted = dict.fromkeys(self.role_of[role] for role in self.roles_to_train)
        if wanted and not wanted.keys() & set(roles) and not any(chat.trained):
            found = f"no message has the role {' or '.join(wanted)}, only {', '.join(dict.fromkeys(roles))}"
            raise UserError(f"{found}. Add an answer, or map the names with roles.")
        for message, is_trained in zip(chat.messages, chat.trained, strict=True):
            if is_trained and not message.get("tool_calls") and not plain(message["content"]).strip():
                note(EMPTY_ANSWER)
        named_tokens = tuple(tok.named_texts.items())
        chat.messages = [_written_as_read(message, template, named_tokens) for message in chat.messages]
        known = self.role_of.values()  # other roles are refused, so no role is the row's own text
        ids, mask, text, spans = encode_chat(tok, template, chat, self.train_on_eos, known, note)
        without_tools = partial(tok.render_if_possible, chat.messages, False, template)
        check_complete(text, spans, chat, without_tools, keys, note)
        return ids, mask


def _as_texts(messages: Messages) -> Messages:
    """The same with text parts as one text."""
    return [{**m, "content": plain(m["content"])} if isinstance(m["content"], list) else m for m in messages]


Named = tuple[tuple[str, str], ...]  # what a template may write by name: ("bos_token", "<s>"), ...


def _written_as_read(message: dict[str, Any], template: str | None, named: Named) -> dict[str, Any]:
    """A message whose text parts are joined as its template does it, or as servers do for one that takes only texts.

    The arguments of its calls become JSON texts again where the template cannot write objects.
    """

    def as_text(arguments: Any) -> str:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    if message.get("tool_calls") and _takes_texts(template, named):
        message = {**message, "tool_calls": [with_fields(c, ("arguments",), as_text) for c in message["tool_calls"]]}
    if isinstance(message["content"], list):
        between = _between_parts(template, message["role"], named)
        if between is not None:
            return {**message, "content": between.join(part["text"] for part in message["content"])}
    return message


def _write(template: str, messages: Messages, named: Named) -> str:
    try:
        return render(template, messages, False, dict(named))
    except UserError:
        return ""


@lru_cache
def _takes_texts(template: str, named: Named) -> bool:
    """Whether a template writes the arguments of a call only where they are a JSON text, as `+` does it."""

    def is_written(arguments: Any) -> bool:
        call = {"type": "function", "id": "123456789", "function": {"name": "a_function", "arguments": arguments}}
        messages = [*say("user", "a question"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        return "an_argument" in _write(template, messages, named)

    return not is_written({"an_argument": 1}) and is_written('{"an_argument": 1}')


@lru_cache
def _between_parts(template: str, role: str, named: Named) -> str | None:
    """What a template writes between two parts of a text; None: it takes parts alone."""
    one, two = "some words", "other words"
    before = say("user", "a question") if role in ("assistant", "tool") else []

    def write(content: Any) -> str:
        return _write(template, [*before, {"role": role, "content": content}], named)

    parts = write([{"type": "text", "text": text} for text in (one, two)])
    if "'type'" in parts or not (one in parts and two in parts):
        return "\n"  # it would write them as Python or not at all; vLLM and llama.cpp give such a template lines
    return next((between for between in ("", "\n", " ", "\n\n") if write(f"{one}{between}{two}") == parts), None)


SHAREGPT = {"role": "from", "content": "value"}
MARKERS = (
    "the text holds what looks like special tokens, which stay text: they neither end an answer nor begin a turn. "
    "Write them in the format of a map under type, or give the messages and type: chat_template"
)
EMPTY_ANSWER = "the answer is empty, so only the token that ends it is learnt"


def detect_format(row: dict[str, Any]) -> PromptFormat:
    """The format of a row, by its columns."""
    pair = row.get("prompt"), row.get("completion")
    if "messages" in row or all(isinstance(part, list) for part in pair):
        return PromptFormat(type="chat_template")
    if "conversations" in row:
        return PromptFormat(type="chat_template", field_messages="conversations", message_property_mappings=SHAREGPT)
    if "instruction" in row and "output" in row:
        return PromptFormat(type="alpaca")
    if "prompt" in row and "completion" in row:
        return PromptFormat(type="prompt_completion")
    if "text" in row:
        return PromptFormat(type="completion")
    advice = "Name them messages, or instruction and output, or prompt and completion, or text"
    raise UserError(f"a row has the columns {', '.join(row) or 'none'}, which tell no format. {advice}.")
