"""Rows to tokens and masks, against transformers; the Ollama template, against Go where there is one."""

import json
from dataclasses import replace

import pytest
from chats import CHAT, CHATML, DATED, counted, say
from go_text import go_write, needs_go

from nanoqlora.config.errors import UserError
from nanoqlora.config.load import load_config
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat, detect_format
from nanoqlora.data.row_format import Frame
from nanoqlora.export.go_template import go_template
from nanoqlora.run.inputs import prompt_format_of
from nanoqlora.tokenizer.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


CHATS = [
    say("user", "hi", "assistant", "A pirate."),
    say("system", "Be brief.", "user", "hi", "assistant", "Ho!"),
    say("user", "a", "assistant", "bb\n\nb", "user", "c", "assistant", "d 5 \u00fc\U0001f642"),
    say("user", "assistant", "assistant", "user", "user", "A", "assistant", "A", "user", "A", "assistant", "im_end"),
    say("system", "", "user", "x", "assistant", "```py\nprint('<b>')\n```", "user", "a last question"),
    say("user", "\u4f60\u597d {{ x }}", "assistant", "{% if %}{{ y }}"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Chats


ANSWER_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
FIRST_LLAMA3 = CHAT_TEMPLATES["llama3"].split("{% if add")[0] + "{{ " + repr(ANSWER_HEADER) + " }}"  # always there


@pytest.mark.parametrize("name", ["smollm", "first llama3", *CHAT_TEMPLATES])
def test_answers_and_their_end_tokens_count(tok, llama3, hf, llama3_hf, name):
    template = {"smollm": None, "first llama3": FIRST_LLAMA3}.get(name) or CHAT_TEMPLATES.get(name)
    used, witness = (tok, hf) if name in ("smollm", "chatml") else (llama3, llama3_hf)
    end = {"alpaca": "<|end_of_text|>", "mistral": "<|end_of_text|>"}.get(name, used.vocab[2])
    space = " " if name == "mistral" else ""
    fmt = replace(CHAT, chat_template=template)
    for messages in CHATS:
        ids, mask = fmt.encode_row(used, {"messages": messages})
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert counted(used, ids, mask) == "".join(space + answer + end for answer in answers)
        assert ids == witness.apply_chat_template(messages, chat_template=template, return_dict=False)
        assert ids.count(llama3.bos_id) == 1 or used is tok
        prompt = fmt.encode_prompt(used, messages)
        assert prompt == witness.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, return_dict=False
        )


@pytest.mark.parametrize("messages", CHATS)
def test_the_mask_is_that_of_transformers(tok, hf, messages):
    """transformers can mask too, if the template marks the answers itself; here with a space that begins them."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}[/INST]{% generation %} {{ m.content }}<|im_end|>"
        "{% endgeneration %}{% elif m.role == 'user' %}<|im_start|>[INST] {{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[/INST]{% endif %}"
    )
    ids, mask = replace(CHAT, chat_template=template).encode_row(tok, {"messages": messages})
    witness = hf.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids == witness["input_ids"]
    assert mask == [bool(flag) for flag in witness["assistant_masks"]]


def test_user_text_that_looks_special_moves_no_mask(tok):
    messages = say("user", "a<|im_end|>\n<|im_start|>assistant\n", "assistant", "no <|im_end|> here", "user", "x")
    ids, mask = CHAT.encode_row(tok, {"messages": messages})
    assert counted(tok, ids, mask) == "no <|im_end|> here<|im_end|>"
    assert sum(id == tok.eos_id for id, flag in zip(ids, mask, strict=True) if flag) == 1


def test_special_tokens_within_an_answer_count_but_do_not_end_it(tok):
    template = CHAT_TEMPLATES["chatml"].replace("{{ message['content'] }}", "<file_sep>{{ message['content'] }}")
    ids, mask = replace(CHAT, chat_template=template).encode_row(tok, {"messages": CHATS[2]})
    assert counted(tok, ids, mask) == "<file_sep>bb\n\nb<|im_end|><file_sep>d 5 \u00fc\U0001f642<|im_end|>"


def test_tokens_that_a_header_shares_with_an_answer_do_not_count(tok):
    """The header ends with a newline. If the answer begins with one, both are one token, which starts too early."""
    ids, mask = CHAT.encode_row(tok, {"messages": say("user", "x", "assistant", "\n  y")})
    assert counted(tok, ids, mask) == " y<|im_end|>"
    assert tok.decode(ids).endswith("assistant\n\n  y<|im_end|>\n")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "B<|im_end|>D<|im_end|>"),
        ({"train_on_eos": "last"}, "BD<|im_end|>"),
        ({"train_on_eos": "none"}, "BD"),
        ({"train_on_eos": "all"}, "<|im_end|><|im_end|>B<|im_end|><|im_end|>D<|im_end|>"),
        ({"roles_to_train": ("user",)}, "user<|im_end|>C<|im_end|>"),
        ({"roles_to_train": ("user", "assistant")}, "user<|im_end|>B<|im_end|>C<|im_end|>D<|im_end|>"),
        ({"roles_to_train": ("system",)}, "S<|im_end|>"),
    ],
)
def test_which_turns_and_end_tokens_count(tok, changes, expected):
    messages = say("system", "S", "user", "user", "assistant", "B", "user", "C", "assistant", "D")
    ids, mask = replace(CHAT, **changes).encode_row(tok, {"messages": messages})
    assert counted(tok, ids, mask) == expected


def test_messages_that_a_template_leaves_out_have_no_tokens(tok):
    template = CHAT_TEMPLATES["chatml"].replace("in messages %}", "in messages if message.role != 'system' %}")
    fmt = replace(CHAT, chat_template=template, roles_to_train=("system", "assistant"), train_on_eos="all")
    ids, mask = fmt.encode_row(tok, {"messages": CHATS[1]})
    assert counted(tok, ids, mask) == "<|im_end|>Ho!<|im_end|>" and "Be brief" not in tok.decode(ids)


def test_inputs_count_when_asked_for(tok):
    for fmt, row in (
        (CHAT, {"messages": CHATS[2]}),
        (PromptFormat(type="alpaca"), {"instruction": "i", "output": "o"}),
    ):
        ids, mask = replace(fmt, train_on_inputs=True).encode_row(tok, row)
        assert mask == [False] + [True] * (len(ids) - 1)
        assert ids == fmt.encode_row(tok, row)[0]


def test_other_column_and_role_names(tok):
    fmt = replace(CHAT, field_messages="conversations", message_property_mappings={"role": "from", "content": "value"})
    given = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    expected = CHAT.encode_row(tok, {"messages": say("user", "hi", "assistant", "ho")})
    assert fmt.encode_row(tok, {"conversations": given}) == expected
    fmt = replace(CHAT, roles={"assistant": ["pirate"], "user": ["parrot"]})
    assert fmt.encode_row(tok, {"messages": say("parrot", "hi", "pirate", "ho")}) == expected


TOOLS = [{"type": "function", "function": {"name": "tide", "description": "When <|im_end|> is \u00fc?"}}]
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<file_sep>{{ call.function.name }} {{ call.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_calls_of_tools_count_and_their_answers_do_not(tok, hf, as_text):
    """Against transformers, which masks by the template's own marks. Files often keep objects as JSON texts."""

    def call(arguments: dict[str, str]) -> dict[str, object]:
        return {"type": "function", "function": {"name": "tide", "arguments": arguments}}

    def messages(calls: list[dict[str, object]]) -> list[dict[str, object]]:
        asked = {"role": "assistant", "content": None, "tool_calls": calls}
        also = {"role": "assistant", "content": "Also:", "tool_calls": calls[:1]}
        answers = [{"role": "tool", "content": "high"}, {"role": "tool", "content": "low"}]
        return [*say("system", "s", "user", "When?"), asked, *answers, also, answers[0], *say("assistant", "Now.")]

    calls = [call({"port": "N\u00e2ntes", "day": "1"}), call({})]
    texts = [call(json.dumps(c["function"]["arguments"])) for c in calls]
    row = {"messages": messages(texts if as_text else calls), "tools": json.dumps(TOOLS) if as_text else TOOLS}
    ids, mask = replace(CHAT, chat_template=WITH_TOOLS).encode_row(tok, row)
    hidden = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": "When <\ue000|im_end|> is \u00fc?"}}]
    witness = hf.apply_chat_template(
        messages(calls), tools=hidden, chat_template=WITH_TOOLS, return_assistant_tokens_mask=True, return_dict=True
    )
    assert mask[-40:] == [bool(flag) for flag in witness["assistant_masks"]][-40:]
    assert counted(tok, ids, mask) == (
        '<file_sep>tide {"port": "N\u00e2ntes", "day": "1"}<file_sep>tide {}<|im_end|>'
        'Also:<file_sep>tide {"port": "N\u00e2ntes", "day": "1"}<|im_end|>Now.<|im_end|>'
    )
    assert tok.decode(ids) == hf.decode(witness["input_ids"]).replace("\ue000", "")
    assert sum(id == tok.eos_id for id in ids) == 9, "the tool's description ends no turn"


def test_templates_that_hide_where_answers_are_get_refused(tok):
    counts = "{% for m in messages if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% endfor %}"
    with pytest.raises(UserError, match="message 2: the chat template leaves this answer out"):
        replace(CHAT, chat_template=counts + "{{ messages | length }}").encode_row(tok, {"messages": CHATS[0]})
    with pytest.raises(UserError, match="never learn to stop"):  # SmolLM2 does not know <|eot_id|>
        replace(CHAT, chat_template=CHAT_TEMPLATES["llama3"]).encode_row(tok, {"messages": CHATS[0]})


# ---------------------------------------------------------------------------------------------------------------------
# Alpaca and completion


def test_alpaca_prompts_are_stanfords(tok, llama3):
    fmt = PromptFormat(type="alpaca")
    ids, mask = fmt.encode_row(tok, {"instruction": "Add {these}.", "input": "1 {input} 2", "output": "3"})
    prompt = (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Input:\n"
        "1 {input} 2\n\n### Response:\n"
    )
    assert ids == [*tok.encode(prompt), *tok.encode("3"), tok.eos_id] and counted(tok, ids, mask) == "3<|im_end|>"

    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing <|eot_id|>.\n\n### Response:\n"
    )
    for row in ({"input": ""}, {"input": None}, {}):
        ids, mask = fmt.encode_row(llama3, {"instruction": "Sing <|eot_id|>.", "output": "\n Yo", **row})
        assert ids == [1, *llama3.encode(prompt), *llama3.encode("\n Yo"), 0]
        assert counted(llama3, ids, mask) == "\n Yo<|end_of_text|>"
    assert fmt.encode_prompt(llama3, say("user", "Sing <|eot_id|>.")) == [1, *llama3.encode(prompt)]


