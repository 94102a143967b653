"""Readers of vocabularies, of what is written beside them, and of chat templates."""

import base64
import json
import math
import struct
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

from mutate import STRINGS, dump, mutate_bytes, mutate_json, places_in
from right import bytes_of, json_of, linked, put, tokenizer
from use import CHAT, ROW, export_prompts, use_tokenizer

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import PromptFormat


def folder_reader(name: str, file: str, source: str, *others: str) -> Callable[[bytes, Random], None]:
    """Reads the tokenizer of a folder in which one file is changed."""

    def read(data: bytes, rng: Random) -> None:
        folder = linked(name, source, *others)
        put(folder / file, data)
        use_tokenizer(folder, rng)

    return read


def make_tokenizer_json(source: str) -> Callable[[Random], bytes]:
    def make(rng: Random) -> bytes:
        tree, places = json_of(f"{source}/tokenizer.json"), None
        if rng.random() < 0.75:  # else it would be single pieces of the vocabulary only
            model = tree["model"]
            places = places_in({key: item for key, item in tree.items() if key != "model"})
            places += [("model", key) for key in model] * 2
            places += [("model", "vocab", rng.choice(list(model["vocab"]))) for _ in range(6)]
            places += [("model", "merges", rng.randrange(len(model["merges"]))) for _ in range(6)]
        return dump(mutate_json(tree, rng, places=places), rng)

    return make


