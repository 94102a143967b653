"""Text to token ids and back.

Encoding takes two steps. Special tokens such as <|im_end|> are set apart, but only where the caller asks for it. The
stretches of text between them go to the engine of the vocabulary's family: byte_pairs.py or sentencepieces.py.

A chat is text too: a Jinja template writes the messages and the special tokens between them into one string, and no
message can put special tokens of its own there (tokenizer/chat_template.py).

Read next: files.py, where vocabularies come from; data/prompts.py, which turns rows of data into tokens and masks.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from os.path import commonprefix
from pathlib import Path
from typing import Any, Self

from ..config.errors import UserError
from ..weights.hub import ADAPTER_FILES, TOKENIZER_FILES, local_path
from .byte_pairs import BytePairs, piece_to_bytes
from .chat_template import Jinja, Messages, Tools, guard, render
from .files import read_chat_template, read_folder, read_gguf_metadata, write_folder
from .sentencepieces import SentencePieces, width
from .traced import Span, plain, spans_of
from .vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Vocabulary, any_of


@dataclass
class Tokenizer(Vocabulary):
    """A vocabulary that encodes and decodes. Two that are equal encode alike."""

    def __post_init__(self) -> None:
        self._engine = SentencePieces(self) if self.is_sentencepiece else BytePairs(self)
        self._ids = {piece: id for id, piece in enumerate(self.vocab)}
        self._bytes = [self._spelled_out(piece, kind) for piece, kind in zip(self.vocab, self.kinds, strict=True)]
        # Control tokens steer the model, and text must not become one by accident. User-defined tokens are only pieces
        # that somebody added: like transformers and llama.cpp we find them in any text.
        self.special_tokens = {p: id for p, id in self._ids.items() if self.kinds[id] in (CONTROL, UNKNOWN)}
        added = [piece for piece, id in self._ids.items() if self.kinds[id] == USER_DEFINED]
        self._special = any_of(self.special_tokens)
        self._headers: dict[tuple[str | None, bool], tuple[str, ...]] = {}  # see `answer_headers`
        self._cut_added, self._cut_all = any_of(added), any_of([*added, *self.special_tokens])

    @property
    def vocab_size(self) -> int:
        """Number of ids. The embedding of a model may have more rows, never fewer."""
        return len(self.vocab)

    def with_special_tokens(self, additional_special_tokens: Sequence[str] = (), **named_tokens: str | None) -> Self:
        """The same with other named tokens, and more that no text becomes by accident.

        Args:
            additional_special_tokens: texts of tokens that are ordinary so far.
            named_tokens: eos_token="<|im_end|>", and so on; None leaves one as it is.
        Raises:
            UserError: the vocabulary has no such token, or it is an ordinary one.
        """
        given = {name: text for name, text in named_tokens.items() if text is not None}
        ids: dict[str, Any] = {
            name.replace("_token", "_id"): self.id_of_special(text, f"special_tokens.{name}")
            for name, text in given.items()
        }
        key = "special_tokens.additional_special_tokens"
        more = {self.id_of_special(text, key) for text in additional_special_tokens}
        changed = {id for id in more | set(ids.values()) if self.kinds[id] == USER_DEFINED}
        if not ids and not changed:
            return self
        kinds = [CONTROL if id in changed else kind for id, kind in enumerate(self.kinds)]
        files = self.original_files
        if changed or ids.get("bos_id", self.bos_id) != self.bos_id:  # tokenizer.json speaks of both
            files = {name: data for name, data in files.items() if name != "tokenizer.json"}
        return replace(self, kinds=kinds, original_files=files, **ids)

    def id_of_special(self, text: str, key: str) -> int:
        """The id of a token that `key` of a run asks to be a special one."""
        id = self._ids.get(text)
        if id is None or self.kinds[id] in (NORMAL, BYTE):
            why = "not in the vocabulary" if id is None else "an ordinary token, which texts are made of"
            known = ", ".join(list(self.special_tokens)[:12])
            raise UserError(f"{key} is {text!r}, which is {why}. Name a special token of the model, such as {known}.")
        return id

    # Text to ids and back

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            bos: put BOS in front. Whether a model wants it with plain text is `add_bos`.
            special: read "<|im_end|>" and the like as the special token, not as ordinary text.
        """
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half of a pair becomes U+FFFD
        ids, _ = self._tokens((self._cut_all if special else self._cut_added).split(text))
        if bos and self.bos_id is None:
            raise UserError("the tokenizer has no BOS token. Encode without bos=True.")
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def encode_guarded(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text that may be traced, and where each token starts, in `width`.

        What is the author's, of a template, a frame or a configuration, becomes special tokens; what a row has given
        never does. Training, chats and prompts of every format go through here; programs that serve the model read
        special tokens in all of a prompt, which is the same where the row's text holds none.
        """
        if half := re.search("[\ud800-\udfff]", text):
            raise UserError(f"the chat template writes {half[0]!a}, half of a surrogate pair. Correct it.")
        spans = [span for span in spans_of(text) if span.start < span.stop]
        return self._tokens(self._parts(plain(text), spans) if spans else self._cut_all.split(text))

    def _parts(self, text: str, spans: list[Span]) -> list[str]:
        """The text, cut at special tokens that no span touches, and at added tokens: every second part is one."""
        parts, start, at = [], 0, 0
        ends = [span.stop for span in spans]
        while found := self._cut_all.search(text, at):
            begin, end = found.span()
            span = spans[min(bisect_right(ends, begin), len(spans) - 1)]  # the first that ends behind the beginning
            if found[0] in self.special_tokens and begin < span.stop and span.start < end:
                if span.source is None:
                    why = f"the chat template changes texts so that nobody can tell whether {found[0]} is the row's"
                    raise UserError(f"{why}. Give a plainer template with chat_template_jinja, or edit the row.")
                added = self._cut_added.match(text, begin)
                special = self._special.match(text, begin, max(begin, span.start))  # that ends before the span
                end = max((match.end() for match in (added, special) if match), default=0)
                if not end:
                    at = begin + 1
                    continue
            parts += [text[start:begin], text[begin:end]]
            start = at = end
        return [*parts, text[start:]]

    def _tokens(self, parts: list[str]) -> tuple[list[int], list[int]]:
        """The ids, and where each token starts, in `width`, of a text in parts, of which every second is one token.

        Lists at a time: one by one in Python, the tokens would take longer than the engine does.
        """
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._ids[part])
                starts.append(position)
                position += self.width(part)
            elif part:
                wanted = self.space_before == "every" or self.space_before == "first" and i == 0
                space = " " if wanted and (self.space_before_space or part[0] not in (" ", SPACE)) else ""
                found, widths = self._engine.tokens(space + part)
                begins = list(accumulate(widths, initial=position - len(space)))
                begins[0] = position  # the space is no part of the text, so the token that has it starts with the text
                position = begins.pop()
                if None in found:  # bytes that no token has
                    begins = [begin for begin, id in zip(begins, found, strict=True) if id is not None]
                ids += [id for id in found if id is not None]
                starts += begins
        return ids, starts

    def width(self, text: str) -> int:
        """How long a text is, where tokens start and end: in bytes, with one for sentencepiece's U+2581."""
        return width(text) if self.is_sentencepiece else len(text.encode())

    def _spelled_out(self, piece: str, kind: int) -> bytes:
        """The bytes of a token: special tokens are written as they look, the rest as the family spells it."""
        if kind == UNUSED:
            return b""
        if kind == BYTE:
            return bytes([int(piece[3:5], 16)])
        if kind == NORMAL and self.is_sentencepiece:
            return piece.replace(SPACE, " ").encode()
        spelled = piece_to_bytes(piece) if kind == NORMAL else None
        return piece.encode() if spelled is None else spelled

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; none for an id without a token, which a padded embedding can produce."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """The text of some ids, without the space that sentencepiece puts in front of a text.

        Bytes that are not UTF-8, such as half of a character, become U+FFFD.
        """
        hidden = set(self.special_tokens.values()) if skip_special else ()
        text = b"".join(self.token_bytes(id) for id in ids if id not in hidden).decode("utf-8", errors="replace")
        return text if self.space_before == "never" else text.removeprefix(" ")

    # Chats

    def encode_chat(
        self, messages: Messages, add_generation_prompt: bool = False, chat_template: Jinja = None, tools: Tools = None
    ) -> list[int]:
        """The ids of a conversation, as the chat template writes it; special tokens come from the template alone.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with the header of an assistant's turn, for the model to go on.
            chat_template: Jinja to use in place of the tokenizer's own.
            tools: descriptions of the functions that the assistant may call.
        """
        if not messages:
            raise UserError("a chat has no messages. Give at least one.")
        guarded, tools = guard(messages, tools)
        return self.encode_guarded(self.render_chat(guarded, add_generation_prompt, chat_template, tools))[0]

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool = False, chat_template: Jinja = None, tools: Tools = None
    ) -> str:
        """The text of a conversation, and of the tools that it may use."""
        template = chat_template or self.chat_template
        if template is None:
            advice = "Name one with chat_template or chat_template_jinja, or use data of type alpaca or completion"
            raise UserError(f"the tokenizer has no chat template. {advice}.")
        return render(template, messages, add_generation_prompt, self.named_texts, tools)

    def render_if_possible(
        self, messages: Messages, add_generation_prompt: bool = False, chat_template: Jinja = None, tools: Tools = None
    ) -> str | None:
        """The same; None where the template refuses the messages."""
        with suppress(UserError):
            return self.render_chat(messages, add_generation_prompt, chat_template, tools)
        return None

    def turn_end_id(self, chat_template: str | None) -> int | None:
        """The special token that a template puts behind an answer, found by letting it write one."""
        answer = "the text of the answer"
        chat = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        text = self.render_if_possible(chat, chat_template=chat_template)
        end = self._special.search(text, text.rfind(answer)) if text is not None else None
        return self.special_tokens[end[0]] if end else None

    def find_special(self, text: str) -> int | None:
        """Where the first special token in a template's text ends."""
        found = self._special.search(text)
        return found and found.end()

    def answer_headers(self, chat_template: str | None = None, tools: Tools = None) -> tuple[str, ...]:
        """The generation prompt of a template, and what it shares with the headers of written answers, longest first.

        They differ where the prompt already begins the answer, with "<think>" for example. Empty: there is no header.
        """
        template = chat_template or self.chat_template
        key = template, tools is None  # some templates refuse to write anything without tools
        if key not in self._headers:
            self._headers[key] = tuple(self._find_headers(template, tools))
        return self._headers[key]

    def _find_headers(self, template: str | None, tools: Tools) -> list[str]:
        render = partial(self.render_if_possible, chat_template=template, tools=tools)
        asked = "a question"
        question, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": "\0"}
        chats = [question], [{"role": "system", "content": "."}, question], [question, answer, question]
        for turns, is_lenient in [(turns, is_lenient) for is_lenient in (False, True) for turns in chats]:
            before, prompt = render(turns), render(turns, True)
            if prompt is not None and is_lenient:  # no question may be last: the header has the last special token
                start = prompt.rfind(asked)
                last = [found.start() for found in self._special.finditer(prompt, start)][-1:]
                before = prompt[: last[0] if last else start + len(asked)]
            if before is not None and prompt is not None and prompt.startswith(before):
                header = prompt.removeprefix(before)
                texts = [render([*turns, answer]), render([*turns, answer, question])]
                shared = {commonprefix([prompt, text])[len(before) :] for text in texts if text is not None}
                shared = {re.sub(r"<[^<>]*$", "", text) for text in shared}  # no half of a tag
                return sorted({header, *shared} - {""}, key=len, reverse=True)
        return []


def brings_tokenizer(adapter: Path) -> bool:
    """Whether there is a tokenizer in an adapter's folder."""
    vocabularies = ("prompt.json", "tokenizer.json", "tokenizer.model")  # with the first, ours: then it must be there
    return (adapter / "tokenizer_config.json").is_file() and any((adapter / name).is_file() for name in vocabularies)


def load_tokenizer(path: str | Path, adapter: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a folder in Hugging Face's or Meta's format, of a .gguf file, or of a model by its hub name.

    Args:
        adapter: an adapter for that model, folder or hub name. Training may have given the tokenizer other tokens or
            another chat template, and saved them there, as users of PEFT do; then those are taken.
    """
    if adapter:
        folder = local_path(adapter, ADAPTER_FILES)
        if brings_tokenizer(folder):
            path = folder
        elif template := read_chat_template(folder):
            return replace(load_tokenizer(path), chat_template=template)
    path = local_path(path, TOKENIZER_FILES)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise UserError(f"model {path}: neither a folder nor a .gguf file. Give the path of one, or a hub name.")
    if path.is_dir():
        return Tokenizer(**read_folder(path))
    from ..gguf.reader import read_gguf  # here, because most runs open no GGUF file

    return Tokenizer(**read_gguf_metadata(read_gguf(path).metadata, path))


def save_tokenizer(tok: Tokenizer, folder: str | Path, chat_template: str | None = None) -> None:
    """Write the files that transformers' AutoTokenizer, llama.cpp and `load_tokenizer` read.

    Args:
        chat_template: Jinja to write in place of the tokenizer's own: the one that a model was trained with.
    """
    write_folder(tok, Path(folder), chat_template or tok.chat_template)
