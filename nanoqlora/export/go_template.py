"""The prompt that a model was trained with, as Ollama's TEMPLATE, in the language of Go's text/template.

A GGUF file carries the Jinja of the chat template (`tokenizer_metadata.py`), and llama.cpp runs that. Ollama prefers
the Go template of a Modelfile, and guesses one where it is missing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..config.errors import UserError
from ..data.messages import say
from ..data.prompts import PromptFormat
from ..gguf.modelfile import go_text, quoted
from ..tokenizer.chat_template import Messages
from ..tokenizer.tokenizer import Tokenizer
from ..tokenizer.vocabulary import CONTROL, USER_DEFINED
from .tokenizer_metadata import probes, spaces, takes


class GoTemplate(NamedTuple):
    """What a Modelfile needs: TEMPLATE, SYSTEM and the stop texts. A BOS that the tokenizer adds is not in it."""

    template: str
    system: str | None
    stops: list[str]


def go_template(fmt: PromptFormat, tok: Tokenizer, ends: Sequence[int] = ()) -> GoTemplate:
    """The template of an Ollama Modelfile, proven to write what the training format writes.

    Jinja cannot be translated in general. But nearly every chat template puts the same few strings around messages:
    the same for all of them (`Turns`), or something for each pair of roles that meet (`Joints`). We read
    the strings off one or two conversations, and use them only if on other conversations they give the same text as
    the Jinja. White space around contents is not part of the proof: many templates strip it, and Go cannot.

    Args:
        ends: tokens that end an answer besides those of the format and the tokenizer.
    Raises:
        UserError: the template does more than that.
    """
    stops = stop_texts(fmt, tok, ends)

    def render(messages: Messages) -> str:
        text, bos = fmt.render(tok, messages, add_generation_prompt=True), tok.bos_id
        return text.removeprefix(tok.vocab[bos]) if tok.add_bos and bos is not None else text  # SmolLM2's stays

    if fmt.type != "chat_template":  # then the last message alone is prompted with
        texts = map(go_text, render(say("user", "\0")).split("\0"))
        last = '{{ $last := "" }}{{ range .Messages }}{{ $last = .Content }}{{ end }}'
        return GoTemplate(last + "{{ $last }}".join(texts), None, stops)
    if "strftime_now" in (fmt.jinja(tok) or ""):
        raise _inexpressible("it writes today's date")
    joints = Joints.read(render)
    writers, chats = (Turns.read(joints, render), joints), probes(render)
    writer = next((w for w in writers if w and all(w.write(chat) == render(chat) for chat in chats)), None)
    if writer is None:
        raise _inexpressible("what it writes around a message depends on more than the message before")
    stops = stops or [joints.gaps["assistant", "user"].strip()]
    template = spaces(tok, fmt)[1] + writer.go()
    return GoTemplate(template, writer.system if _as_system(writer.system) else None, stops)


def _as_system(text: str | None) -> bool:
    """Whether SYSTEM can hold a system message of the template's own; in the template it is right as well."""
    # Ollama may run the Jinja instead, which gets SYSTEM as a message, and may strip white space off its ends.
    return text is not None and text != "" and quoted(text) is not None and text == text.strip()


def stop_texts(fmt: PromptFormat, tok: Tokenizer, ends: Sequence[int] = ()) -> list[str]:
    """The texts of the tokens that end an answer: first the one that training ended answers with."""
    ours, kinds = (fmt.end_id(tok), tok.eos_id), tok.kinds
    # An ordinary token that a file names is an end by its id, and no text at which to stop.
    others = [id for id in ends if id < len(kinds) and kinds[id] in (CONTROL, USER_DEFINED)]
    return [tok.vocab[id] for id in dict.fromkeys((*ours, *others)) if id is not None]