def test_a_prompt_stands_as_it_is_and_its_completion_counts(tok, llama3):
    fmt = PromptFormat(type="prompt_completion")
    ids, mask = fmt.encode_row(llama3, {"prompt": "2 {x} + 2 = <|eot_id|>", "completion": "4"})
    assert ids == [1, *llama3.encode("2 {x} + 2 = <|eot_id|>"), *llama3.encode("4"), 0]
    assert counted(llama3, ids, mask) == "4<|end_of_text|>"
    assert fmt.encode_prompt(llama3, say("user", "2 +")) == [1, *llama3.encode("2 +")] and fmt.end_id(tok) == tok.eos_id


def test_columns_and_words_of_your_own(tok):
    """As Axolotl's `type` with a map: a row's own system text, else the one for all; with or without an input."""
    frame = Frame(
        **{"format": "Q: {instruction} ({input})\nA: ", "no_input_format": "Q: {instruction}\nA: "},
        **{"system_format": "# {system}\n", "system_prompt": "Be brief.", "field_system": "sys", "field_output": "a"},
        **{"field_instruction": "q", "field_input": "context"},
    )
    fmt = PromptFormat(type="custom", frame=frame)
    for row, prompt in {
        ("Who?", "", ""): "# Be brief.\nQ: Who?\nA: ",
        ("Wh{input}o?", "here", ""): "# Be brief.\nQ: Wh{input}o? (here)\nA: ",
        ("Who?", None, "Be {system}."): "# Be {system}.\nQ: Who?\nA: ",
    }.items():
        ids, mask = fmt.encode_row(tok, {**dict(zip(("q", "context", "sys"), row, strict=True)), "a": "Me."})
        assert (
            ids == [*tok.encode(prompt), *tok.encode("Me."), tok.eos_id] and counted(tok, ids, mask) == "Me.<|im_end|>"
        )
    assert fmt.render(tok, say("user", "Who?")) == "# Be brief.\nQ: Who?\nA: "
    assert PromptFormat.from_json(fmt.to_json()) == fmt
    with pytest.raises(UserError, match="q is missing"):
        fmt.encode_row(tok, {"a": "x"})
    with pytest.raises(UserError, match="no frame"):
        PromptFormat(type="custom")
    with pytest.raises(UserError, match="frame"):
        PromptFormat.from_json('{"type": "custom", "frame": {"x": "y"}}')


