"""Chat templates: programs in Jinja that write messages, and the special tokens between them, into one string.

A template comes with the model, from the internet, so it runs in Jinja's sandbox, with what transformers offers it.
What a user wrote must not turn into special tokens there, or a message that holds "<|im_end|>" could end its own turn.
So while the template runs, a mark sits inside every such text (`guard`), and leaves it once the string has been cut.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from .cli import UserError

Messages = list[dict[str, Any]]


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words in some templates. For the text it means nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Messages,
    add_generation_prompt: bool,
    named_tokens: dict[str, str],
    tools: list[Any] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        named_tokens: what the template may write by name, such as "bos_token" -> "<s>".
        tools: descriptions of the functions that the assistant may call.
    """
    try:
        return _compile(template).render(
            messages=[{key: item for key, item in message.items() if item is not None} for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            **named_tokens,
        )
    except Exception as error:  # the template is the user's program: whatever it raises is about it or its messages
        raise UserError(
            f"the chat template stopped with {type(error).__name__}: {error}. Without it the messages cannot be "
            "written as text. Check the roles and their order, or give another template with chat_template_jinja."
        ) from error


@lru_cache
def _compile(template: str) -> jinja2.Template:
    """In a sandbox; settings as in transformers."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:  # Jinja's own would escape HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    sandbox.filters["tojson"] = tojson
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return sandbox.from_string(template)


def guard(messages: Any, special: re.Pattern[str]) -> tuple[Any, str]:
    """Messages whose texts cannot turn into special tokens, which `special` finds, and the mark that was put into them.

    The mark is a character that no message uses. It goes behind the first character of everything that looks like a
    special token, where it stays through the template; whoever encodes the text takes it out.
    """
    everything = json.dumps(messages, ensure_ascii=False, default=str)
    mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in everything)

    def harmless(text: str) -> str:
        if not special.search(text):  # nearly always, and a hundred times faster than what follows
            return text
        # Looking ahead finds overlapping ones as well: after "<" everything in "<|im_<|im_end|>" is looked at again.
        return re.sub(f"(?={special.pattern})(.)", rf"\2{mark}", text, flags=re.DOTALL)

    return _in_every_text(messages, harmless), mark


def _in_every_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in a message, however deep."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _in_every_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_every_text(item, change) for item in value]
    return value