def make_tokenizer_config(rng: Random) -> bytes:
    tree = json_of(f"{rng.choice(['hf', 'sp'])}/tokenizer_config.json")
    tree = tree | {"add_bos_token": True, "legacy": False, "add_prefix_space": True, "unk_token": None}
    if rng.random() < 0.3:
        named = {"default": tree["chat_template"], "tool_use": "x"}
        tree["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    if rng.random() < 0.3:
        added = {"900": {"content": "<|x|>", "special": True}, "901": {"content": "<|y|>"}}
        tree["added_tokens_decoder"] = added
    if rng.random() < 0.2:
        tree["bos_token"] = {"content": tree["bos_token"], "special": True}
    if rng.random() < 0.2:
        tree[rng.choice(["extra_special_tokens", "additional_special_tokens"])] = ["<|x|>", {"content": "<|y|>"}]
    return dump(mutate_json(tree, rng), rng)


def read_tokenizer_config(data: bytes, rng: Random) -> None:
    wrong = None
    for source, file in (("hf", "tokenizer.json"), ("sp", "tokenizer.model")):
        try:
            folder_reader(f"tokenizer-config-{source}", "tokenizer_config.json", source, file)(data, rng)
        except UserError as error:
            wrong = error
    if wrong:
        raise wrong


def make_added_tokens(rng: Random) -> bytes:
    return dump(mutate_json({"<|a|>": 900, "<|b|>": 901}, rng), rng)


def make_special_tokens_map(rng: Random) -> bytes:
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    tree: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"} | plain, "unk_token": "<unk>"}
    tree |= {"additional_special_tokens": ["<|x|>", {"content": "<|y|>"}], "pad_token": "</s>"}
    return dump(mutate_json(tree, rng), rng)


@cache
def fields_of(data: bytes) -> list[tuple[int, int, Any]]:
    """The fields of a protobuf message: number, kind on the wire, value."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        size = {1: 8, 5: 4, 2: None}.get(key & 7, 0)
        if key & 7 == 0:
            found.append((key >> 3, 0, varint()))
            continue
        size = varint() if size is None else size
        found.append((key >> 3, key & 7, data[at : at + size]))
        at += size
    return found


def varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def message_of(fields: list[tuple[int, int, Any]]) -> bytes:
    out = bytearray()
    for number, kind, value in fields:
        out += varint_bytes(number << 3 | kind)
        out += varint_bytes(value) if kind == 0 else varint_bytes(len(value)) + value if kind == 2 else value
    return bytes(out)


def change_message(data: bytes, rng: Random) -> bytes:
    """A message whose own fields have other values of their kind, or are others."""
    fields = list(fields_of(data))
    if not fields:
        return data
    i = rng.randrange(len(fields))
    number, kind, value = fields[i]
    what = rng.random()
    if what < 0.1:
        fields.pop(i)
    elif what < 0.2:
        fields.append((rng.randrange(1, 60), 0, rng.choice([0, 1, 2, 5, 2**31, 2**64 - 1])))
    elif kind == 0:
        fields[i] = number, 0, rng.choice([0, 1, 2, 3, 4, 5, 6, 399, 500, 2**31, 2**63, 2**64 - 1])
    elif kind == 5:
        numbers = [math.nan, math.inf, -math.inf, 0.0, 1e38, -2e9, -1.0, -3.0]
        fields[i] = number, 5, struct.pack("<f", rng.choice(numbers))
    elif what < 0.6:
        text = rng.choice([*STRINGS, "\u2581the", "<unk>", "<s>", "<0x41>"])
        fields[i] = number, kind, text.encode("utf-8", "surrogatepass")
    else:
        fields[i] = number, kind, mutate_bytes(value, rng) if value else b"x"
    return message_of(fields)


def make_tokenizer_model(rng: Random) -> bytes:
    raw = bytes_of("sp/tokenizer.model")
    if rng.random() < 0.4:
        return mutate_bytes(raw, rng, within=rng.choice([None, 400]))
    fields = list(fields_of(raw))  # pieces, trainer, normalizer
    settings = [i for i, (number, _, _) in enumerate(fields) if number != 1]
    for _ in range(rng.choice([1, 2, 4, 8])):
        i = rng.choice(settings) if rng.random() < 0.3 else rng.randrange(len(fields))
        number, kind, value = fields[i]
        what = rng.random()
        if what < 0.7 and kind == 2:
            fields[i] = number, kind, change_message(value, rng)
        elif what < 0.8:
            fields.insert(rng.randrange(len(fields)), fields[i])
        elif what < 0.9 and len(fields) > 3:
            fields.pop(i)
            settings = [i for i, (number, _, _) in enumerate(fields) if number != 1] or [0]
        else:
            other = rng.randrange(len(fields))
            fields[i], fields[other] = fields[other], fields[i]
    return message_of(fields)


def make_ranks(rng: Random) -> bytes:
    lines = [base64.b64encode(bytes([i % 256, i // 256])) + b" %d" % i for i in range(rng.choice([1, 3, 300]))]
    return mutate_bytes(b"\n".join(lines) + b"\n", rng)


# ------------------------------------------------------------------------------------------------ chat templates


def make_template_file(rng: Random) -> bytes:
    return mutate_bytes(json_of("hf/tokenizer_config.json")["chat_template"].encode(), rng)


EXPRESSIONS = [
    *(
        "''.__class__",
        "''['__class__']",
        "''|attr('__class__')",
        "''|attr(('__cla','ss__')|join)",
        "lipsum.__globals__",
    ),
    *(
        "cycler.__init__.__globals__",
        "cycler['__init__']",
        "joiner|attr('__init__')",
        "self._TemplateReference__context",
    ),
    *("raise_exception.__globals__", "strftime_now.__code__", "raise_exception.__closure__", "namespace.__init__"),
    *("'{0.__class__}'.format(messages)", "'{0.__class__}'|format(messages)", "'%s'|format(messages)", "self.__init__"),
    *("'{a.__init__}'.format_map({'a': cycler})", "['{0.__class__}'.format][0](messages)", "messages.__class__"),
    *("[messages]|map(attribute='__class__')|list", "messages|groupby('__class__')|list", "dict.fromkeys"),
    *("messages|sort(attribute='__class__')", "messages|selectattr('__class__')|list", "dict.__mro__", "range(3)"),
    *("messages|tojson(default=raise_exception)", "messages|tojson(cls=cycler)", "messages|tojson(indent=10)"),
    *("messages|tojson(separators=5)", "messages|tojson(sort_keys=true)", "namespace(a=1)|tojson", "range(10**5)"),
    *("messages.append(1)", "messages.clear()", "messages.pop()", "messages[0].update({'a':1})", "range(10**9)"),
    *("'a'*10**7", "'%0100000d'|format(1)", "10**1000", "2**10**4", "1/0", "[1,2]|batch(1)|list", "'x'.encode('idna')"),
    *("'x'.encode('nope')", "''.join(messages)", "messages[0].content.splitlines()", "messages[99]", "messages['x']"),
    *("undefined.x", "strftime_now('%')", "strftime_now('\\0')", "strftime_now('%Y')", "strftime_now(5)", "tools"),
    *("strftime_now('%'*1000)", "raise_exception('x')", "raise_exception()", "raise_exception(messages)", "documents"),
    *("messages|pprint", "messages|xmlattr", "{'a b':1}|xmlattr", "'x'|urlize", "'x'|wordwrap(0)", "'x'|wordwrap(-1)"),
    *("'x'|truncate(-5)", "'x'|center(10**6)", "'x'|indent(10**6)", "messages|random", "messages|dictsort", "loop"),
    *("1|filesizeformat", "messages|string", "self", "self()", "varargs", "caller()", "eos_token", "'\\ud800'"),
    *("messages is callable", "x is sameas y", "5 is divisibleby 0", "'x' is filter", "'\\x1b[31m'", "'\\ue000'"),
    *("messages|unique|list", "messages|min", "messages|max", "'a'|int(base=99)", "'a'|float", "1|round(10**9)"),
    *("1.5|round(400)", "'x'|replace('', 'y'*1000)", "messages|slice(0)|list", "'abc'[::0]", "lipsum(n=2)", "cycler()"),
    *(
        "lipsum(n=-1)",
        "cycler(1).next()",
        "joiner()()",
        "namespace(5)",
        "namespace([1])",
        "dict(messages)",
        "dict([1])",
    ),
    *("messages|items", "messages[0]|items|list", "messages[0]|length", "true|length", "5|join", "messages|safe"),
    *("messages[0].content|e", "'x'|safe|tojson"),
]
STATEMENTS = [
    *("{% set x = EXPR %}", "{% for i in EXPR %}{{ i }}{% endfor %}", "{{ EXPR }}", "{% if EXPR %}a{% endif %}"),
    *("{% macro f(a) %}{{ a }}{{ EXPR }}{% endmacro %}{{ f(1) }}", "{% filter upper %}{{ EXPR }}{% endfilter %}"),
    *("{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% from 'x' import y %}", "{% break %}"),
    *("{% block a %}{{ EXPR }}{% endblock %}", "{% call lipsum() %}{% endcall %}", "{% generation %}", "{% do x %}"),
    *("{% generation %}{{ EXPR }}{% endgeneration %}", "{% for m in messages %}{% break %}{% endfor %}"),
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace() %}{% set ns.x = EXPR %}{{ ns.x }}",
    *(
        "{% set messages = EXPR %}",
        "{% raw %}{{ x }}{% endraw %}",
        "{# x #}",
        "{% with a = EXPR %}{{ a }}{% endwith %}",
    ),
    *("{% autoescape true %}{{ EXPR }}{% endautoescape %}", "{% trans %}x{% endtrans %}"),
    "{% set x %}{{ EXPR }}{% endset %}{{ x }}",
]
FILTERS = "list string tojson length upper first attr('__class__') map('upper')|list join format(1)".split()
PARTS = [
    "{{ bos_token }}",
    "{% for m in messages %}",
    "{{ '<|im_start|>' + m.role + '\\n' }}",
    "{{ m.content | trim }}",
]
PARTS += ["<|im_end|>\n", "{% endfor %}", "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"]


def make_template(rng: Random) -> bytes:
    parts, kind = list(PARTS), rng.random()
    if kind > 0.85:
        return mutate_bytes("".join(parts).encode(), rng)
    if kind > 0.75:
        rng.shuffle(parts)
        return "".join(parts[: rng.randrange(1, 8)]).encode()
    for _ in range(rng.choice([1, 1, 2, 3])):
        expression = rng.choice(EXPRESSIONS)
        if rng.random() < 0.2:
            expression = f"({expression})|{rng.choice(FILTERS)}"
        statement = rng.choice(STATEMENTS).replace("EXPR", expression)
        parts.insert(rng.randrange(len(parts) + 1), statement)
    return "".join(parts).encode()


LEAKS = ("<class '", "<built-in function", "<function", "__globals__", "mappingproxy")


def read_template(data: bytes, rng: Random) -> None:
    """The template is used for prompts, training and export; nothing of Python's inside shows in what it writes."""
    from modelfiles import parse

    from nanoqlora.export.go_template import go_template
    from nanoqlora.gguf.modelfile import Recipe

    text = data.decode("utf-8", "replace")
    prompts, tok, wrong = PromptFormat(type="chat_template", chat_template=text), tokenizer(), None
    try:
        prompts.end_id(tok)
        written = prompts.render(tok, CHAT)
        assert not any(leak in written and leak not in text for leak in LEAKS), "the inside of Python shows"
        prompts.encode_row(tok, ROW)
    except UserError as error:
        wrong = error
    export_prompts(prompts)
    go = go_template(prompts, tok)
    if len(go.template) > 20_000:  # the rules of Ollama's parser are restated for short texts
        return
    found = parse(Recipe(["FROM ./x.gguf"], *go).text())
    names = [name for name, _ in found]
    wanted = ["from", "template", *["system"] * (go.system is not None)]
    assert names[: len(wanted)] == wanted and set(names[len(wanted) :]) <= {"stop"}, f"other instructions: {names}"
    if wrong:
        raise wrong


HOSTILE = ['"""', '"', '""', "\n", "{{", "}}", "{", "}", "{%", "\\", "`", "FROM /etc/passwd", "\nADAPTER ./evil\n"]
HOSTILE += ["SYSTEM", "{{ .System }}", "\r", "\0", "$", "\x1b", "#}", "'", "{{-", "-}}", "<|im_end|>", "\u2028"]
ENDINGS = ['"""\nADAPTER ./evil.gguf\nSYSTEM """', '"""', '"""\n', '"""\nPARAMETER stop a']


def make_modelfile(rng: Random) -> bytes:
    """Templates that Ollama's language can express, whose texts try to become instructions of a Modelfile."""

    def text() -> str:
        return "".join(rng.choice([*HOSTILE, "word ", "a"]) for _ in range(rng.choice([0, 1, 2, 4])))

    def write(*texts: str) -> str:
        return "{{ " + json.dumps("".join(texts)) + " }}"

    system, a, b, c, d = text(), text(), text(), text(), text()
    system += rng.choice(ENDINGS) if rng.random() < 0.2 else ""
    template = ""
    if rng.random() < 0.6:
        first = write("<|im_start|>", a, "system", b, "\n", system, c, "<|im_end|>", d)
        template = "{% if messages[0].role != 'system' %}" + first + "{% endif %}"
    template += "{% for m in messages %}" + write("<|im_start|>", a) + "{{ m.role }}" + write(b, "\n")
    template += "{{ m.content }}" + write(c, "<|im_end|>", d) + "{% endfor %}{% if add_generation_prompt %}"
    template += write("<|im_start|>", a, "assistant", b, "\n") + "{% endif %}"
    return template.encode("utf-8", "surrogatepass")


MARKERS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "end|>", "<", "|", ">", "<|", "|>", "\ue000"]
MARKERS += ["\ue001", "\uf8ff", " ", "\n", "a", "im_end", "\u2581", "</s>", "<s>", "[INST]", "<unk>", "<0x0A>"]
MARKERS += ["\\ue000", "\0", "\u00e9", "\U0001f642", "\r", "{{ x }}"]
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
GUARDED = [  # each writes two special tokens a message
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS,
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASKS,
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}"
    "<|im_end|>\n{% endfor %}" + ASKS,
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASKS,
]