class Joints(NamedTuple):
    """A chat template as the texts between two messages, by their roles; beginning and end have the role ""."""

    gaps: dict[tuple[str, str], str]
    around_system: tuple[str, str] | None = None  # where a system message goes to the question at the end, as Mistral's
    system: str | None = None  # a message that the template puts in by itself is in the gap at the beginning

    @classmethod
    def read(cls, render: Callable[[Messages], str]) -> "Joints":
        """Read the strings off three conversations; a template may refuse the shorter one, and a system message."""
        turns = say("user", "content 1", "assistant", "content 2", "user", "content 3")
        with_system, text = say("system", "content 0") + turns, render(turns)
        gaps = _gaps(text, turns)
        if gaps is None:
            raise _inexpressible("it leaves out a message")
        if not gaps["assistant", "user"]:
            raise _inexpressible("nothing stands between two messages")
        if takes(render, turns[:2]):
            gaps |= _gaps(render(turns[:2]), turns[:2]) or {}
        # Of a system message that is left out, the Go template leaves it out too, without a case for it.
        if not takes(render, with_system) or (all_text := render(with_system)) == text:
            return cls(gaps)
        if more := _gaps(all_text, with_system):
            return cls(gaps | more | gaps)  # in the order of `gaps`, whose texts win
        question = "content 3" + gaps["user", ""]
        added = all_text.removeprefix(text.removesuffix(question)).removesuffix(question)
        before, _, after = added.partition("content 0")
        return cls(gaps, (before, after))

    def write(self, messages: Messages) -> str | None:
        """What the Go template will write, None where two roles meet that we have not seen together."""
        system = messages[0]["content"] if self.around_system and messages[0]["role"] == "system" else None
        messages = messages if system is None else messages[1:]
        messages = [message for message in messages if any(message["role"] == role for _, role in self.gaps)]
        text, role = "", ""
        for i, message in enumerate(messages):
            if (role, message["role"]) not in self.gaps:
                return None
            text, role = text + self.gaps[role, message["role"]], message["role"]
            if self.around_system and system is not None and role == "user" and i == len(messages) - 1:
                text += system.join(self.around_system)
            text += message["content"]
        return text + self.gaps.get((role, ""), "")

    def go(self) -> str:
        """For each role what stands in front of its content, which may depend on the role before."""

        def gap_before(role: str) -> str:
            cases = {before: go_text(gap) for (before, after), gap in self.gaps.items() if after == role}
            (_, otherwise), *others = cases.items()
            tests = [f'if eq $before "{before}" }}}}{gap}' for before, gap in others if gap != otherwise]
            return "{{ " + "{{ else ".join(tests) + "{{ else }}" + otherwise + "{{ end }}" if tests else otherwise

        fronts = {role: gap_before(role) for role in dict.fromkeys(role for _, role in self.gaps)}
        start, each = "", "range .Messages"
        if self.around_system:
            start, each = "{{ $first := index .Messages 0 }}", "range $i, $_ := .Messages"
            is_last = 'if and (eq $first.Role "system") (eq (len (slice $.Messages $i)) 1)'
            before, after = map(go_text, self.around_system)
            fronts["user"] += f"{{{{ {is_last} }}}}{before}{{{{ $first.Content }}}}{after}{{{{ end }}}}"
        turns = [
            f'if eq .Role "{role}" }}}}{front}{{{{ .Content }}}}{{{{ $before = .Role }}}}'
            for role, front in fronts.items()
            if role
        ]
        body = "{{ " + "{{ else ".join(turns) + "{{ end }}"
        return f'{start}{{{{ $before := "" }}}}{{{{ {each} }}}}{body}{{{{ end }}}}{fronts[""]}'


def _gaps(text: str, messages: Messages) -> dict[tuple[str, str], str] | None:
    """What stands between the messages in a text, None if they are not in it in their order."""
    gaps, role = {}, ""
    for message in messages:
        gap, found, text = text.partition(message["content"])
        if not found:
            return None
        gaps[role, message["role"]], role = gap, message["role"]
    return gaps | {(role, ""): text}


class Turns(NamedTuple):
    """A chat template in four strings: before the role, between role and content, behind the content."""

    before: str
    after: str
    end: str
    intro: str  # stands in front of every system message, in some Llama-3 templates
    system: str | None = None  # what the template writes where no system message is given

    @classmethod
    def read(cls, joints: Joints, render: Callable[[Messages], str]) -> "Turns | None":
        """Read the strings off the texts between messages, None where these are not of that form."""
        between, first = joints.gaps["assistant", "user"], joints.gaps.get(("", "system"))
        if first is None or "user" not in between or "system" not in first:
            return None
        to_end, _, after = between.rpartition("user")  # the end of one turn and the header of the next
        before, _, after_system = first.partition("system")
        frame = cls(before, after, to_end.removesuffix(before), after_system.removeprefix(after))
        question = say("user", "question?")
        if render(question) != frame.write(question):  # the template puts in a system message of its own
            header, behind = frame.header("system") + frame.intro, frame.end + frame.write(question)
            frame = frame._replace(system=render(question).removeprefix(header).removesuffix(behind))
        return frame

    def header(self, role: str) -> str:
        return self.before + role + self.after

    def write(self, messages: Messages) -> str:
        """What the Go template will write: every turn, then the header of the answer."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = say("system", self.system) + messages
        turns = [{**m, "content": self.intro + m["content"]} if m["role"] == "system" else m for m in messages]
        return "".join(self.header(m["role"]) + m["content"] + self.end for m in turns) + self.header("assistant")

    def go(self) -> str:
        """One loop over the messages. A system message of the template's own becomes SYSTEM, where that can hold it."""
        before, after, end, intro = map(go_text, self[:4])
        turns = "{{ range .Messages }}" + before + "{{ .Role }}" + after
        if intro:
            turns += '{{ if eq .Role "system" }}' + intro + "{{ end }}"
        turns += "{{ .Content }}" + end + "{{ end }}" + before + "assistant" + after
        if self.system is not None and not _as_system(self.system):  # then the template begins with it
            unless_given = '{{ if ne (index .Messages 0).Role "system" }}'
            turns = unless_given + before + "system" + after + intro + go_text(self.system) + end + "{{ end }}" + turns
        return turns


def _inexpressible(why: str) -> UserError:
    return UserError(f"the chat template cannot be a Go template: {why}. Train with chat_template chatml or llama3.")