MARKED = "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"


def test_markers_of_a_frame_are_special_and_those_of_columns_are_text(tok, hf, llama3):
    """The frame is the author's: its ids are those that servers read. A BOS that it writes is the only one."""
    fmt = PromptFormat(type="custom", frame=Frame(format=MARKED, system_format="<|im_start|>{system}<|im_end|>\n"))
    ids, mask = fmt.encode_row(tok, {"instruction": "Who?", "output": "Me."})
    text = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nMe.<|im_end|>"
    assert ids == hf(text)["input_ids"] and counted(tok, ids, mask) == "Me.<|im_end|>"
    assert ids[: mask.index(True)] == fmt.encode_prompt(tok, say("user", "Who?"))
    special = tok.special_tokens.values()
    for instruction in ("<|im_end|>", "a<|im_", "|>", "im_end|>\n<|im_start|>", "{instruction}<|im_end|>"):
        row = {"instruction": instruction, "output": "<|im_end|>", "system": "<|im_start|>"}
        ids, mask = fmt.encode_row(tok, row)
        assert sum(id in special for id in ids) == 6 and sum(id in special for id in ids[mask.index(True) :]) == 1
    ids, _ = replace(fmt, frame=Frame(format="<|begin_of_text|>{instruction}<|eot_id|>")).encode_row(
        llama3, {"instruction": "<|begin_of_text|>a", "output": "b"}
    )
    assert ids == [1, *llama3.encode("<|begin_of_text|>a"), 2, *llama3.encode("b"), 0]


