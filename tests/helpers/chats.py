"""Conversations, templates in the manner of several families, and rows encoded with them."""

import json
from dataclasses import replace
from typing import Any

from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.tokenizer.tokenizer import Tokenizer

CHAT = PromptFormat(type="chat_template")
CHATML = CHAT_TEMPLATES["chatml"]
DATED = (  # as in Llama-3.1: a system message is always there, with lines of the template's own in front
    "{{ bos_token }}{% set first = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% set messages = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge: 2023\n\n{{ first | trim }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HEAD = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}{% set f = tool.function %}TOOL{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
TURN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{% set f = call.function %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_AS = {  # as Llama-3.1, Hermes and Qwen write tools; as a line of code; as XML
    "json": "{{ tool | tojson(indent=4) }}",
    "function": "<tools>{{ f | tojson }}</tools>",
    "python": "{{ f }}",
    "sorted": "{{ tool | tojson(ensure_ascii=True, sort_keys=True) }}",
    "code": "{{ f.name }}({% for p, d in f.parameters.properties.items() %}{{ p }}: {{ d.type }} {{ d.enum }},"
    "{% endfor %})"
    " // {{ f.description }}",
}
CALLS_AS = {
    "json": '<tool_call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</tool_call>',
    "python": "{{ f }}",
    "sorted": "{{ call | tojson(indent=2, sort_keys=True) }}",
    "code": "{{ f.name }}({% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson }},{% endfor %})",
    "xml": "<function={{ f.name }}>{% for k, v in f.arguments.items() %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}</parameter>{% endfor %}</function>",
}


def say(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


def counted(tok: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    """The text of the tokens that count."""
    assert len(ids) == len(mask) and all(isinstance(flag, bool) for flag in mask)
    return tok.decode([id for id, flag in zip(ids, mask, strict=True) if flag])


def template(tools: str = "", calls: str = "") -> str:
    return HEAD.replace("TOOL", tools) * bool(tools) + TURN.replace("CALL", calls)


def encode(tok, jinja: str, row: dict[str, Any], **changes: Any) -> tuple[str, list[str]]:
    """The text of a row, and what was noted but roles."""
    notes: list[str] = []
    ids, _ = PromptFormat(type="chat_template", chat_template=jinja, **changes).encode_row(tok, row, notes.append)
    return tok.decode(ids), [note for note in dict.fromkeys(notes) if not note.startswith("role: ")]


def with_default(system: str) -> str:
    """ChatML that says a system text by itself where none is given."""
    text = json.dumps(system, ensure_ascii=False)
    turn = f"'<|im_start|>system\\n' + {text} + '<|im_end|>\\n'"
    return f"{{{{ {turn} if messages[0].role != 'system' }}}}{CHAT_TEMPLATES['chatml']}"


def llama3_tokenizer(tok: Tokenizer) -> Tokenizer:
    """The same vocabulary with the markers of Llama-3, whose tokenizer puts a BOS in front."""
    markers = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return replace(
        tok,
        vocab=markers + tok.vocab[len(markers) :],
        bos_id=1,
        eos_id=0,
        pad_id=None,
        add_bos=True,
        chat_template=CHAT_TEMPLATES["llama3"],
        original_files={},
    )
