"""Modelfiles: no text of a model changes on its way through Ollama's parser, or becomes an instruction."""

import json
import random
import re
from pathlib import Path

import pytest
from chats import with_default
from modelfiles import INSTRUCTIONS, is_print, parse

from nanoqlora.config.errors import UserError
from nanoqlora.data.messages import say
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.data.row_format import Frame
from nanoqlora.export.go_template import go_template
from nanoqlora.gguf.modelfile import (
    NO_GUESS,
    Recipe,
    file_value,
    go_text,
    is_kept,
    is_ours,
    jinja_wins,
    no_guess,
    own_name,
    quoted,
    write_modelfiles,
)
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer

# Pieces of which texts are made that a careless writer lets escape, or that the parser drops.
PIECES = [
    *('"', '""', '"""', '"""\n', "\n", "\r", "\r\n", " ", "\t", "\\", "\\n", "{", "{{", "}}", "{{-", "-}}", "{%", "`"),
    *("\nFROM /etc/passwd\n", '"""\nADAPTER ./evil\n', "PARAMETER stop a\n", '\nSYSTEM """', "# ", "\nMESSAGE user x"),
    *("\u200c", "\u200d", "\u00a0", "\u202f", "\u3000", "\ufeff", "\u00ad", "\u06dd", "\u2028", "\x00", "\x1b", "\x85"),
    *(
        "a",
        "word",
        "\u00fc",
        "\u4f60",
        "\U0001f642",
        "\U0001fae8",
        "\ue000",
        "\U000e0001",
        "<|im_end|>",
        "$x",
        "{{ .X }}",
    ),
]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return PIECES + ["".join(rng.choices(PIECES, k=rng.randint(2, 12))) for _ in range(count)]


def go_value(text: str) -> str:
    """What a template of text and of actions with one string each writes, by the rules of Go."""

    def unescaped(action: re.Match[str]) -> str:
        name = re.compile(r'\\(?:u([0-9a-f]{4})|U([0-9a-f]{8})|([bfnrt"\\]))')
        rest = name.sub("", action[1])
        assert "\\" not in rest and '"' not in rest and "\n" not in rest
        simple = dict(zip('bfnrt"\\', '\b\f\n\r\t"\\', strict=True))
        return name.sub(lambda found: simple[found[3]] if found[3] else chr(int(found[1] or found[2], 16)), action[1])

    assert "{{" not in (outside := re.sub(r'\{\{ "((?:\\.|[^"\\])*)" \}\}', "", text)), outside
    return re.sub(r'\{\{ "((?:\\.|[^"\\])*)" \}\}', unescaped, text)


def test_texts_come_out_of_the_parser_as_they_went_in():
    """A value is right or is not written, a Go template always holds the text."""
    for text in texts(5000):
        if (value := quoted(text)) is not None:
            assert parse(f"FROM a\nSYSTEM {value}\nPARAMETER stop {value}\n")[1:] == [("system", text), ("stop", text)]
        template = go_text(text)
        recipe = Recipe(["FROM a"], template, text if value is not None else None, [text])
        assert parse(recipe.text())[1] == ("template", template) and go_value(template) == text
    assert quoted("plain") == '"plain"' and go_text("<|im_end|>\n") == "<|im_end|>\n"
    assert go_text("a\u200cb") == 'a{{ "\\u200c" }}b'


def test_what_is_kept_can_be_printed():
    """By this Python's Unicode. Of what it has not heard of, nothing is kept."""
    assert all(is_print(char) or char in "\t\n" for char in map(chr, range(0x110000)) if is_kept(char))
    assert all(is_kept(char) for char in "aZ0 ~\u00fc\u4f60\n\t|<>")
    assert not any(map(is_kept, "\r\x7f\x00\xa0\xad\u200b\u200d\u2028\u3000\ue000\ufeff\ud800\U0001fae8"))


def test_no_text_of_a_model_adds_an_instruction():
    """Whatever template, system text, end tokens and names hold, the instructions are those that we meant."""
    rng, all_texts = random.Random(0), texts(2000, seed=1)
    for _ in range(3000):
        template, system, stop, other, name = rng.choices(all_texts, k=5)
        try:
            files = [f"FROM {file_value(f'./{name}.gguf')}"]
        except UserError:
            files = ["FROM ./m.gguf"]
            assert any(not is_kept(char) or char == "\n" for char in name) or '"""' in name
        system = None if quoted(system) is None else system
        recipe = Recipe(files, go_text(template), system, [stop, other], [("top_p", 0.9)], note="A note.")
        given = [
            ("from", f"./{name}.gguf" if files[0] != "FROM ./m.gguf" else "./m.gguf"),
            ("template", recipe.template),
        ]
        given += [("system", system)] * (system is not None) + [("top_p", "0.9")]
        given += [("stop", text) for text in (stop, other) if quoted(text) is not None]
        assert parse(recipe.text()) == given


