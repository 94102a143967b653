"""The shapes that conversations have in files: all of one conversation give the same ids, and nothing goes unnamed."""

import json
from dataclasses import replace
from typing import Any

import pytest
from chats import CALLS_AS, CHAT, CHATML, TOOLS_AS, counted, encode, say, template

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat, detect_format
from nanoqlora.data.row_format import USUAL_ROLES, Frame

CHAT_ROW = {"messages": say("system", "Be brief.", "user", "hi", "assistant", "Ho!")}
SHAREGPT = {"role": "from", "content": "value"}


def sharegpt(*turns: str) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> row, keys of its data set
    "sharegpt": (
        {"conversations": sharegpt("system", "Be brief.", "human", "hi", "gpt", "Ho!")},
        {"field_messages": "conversations", "message_property_mappings": SHAREGPT},
    ),
    "sharegpt with a system column": (
        {"system": "Be brief.", "conversations": sharegpt("human", "hi", "gpt", "Ho!")},
        {"field_messages": "conversations", "message_property_mappings": SHAREGPT, "roles": {"assistant": ["gpt"]}},
    ),
    "a system column of another name": (
        {"persona": "Be brief.", "messages": CHAT_ROW["messages"][1:]},
        {"field_system": "persona"},
    ),
    "messages as JSON text": ({"messages": json.dumps(CHAT_ROW["messages"])}, {}),
    "each message as JSON text": ({"messages": [json.dumps(message) for message in CHAT_ROW["messages"]]}, {}),
    "text parts": (
        {"messages": [{**m, "content": parts(m["content"])} for m in CHAT_ROW["messages"]]}, {}
    ),
    "no calls, no tools": (
        {"messages": [*CHAT_ROW["messages"][:2], {**CHAT_ROW["messages"][2], "tool_calls": []}], "tools": []}, {}
    ),
    "trl's prompt and completion": (
        {"prompt": CHAT_ROW["messages"][:2], "completion": CHAT_ROW["messages"][2:]}, {}
    ),
    "two columns": (
        {"q": "hi", "a": "Ho!", "s": "Be brief."},
        {"field_instruction": "q", "field_output": "a", "field_system": "s"},
    ),
    "two columns, keys of another name": (
        {"q": "hi", "a": "Ho!", "system": "Be brief."},
        {"field_instruction": "q", "field_output": "a", "message_property_mappings": SHAREGPT},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_one_conversation_in_many_shapes(tok, shape):
    row, keys = SHAPES[shape]
    notes: list[str] = []
    fmt = PromptFormat(type="chat_template", **keys)
    assert fmt.encode_row(tok, row, notes.append) == CHAT.encode_row(tok, CHAT_ROW)
    assert [note for note in notes if not note.startswith("role: ")] == []
    if shape in ("trl's prompt and completion", "sharegpt"):
        found = detect_format(row)
        assert found.encode_row(tok, row) == CHAT.encode_row(tok, CHAT_ROW), "without a configuration too"
    assert [m["content"] for m in fmt.question(row)] == ["Be brief.", "hi"]


def test_only_the_completion_of_a_pair_is_learnt(tok):
    """As trl has it: an answer in the prompt is given."""
    chat = say("user", "a", "assistant", "B", "user", "c", "assistant", "D")
    for cut, expected in ((3, "D<|im_end|>"), (1, "B<|im_end|>D<|im_end|>")):
        assert counted(tok, *CHAT.encode_row(tok, {"prompt": chat[:cut], "completion": chat[cut:]})) == expected


def test_an_empty_list_of_calls_calls_nothing(tok):
    """Some templates ask only whether there is one, as Llama-3.1's, which refuses any number but one."""
    asks = CHATML.replace(
        "<|im_end|>", "{% if 'tool_calls' in message %}{{ message.tool_calls[0].x }}{% endif %}<|im_end|>"
    )
    row = {"messages": [*say("user", "a"), {"role": "assistant", "content": "b", "tool_calls": []}]}
    assert encode(tok, asks, row)[0] == encode(tok, CHATML, {"messages": say("user", "a", "assistant", "b")})[0]


WITH_PARTS = (  # as Llama-3.2-Vision
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}BETWEEN{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("name", ["", "{{ '\n' if not loop.first }}", "alone"])
def test_text_parts_are_written_as_transformers_writes_them(tok, hf, name):
    jinja = PARTS_ALONE if name == "alone" else WITH_PARTS.replace("BETWEEN", name)
    content = [parts("Look ", "at", " <|im_end|>"), parts("Ho", "!")]
    messages = [{"role": role, "content": some} for role, some in zip(("user", "assistant"), content, strict=True)]
    text, notes = encode(tok, jinja, {"messages": messages})
    assert text == hf.apply_chat_template(messages, chat_template=jinja, tokenize=False) and notes == []
    ids, mask = PromptFormat(type="chat_template", chat_template=jinja).encode_row(tok, {"messages": messages})
    between = "\n" * name.startswith("{{")
    assert counted(tok, ids, mask) == f"Ho{between}!<|im_end|>"


def test_text_parts_for_a_template_of_texts_are_lines(tok):
    """transformers would write them as Python; llama.cpp and vLLM give such a template a line for each."""
    for jinja in (None, CHATML):
        row = {"messages": [{"role": "user", "content": parts("a", "b")}, *say("assistant", "c")]}
        assert encode(tok, jinja, row)[0] == encode(tok, jinja, {"messages": say("user", "a\nb", "assistant", "c")})[0]
    row["messages"][0]["content"].append({"type": "image_url", "image_url": "x"})
    with pytest.raises(UserError, match="message 1: content has a part of type image_url, and only text"):
        encode(tok, CHATML, row)


CHATS = {
    "two questions": say("user", "a", "user", "b", "assistant", "c"),
    "two answers": say("user", "a", "assistant", "b", "assistant", "c"),
    "a late system message": say("user", "a", "assistant", "b", "system", "s", "user", "c", "assistant", "d"),
    "several results": [
        *say("user", "a"),
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * 2},
        *say("tool", "x", "tool", "", "tool", "y", "assistant", "d"),
    ],
}


@pytest.mark.parametrize("name", CHATS)
def test_orders_that_a_template_writes_are_trained(tok, hf, name):
    jinja = template(TOOLS_AS["json"], CALLS_AS["json"])
    messages = CHATS[name]
    ids, mask = PromptFormat(type="chat_template", chat_template=jinja).encode_row(tok, {"messages": messages})
    assert ids == hf.apply_chat_template(messages, chat_template=jinja, return_dict=False)
    assert sum(mask[i] and ids[i] == tok.eos_id for i in range(len(ids))) == sum(
        m["role"] == "assistant" for m in messages
    )
    strict = (
        "{% for m in messages %}{% if loop.index0 and m.role == messages[loop.index0 - 1].role %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}{% endfor %}"
    )
    if name.startswith("two"):
        with pytest.raises(UserError, match="roles must take turns"):
            encode(tok, strict + jinja, {"messages": messages})


# ---------------------------------------------------------------------------------------------------------------------
# Tools and calls

CALL = {"name": "f", "arguments": {"x": {"y": [1, "z"]}, "n": None}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "object"}}}}


