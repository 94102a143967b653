"""Text to token ids and back: byte-level BPE, read from a Hugging Face folder or out of a GGUF file.

Encoding takes three steps.

1. Cut.    Special tokens such as <|im_end|> are set apart, but only where the caller asks for it.
2. Split.  A regular expression, the split rule, breaks the rest into words: "two  cats" gives "two", " " and " cats".
3. Merge.  A word starts as its UTF-8 bytes. Of all neighbours that form a token together, the pair whose token was
           learnt first is joined; this repeats until no two neighbours form a token.

Steps 2 and 3 run in tiktoken, which is Rust. It wants one number per token, the rank: the order in which the tokens
were learnt. The files hold a list of merges instead, so the ranks are read off that list (`BytePairs`).

A token has three names: its id; its bytes, which the text is made of; and its piece, the way files spell it. In a piece
every byte is one printable character, so " cat" is the piece "\u0120cat". Special tokens are spelled as they look.

A chat is text too: a Jinja template writes the messages and the special tokens between them into one string. What a
user wrote must not turn into special tokens there, or a message that holds "<|im_end|>" could end its own turn. So
while the template runs, a mark sits inside every such text (`guard`), and leaves it once the string has been cut.

Left out: sentencepiece vocabularies (Llama-2, Mistral). Split rules that are not in `SPLIT_RULES` are refused, because
a wrong rule gives plausible but different ids. Read next: prompts.py, which turns rows of data into tokens and masks.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import tiktoken

from nanoqlora.cli import UserError, whole_file, write_text
from nanoqlora.hub import TOKENIZER_FILES, local_path

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of token, by the numbers that GGUF gives them
NAMED_TOKENS = ("bos", "eos", "pad", "unk")
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")  # asked only when no chat template tells how an assistant's turn ends
LONGEST_BLANK = 500_000  # white space in a row; the regex engine runs out of stack at a little under a million
NOTHING = "(?!)"  # a pattern that matches nowhere


# ---------------------------------------------------------------------------------------------------------------------
# Split rules


@dataclass(frozen=True)
class SplitRule:
    """How a family of models breaks text into words, in the three forms that we meet."""

    pattern: str  # one regular expression, for tiktoken
    pre_tokenizer: dict[str, Any]  # the same rule as tokenizer.json writes it
    whole_words: bool  # a word that is a token is taken as it is, even if no merges lead to it ("ignore_merges")
    add_bos: bool  # what a GGUF file means when it does not say


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT_RULES: dict[str, SplitRule] = {  # by their names in GGUF, `tokenizer.ggml.pre`
    # Two rules in one. Every digit is a word. What lies between digits is split as GPT-2 does it, each stretch as if it
    # were the whole text: so spaces in front of a digit stay together ("a  5"), while in front of a letter the last
    # space goes with the letter ("a  b").
    "smollm": SplitRule(
        pattern=r"\p{N}|'(?:[sdmt]|re|ve|ll)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
        },
        whole_words=False,
        add_bos=False,
    ),
    "llama-bpe": SplitRule(
        pattern=_LLAMA3,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _LLAMA3}, "behavior": "Isolated", "invert": False},
                _byte_level(use_regex=False),
            ],
        },
        whole_words=True,
        add_bos=True,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Pieces, bytes and merges


def _byte_letters() -> list[str]:
    """The character that spells each byte in vocabulary files: itself if it prints, else one from U+0100 on."""
    letters, spare = [], 0x100
    for byte in range(256):
        prints = 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xFF and byte != 0xAD  # 0xAD is the soft hyphen
        letters.append(chr(byte if prints else spare))
        spare += not prints
    return letters


LETTERS = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in enumerate(LETTERS)}


def piece_to_bytes(piece: str) -> bytes | None:
    """The bytes that a piece spells, or None when it holds a character that spells no byte."""
    try:
        return bytes([_BYTE_OF[letter] for letter in piece])
    except KeyError:
        return None


def _spelled_out(piece: str, kind: int) -> bytes:
    """The bytes of a token: special tokens are written as they look, the rest in letters for bytes."""
    spelled = piece_to_bytes(piece) if kind == NORMAL else None
    return b"" if kind == UNUSED else piece.encode() if spelled is None else spelled


class BytePairs:
    """Words to token ids, by merging neighbours; one tiktoken `Encoding` and the way from its ranks to our ids.

    Ranks 0 to 255 are the single bytes, then come the results of the merges in the order of the merges. tiktoken knows
    tokens but no merges: it joins any two neighbours whose bytes form a token. That gives the same ids as long as every
    token can be reached by its merges, which holds for a vocabulary that was trained as one. A single byte that has no
    token of its own gets a rank all the same, with the id None, and is dropped at the end. So does llama.cpp, while
    transformers drops it before it merges. In SmolLM2 those are six control characters, and bytes that no text has.
    """

    def __init__(self, vocab: list[str], kinds: list[int], merges: list[str], rule: SplitRule) -> None:
        ids = {piece: id for id, piece in enumerate(vocab)}
        learnt = dict.fromkeys(merge.replace(" ", "") for merge in merges)  # a set that keeps its order
        words = list(learnt)
        if rule.whole_words:  # then tokens without merges count as well; ids tell when they were learnt, if they rise
            in_order = all(ids[a] < ids[b] for a, b in pairwise(words))
            words += [
                piece
                for piece, kind in zip(vocab, kinds, strict=True)
                if kind == NORMAL and len(piece) > 1 and piece not in learnt and piece_to_bytes(piece)
            ]
            words = sorted(words, key=ids.__getitem__) if in_order else words
        spelled = [bytes([byte]) for byte in range(256)] + [piece_to_bytes(word) for word in words]
        self.id_of_rank = [ids.get(letter) for letter in LETTERS] + [ids[word] for word in words]
        self.bytes_of_rank = [len(token) for token in spelled]
        ranks = {token: rank for rank, token in enumerate(spelled)}
        self._tiktoken = tiktoken.Encoding("words", pat_str=rule.pattern, mergeable_ranks=ranks, special_tokens={})

    def ranks(self, text: str) -> list[int]:
        """Split and merge. The bytes of the ranks, put together, are the text."""
        if len(text) > LONGEST_BLANK and max(map(len, re.findall(r"\s+", text)), default=0) > LONGEST_BLANK:
            raise UserError(
                f"a text has more than {LONGEST_BLANK} characters of white space in a row. The split rule takes such a "
                "run for one word, and its stack overflows. Shorten the run."
            )
        return self._tiktoken.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words in some templates. For the text it means nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache
def _compile_template(template: str) -> jinja2.Template:
    """A chat template is a program from the internet, so it runs in a sandbox; settings as in transformers."""

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


def _guard(value: Any, harmless: Callable[[str], str]) -> Any:
    """Apply `harmless` to every string in a message, however deep."""
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, dict):
        return {key: _guard(item, harmless) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_guard(item, harmless) for item in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


@dataclass
class Tokenizer:
    """A vocabulary with its merges, its named tokens and its chat template. Two that are equal encode alike."""

    pre: str  # the split rule, a key of SPLIT_RULES
    vocab: list[str] = field(repr=False)  # id -> piece
    kinds: list[int] = field(repr=False)  # id -> NORMAL, CONTROL, USER_DEFINED or UNUSED
    merges: list[str] = field(repr=False)  # "left right", pieces, in the order in which they were learnt
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False  # plain text starts with BOS; a chat template writes its own
    chat_template: str | None = field(default=None, repr=False)
    original_json: bytes | None = field(default=None, repr=False, compare=False)  # the tokenizer.json it came from

    def __post_init__(self) -> None:
        self._pairs = BytePairs(self.vocab, self.kinds, self.merges, SPLIT_RULES[self.pre])
        self._ids = {piece: id for id, piece in enumerate(self.vocab)}
        self._bytes = [_spelled_out(piece, kind) for piece, kind in zip(self.vocab, self.kinds, strict=True)]
        # Control tokens steer the model, and text must not become one by accident. User-defined tokens are only words
        # that somebody added: like transformers and llama.cpp we find them in any text.
        self.special_tokens = {piece: id for piece, id in self._ids.items() if self.kinds[id] == CONTROL}
        added = {piece: id for piece, id in self._ids.items() if self.kinds[id] == USER_DEFINED}
        self._cut_added, self._cut_all = _any_of(added), _any_of({**added, **self.special_tokens})

    @property
    def vocab_size(self) -> int:
        """Number of ids. The embedding of a model may have more rows, never fewer."""
        return len(self.vocab)

    def pieces(self) -> list[str]:
        """The piece of every id: GPT-2's printable spelling, or the plain text of a special token."""
        return list(self.vocab)

    def token_types(self) -> list[int]:
        """The kind of every id, as GGUF counts: 1 normal, 3 control, 4 user-defined, 5 unused."""
        return list(self.kinds)

    # Text to ids and back

    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
            bos: put BOS in front. Whether a model wants it with plain text is `add_bos`.
            special: read "<|im_end|>" and the like as the special token, not as ordinary text.
        """
        if bos and self.bos_id is None:
            raise UserError("the tokenizer has no BOS token, so none can be put in front. Encode without bos=True.")
        ids = [id for id, _ in self._tokens(text, self._cut_all if special else self._cut_added)]
        return [self.bos_id, *ids] if bos else ids

    def _tokens(self, text: str, cut: re.Pattern[str], mark: str = "") -> list[tuple[int, int]]:
        """The id and the first byte of each token. A `mark` leaves the text between the cuts, and is not counted."""
        found, position = [], 0
        id_of_rank, bytes_of_rank = self._pairs.id_of_rank, self._pairs.bytes_of_rank
        for i, part in enumerate(cut.split(text)):
            if i % 2:  # the pattern is one group, so every second part is a match
                found.append((self._ids[part], position))
                position += len(part.encode())
            elif part:
                for rank in self._pairs.ranks(part.replace(mark, "") if mark else part):
                    if (id := id_of_rank[rank]) is not None:
                        found.append((id, position))
                    position += bytes_of_rank[rank]
        return found

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token; none for an id without a token, which a padded embedding can produce."""
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """The text of some ids. Bytes that are not UTF-8, such as half of a character, become U+FFFD."""
        hidden = set(self.special_tokens.values()) if skip_special else ()
        return b"".join(self.token_bytes(id) for id in ids if id not in hidden).decode("utf-8", errors="replace")

    # Chats

    def encode_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, chat_template: str | None = None
    ) -> list[int]:
        """The ids of a conversation, as the chat template writes it; special tokens come from the template alone.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with the header of an assistant's turn, for the model to go on.
            chat_template: Jinja to use in place of the tokenizer's own.
        """
        if not messages:
            raise UserError("a chat has no messages, so there is nothing to encode. Give at least one.")
        guarded, mark = self.guard(messages)
        text = self.render_chat(guarded, add_generation_prompt, chat_template)
        return self.encode_guarded(text, mark)[0]

    def render_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, chat_template: str | None = None
    ) -> str:
        """The text of a conversation."""
        template = chat_template or self.chat_template
        if template is None:
            raise UserError(
                "the tokenizer has no chat template. It says how the model wants messages to be written. Name one with "
                "chat_template or chat_template_jinja, or use data of type alpaca or completion."
            )
        named = {f"{name}_token": getattr(self, f"{name}_id") for name in NAMED_TOKENS}
        try:
            return _compile_template(template).render(
                messages=[{key: item for key, item in message.items() if item is not None} for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{name: self.vocab[id] for name, id in named.items() if id is not None},
            )
        except Exception as error:  # the template is the user's program: whatever it raises is about it or its messages
            raise UserError(
                f"the chat template stopped with {type(error).__name__}: {error}. Without it the messages cannot be "
                "written as text. Check the roles and their order, or give another template with chat_template_jinja."
            ) from error

    def guard(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
        """Messages whose texts cannot turn into special tokens, and the mark that was put into them.

        The mark is a character that no message uses. It goes behind the first character of everything that looks like a
        special token, where it stays through the template; `encode_guarded` takes it out.
        """
        everything = json.dumps(messages, ensure_ascii=False, default=str)
        mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in everything)
        # Looking ahead finds overlapping ones as well: after "<" everything in "<|im_<|im_end|>" is looked at again.
        looks_special = re.compile(f"(?={_any_of(self.special_tokens).pattern})(.)", re.DOTALL)
        return _guard(messages, lambda text: looks_special.sub(rf"\2{mark}", text)), mark

    def encode_guarded(self, text: str, mark: str) -> tuple[list[int], list[int]]:
        """The ids of a rendered text, and the byte at which each token starts, as if the mark had never been there."""
        tokens = self._tokens(text, self._cut_all, mark)
        return [id for id, _ in tokens], [start for _, start in tokens]

    @cached_property
    def eot_id(self) -> int | None:
        """The token that ends an assistant's turn, None if nothing tells."""
        if self.chat_template is not None:
            return self.turn_end_id(self.chat_template)
        return next((self.special_tokens[text] for text in TURN_ENDS if text in self.special_tokens), None)

    def turn_end_id(self, chat_template: str) -> int | None:
        """The special token that a template puts behind an assistant's words, found by letting it write some."""
        answer = "the words of the answer"
        try:
            text = self.render_chat(
                [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}],
                chat_template=chat_template,
            )
        except UserError:
            return None
        end = re.compile(_any_of(self.special_tokens).pattern).search(text, text.rfind(answer))
        return self.special_tokens[end[0]] if end else None


