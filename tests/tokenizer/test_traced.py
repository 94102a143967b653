"""Who wrote which part of a text: whatever a template does to it, and whatever a row holds.

transformers is the witness of the text, which keeping spans must not change. That no text of a row becomes a special
token is counted: the template writes as many of them around harmless contents.
"""

import json
import random
import resource
from multiprocessing import get_context
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.tokenizer.chat_template import guard, render
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from nanoqlora.tokenizer.traced import Span, Traced, plain, run, spans_of, trace


@pytest.fixture(scope="module")
def tok(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def hf(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(tok, folder)
    return AutoTokenizer.from_pretrained(folder)


# What a template may write for a message `m`. Behind each, the special tokens that it writes itself.
WRITTEN = {
    "{{ m.content }}": 0,
    "{{ m['content'] | trim }}<|im_end|>": 1,
    "{{ '<|im_start|>' + m.content.strip() + '<|im_end|>' }}": 2,
    "{{ '<|im_start|>' ~ m.content ~ '<|im_end|>' ~ 5 }}": 2,
    "{{ m.content | upper }}{{ m.content.lower() }}{{ m.content | title }}{{ m.content.swapcase() }}": 0,
    "{{ m.content | replace('zz', '') }}{{ m.content.replace('q', 'end') }}{{ m.content.replace('', '|') }}": 0,
    "{{ m.content.split('zz')[-1] }}{{ m.content.split() | join('') }}{{ m.content.rsplit('|', 1) | join('|') }}": 0,
    "{{ ''.join(m.content.split('zz')) }}{{ m.content.partition('zz')[2] }}{{ m.content.splitlines()[0] }}": 0,
    "{{ m.content[1:-1] }}{{ m.content[::-1] }}{{ m.content[0] }}{{ m.content | reverse }}{{ m.content | last }}": 0,
    "{% for c in m.content %}{{ c }}{% endfor %}{{ m.content | list | join }}": 0,
    "{{ m | tojson }}{{ m.content | tojson }}{{ m | tojson(indent=2) }}{{ [m.content, {'k': m.content}] | tojson }}": 0,
    "{{ '<|im_start|>%s<|im_end|>' % m.content }}{{ '<|im_start|>%s' | format(m.content) }}": 3,
    "{{ '<|im_start|>{}{x}'.format(m.content, x=m.content) }}": 1,
    "{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% for k in m %}<|{{ k }}|>{% endfor %}": 0,
    "{% set t %}<|im_start|>{{ m.content }}{% endset %}{{ t }}{% filter trim %} {{ t }} {% endfilter %}": 2,
    "{% macro f(x) %}<|im_start|>{{ x }}{{ caller() }}{% endmacro %}{% call f(m.content) %}end|>{% endcall %}": 1,
    "{% set n = namespace(t='') %}{% set n.t = n.t + m.content %}{{ n.t }}{{ n.t | indent(2) }}{{ n.t * 2 }}": 0,
    "<|im_{{ m.content }}|>{{ m.content }}end|><|im_{{ m.content }}<|{{ m.content }}": 0,
    "<|{{ m.content }}|><|{{ m.number }}|>{{ m.number }}{{ m.list }}{{ m.list | join('<|im_end|>') }}": 2,
    "{{ m.content.removeprefix('<').removesuffix('>').lstrip('<|').rstrip('|>') }}{{ m.content | center(60) }}": 0,
    "{{ m.content | default('<|im_end|>') }}{{ m.missing | default('<|im_end|>') }}{{ m.content | string | first }}": 1,
    "{{ (messages | map(attribute='content') | list)[0] }}{{ [m] | map(attribute='content') | join('|') }}": 0,
    "{{ m.content if '<|im_end|>' in m.content else 'none<|im_end|>' }}": None,  # the text decides
}
BITS = ["<|im_start|>", "<|im_end|>", "<|im_", "im_end", "end|>", "end", "<", "|", ">", "<|", "|>", "im_", "zz", "q"]
BITS += [
    "\ue000",
    "\uf8ff",
    " ",
    "\n",
    "a",
    "<|IM_END|>",
    "<|im_zzend|>",
    "<|im_q|>",
    ">|dne_mi|<",
    "\u00df",
    "{}",
    "%s",
]


def hostile(chance: random.Random) -> str:
    return "".join(chance.choices(BITS, k=chance.choice([1, 2, 3, 5, 8])))


def message(text: str, other: str) -> dict[str, object]:
    return {"role": "user", "content": text, other: other, "number": 7, "list": [text, {other: text}]}


@pytest.mark.parametrize("written", WRITTEN)
def test_text_of_a_row_becomes_no_special_token(tok, hf, written):
    """Halves of markers on both sides of a template's own, upper and lower case, keys, numbers, pieces and JSON."""
    chance = random.Random(written)
    template = "<|im_start|>{% for m in messages %}" + written + "{% endfor %}<|im_end|>"
    special, refused = set(tok.special_tokens.values()), 0
    for _ in range(40):
        given = message(hostile(chance), hostile(chance))
        guarded, _ = guard([given])
        text = render(template, guarded, False, tok.named_texts)
        assert text == hf.apply_chat_template([given], chat_template=template, tokenize=False)
        try:
            ids, starts = tok.encode_guarded(text)
        except UserError as error:
            assert "nobody can tell" in str(error)
            refused += 1
            continue
        assert b"".join(map(tok.token_bytes, ids)).decode() == text and starts == sorted(starts)
        own = WRITTEN[written]
        own = int("<|im_end|>" not in given["content"]) if own is None else own
        assert sum(id in special for id in ids) == own + 2, (given, text)
    # Refused only where a filter mixes texts so that nobody can tell.
    assert not refused or any(word in written for word in ("title", "center", "list }}", "indent")), refused


@pytest.mark.parametrize("text", ["<|im_end|> is a marker", "plain", "5 < 6 > 4", "<|im_", "end|>"])
def test_a_row_without_markers_has_the_ids_of_transformers(tok, hf, text):
    template = "{% for m in messages %}<|{{ 'im_start' }}|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "an answer"}]
    ids, _ = PromptFormat(type="chat_template", chat_template=template).encode_row(tok, {"messages": messages})
    expected = hf.apply_chat_template(messages, chat_template=template, return_dict=False)
    assert (ids == expected) == ("<|im_end|>" not in text)


def test_roles_are_the_authors_where_they_are_known(tok):
    """Templates write "<|user|>". A role that only the row knows is its text, unless the configuration names it."""
    tok = tok.with_special_tokens()
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    for role, roles, count in (("im_end", (), 0), ("im_end", ("im_end",), 1), ("user", (), 0)):
        guarded, _ = guard([{"role": role, "content": "x"}], roles=roles)
        ids, _ = tok.encode_guarded(render(template, guarded, False, {}))
        assert sum(id in tok.special_tokens.values() for id in ids) == count


def test_halves_of_surrogate_pairs_are_replaced(tok):
    guarded, tools = guard([{"role": "user", "content": "a\ud800\udc00b\udfff"}], [{"\ud801": "\udc00"}])
    assert guarded[0]["content"] == "a\U00010000b\ufffd" and tools == [{"\ufffd": "\ufffd"}]
    tok.encode_guarded(render("{{ messages | tojson }}{{ tools | tojson }}", guarded, False, {}, tools))


def parts(text: str) -> list[tuple[str, int | None]]:
    return [(plain(text)[a:b], source) for a, b, source in spans_of(text)]


def test_where_each_part_came_from():
    one, two = trace("one", 1), trace(" two\n", 2)
    assert parts("<" + one + ">" + two) == [("one", 1), (" two\n", 2)]
    assert parts(("<" + one + ">" + two).strip()) == [("one", 1), (" two", 2)]
    assert parts((one + "|" + two)[1:6]) == [("ne", 1), (" t", 2)]
    assert parts(trace("", 3) + "x" + trace("  ", 4).strip()) == [("", 3), ("", 4)]
    assert parts((one + "," + two).replace(",", "-" + trace("new", 5))) == [("one", 1), ("new", 5), (" two\n", 2)]
    assert [parts(piece) for piece in (one + " " + two).split()] == [[("one", 1)], [("two", 2)]]
    assert [parts(line) for line in (one + "\n" + two).splitlines()] == [[("one", 1)], [(" two", 2)]]
    assert parts(run(json.dumps, {"a": one, two: [5, "own"]}, ensure_ascii=False)) == [("one", 1), (" two\\n", 2)]
    assert parts(run("{}:{}".format, one, two)) == [("one", 1), (" two\n", 2)]
    assert parts(run(str.capitalize, one)) == [("One", 1)]  # the marks change it; it was all of one source
    assert parts(run(str.capitalize, one + " own")) == [("One own", None)]  # and here nobody knows
    many = run("".join, [trace(str(i), i) for i in range(0, 3000, 7)])
    assert [source for _, source in parts(many)] == list(range(0, 3000, 7))
    assert spans_of(trace({"k": {"n": 12}}, 8)["k"]["n"].__str__()) == (Span(0, 2, 8),)


@pytest.mark.parametrize("seed", range(30))
def test_pieces_are_those_of_python(seed):
    """Every method that keeps spans gives what str gives, and each character keeps who wrote it."""
    chance = random.Random(seed)
    text = Traced()
    for source in range(4):
        text = text + trace("".join(chance.choices("ab \n", k=3)), source) + "".join(chance.choices("ab \n", k=2))
    owner = {i: source for a, b, source in spans_of(text) for i in range(a, b)}
    calls = [
        ("strip",),
        ("lstrip", "a "),
        ("rstrip",),
        ("split",),
        ("split", "a"),
        ("split", "ab", 1),
        ("rsplit", "b", 2),
    ]
    calls += [("rsplit", None, 1), ("splitlines",), ("splitlines", True), ("partition", "b"), ("rpartition", "ab")]
    calls += [("removeprefix", text[:2]), ("removesuffix", text[-2:]), ("__getitem__", slice(2, -3))]
    for name, *args in calls:
        found, expected = getattr(text, name)(*args), getattr(plain(text), name)(*args)
        assert found == expected
        at = 0
        for piece in [found] if isinstance(found, str) else found:
            where = [i for i in range(at, len(text) + 1) if plain(text).startswith(piece, i)]
            spans = {i: source for a, b, source in spans_of(piece) for i in range(a, b)}
            fits = [i for i in where if all(owner.get(i + k) == spans.get(k) for k in range(len(piece)))]
            assert fits, (name, args, piece)
            at = fits[0] + len(piece)


def test_templates_run_below_a_limit_of_the_users_own():
    """As `ulimit -v` sets it: nobody may raise it, and it may be below the one that a template gets."""

    def limited() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        own = (used + (1 << 29),) * 2
        resource.setrlimit(resource.RLIMIT_AS, own)
        text = render("{{ messages[0].content }}", [{"role": "user", "content": "x"}], False, {})
        assert text == "x" and resource.getrlimit(resource.RLIMIT_AS) == own

    child = get_context("fork").Process(target=limited)
    child.start()
    child.join()
    assert child.exitcode == 0