def test_json_in_json_is_parsed_where_an_object_belongs(tok):
    """The same ids from objects and from texts, at every place where files keep a text."""
    jinja = template(TOOLS_AS["json"], CALLS_AS["json"])

    def row(tools: Any, calls: Any) -> dict[str, Any]:
        return {
            "messages": [*say("user", "a"), {"role": "assistant", "content": None, "tool_calls": calls}],
            "tools": tools,
        }

    def wrapped(inner: Any) -> dict[str, Any]:
        return {"type": "function", "function": inner}

    expected = encode(tok, jinja, row([wrapped(TOOL)], [wrapped(CALL)]))
    assert '"arguments": {"x": {"y": [1, "z"]}, "n": null}' in expected[0] and expected[1] == []
    texts = {**TOOL, "parameters": json.dumps(TOOL["parameters"])}, {**CALL, "arguments": json.dumps(CALL["arguments"])}
    for tool, call in ((TOOL, CALL), texts, map(json.dumps, (TOOL, CALL)), map(json.dumps, texts)):
        pair = [wrapped(tool)], [wrapped(call)]
        for form in (list, json.dumps, lambda some: [json.dumps(some[0])]):
            assert encode(tok, jinja, row(*map(form, pair))) == expected
    old = row([wrapped(TOOL)], None)
    old["messages"][1] |= {"function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
    assert encode(tok, jinja, old) == expected, "OpenAI's older way"
    empty = row([wrapped(TOOL)], [wrapped({"name": "f", "arguments": ""})])
    assert '"arguments": {}' in encode(tok, jinja, empty)[0]
    for text in ("Oslo", "{Oslo", '"5"'):
        assert (
            f'"arguments": {json.dumps(text)}'
            in encode(tok, jinja, row([wrapped(TOOL)], [wrapped({"name": "f", "arguments": text})]))[0]
        )


# ---------------------------------------------------------------------------------------------------------------------
# Roles, and what is learnt

BOTH = say("human", "hi", "gpt", "Ho!", "function_call", "{}", "observation", "x", "gpt", "Hey!")


def test_unknown_roles_are_refused_unless_named(tok):
    for given in ({}, {"roles": {"assistant": ["gpt"]}}):
        with pytest.raises(
            UserError,
            match="the roles function_call and observation are unknown.*roles: "
            "{assistant: .function_call., tool: .observation.}",
        ):
            encode(tok, CHATML, {"messages": BOTH}, **given)
    named = {"assistant": ["function_call"], "tool": ["observation"]}
    text, _ = encode(tok, CHATML, {"messages": BOTH}, roles=named)
    assert (
        text
        == encode(
            tok,
            CHATML,
            {"messages": say("user", "hi", "assistant", "Ho!", "assistant", "{}", "tool", "x", "assistant", "Hey!")},
        )[0]
    )
    text, _ = encode(tok, CHATML, {"messages": BOTH}, roles={name: [name] for name in ("function_call", "observation")})
    assert "<|im_start|>function_call\n{}" in text
    for role, ours in USUAL_ROLES.items():
        others = say("user", "a", "assistant", "b")
        assert f"<|im_start|>{ours}\nx" in encode(tok, CHATML, {"messages": [*others, *say(role, "x")]})[0]


@pytest.mark.parametrize(
    ("role", "meant"),
    [("developer", "system"), ("assitant", "assistant"), ("Assistant", "assistant"), ("User", "user")]
    + [("usr", "user"), ("ipython", "tool"), ("tool_call", "assistant"), ("narrator", "assistant")],
)
def test_the_error_on_a_role_names_what_it_most_likely_means(tok, role, meant):
    row = {"messages": [*CHAT_ROW["messages"], *say(role, "x")]}
    with pytest.raises(UserError, match=rf"the role {role} is unknown.*roles: {{{meant}: \[{role}\]}}"):
        encode(tok, CHATML, row)


def test_functions_of_older_files_are_tools(tok):
    """OpenAI's files had functions and function_call before they had tools and tool_calls."""
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    call = {"name": "f", "arguments": '{"a": 1}'}
    asked = say("user", "hi")
    old = {"functions": [function], "messages": [*asked, {"role": "assistant", "content": None, "function_call": call}]}
    wrapped = [{"type": "function", "function": call}]
    new = {
        "tools": [{"type": "function", "function": function}],
        "messages": [*asked, {"role": "assistant", "content": None, "tool_calls": wrapped}],
    }
    jinja = template(next(iter(TOOLS_AS.values())), next(iter(CALLS_AS.values())))
    notes: list[str] = []
    fmt = PromptFormat(type="chat_template", chat_template=jinja)
    assert fmt.encode_row(tok, old, notes.append) == fmt.encode_row(tok, new)
    assert [note for note in notes if not note.startswith("role: ")] == []
    with pytest.raises(UserError, match="leaves out tool_calls .* and tools"):
        encode(tok, CHATML, old)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"query": "q", "answers": '[{"name": "f", "arguments": {}}]', "tools": "[]"}, "field_output: answers"),
        ({"data": [{"instruction": "q", "output": "a"}]}, "Name the column"),
        ({"conversation": CHAT_ROW["messages"]}, "field_messages: conversation."),
        ({"instruction": "q", " output": "a"}, "columns instruction, ' output'"),
    ],
)
def test_the_advice_on_missing_columns_fits_what_is_there(tok, row, advice):
    with pytest.raises(UserError, match="messages is missing") as error:
        encode(tok, CHATML, row)
    assert advice in str(error.value)