def _any_of(texts: dict[str, int]) -> re.Pattern[str]:
    """A pattern with one group that finds any of the texts, the longest first."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or NOTHING})")


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, of a .gguf file, or of a model by its hub name."""
    path = local_path(path, TOKENIZER_FILES)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        from nanoqlora.gguf import read_gguf  # here, because most runs open no GGUF file

        return _from_gguf(read_gguf(path).metadata, path)
    raise UserError(
        f"{path}: neither a folder nor a .gguf file. The tokenizer is read from one or the other. Check the path."
    )


def _from_folder(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / "tokenizer.model").is_file():
        raise UserError(
            f"{folder}: there is a tokenizer.model, but no tokenizer.json. Only byte-level BPE from a tokenizer.json "
            "can be read. Use a copy of the model in Hugging Face's format that has one."
        )
    data, config = _read_json(path), _read_json(folder / "tokenizer_config.json")
    model, added = data.get("model"), data.get("added_tokens") or []
    pre = _recognise(path, data)
    by_id = {id: piece for piece, id in model["vocab"].items()}
    vocab = [by_id.get(id, f"[PAD{id}]") for id in range(max([*by_id, *(token["id"] for token in added)]) + 1)]
    kinds = [UNUSED if piece == f"[PAD{id}]" else NORMAL for id, piece in enumerate(vocab)]
    for token in added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(
                f"{path}: the added token {token['content']!r} has lstrip, rstrip or single_word. They change what is "
                "found around it, and are not supported. Set the three to false."
            )
        vocab[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED

    ids = {piece: id for id, piece in enumerate(vocab)}
    named: dict[str, int | None] = {}
    for name in NAMED_TOKENS:
        text = config.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text  # older files write a whole added token here
        if text is not None and text not in ids:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {name}_token is {text!r}, which is not in the vocabulary of "
                "tokenizer.json. It would have no id. Correct the text, or take both files from one model."
            )
        named[f"{name}_id"] = None if text is None else ids[text]
    return _checked(
        path,
        pre=pre,
        vocab=vocab,
        kinds=kinds,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        **named,
        add_bos=_adds_bos(data, config) and named["bos_id"] is not None,
        chat_template=_chat_template(folder, config),
        original_json=path.read_bytes(),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file. In Hugging Face's format a tokenizer is tokenizer.json and tokenizer_config.json. "
            "Copy the missing one from the model's page."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). The tokenizer is read from it. Copy it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a JSON {type(data).__name__}, not an object. It must be one. Copy the file again.")
    return data