@pytest.mark.parametrize(
    ("kind", "row", "noted"),
    [
        ("completion", {"text": "<|im_start|>user\nhi<|im_end|>"}, True),
        ("completion", {"text": "<|im_start> |im_end|> 5 < 6"}, False),
        ("prompt_completion", {"prompt": "<|im_start|>user\nhi", "completion": "x"}, True),
        ("alpaca", {"instruction": "i", "output": "x<|im_end|>"}, True),
        ("alpaca", {"instruction": "i", "input": "a<|im_end|>", "output": "x"}, True),
        ("alpaca", {"instruction": "i", "output": "x"}, False),
        ("custom", {"instruction": "i", "output": "x"}, False),
    ],
)
def test_columns_that_hold_markers_are_noted(tok, kind, row, noted):
    fmt = PromptFormat(type=kind, frame=Frame(format=MARKED) if kind == "custom" else None)
    notes: list[str] = []
    ids, _ = fmt.encode_row(tok, row, notes.append)
    assert any("special tokens, which stay text" in note for note in notes) == noted
    assert sum(id in tok.special_tokens.values() for id in ids) == (4 if kind == "custom" else 1)


def test_completion_counts_all_but_the_first_token(tok, llama3):
    fmt = PromptFormat(type="completion", field="story")
    ids, mask = fmt.encode_row(llama3, {"story": "Once upon"})
    assert ids == [1, *llama3.encode("Once upon"), 0] and mask == [False, True, True, True]
    assert fmt.encode_row(tok, {"story": "Once upon"}) == ([*tok.encode("Once upon"), 2], [False, True, True])
    assert fmt.encode_prompt(llama3, say("user", "Once")) == [1, *llama3.encode("Once")]


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are not of the format, and the format itself


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("chat_template", {}, "messages is missing"),
        ("chat_template", {"messages": []}, "messages is list"),
        ("chat_template", {"messages": "hi"}, "messages is str"),
        ("chat_template", {"messages": ["hi"]}, "message 1 is str"),
        ("chat_template", {"messages": [{"content": "hi"}]}, "message 1: role is missing"),
        ("chat_template", {"messages": [*say("user", "x"), {"role": "assistant"}]}, "message 2: content is missing"),
        ("chat_template", {"messages": say("user", " \n", "assistant", "x")}, "message 1: content is str"),
        ("chat_template", {"messages": [{"role": "user", "content": [{"text": "hi"}]}]}, "content is list"),
        ("chat_template", {"messages": say("user", "hi", "system", "s")}, "no message has the role assistant"),
        ("chat_template", {"messages": say("user", "hi", "asistant", "s")}, "the role asistant is unknown"),
        ("chat_template", {"messages": say("user", "\ud83d", "assistant", "x")}, "surrogate"),
        ("chat_template", {"messages": [{"role": "assistant", "tool_calls": "x"}]}, "message 1: tool_calls is str"),
        ("chat_template", {"messages": say("user", "a", "assistant", "b"), "tools": "x"}, "tools is str"),
        ("prompt_completion", {"prompt": "hi"}, "completion is missing"),
        ("prompt_completion", {"prompt": "", "completion": "x"}, "prompt is str"),
        ("prompt_completion", {"prompt": say("user", "hi"), "completion": "x"}, "prompt is list"),
        ("alpaca", {"instruction": "hi"}, "output is missing"),
        ("alpaca", {"instruction": "", "output": "x"}, "instruction is str"),
        ("alpaca", {"instruction": "hi", "input": 3, "output": "x"}, "input is int"),
        ("completion", {"text": 5}, "text is int 5"),
        ("completion", {"txt": "x"}, "text is missing"),
    ],
)
def test_bad_rows_are_user_errors(tok, kind, row, said):
    with pytest.raises(UserError, match=said):
        PromptFormat(type=kind).encode_row(tok, row)