def test_arguments_are_texts_for_a_template_that_adds_them(tok):
    """As functionary's does it: transformers writes the row's JSON text, and could not write an object."""
    jinja = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{ '[' + call.function.name + ': ' + call.function.arguments + ']' }}{% endfor %}",
    )
    for arguments in ('{"city": "Oslo"}', {"city": "Oslo"}):
        calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}}]
        row = {"messages": [*say("user", "hi"), {"role": "assistant", "content": "", "tool_calls": calls}]}
        fmt = PromptFormat(type="chat_template", chat_template=jinja)
        assert counted(tok, *fmt.encode_row(tok, row)) == '[f: {"city": "Oslo"}]<|im_end|>'


def test_a_key_that_stands_twice_in_json_text_is_refused(tok):
    for text in ('[{"role": "user", "content": "a", "content": "b"}]', '[{"role": "user", "role": "user"}]'):
        with pytest.raises(UserError, match="the key (content|role) stands twice in one object"):
            encode(tok, CHATML, {"messages": text})


def test_roles_to_train_takes_the_names_of_the_file(tok):
    def learnt(*roles: str, **more: Any) -> str:
        fmt = PromptFormat(type="chat_template", chat_template=CHATML, roles_to_train=roles, **more)
        return counted(tok, *fmt.encode_row(tok, {"messages": BOTH}))

    named = {"roles": {"assistant": ["gpt", "function_call"], "tool": ["observation"]}}
    assert learnt("assistant", **named) == "Ho!<|im_end|>{}<|im_end|>Hey!<|im_end|>"
    assert learnt("gpt", **named) == "Ho!<|im_end|>Hey!<|im_end|>"
    assert learnt("function_call", "human", **named) == "hi<|im_end|>{}<|im_end|>"
    with pytest.raises(UserError, match="roles_to_train names asistant, and known are system, user, human"):
        learnt("asistant")


