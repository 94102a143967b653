"""Conversations of every shape under templates of every family: ids are transformers', masks as one reads them.

The templates are written in the manner of those that models bring: what they refuse, what they write in another way
when more messages follow, where tools stand, and how a generation prompt ends.
"""

from dataclasses import replace
from typing import Any

import jinja2
import pytest
from chats import counted, say
from transformers import AutoTokenizer

from nanoqlora.config.errors import UserError
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.tokenizer.tokenizer import Tokenizer, save_tokenizer
from nanoqlora.tokenizer.vocabulary import CONTROL

MARKERS = ["</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
MARKERS += ["[/TOOL_RESULTS]", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end|>"]
MARKERS += ["<|user|>", "<|assistant|>", "<|system|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>"]
MARKERS += ["<|calls|>", "<|call|>", "<|/call|>", "<|/calls|>", "<|end_of_sentence|>"]

GEN = "{% if add_generation_prompt %}HEADER{% endif %}"
CHATML = GEN.replace("HEADER", "<|im_start|>assistant\n")
LLAMA3 = GEN.replace("HEADER", "<|start_header_id|>assistant<|end_header_id|>\n\n")
SYSTEM_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)
FAMILIES = {
    "smollm2": None,  # its own: a system message of its own unless the first one is one; refuses no messages
    **{name: template for name, template in CHAT_TEMPLATES.items()},
    "llama3": "{% for m in messages %}{% set t = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set t = '<|begin_of_text|>' + t %}{% endif %}"
    "{{ t }}{% endfor %}" + LLAMA3,
    # Its first message is read before any other, tools stand in the first question, a call is the only one.
    "llama3.1": "<|begin_of_text|>{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>"
    "\n\nCutting Knowledge: 2023\n\n{{ s }}<|eot_id|>{% if tools %}{% if messages | length == 0 %}"
    "{{ raise_exception('no first question') }}{% endif %}{% set u = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}<|start_header_id|>user<|end_header_id|>\n\n{{ tools | tojson(indent=4) }}"
    "{{ u }}<|eot_id|>{% endif %}{% for m in messages %}{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call') }}{% endif %}{% set f = m.tool_calls[0].function %}<|start_header_id|>assistant"
    '<|end_header_id|>\n\n{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}<|eot_id|>'
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}" + LLAMA3,
    # Refuses roles that do not take turns. A system message stands in the last question, as the tools do.
    "mistral v3": "<|begin_of_text|>{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if m == users[-1] %}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}"
    "[/AVAILABLE_TOOLS]{% endif %}[INST]{{ system + m.content }}[/INST]{% else %}[INST]{{ m.content }}[/INST]"
    "{% endif %}{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{{ c.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}]</s>{% elif m.role == 'assistant' %}{{ m.content }}</s>{% else %}"
    '[TOOL_RESULTS]{"content": {{ m.content }}}[/TOOL_RESULTS]{% endif %}{% endfor %}',
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}{% endfor %}",
    "phi": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    + GEN.replace("HEADER", "<|assistant|>\n"),
    "gemma": "{{ bos_token }}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}" + GEN.replace("HEADER", "<start_of_turn>model\n"),
    # Several results share one turn; calls stand behind the content.
    "qwen2.5": SYSTEM_TOOLS + "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user"
    "{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>{% if loop.last or "
    "messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}{% else %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}<tool_call>\n{{ c.function | "
    "tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}" + CHATML,
    # Thinking only behind the last question, where it stands even if it is empty.
    "qwen3": SYSTEM_TOOLS + "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set think = '' %}{% if '</think>' in c %}{% set think = "
    "c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{% set c = c.split('</think>')[-1]"
    ".lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + think.strip('\n') + '\n</think>\n\n' }}"
    "{% endif %}{% endif %}{{ c }}"
    "{% for t in m.tool_calls or [] %}<tool_call>\n{{ t.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}" + CHATML,
    # Cuts the thinking, and the generation prompt begins it.
    "r1": "{{ bos_token }}{{ tools | tojson if tools }}{% for m in messages %}"
    "{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.role == "
    "'assistant' %}{% set c = m.content or '' %}<|Assistant|>{% for t in m.tool_calls or [] %}{{ '<|calls|>' if "
    "loop.first }}<|call|>{{ t.function.name }}\n{{ t.function.arguments | tojson }}<|/call|>{% endfor %}"
    "{{ '<|/calls|>' if m.tool_calls }}{{ c.split('</think>')[-1] }}<|end_of_sentence|>{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}" + GEN.replace("HEADER", "<|Assistant|><think>\n"),
    "opens a thought": CHAT_TEMPLATES["chatml"].replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
    "counts": "{{ messages | length }}" + CHAT_TEMPLATES["chatml"],
    "refuses a beginning": ""
    "{% if messages[-1].role != 'assistant' and not add_generation_prompt or messages | length "
    "< 2 %}{{ raise_exception('an answer is last') }}{% endif %}" + CHAT_TEMPLATES["chatml"],
}
END = {"smollm2": "<|im_end|>", "alpaca": "</s>", "mistral": "</s>", "mistral v3": "</s>", "zephyr": "</s>"}
END |= {"llama3": "<|eot_id|>", "llama3.1": "<|eot_id|>", "phi": "<|end|>", "gemma": "<end_of_turn>"}
END |= {"r1": "<|end_of_sentence|>"}