def test_no_end_token_no_training(tok):
    with pytest.raises(UserError, match="no end token"):
        PromptFormat(type="completion").encode_row(replace(tok, eos_id=None), {"text": "x"})


def test_format_from_the_columns():
    assert detect_format({"messages": []}).type == "chat_template"
    assert detect_format({"instruction": "", "input": "", "output": ""}).type == "alpaca"
    assert detect_format({"prompt": "", "completion": "", "text": ""}).type == "prompt_completion"
    assert detect_format({"text": ""}).type == "completion"
    with pytest.raises(UserError, match="columns prompt, answer"):
        detect_format({"prompt": "", "answer": ""})


def test_prompt_json_is_the_whole_format(tok, llama3):
    fmt = replace(CHAT, roles_to_train=["assistant", "tool"], roles={"user": ["human"]}, train_on_eos="last")
    assert PromptFormat.from_json(fmt.to_json()) == fmt != CHAT
    fixed = CHAT.for_tokenizer(tok)
    assert PromptFormat.from_json(fixed.to_json()).jinja(llama3) == tok.chat_template != CHAT.jinja(llama3)
    for text, said in (("{", "valid JSON"), ("[]", r"is \[\]"), ('{"type": "alpaca", "x": 1}', "x is 1")):
        with pytest.raises(UserError, match=said):
            PromptFormat.from_json(text)
    with pytest.raises(UserError, match="sharegpt"):
        PromptFormat.from_json(json.dumps({"type": "sharegpt"}))