@pytest.mark.parametrize(
    ("marks", "keys", "expected"),
    [
        ([{"weight": 0}, {"weight": 1}], {}, "D"),
        ([{"weight": 0.0}, {}], {}, "D"),
        ([{"train": False}, {"train": True}], {}, "D"),
        ([{"train": "false"}, {}], {}, "D"),
        ([{}, {"learn": False}], {"message_field_training": "learn"}, "B"),
        ([{"learn": 0, "weight": 1}, {"weight": 0}], {"message_field_training": "learn"}, "D"),
        ([{"weight": 0}, {"train": False}], {}, ""),
    ],
)
def test_answers_may_be_marked_as_not_to_be_learnt(tok, marks, keys, expected):
    messages = say("user", "a", "assistant", "B", "user", "c", "assistant", "D")
    for number, mark in zip((1, 3), marks, strict=True):
        messages[number] |= mark
    fmt = PromptFormat(type="chat_template", **keys)
    notes: list[str] = []
    learnt = counted(tok, *fmt.encode_row(tok, {"messages": messages}, notes.append))
    assert learnt == "".join(f"{text}<|im_end|>" for text in expected)
    assert not [note for note in notes if "key" in note]
    with pytest.raises(UserError, match="weight is float 0.5"):
        CHAT.encode_row(tok, {"messages": [*messages[:3], {**messages[3], "weight": 0.5}]})


def test_a_message_may_also_be_marked_as_to_be_learnt(tok):
    """As Axolotl's message_field_training, whatever its role."""
    fmt = PromptFormat(type="chat_template", message_field_training="learn")
    row = {"messages": [{"role": "user", "content": "a", "learn": True}, *say("assistant", "b")]}
    assert counted(tok, *fmt.encode_row(tok, row)) == "a<|im_end|>b<|im_end|>"
    by_mark_alone = replace(fmt, roles_to_train=())
    assert counted(tok, *by_mark_alone.encode_row(tok, row)) == "a<|im_end|>"
    assert counted(tok, *by_mark_alone.encode_row(tok, {"messages": say("user", "a", "assistant", "b")})) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Columns and keys


def test_columns_and_keys_that_nobody_reads_are_named(tok, llama3):
    extra = {"id": 7, "score": 0.0, "source": "web", "empty": "", "null": None, "none": []}
    expected = {f"the column {name} was not read" for name in ("id", "score", "source")}
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "i", "output": "o"},
        "prompt_completion": {"prompt": "i", "completion": "o"},
        "completion": {"text": "t"},
        "chat_template": {
            "messages": [{"role": "user", "content": "a", "name": "Bo", "x": None}, *say("assistant", "b")]
        },
    }
    for kind, row in rows.items():
        notes: list[str] = []
        PromptFormat(type=kind).encode_row(tok, {**row, **extra}, notes.append)
        wanted = expected | ({"the key name of messages was not read"} if kind == "chat_template" else set())
        assert {note for note in notes if not note.startswith("role: ")} == wanted, kind
    for row, column in (
        ({"instruction": "i", "output": "o", "system": "s"}, "system"),
        ({"text": "t", "tools": [1]}, "tools"),
    ):
        notes = []
        detect_format(row).encode_row(tok, row, notes.append)
        assert notes == [f"the column {column} was not read"]
    both = {"system": "s", "messages": say("system", "S", "user", "a", "assistant", "b")}
    assert encode(tok, CHATML, both)[1] == ["the column system was not read"]


