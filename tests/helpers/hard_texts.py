"""Texts and chats that tokenizers disagree about."""

import itertools
import random

import tokenizers

HARD = [
    text
    for line in [
        "~a~1~A~.~The quick brown fox.~  two~two  ~a  b~a  5~a   5~5  a~5 5~12345~3.14159~1e-5~0x1F~1,000,000",
        "\u0663\u0664\u0665~\u00bd\u00b2~\u2167~\u4e00\u4e8c\u4e09~\U0001d7d8\U0001d7d9~a\u00b2b~ \u00b2~  \u00b2",
        "I'm~I'M~we'll~WE'LL~they've~it's~'s~'S~'sad~'tis~don't~o'clock~''s~' s~'d'd~'re're~'\u017f~rock'n'roll",
        "\u00fc~u\u0308~\u00e9te\u0301~A\u030a\u0327~\u0301~a\u0301\u0301~\u0915\u094d\u0937\u093f~\u0e01\u0e33~\u01c5",
        "\u1e9b\u0323~\u0130i\u0307~\u00df\u1e9e~\U0001f642~a\U0001f642b~ \U0001f642 ~\u2764\ufe0f~#\ufe0f\u20e3",
        "\U0001f468\u200d\U0001f469\u200d\U0001f467~\U0001f1e9\U0001f1ea~\U0001f44d\U0001f3fd~\U00020000~\U0001d49c",
        "\u4f60\u597d~\u4f60\u597d\uff0c\u4e16\u754c\uff01~\u3053\u3093\u306b\u3061\u306f~\u30ab\u30bf~\uff76\uff85",
        "\ud55c\uad6d\uc5b4~\u1112\u1161\u11ab~\u0627\u0644\u0639\u0631\u0628\u064a\u0629~\u05e2\u05d1\u05e8~\u0440",
        "\u00a0~a\u00a0b~\u3000a~\u2003\u2003x~\u2028~\u2029a~\u200b~a\u200bb~\ufeffa~\u200d~\u202e~\u180e",
        "\u205f~\ufffd~\ufffe~\ue000~\U0010ffff~x=1;y=2~def f(x):~x**2~<div>~{'k': [1, 2]}~a/b\\c~$HOME~@user",
        "http://a.b/c?d=e&f=g~snake_case~camelCase~__init__~---~===~....~\u2026~--a--~!!!~?!~(((~a_1~_~__~%%~`x`~\u1680",
        "<|im_end|~im_end|>~< |im_end|>~<|IM_END|>~<|im_end|><|im_end|>~a<|im_end|>b~ <|im_end|> ~<|im_<|im_end|>end|>",
    ]
    for text in line.split("~")
]
ATOMS = " ~  ~\n~\n\n~\t~\r\n~a~Zz~7~42~\u00b2~'s~'LL~.~...~\u4f60~\u00fc~\u0301~\U0001f642~\u00a0~\u3000~\x85".split(
    "~"
)
ATOMS += ["_", "-", "<|", "|>", "<|im_end|>", "<|endoftext|>"]
CONTROL_CHARACTERS = ["\r", "\x01", "\x04", "\x0b", "\x0c", "\x16", "\x1b", "\x1c", "\x1d", "\x1f", "\x7f", "\x80"]


def _random_texts(count: int) -> list[str]:
    choice = random.Random(0)
    atoms = [*ATOMS, *CONTROL_CHARACTERS, *"etaoin shrdlu ETAOIN 0123456789"]
    atoms += [
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<s>",
        "</s>",
        "<0x41>",
        "\u2581",
        "\x00",
        b"\xe2\x96 \xff".decode(errors="replace"),
    ]
    return ["".join(choice.choices(atoms, k=choice.randint(1, 30))) for _ in range(count)]


# Every hard text alone, every two small ones side by side, and long random ones.
PAIRS = ["".join(pair) for pair in itertools.product([*ATOMS, *CONTROL_CHARACTERS], repeat=2)]
TEXTS = [*HARD, *CONTROL_CHARACTERS, *PAIRS, *_random_texts(10_000)]

CHATS = [
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A pirate, matey.\n\nArr  5 \u00fc"},
    ],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi \n"}],
    [
        {"role": "system", "content": "{{ braces }} and {% blocks %}"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "\u4f60\u597d \U0001f642"},
        {"role": "assistant", "content": "  indented\n\tcode"},
        {"role": "user", "content": "12345"},
    ],
]


def as_text(witness: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that the tokenizers package gives when special tokens in the texts are to stay texts."""
    witness.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in witness.encode_batch(texts, add_special_tokens=False)]
    finally:
        witness.encode_special_tokens = False