def make_guard(rng: Random) -> bytes:
    def text() -> str:
        return "".join(rng.choice(MARKERS) for _ in range(rng.choice([1, 2, 3, 5, 8])))

    turns: list[dict[str, Any]] = []
    for _ in range(rng.choice([1, 2, 3])):
        turns += [{"role": "user", "content": text()} | ({text(): text()} if rng.random() < 0.3 else {})]
        turns += [{"role": "assistant", "content": text()}]
    function = {"name": text(), "parameters": {text(): text()}}
    tools = [{"type": "function", "function": function}] if rng.random() < 0.3 else None
    if rng.random() < 0.2:
        turns[1]["tool_calls"] = [{"function": {"name": text(), "arguments": {text(): text()}}}]
    if rng.random() < 0.2:
        turns[0]["role"] = text()
    return json.dumps({"messages": turns, "tools": tools, "template": rng.randrange(4)}).encode()


def read_guard(data: bytes, rng: Random) -> None:
    """No text of a row becomes a special token."""
    tree, tok = json.loads(data), tokenizer()
    prompts = PromptFormat(type="chat_template", chat_template=GUARDED[tree["template"]])
    ids, _ = prompts.encode_row(tok, {"messages": tree["messages"], "tools": tree["tools"]})
    count = sum(id in tok.special_tokens.values() for id in ids)
    assert count == 2 * len(tree["messages"]), f"template {tree['template']}: {count} special tokens"