def test_templates_by_their_names_in_a_configuration(tok, llama3, tmp_path):
    keys = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 8}
    keys |= {"learning_rate": 1e-4, "datasets": [{"path": "d", "type": "chat_template"}]}
    (tmp_path / "run.yml").write_text(json.dumps(keys))  # which is YAML too

    def jinja(name: str, tokenizer: Tokenizer) -> str | None:
        config = load_config([str(tmp_path / "run.yml"), "--chat_template", name])
        return prompt_format_of(config, config.datasets[0], tokenizer).chat_template

    for name, template in CHAT_TEMPLATES.items():
        assert jinja(name, tok) == template
        assert jinja(f"tokenizer_default_fallback_{name}", tok) == tok.chat_template
        assert jinja(f"tokenizer_default_fallback_{name}", replace(tok, chat_template=None)) == template
    assert jinja("tokenizer_default", llama3) == llama3.chat_template
    with pytest.raises(UserError, match="chat_template is gemma; known are tokenizer_default, chatml, llama3, alpaca"):
        jinja("gemma", tok)
    with pytest.raises(UserError, match="brings no chat template"):
        jinja("tokenizer_default", replace(tok, chat_template=None))


# Of the run, of the data set -> the template in force, and what is said of the rest. JINJA and OTHER are templates.
JINJA, OTHER = "{# one #}" + CHAT_TEMPLATES["chatml"], "{# two #}" + "{# a long one #}" * 400 + CHAT_TEMPLATES["chatml"]
PRECEDENCE = {
    ("jinja JINJA", ""): ("JINJA", "d: chat_template jinja"),
    ("JINJA", ""): ("JINJA", "d: chat_template jinja"),
    ("jinja JINJA", "llama3"): ("llama3", "chat_template_jinja is not used: no data set takes it"),
    ("llama3 JINJA", ""): ("llama3", "chat_template_jinja is not used: chat_template is llama3"),
    ("llama3", "jinja OTHER"): ("OTHER", "chat_template llama3 is not used: no data set takes it"),
    ("llama3 JINJA", "OTHER"): ("OTHER", "chat_template_jinja is not used: no data set takes it"),
    ("", "llama3 OTHER"): ("llama3", "d: chat_template_jinja is not used: chat_template is llama3"),
    ("chatml", "llama3"): ("llama3", "chat_template chatml is not used: no data set takes it"),
    ("JINJA", "tokenizer_default"): ("own", "chat_template_jinja is not used: no data set takes it"),
    ("tokenizer_default OTHER", ""): ("own", "chat_template_jinja is not used: chat_template is tokenizer_default"),
    ("file.jinja", ""): ("OTHER", "d: chat_template jinja"),
    ("jinja JINJA", "file.jinja"): ("OTHER", "chat_template_jinja is not used: no data set takes it"),
}


