"""Chat templates: programs in Jinja that write messages, and the special tokens between them, into one string.

A template comes with the model, from the internet, so it runs in Jinja's sandbox, with what transformers offers it,
and within limits of time and memory.
Which part of its text came from which message is known in the end (traced.py): no text of a message may become a
special token, and data/masks.py asks where the answers are.
"""

import contextlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import lru_cache, partial, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import compiler, ext, filters, runtime, sandbox

from ..config.errors import UserError
from ..config.limits import bounded_memory
from . import traced

Messages = list[dict[str, Any]]
Jinja = str | None  # a chat template; None: the tokenizer's own
Tools = list[Any] | None  # descriptions of functions that the assistant may call

# For one conversation: of a processor, of a whole number, of its text beyond 10 times what it is given.
SECONDS, BITS, CHARACTERS = 5, 10_000, 1 << 18
_stopped = Counter[str]()  # templates that took too long, and those that wrote too much twice as often


class _GenerationTag(ext.Extension):
    """`{% generation %}` marks the assistant's text in some templates. It writes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str, messages: Messages, add_generation_prompt: bool, named_tokens: dict[str, str], tools: Tools = None
) -> str:
    """The text of a conversation; traced, if it is a guarded one.

    Args:
        named_tokens: what the template may write by name, such as "bos_token" -> "<s>".
        tools: descriptions of the functions that the assistant may call.
    """
    try:
        with bounded_memory(), _limits(template):
            program = _compile(template, any(map(traced.spans_of, messages[0])) if messages else False)
            given = [{key: item for key, item in message.items() if item is not None} for message in messages]
            more: dict[str, Any] = {"tools": tools, "documents": None} | named_tokens
            text = program.render(messages=given, add_generation_prompt=add_generation_prompt, **more)
        if len(text) > CHARACTERS and len(text) > 10 * len(f"{given}{tools}"):
            _stopped[template] += 2
            raise jinja2.TemplateRuntimeError(f"a text of {len(text)} characters")
        return text
    except Exception as error:  # the template is the user's program: whatever it raises is about it or its messages
        advice = "Check the roles and their order, or name another template with chat_template_jinja"
        what = f"{type(error).__name__}: {str(error) or 'it needs too much memory'}"
        raise UserError(f"the chat template stopped with {what}. {advice}.") from error


@contextlib.contextmanager
def _limits(template: str) -> Iterator[None]:
    """Bound the time of what runs inside. The main thread gets a signal, others look at each line."""

    def stop(_: int = 0, frame: Any = None) -> None:
        if frame and frame.f_code.co_filename == contextlib.__file__:  # the template has ended, the limits have not
            return
        _stopped[template] += 1
        raise jinja2.TemplateRuntimeError(f"it ran for more than {SECONDS} s")

    if _stopped[template] > 1:  # not at each of the many questions that are asked of a template
        raise jinja2.TemplateRuntimeError(f"it ran for more than {SECONDS} s, or wrote too much, before")

    def watch(*_: Any) -> Any:
        return watch if time.thread_time() < end else stop()

    end = time.thread_time() + SECONDS
    is_main = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as after:  # each is called, though the signal may come within another one
        after.callback(sys.settrace, sys.gettrace())
        if is_main:
            after.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, stop))
            after.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS) if is_main else sys.settrace(watch)
        yield


class _CodeGenerator(compiler.CodeGenerator):
    """`a ~ b` goes through functions that keep spans."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: compiler.Frame) -> None:
        self.write("environment.concat((")
        for child in node.nodes:
            self.write("environment.finalize(")
            self.visit(child, frame)
            self.write("), ")
        self.write("))")


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's, with numbers of bounded size: no signal ends a product of huge ones."""

    intercepted_binops = frozenset(("*", "**", "//", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        bits = [x.bit_length() if isinstance(x, int) else 0 for x in (left, right)]
        if all(bits) and bits[0] * (right if operator == "**" else 1) + bits[1] > BITS:
            raise OverflowError(f"a number of more than {BITS} bits")
        return super().call_binop(context, operator, left, right)


class _Environment(_Sandbox):
    """A sandbox in which every operation that makes a string of strings keeps their spans."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(traced.join)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        call = partial(super().call, context)
        if isinstance(function, runtime.Macro | runtime.LoopContext) or traced.is_own(function):
            return call(function, *args, **kwargs)  # of the first two, the result went through `concat`
        return traced.run(call, function, *map(_listed, args), **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return traced.run(partial(super().call_binop, context, operator), left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        written = super().wrap_str_format(value)
        if written and traced.spans_of(value.__self__):  # a row's text as a layout: the source of the result is unknown
            return lambda *args, **kwargs: traced.of_unknown(written(*args, **kwargs))
        return written


OWN = ("trim", "replace", "reverse", "first", "last", "string")  # filters that only call methods of a string


def _listed(value: Any) -> Any:
    """What can be read only once, as a list."""
    return list(value) if isinstance(value, Iterator) and not isinstance(value, runtime.LoopContext) else value


def _keeping_spans(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter, whose result has the spans of what it was given."""
    return wraps(function)(lambda *args, **kwargs: traced.run(function, *map(_listed, args), **kwargs))


@lru_cache
def _compile(template: str, is_traced: bool) -> jinja2.Template:
    """In a sandbox; settings as in transformers. To keep spans takes longer, up to twice with many tools."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
    environment = (_Environment if is_traced else _Sandbox)(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    # Jinja's own would escape HTML.
    environment.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(x, ensure_ascii=ensure_ascii, **how)
    environment.filters["round"] = lambda x, digits=0, *how: filters.do_round(x, max(-99, min(digits, 99)), *how)
    if is_traced:
        environment.finalize = lambda x: x if isinstance(x, str) else traced.run(str, x)
        environment.filters = {name: f if name in OWN else _keeping_spans(f) for name, f in environment.filters.items()}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment.from_string(template)


# Roles of templates. They are not the row's text: "<|{{ role }}|>" writes a special token.
ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "ipython", "function", "model"))


def guard(messages: Messages, tools: Tools = None, roles: Iterable[str] = ()) -> tuple[Messages, Any]:
    """Messages and tools whose text cannot turn into special tokens; the source of message i is i, that of tools -1.

    Args:
        roles: names of roles that the configuration gives, beside the usual ones.
    """
    known = {*ROLES, *roles}
    own = ({"role": m["role"]} if isinstance(m.get("role"), str) and m["role"] in known else {} for m in messages)
    guarded = [traced.trace(message, i) | role for i, (message, role) in enumerate(zip(messages, own, strict=True))]
    return guarded, traced.trace(tools, -1)