def _recognise(path: Path, data: dict[str, Any]) -> str:
    """The split rule of a tokenizer.json. Whatever else would change ids must be absent."""
    model = data.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind != "BPE" or model.get("byte_fallback"):
        found = "sentencepiece-style BPE (byte_fallback)" if kind == "BPE" else repr(kind)
        raise UserError(
            f"{path}: the model is {found}, and only byte-level BPE can be read. Read in another way it would give "
            "other ids. Use a model with a byte-level tokenizer, such as Llama-3 or SmolLM2."
        )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"] or not isinstance(model.get("merges"), list):
        raise UserError(f"{path}: the model has no vocab or no merges. BPE needs both. Copy the file again.")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{path}: {name} is {model[name]!r}. It changes ids and is not supported. Set it to null.")
    if data.get("normalizer"):
        raise UserError(
            f"{path}: a normalizer, {json.dumps(data['normalizer'])[:200]}. It rewrites text before it is split, which "
            "byte-level BPE has no use for. Only tokenizers without one can be read."
        )
    found = _essence(data.get("pre_tokenizer"))
    for name, rule in SPLIT_RULES.items():
        if found == _essence(rule.pre_tokenizer):
            return name
    raise UserError(
        f"{path}: unknown pre_tokenizer {json.dumps(data.get('pre_tokenizer'))[:400]}. It decides where words begin, "
        f"so a wrong guess gives wrong ids. Use a model with one of the rules {', '.join(SPLIT_RULES)}."
    )