@pytest.fixture(scope="module")
def tok(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def chat(template: str) -> PromptFormat:
    return PromptFormat(type="chat_template", chat_template=template)


def written(template: str, messages: list[dict[str, str]]) -> str:
    """What the Go template of a ChatML-like chat writes, by the shape that `Turns.go` gives it."""
    first, turns, end = re.fullmatch(
        r"(?:\{\{ if ne \(index \.Messages 0\)\.Role \"system\" \}\}(.*?)\{\{ end \}\})?"
        r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)",
        template,
        re.DOTALL,
    ).groups()
    text = "" if messages[0]["role"] == "system" else go_value(first or "")
    for message in messages:
        parts = re.split(r"\{\{ \.(Role|Content) \}\}", turns)
        text += "".join(message[part.lower()] if i % 2 else go_value(part) for i, part in enumerate(parts))
    return text + go_value(end)


HARD = [piece for piece in PIECES if piece not in ("{{", "}}", "{%", "{{-", "-}}", "{{ .X }}", "{", "\x00", "# ")]


@pytest.mark.parametrize("seed", range(4))
def test_templates_with_any_character(seed: int, tok: Tokenizer):
    """A chat template, a default system text and a frame: their Go template writes what they write."""
    rng = random.Random(seed)
    question = say("user", "question?", "assistant", "answer.", "user", "more?")
    for _ in range(12):
        # Jinja makes every line break \n, and a test of roles needs them, so one of them stands in an expression.
        mark, other = ("".join(rng.choices(HARD, k=3)).strip() or "x" for _ in range(2))
        chatml = CHAT_TEMPLATES["chatml"].replace("<|im_end|>", f"{{{{ {json.dumps(mark)} }}}}<|im_end|>")
        for template, text in ((chatml, None), (with_default(other), other), (with_default(f" {other}"), f" {other}")):
            fmt = chat(template)
            go, system, stops = go_template(fmt, tok)
            recipe = dict(parse(Recipe(["FROM a"], go, system, stops).text()))
            assert recipe.keys() <= {"from", "template", "system", "stop"} and recipe["stop"] == "<|im_end|>"
            assert (recipe.get("system") == text) if system is not None else "system" not in recipe
            for messages in (question, say("system", "s", "user", "u")):
                given = (
                    messages if system is None or messages[0]["role"] == "system" else say("system", system) + messages
                )
                expected = fmt.render(tok, messages, add_generation_prompt=True)
                assert written(recipe["template"], given) == expected
        frame = PromptFormat(type="custom", frame=Frame(format=f"{mark}{{instruction}}{other}"))
        recipe = dict(parse(Recipe(["FROM a"], *go_template(frame, tok)).text()))
        head, middle, tail = recipe["template"].partition("{{ end }}")[2].partition("{{ $last }}")
        assert go_value(head) + "?" + go_value(tail) == fmt_text(frame, tok) and middle


def fmt_text(fmt: PromptFormat, tok: Tokenizer) -> str:
    return fmt.render(tok, say("user", "?"))


def test_a_system_text_is_where_it_comes_through(tok: Tokenizer):
    """SYSTEM where it can hold the text, as users look for it there, else the template."""
    for text, is_in_system in {
        "You are a pirate.": True,
        'Two\nlines, "quoted" and \\n': True,
        'Ends with """': False,
        '"""\nADAPTER ./evil': False,
        "joined\u200dhere": False,
        "a\r\nb": False,
        "ends with a space ": False,  # a Jinja that is run instead may strip it
    }.items():
        go, system, _ = go_template(chat(with_default(text)), tok)
        assert (system == text) == is_in_system and (system is None) == (not is_in_system), text
        assert ("index .Messages 0" in go) != is_in_system


# ------------------------------------------------------------------------------------------------ which template


def test_jinja_that_ollama_prefers():
    """As in server/images.go of Ollama 0.32, for a TEMPLATE without tools and thinking."""
    splits = "{{ content.split('</think>')[1] }}"
    for jinja in ("{{ tools }}", "{{ message.tool_calls }}", "<think>{{ x }}</think>", splits):
        assert jinja_wins(CHAT_TEMPLATES["chatml"] + jinja)
    for jinja in ("", "<think>", "</think>", splits + "{{ reasoning_content }}"):
        assert not jinja_wins(CHAT_TEMPLATES["chatml"] + jinja)


