"""Masks of chats, token by token, against where transformers finds each token and where Jinja writes each answer."""

import random
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nanoqlora.data.prompts import PromptFormat
from nanoqlora.tokenizer.chat_template import render
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

# How templates frame an answer: what stands before it, how its content is written, what ends it and the turn.
HEADERS = ["<|im_start|>assistant\n", "<|im_start|>assistant\n\n", "[/INST]", "[/INST] ", "\nAssistant: "]
CONTENTS = ["m.content", "m.content | trim", "' ' + m.content", "'  ' + m.content + ' '"]
BEHIND = ["", "\n", " and "]
TEXTS = ["Ho!", " two  words ", "\n\nline\n", "\u00fc\U0001f642", "5 <b>", "\t", "a\u2581b", "assistant", "'s", "End"]
OPEN, CLOSE = "\ue100", "\ue101"  # around every answer, in a second rendering


def templates(end: str) -> list[str]:
    """All of them: a question with its own frame, then an answer."""
    answers = [(header, content, behind) for header in HEADERS for content in CONTENTS for behind in BEHIND]
    return [
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{header}(({{{{ {content} }}}}{end})){behind}"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{header}{{% endif %}}"
        for header, content, behind in answers
    ]


def conversation(chance: random.Random) -> list[dict[str, str]]:
    turns = [("user", "assistant")[i % 2] for i in range(2 * chance.randint(1, 3) + chance.randint(0, 1))]
    messages = [{"role": role, "content": "".join(chance.choices(TEXTS, k=2)) + "."} for role in turns]
    return [{"role": "system", "content": "Be brief."}] * chance.randint(0, 1) + messages


def spans(text: str) -> list[tuple[int, int]]:
    """Where the answers stand in the text without the marks around them."""
    found, place = [], 0
    for part in text.split(OPEN)[1:]:
        place = text.index(OPEN, place) + 1
        start = place - 1 - 2 * len(found)
        found.append((start, start + part.index(CLOSE)))
    return found


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte-level":
        return load_tokenizer(request.getfixturevalue("smollm2_path"))
    return load_tokenizer(request.getfixturevalue("mistral_folder"))


def test_exactly_the_tokens_within_an_answer_and_its_end_count(tok: Tokenizer, tmp_path: Path):
    """Whatever the template: a token counts if all of it lies in the answer; one that starts in the header does not."""
    save_tokenizer(tok, tmp_path)
    witness = AutoTokenizer.from_pretrained(tmp_path)
    chance, end = random.Random(0), tok.vocab[tok.eos_id]
    for template in templates(end):
        messages = conversation(chance)
        fmt = PromptFormat(type="chat_template", chat_template=template.replace("((", "").replace("))", ""))
        ids, mask = fmt.encode_row(tok, {"messages": messages})
        text = fmt.render(tok, messages)
        marked = render(template.replace("((", OPEN).replace("))", CLOSE), messages, False, tok.named_texts)
        assert marked.replace(OPEN, "").replace(CLOSE, "") == text
        encoded = witness(text, add_special_tokens=False, return_offsets_mapping=True)
        assert ids == encoded["input_ids"]
        expected = [
            any(start <= a and b <= stop and a < b for start, stop in spans(marked))
            for a, b in encoded["offset_mapping"]
        ]
        assert mask == expected, (template, messages)
        assert sum(mask) >= sum(m["role"] == "assistant" for m in messages)