def test_a_frame_without_a_place_for_a_column(tok):
    fmt = PromptFormat(type="custom", frame=Frame(format="Q: {instruction}\nA: "))
    notes: list[str] = []
    fmt.encode_row(tok, {"instruction": "i", "input": "context", "output": "o"}, notes.append)
    assert notes == ["the column input was not read: the format has no place for it"]


def test_axolotls_own_frame_has_one_space_behind_an_instruction_alone(tok):
    frame = Frame(field_instruction="question", field_output="answer")
    assert (frame.prompt("Who?"), frame.prompt("Who?", "here")) == ("Who? ", "Who? here ")
    assert Frame(format="{instruction}|{input}|").prompt("Who?") == "Who?||"
    assert Frame(no_input_format="{instruction}?").prompt("Who") == "Who?"


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        (
            "alpaca",
            {"question": "q", "answer": "a"},
            "columns question, answer. .*type: {field_instruction: question, field_output: answer}",
        ),
        ("alpaca", {"Prompt": "q", "Response": "a"}, "field_instruction: Prompt, field_output: Response"),
        ("alpaca", {"a": "q", "b": "a"}, "columns a, b. .*field_instruction: COLUMN"),
        (
            "alpaca",
            {"conversations": sharegpt("human", "a", "gpt", "b")},
            "type: chat_template and field_messages: conversations. .*{role: from, content: value}",
        ),
        (
            "chat_template",
            {"id": 1, "conversations": sharegpt("human", "a", "gpt", "b")},
            "messages is missing.*columns id, conversations.*field_messages: conv.*{role: from, content: value}",
        ),
        ("chat_template", {"chat": say("user", "a", "assistant", "b")}, "field_messages: chat\\.$"),
        (
            "chat_template",
            {"messages": sharegpt("human", "a", "gpt", "b")},
            "message 1: role is missing.*message_property_mappings: {role: from, content: value}",
        ),
        (
            "chat_template",
            {"messages": [{"role": "user", "text": "a"}]},
            "content is missing, and there is text.*{role: role, content: text}",
        ),
        (
            "chat_template",
            {"question": "q", "answer": "a"},
            "field_instruction: question, field_output: answer beside type: chat_template",
        ),
        ("completion", {"id": 1, "story": "x"}, "text is missing.*columns id, story. Write field: story"),
        ("prompt_completion", {"question": "q", "answer": "a"}, "prompt is missing.*field_instruction: question"),
        ("alpaca", {}, "columns none"),
    ],
)
def test_other_columns_are_named_with_the_mapping_to_write(tok, kind, row, said):
    with pytest.raises(UserError, match=said):
        PromptFormat(type=kind).encode_row(tok, row)


def test_an_empty_answer_trains_its_end_token(tok, llama3):
    empty = {"alpaca": {"instruction": "i", "output": ""}, "prompt_completion": {"prompt": "i", "completion": ""}}
    empty |= {"chat_template": {"messages": say("user", "a", "assistant", "")}}
    for kind, row in empty.items():
        notes: list[str] = []
        ids, mask = PromptFormat(type=kind).encode_row(tok, row, notes.append)
        assert counted(tok, ids, mask) == "<|im_end|>" and sum("answer is empty" in note for note in notes) == 1
    for name, end in (("llama3", "<|eot_id|>"), ("mistral", " <|end_of_text|>"), ("alpaca", "<|end_of_text|>")):
        fmt = PromptFormat(type="chat_template", chat_template=CHAT_TEMPLATES[name])
        assert counted(llama3, *fmt.encode_row(llama3, row)) == end
    row = {"question": "q", "answer": ""}
    fmt = PromptFormat(type="chat_template", field_instruction="question", field_output="answer")
    assert counted(tok, *fmt.encode_row(tok, row)) == "<|im_end|>"