FUNCTION = {"name": "tide", "arguments": {"port": "Oslo"}}
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "When?", "parameters": {"type": "object"}}}]


def calls(count: int) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": FUNCTION}] * count}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": say("user", "hi", "assistant", "Ho there.", "user", "more", "assistant", "And so on."),
    "system": say("system", "Be brief.", "user", "hi", "assistant", "Ho there."),
    "assistant first": say("assistant", "Welcome!", "user", "hi", "assistant", "Ho there."),
    "assistant behind system": say("system", "Be.", "assistant", "Welcome!", "user", "hi", "assistant", "Ho there."),
    "nothing but an answer": say("assistant", "Once upon a time."),
    "two questions": say("user", "hi", "user", "you there?", "assistant", "Ho there."),
    "the same again": say("user", "A", "assistant", "A", "user", "assistant", "assistant", "A"),
    "thinking": say("user", "hi", "assistant", "<think>\nhm\n</think>\n\nHo.", "user", "v", "assistant", "Yes."),
    "thinking last": say("user", "hi", "assistant", "Ho.", "user", "v", "assistant", "<think>\nhm\n</think>\n\nYes."),
    "tool": [*say("user", "When?"), calls(1), *say("tool", "high", "assistant", "Now.", "user", "x", "assistant", "y")],
    "results": [*say("user", "When?"), calls(2), *say("tool", "high", "tool", "low", "assistant", "Both.")],
    "calls later": [
        *say("user", "a", "assistant", "b", "user", "When?"),
        calls(1),
        *say("tool", "t", "assistant", "c"),
    ],
}
CALL = '{"name": "tide", "arguments": {"port": "Oslo"}}'
WITH_TOOLS = {"llama3.1": "@", "mistral v3": "[TOOL_CALLS][@]", "qwen2.5": "@", "qwen3": "@"}
WITH_TOOLS |= {"r1": "<|calls|>@<|/calls|>"}
CALLS = {
    **{"llama3.1": CALL.replace("arguments", "parameters"), "mistral v3": CALL},
    **dict.fromkeys(("qwen2.5", "qwen3"), f"<tool_call>\n{CALL}\n</tool_call>"),
    "r1": '<|call|>tide\n{"port": "Oslo"}<|/call|>',
}


@pytest.fixture(scope="module")
def marked(tok: Tokenizer) -> Tokenizer:
    vocab, kinds = [*tok.vocab, *MARKERS], [*tok.kinds, *[CONTROL] * len(MARKERS)]
    return replace(tok, vocab=vocab, kinds=kinds, bos_id=0, eos_id=vocab.index("</s>"), original_files={})


@pytest.fixture(scope="module")
def witness(marked: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("marked")
    save_tokenizer(marked, folder)
    return AutoTokenizer.from_pretrained(folder)


def learnt(family: str, messages: list[dict[str, Any]], i: int) -> str:
    """What of answer i shall be learnt, its end token included."""
    content, end = messages[i]["content"], END.get(family, "<|im_end|>")
    if count := len(messages[i].get("tool_calls", [])):
        between = {"mistral v3": ", ", "qwen2.5": "\n"}.get(family, "")
        content = WITH_TOOLS[family].replace("@", between.join([CALLS[family]] * count))
    last_question = max((k for k, message in enumerate(messages) if message["role"] == "user"), default=0)
    if family == "qwen3":
        think, _, content = content.rpartition("</think>\n\n")
        if i > last_question:
            content = (think or "<think>\n\n") + "</think>\n\n" + content
    if family == "r1":
        content = content.split("</think>")[-1]
    if family == "opens a thought":  # the generation prompt has it
        content = content.removeprefix("<think>\n")
    return " " * (family == "mistral") + content + end


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", CONVERSATIONS)
def test_trained_as_transformers_writes_it(marked, witness, family, shape):
    """What transformers' template takes is trained, with its ids: the answers and their ends; the rest is refused."""
    messages, tools = CONVERSATIONS[shape], TOOLS if any(m["role"] == "tool" for m in CONVERSATIONS[shape]) else None
    if tools and family not in WITH_TOOLS:
        pytest.skip("its template knows no tools")
    template = FAMILIES[family] or marked.chat_template
    notes: list[str] = []
    fmt = PromptFormat(type="chat_template", chat_template=template)
    try:
        expected = witness.apply_chat_template(messages, tools, chat_template=template, return_dict=False)
    except jinja2.TemplateError:
        with pytest.raises(UserError, match="the chat template stopped"):
            fmt.encode_row(marked, {"messages": messages, "tools": tools})
        return
    ids, mask = fmt.encode_row(marked, {"messages": messages, "tools": tools}, notes.append)
    assert ids == expected
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text = counted(marked, ids, mask)
    assert text == "".join(learnt(family, messages, i) for i in answers)
    # The one thing that is said of masks: the model is asked behind a text that the answers do not begin with.
    opened = [note for note in notes if "generation prompt" in note]
    cut = {"r1": True, "opens a thought": not all(messages[i]["content"].startswith("<think>\n") for i in answers)}
    assert bool(opened) == cut.get(family, False) and len(opened) < 2, notes
