"""What a row says reaches the text or is refused: against templates of many ways to write, and transformers."""

import copy
import random
from typing import Any

import pytest
from chats import CALLS_AS, TOOLS_AS, TURN, encode, say, template

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import CHAT_TEMPLATES

CHATML = CHAT_TEMPLATES["chatml"]
TOOL = {
    "name": "get_weather",
    "description": 'The weather \u00fcber "here".',
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3, "exact": False, "box": {"x": [1.5, 'a"b']}}}


def function(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": inner}


ROW = {
    "tools": [function(TOOL)],
    "messages": [
        *say("system", "Be brief.", "user", "Weather in Oslo?"),
        {"role": "assistant", "content": "", "tool_calls": [function(CALL)]},
        *say("tool", "It will rain.", "assistant", "Rain."),
    ],
}


@pytest.mark.parametrize("tools", TOOLS_AS)
@pytest.mark.parametrize("calls", CALLS_AS)
def test_every_way_to_write_tools_and_calls_is_complete(tok, hf, tools, calls):
    """No false alarm; and the ids are those of transformers."""
    jinja = template(TOOLS_AS[tools], CALLS_AS[calls])
    text, notes = encode(tok, jinja, ROW)
    assert notes == [] and text == hf.decode(
        hf.apply_chat_template(ROW["messages"], tools=ROW["tools"], chat_template=jinja, return_dict=False)
    )


# What stands in the text by chance: the tool's name in the call, the arguments in the question.
LEAVES_OUT = {
    ("", ""): "tool_calls .*and tools",
    ("json", ""): "tool_calls",
    ("", "json"): "leaves out tools",
    ("json", "{{ f.name }}"): "tool_calls",
    ("json", "<tool_call>"): "tool_calls",
    ("{{ f.description }}", "json"): None,  # the name of the tool is in the call: it can only be noted
}


@pytest.mark.parametrize(("tools", "calls"), LEAVES_OUT)
def test_tools_and_calls_that_a_template_leaves_out_are_refused_by_name(tok, tools, calls):
    jinja = template(TOOLS_AS.get(tools, tools), CALLS_AS.get(calls, calls))
    if expected := LEAVES_OUT[tools, calls]:
        with pytest.raises(UserError, match=expected):
            encode(tok, jinja, ROW)
    else:
        assert encode(tok, jinja, ROW)[1] == ["the chat template leaves out a part of the tools"]


def test_a_call_is_looked_for_in_its_own_turn(tok):
    """All of it stands elsewhere by chance: its name and key in the tools, its value in the question."""
    row = copy.deepcopy(ROW)
    row["messages"][2]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    with pytest.raises(UserError, match="tool_calls .'get_weather'."):
        encode(tok, template(TOOLS_AS["json"]), row)
    row["messages"] = say("user", "rain", "assistant", "So rain.")
    with pytest.raises(UserError, match="leaves out what the user says"):
        encode(tok, without("user"), {"messages": row["messages"]})


@pytest.mark.parametrize("name", ["own", *CHAT_TEMPLATES])
@pytest.mark.parametrize("part", ["tools", "tool_calls", "both"])
def test_built_in_templates_and_smollm2s_own_know_no_tools(tok, llama3, name, part):
    used, jinja = (tok, tok.chat_template) if name == "own" else (llama3, CHAT_TEMPLATES[name])
    row = copy.deepcopy(ROW)
    if part == "tools":
        row["messages"] = say("user", "Weather in Oslo?", "assistant", "Rain.")
    if part == "tool_calls":
        del row["tools"]
    if name == "chatml":
        used = tok
    with pytest.raises(UserError, match={"both": "tool_calls .* and tools"}.get(part, part)):
        encode(used, jinja, row)


def without(role: str) -> str:
    return CHATML.replace("in messages %}", f"in messages if message.role != '{role}' %}}")


def test_messages_that_a_template_leaves_out(tok):
    """A system message may be, and is counted; nothing else may, though its words stand elsewhere by chance."""
    row = {
        "messages": say(
            "system", "Be kind.", "user", "It will rain?", "assistant", "x", "tool", "rain", "assistant", "So rain."
        )
    }
    assert encode(tok, CHATML, row)[1] == []
    [note] = encode(tok, without("system"), row)[1]
    assert note.startswith("the chat template leaves out the system message")
    for role in ("user", "tool"):
        with pytest.raises(UserError, match=f"leaves out what the {role} says"):
            encode(tok, without(role), row)


def test_thinking_that_a_template_cuts_is_counted(tok):
    cuts = CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
    row = {"messages": say("user", "2 + 2?", "assistant", "<think>\nEasy.\n</think>\n4")}
    [note] = encode(tok, cuts, row)[1]
    assert note.startswith("the chat template cuts the thinking up to </think> of what the assistant says")
    assert (
        encode(tok, CHATML, row)[1] == []
        and encode(tok, cuts, {"messages": say("user", "a", "assistant", "4")})[1] == []
    )
    [note] = encode(
        tok,
        CHATML.replace("message['content']", "message['content'][:30]"),
        {"messages": say("user", "long " * 9, "assistant", "b")},
    )[1]
    assert note.startswith("the chat template cuts a part of what the user says")
    only_says_ok = CHATML.replace("message['content'] }}", "message['content'] if message.role == 'user' else 'ok' }}")
    with pytest.raises(UserError, match="leaves out what the assistant says"):
        encode(tok, only_says_ok, row)


def test_keys_that_a_template_reads_only_at_times(tok):
    """As thinking in a key of its own, which some templates write for some answers alone."""
    jinja = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message.content != '4' %}{{ message.reasoning_content }}{% endif %}{{ message['content'] }}",
    )
    chat = say("user", "2 + 2?", "assistant", "4", "user", "3 + 3?", "assistant", "6")
    for number, expected in {1: ["the chat template cuts the key reasoning_content of messages"], 3: []}.items():
        row = copy.deepcopy(chat)
        row[number]["reasoning_content"] = "Let me see."
        assert [note.partition(",")[0] for note in encode(tok, jinja, {"messages": row})[1]] == expected
    assert encode(tok, CHATML, {"messages": row})[1] == ["the key reasoning_content of messages was not read"]


TEXTS = [
    "Ho!",
    " two  words ",
    "\n\nline\n",
    "\u00fc\U0001f642 \"q\" 'a'",
    "5 <b>",
    "\ttab\t",
    "a\\b",
    '{"k": [1, 2]}',
    "<|im_end|>",
    "\u2028",
    "{{ x }}",
]


def test_no_false_alarm_on_texts_of_any_kind(tok, llama3):
    """Contents, arguments and tool results of odd texts, under every built-in template and every way to write calls."""
    chance = random.Random(0)

    def text() -> str:
        return "x" + "".join(chance.choices(TEXTS, k=3))

    for name, jinja in CHAT_TEMPLATES.items():
        for _ in range(10):
            row = {"messages": say("system", text(), *["user", text(), "assistant", text()])}
            assert encode(tok if name == "chatml" else llama3, jinja, row)[1] == []
    for calls in CALLS_AS.values():
        for _ in range(10):
            arguments = {
                text(): chance.choice([text(), 3, -1e-7, 10**20, True, None, [text(), {}], {"k": text()}])
                for _ in range(3)
            }
            call = function({"name": "f", "arguments": arguments})
            row = {
                "messages": [
                    *say("user", text()),
                    {"role": "assistant", "tool_calls": [call]},
                    *say("tool", text(), "assistant", text()),
                ]
            }
            assert encode(tok, TURN.replace("CALL", calls), row)[1] == [], (calls, row)