def _essence(pre_tokenizer: Any) -> Any:
    """A pre_tokenizer without what changes no ids, and with what older files leave unsaid."""
    if isinstance(pre_tokenizer, list):
        return [_essence(step) for step in pre_tokenizer]
    if not isinstance(pre_tokenizer, dict):
        return pre_tokenizer
    unsaid = {"use_regex": True} if pre_tokenizer.get("type") == "ByteLevel" else {}
    return unsaid | {key: _essence(item) for key, item in pre_tokenizer.items() if key != "trim_offsets"}


def _adds_bos(data: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether plain text gets a BOS: the config's word, else that of the template that tokenizer.json ends with."""
    if config.get("add_bos_token") is not None:
        return bool(config["add_bos_token"])
    last = data.get("post_processor") or {}
    steps = last.get("processors", [last])
    return any(step.get("single") and "SpecialToken" in step["single"][0] for step in steps)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the entry of the config: a text, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def _from_gguf(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that the metadata of a GGUF file describes."""

    def get(name: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}")

    if get("model") != "gpt2" or get("pre") not in SPLIT_RULES:
        raise UserError(
            f"{path}: the tokenizer's model is {get('model')!r} and its split rule {get('pre')!r}. They decide which "
            f"ids a text gets. Use a file with the model 'gpt2' (byte-level BPE) and one of {', '.join(SPLIT_RULES)}."
        )
    if not get("tokens") or get("merges") is None:
        raise UserError(f"{path}: there are no tokens or no merges. BPE needs both. Use the file of a whole model.")
    add_bos = get("add_bos_token")
    named = zip(NAMED_TOKENS, ("bos", "eos", "padding", "unknown"), strict=True)
    return _checked(
        path,
        pre=get("pre"),
        vocab=list(get("tokens")),
        kinds=list(get("token_type") or [NORMAL] * len(get("tokens"))),
        merges=list(get("merges")),
        **{f"{ours}_id": get(f"{theirs}_token_id") for ours, theirs in named},
        add_bos=SPLIT_RULES[get("pre")].add_bos if add_bos is None else add_bos,
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _checked(path: Path, **fields: Any) -> Tokenizer:
    """Make a tokenizer of what a file gave, unless the parts do not fit together."""
    vocab, known = fields["vocab"], set(fields["vocab"])
    if len(fields["kinds"]) != len(vocab) or len(known) != len(vocab):
        raise UserError(
            f"{path}: {len(vocab)} tokens, {len(known)} different ones, {len(fields['kinds'])} token types. The three "
            "must be equal, or a token has two ids. The file is damaged: copy it again."
        )
    for merge in fields["merges"]:
        left, _, right = merge.partition(" ")
        if not (left in known and right in known and left + right in known and piece_to_bytes(left + right)):
            raise UserError(
                f"{path}: the merge {merge!r} joins or makes something that is no token. So these merges do not belong "
                "to this vocabulary. Take both from one model."
            )
    for name in NAMED_TOKENS:
        id = fields[f"{name}_id"]
        if id is not None and not 0 <= id < len(vocab):
            raise UserError(f"{path}: the {name} token has id {id} of {len(vocab)} tokens. Correct the id.")
    return Tokenizer(**fields)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_tokenizer(tok: Tokenizer, folder: str | Path, chat_template: str | None = None) -> None:
    """Write the files that transformers' AutoTokenizer, llama.cpp and `load_tokenizer` read.

    A tokenizer.json that was read is written again byte by byte. The chat template stands in two places, because some
    readers know only the one and some only the other.

    Args:
        chat_template: Jinja to write in place of the tokenizer's own: the one that a model was trained with.
    """
    folder, template = Path(folder), chat_template or tok.chat_template
    named = {f"{name}_token": getattr(tok, f"{name}_id") for name in NAMED_TOKENS}
    named_texts = {name: tok.vocab[id] for name, id in named.items() if id is not None}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tok.add_bos,
        "clean_up_tokenization_spaces": False,
        **named_texts,
    }
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # one from an earlier save would be taken for ours
    else:
        config["chat_template"] = template
        write_text(folder / "chat_template.jinja", template)
    with whole_file(folder / "tokenizer.json") as temporary:
        temporary.write_bytes(tok.original_json or _dump(_tokenizer_json(tok)).encode())
    write_text(folder / "tokenizer_config.json", _dump(config))
    write_text(folder / "special_tokens_map.json", _dump(named_texts))


def _dump(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _tokenizer_json(tok: Tokenizer) -> dict[str, Any]:
    """The tokenizer as Hugging Face's `tokenizers` describes it.

    Added tokens are in the vocabulary too: the library gives ids of its own choice to those that are not.
    """
    rule, plain = SPLIT_RULES[tok.pre], {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [id for id, kind in enumerate(tok.kinds) if kind in (CONTROL, USER_DEFINED)]
    unset = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": tok.vocab[id], **plain, "special": tok.kinds[id] == CONTROL} for id in added
        ],
        "normalizer": None,
        "pre_tokenizer": rule.pre_tokenizer,
        "post_processor": _bos_first(tok.vocab[tok.bos_id], tok.bos_id) if tok.add_bos else None,
        "decoder": _byte_level(use_regex=True),
        "model": {
            "type": "BPE",
            **dict.fromkeys(unset),
            **dict.fromkeys(("fuse_unk", "byte_fallback"), False),
            "ignore_merges": rule.whole_words,
            "vocab": {piece: id for id, piece in enumerate(tok.vocab)},
            "merges": tok.merges,
        },
    }


def _bos_first(text: str, id: int) -> dict[str, Any]:
    """The rule that puts BOS in front of a text, and of each text of a pair."""

    def one(name: str, sequence: int) -> list[dict[str, Any]]:
        bos = {"SpecialToken": {"id": text, "type_id": sequence}}
        return [bos, {"Sequence": {"id": name, "type_id": sequence}}]

    return {
        "type": "TemplateProcessing",
        "single": one("A", 0),
        "pair": one("A", 0) + one("B", 1),
        "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
    }