@pytest.mark.parametrize("given", PRECEDENCE)
@pytest.mark.parametrize("path", ["relative", "home"])
def test_the_data_sets_own_template_wins(tok, tmp_path, monkeypatch, given, path):
    """As in Axolotl: the nearer word, and Jinja only where it says jinja. What is not used is named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file.jinja").write_text(OTHER)
    file = "file.jinja" if path == "relative" else "~/file.jinja"
    known = {"JINJA": JINJA, "OTHER": OTHER, "own": tok.chat_template, "file.jinja": file, **CHAT_TEMPLATES}

    def keys(words: str) -> dict[str, str]:
        is_name = {word: word.islower() and "." not in word for word in words.split()}
        return {
            f"chat_template{'_jinja' * (not name)}": word if name else known[word] for word, name in is_name.items()
        }

    run = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 8}
    run |= {"learning_rate": 1e-4, **keys(given[0])}
    run["datasets"] = [{"path": "d", "type": "chat_template", **keys(given[1])}]
    (tmp_path / "run.yml").write_text(json.dumps(run))
    config = load_config(["run.yml"])
    name, said = PRECEDENCE[given]
    assert prompt_format_of(config, config.datasets[0], tok).chat_template == known[name]
    assert said in config.notes
    own = " (its own)" * bool(given[1])
    assert (
        f"d: chat_template {'jinja' if name.isupper() else name.replace('own', 'tokenizer_default')}{own}"
        in config.notes
    )
    assert sum("is not used" in note for note in config.notes) == ("is not used" in said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("templates/chat.jinja", "chat_template_jinja: templates/chat.jinja: no such file"),
        ("chat.jinja\n", "chat_template_jinja: chat.jinja: no such file"),
        ("x" * 5000, "chat_template_jinja: x+ [.]{3} x+.*Give a text file"),
        (".", "chat_template_jinja: .: cannot be read"),
    ],
)
@pytest.mark.parametrize("of_data_set", [False, True])
def test_a_template_that_is_a_mistyped_path(tok, tmp_path, given, said, of_data_set):
    run = {"base_model": "m", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 8}
    jinja, data = {"chat_template": "jinja", "chat_template_jinja": given}, {"path": "d", "type": "chat_template"}
    run |= {"learning_rate": 1e-4} | (jinja if not of_data_set else {})
    (tmp_path / "run.yml").write_text(json.dumps(run | {"datasets": [data | (jinja if of_data_set else {})]}))
    config = load_config([str(tmp_path / "run.yml")])
    with pytest.raises(UserError, match=said):
        prompt_format_of(config, config.datasets[0], tok)


def test_what_a_format_says_of_the_end_and_the_beginning(tok, llama3):
    assert (CHAT.end_id(tok), CHAT.end_id(llama3)) == (2, 2)
    assert (PromptFormat(type="alpaca").end_id(llama3), PromptFormat(type="completion").end_id(tok)) == (0, 2)
    assert CHAT.add_bos(llama3) and PromptFormat(type="alpaca").add_bos(llama3)
    assert not replace(CHAT, chat_template=CHAT_TEMPLATES["chatml"]).add_bos(llama3)
    assert not CHAT.add_bos(tok)  # though its chats begin with <|im_start|>, which is its BOS


# ---------------------------------------------------------------------------------------------------------------------
# Ollama

LLAMA3_STOPS = ["<|eot_id|>", "<|end_of_text|>"]  # what ends a turn, and the end token of the tokenizer
LLAMA3_HEADER = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
LLAMA3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"


LAST = '{{ $last := "" }}{{ range .Messages }}{{ $last = .Content }}{{ end }}'


def test_go_templates(tok, llama3):
    chatml = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    assert go_template(CHAT, tok) == (chatml, DEFAULT_SYSTEM, ["<|im_end|>"])
    assert go_template(replace(CHAT, chat_template=CHAT_TEMPLATES["chatml"]), tok) == (chatml, None, ["<|im_end|>"])
    turns = "{{ range .Messages }}" + LLAMA3_HEADER + "{{ .Content }}<|eot_id|>{{ end }}" + LLAMA3_ANSWER
    assert go_template(CHAT, llama3) == (turns, None, LLAMA3_STOPS)
    template, system, stops = go_template(PromptFormat(type="alpaca"), llama3)
    assert template.startswith(LAST + "Below is") and template.endswith(
        "### Instruction:\n{{ $last }}\n\n### Response:\n"
    )
    assert (system, stops) == (None, ["<|end_of_text|>"])
    assert go_template(PromptFormat(type="completion"), tok) == (LAST + "{{ $last }}", None, ["<|im_end|>"])


def test_go_templates_that_ask_for_the_role_before(llama3):
    """No frame fits all messages of these, but what stands between two depends on their roles alone."""
    go_on = "{{ .Content }}{{ $before = .Role }}{{ else "
    expected = (
        '{{ $before := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ if eq $before "assistant" }}<|end_of_text|>'
        ' [INST] {{ else if eq $before "system" }}\n\n{{ else }} [INST] {{ end }}'
        + go_on
        + 'if eq .Role "assistant" }}'
        " [/INST] " + go_on + 'if eq .Role "system" }} [INST] {{ .Content }}{{ $before = .Role }}{{ end }}{{ end }}'
        '{{ if eq $before "assistant" }}<|end_of_text|>{{ else }} [/INST]{{ end }}'
    )
    mistral = replace(CHAT, chat_template=CHAT_TEMPLATES["mistral"])
    assert go_template(mistral, llama3) == (expected, None, ["<|end_of_text|>"])


def test_go_template_with_lines_before_every_system_message(llama3):
    intro = "Cutting Knowledge: 2023\n\n"
    expected = (
        '{{ if ne (index .Messages 0).Role "system" }}' + LLAMA3_SYSTEM + intro + "<|eot_id|>{{ end }}"
        "{{ range .Messages }}" + LLAMA3_HEADER + '{{ if eq .Role "system" }}' + intro + "{{ end }}"
        "{{ .Content }}<|eot_id|>{{ end }}" + LLAMA3_ANSWER
    )
    assert go_template(replace(CHAT, chat_template=DATED), llama3) == (expected, None, LLAMA3_STOPS)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("message['content'] }}", "message['content'] | upper }}"), "leaves out a message"),
        (
            CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}"),
            "more than the message",
        ),
        (CHATML.replace("<|im_end|>", "<|im_end|>{{ loop.index }}"), "more than the message"),
        ("{{ messages | length }}" + CHATML, "more than the message"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing stands between"),
        ("{{ strftime_now('%Y') }}" + CHATML, "date"),
    ],
)
def test_templates_that_go_cannot_write_are_refused(tok, template, said):
    with pytest.raises(UserError, match=said):
        go_template(replace(CHAT, chat_template=template), tok)


NO_SYSTEM = CHATML.replace(
    "<|im_start|>{{", "{{ raise_exception('no') if message['role'] == 'system' }}<|im_start|>{{", 1
)
TO_GO = {
    **{"smollm": None, "dated": DATED, **CHAT_TEMPLATES},
    "no newline at the end": CHATML.replace("<|im_end|>\n", "<|im_end|>{{ '\n' if not loop.last }}"),
    "system as user": CHATML.replace("message['role'] }}", "message['role'] | replace('system', 'user') }}"),
    "own system, in the question": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ '<<SYS>>Hi.<</SYS>>' if loop.first }}"
        "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}{{ 1 / 0 }}{% endif %}{% endfor %}"
    ),
    "no system": NO_SYSTEM,
    "system left out": CHATML.replace("in messages %}", "in messages if message.role != 'system' %}"),
    "system in the last question": (  # as in Mistral v0.3
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{% for m in rest %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "braces and quotes": CHATML.replace("<|im_end|>", '<|im_end|>{{ "}}{{ .X }} {%" }}"""').replace(
        "\n{{", "\n{ {{ '{' }}{{"
    ),
}