READERS: dict[str, tuple[Callable[[Random], bytes], Callable[[bytes, Random], None]]] = {
    "tokenizer_json": (
        make_tokenizer_json("hf"),
        folder_reader("tokenizer-json", "tokenizer.json", "hf", "tokenizer_config.json"),
    ),
    "tokenizer_json_pieces": (
        make_tokenizer_json("spj"),
        folder_reader("tokenizer-json-pieces", "tokenizer.json", "spj", "tokenizer_config.json"),
    ),
    "tokenizer_config": (make_tokenizer_config, read_tokenizer_config),
    "added_tokens": (
        make_added_tokens,
        folder_reader("added-tokens", "added_tokens.json", "sp", "tokenizer.model", "tokenizer_config.json"),
    ),
    "special_tokens_map": (
        make_special_tokens_map,
        folder_reader("special-tokens", "special_tokens_map.json", "sp", "tokenizer.model", "tokenizer_config.json"),
    ),
    "tokenizer_model": (
        make_tokenizer_model,
        folder_reader("tokenizer-model", "tokenizer.model", "sp", "tokenizer_config.json"),
    ),
    "ranks": (make_ranks, folder_reader("ranks", "tokenizer.model", "sp", "tokenizer_config.json")),
    "template_file": (
        make_template_file,
        folder_reader("template-file", "chat_template.jinja", "hf", "tokenizer.json", "tokenizer_config.json"),
    ),
    "template": (make_template, read_template),
    "modelfile": (make_modelfile, read_template),
    "guard": (make_guard, read_guard),
}