def test_a_template_that_no_guess_fits_writes_the_same(tok: Tokenizer):
    """The line in front changes no text, also where the template begins with white space, which Jinja may drop."""
    assert len(NO_GUESS) >= 100
    for start in ("", "\n", "\n\n", "  ", " \n ", "  {% if true %}x{% endif %}\n", "{{ '\n' }}", "{#- c -#} "):
        template = start + CHAT_TEMPLATES["chatml"]
        for messages in (say("user", "u"), say("system", "s", "user", "u", "assistant", "a", "user", "v")):
            given, guarded = chat(template), chat(no_guess(template))
            assert guarded.render(tok, messages, True) == given.render(tok, messages, True), start


# ------------------------------------------------------------------------------------------------ files of the user


def test_names_of_files():
    for name in (
        "m.gguf",
        "my model.gguf",
        'a "b" c.gguf',
        "~m.gguf",
        "#m.gguf",
        "\u00fc.gguf",
        " m .gguf",
        "\\n.gguf",
    ):
        assert parse(f"FROM {file_value(f'./{name}')}\n") == [("from", f"./{name}")]
    for name in ("a\u00a0b.gguf", 'a"""b.gguf', "a\nFROM b.gguf", "a\u200d.gguf", "a\udcff.gguf", "a\rb.gguf"):
        with pytest.raises(UserError, match="Modelfile cannot hold this name"):
            file_value(f"./{name}")
    assert file_value("../models/m-1.Q4_1.gguf") == "../models/m-1.Q4_1.gguf"


def test_whose_a_modelfile_is(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Ours until somebody changes it, also one that an earlier version left without a mark, if it says the same."""
    text, path = Recipe(["FROM ./m.gguf"], "t", None, ["</s>"]).text(), tmp_path / "Modelfile"
    assert is_ours(path)
    write_modelfiles(tmp_path / "m.gguf", text, is_model=True)
    assert is_ours(path) and is_ours(own_name(tmp_path / "m.gguf")) and parse(path.read_text()) == parse(text)
    for theirs in (
        path.read_text() + "PARAMETER num_ctx 4096\n",
        path.read_text().replace("\n", "\r\n"),
        "",
        "\n",
        "\xff",
    ):
        path.write_bytes(theirs.encode("latin-1"))
        assert not is_ours(path)
    path.write_text(text)
    assert is_ours(path, text) and not is_ours(path, text + "\n") and not is_ours(path)
    path.unlink()
    path.mkdir()
    assert not is_ours(path)


def test_each_file_has_its_own(tmp_path: Path, capsys: pytest.CaptureFixture):
    def said(name: str, is_model: bool = True) -> str:
        write_modelfiles(tmp_path / name, f"FROM ./{name}\n", is_model)
        return capsys.readouterr().out

    last = tmp_path / "Modelfile"
    assert said("model-q8_0.gguf") == f"{last}: ollama create NAME -f {last}\n"
    assert said("model-q8_0.gguf") == f"{last}: ollama create NAME -f {last}\n"
    replaced = f"{last}: was that of ./model-q8_0.gguf, which still has {tmp_path / 'Modelfile-model-q8_0'}\n"
    assert said("model-q4_k_m.gguf").splitlines(True)[1:] == [replaced]
    own = tmp_path / "Modelfile-adapter-f32"
    assert said("adapter-f32.gguf", is_model=False) == f"{own}: ollama create NAME -f {own}\n"
    for path, name in ((last, "model-q4_k_m"), (own, "adapter-f32"), (tmp_path / "Modelfile-model-q8_0", "model-q8_0")):
        assert parse(path.read_text()) == [("from", f"./{name}.gguf")]

    last.write_text("FROM llama3\nPARAMETER temperature 0\n")
    own = tmp_path / "Modelfile-model-q8_0"
    kept = f"{last}: is not one that export_gguf.py wrote, or was changed since, so it stays as it is.\n"
    assert said("model-q8_0.gguf") == f"{kept}{own}: ollama create NAME -f {own}\n"
    assert last.read_text() == "FROM llama3\nPARAMETER temperature 0\n"


def test_the_helper_knows_what_ollama_refuses():
    known = [name for name in INSTRUCTIONS if name != "parameter"]
    assert [name for name, _ in parse("".join(f"{name} user x\n" for name in known))] == known
    for wrong in ("", "SYSTEM x\n", "FROM a\nFOO b\n", 'FROM a\nSYSTEM """x\n', "FROM a\nMESSAGE bot x\n", "FROM"):
        with pytest.raises(ValueError):
            parse(wrong)