@needs_go
def test_go_writes_what_jinja_writes(tok, llama3):
    """For one, several and system turns. Chats that the template itself refuses are left out."""
    formats = {name: replace(CHAT, chat_template=template) for name, template in TO_GO.items()}
    formats |= {"alpaca prompt": PromptFormat(type="alpaca"), "completion": PromptFormat(type="completion")}
    frame = Frame(format='\u00fc\U0001f642 {{ {instruction} }}\n"{instruction}"\n', system_prompt="s ")
    formats["custom"] = PromptFormat(type="custom", frame=frame)
    for name, fmt in formats.items():
        used = llama3 if name in ("llama3", "dated", "mistral", "alpaca", "alpaca prompt") else tok
        template, system, _ = go_template(fmt, used)
        assert '"""' not in template  # it would end the TEMPLATE of a Modelfile
        chats = [
            chat
            for chat in CHATS
            if name not in ("no system", "own system, in the question") or chat[0]["role"] == "user"
        ]
        given = [say("system", system) * bool(system and chat[0]["role"] != "system") + chat for chat in chats]
        expected = [fmt.render(used, chat, add_generation_prompt=True) for chat in chats]
        bos = used.vocab[used.bos_id] if fmt.add_bos(used) else ""
        assert go_write(template, given) == [text.removeprefix(bos) for text in expected], name
