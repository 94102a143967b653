"""What the columns of a row are called and mean, and the text around them: the content of prompt.json.

`prompts.py` encodes rows by it. The same file that made the training tokens makes the prompt of a chat later.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import ClassVar, Self

from pydantic import ConfigDict

from ..config.errors import UserError
from ..config.files import expect
from ..tokenizer.traced import join, trace

USUAL_ROLES = {  # names in data files -> names in templates
    **{"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"},
    **{"model": "assistant", "tool": "tool", "function": "tool"},
}

WITH_INPUT = "{instruction} {input} "


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The text around the columns of a row. The fields are the keys of Axolotl's `type`, where that is a map."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # where it is read from JSON

    format: str = WITH_INPUT  # of a row with an input
    no_input_format: str | None = None  # of one without; None: the same, or Axolotl's own where format is Axolotl's own
    system_format: str = "{system}"  # comes first, if there is a system text
    system_prompt: str = ""  # the system text of rows that have none
    field_system: str = "system"  # names of columns
    field_instruction: str = "instruction"
    field_input: str = "input"
    field_output: str = "output"

    def prompt(self, instruction: str, context: str = "", system: str = "") -> str:
        """The text before the answer; the columns in it are traced, the frame is trusted."""
        columns = {"instruction": instruction, "input": context, "system": system}
        texts = {name: trace(text, 0) for name, text in columns.items()}
        texts["system"] = texts["system"] or self.system_prompt
        without = "{instruction} " if self.format == WITH_INPUT else self.format
        frame = self.format if context else without if self.no_input_format is None else self.no_input_format
        frame = (self.system_format if texts["system"] else "") + frame
        parts = re.split(r"{(instruction|input|system)}", frame)  # the texts may hold braces
        return join(texts[part] if i % 2 else part for i, part in enumerate(parts))


TEMPLATES = resources.files(__package__) / "templates"
FRAMES = {  # alpaca is Stanford's
    name: Frame(**fields) for name, fields in json.loads((TEMPLATES / "frames.json").read_text("utf-8")).items()
}
ENDS = ("turn", "last", "all", "none")  # whose end tokens are supervised: every trained turn's, the last's, all
TYPES = ("chat_template", *FRAMES, "custom", "completion")


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a row is read. The fields are named after the YAML keys that set them, and prompt.json holds them."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")  # where it is read from JSON

    type: str  # one of TYPES
    chat_template: str | None = None  # Jinja; None: the tokenizer's own
    train_on_inputs: bool = False  # supervise the prompt as well
    roles_to_train: tuple[str, ...] = ("assistant",)
    train_on_eos: str = "turn"  # supervised end tokens: of trained turns, of the last one, of all, none
    frame: Frame | None = None  # custom: the text around the columns
    field: str = "text"  # completion: the column with the text
    field_messages: str = "messages"  # chat_template: the column with the messages
    field_tools: str = "tools"  # chat_template: the column with the tools that the assistant may call, if there are any
    field_system: str = "system"  # chat_template: the column with a system text, where no message has one
    field_instruction: str = ""  # chat_template: the column with a question, in place of messages; and with its answer
    field_output: str = ""
    message_field_training: str = ""  # chat_template: the key that decides whether a message is supervised
    # What the template calls a field of a message, or a role -> what the file calls it.
    message_property_mappings: dict[str, str] = dataclasses.field(default_factory=dict)
    roles: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, allowed in {"type": TYPES, "train_on_eos": ENDS}.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}. Use {' or '.join(allowed)}")
        if self.type == "custom" and self.frame is None:
            raise UserError("type is custom and there is no frame: the text around the columns. Give one.")
        # From JSON they come as lists; frozen, so that training and prompts have the same format.
        object.__setattr__(self, "roles_to_train", tuple(self.roles_to_train))
        object.__setattr__(self, "roles", {role: tuple(names) for role, names in self.roles.items()})
        if unknown := [role for role in self.roles_to_train if role not in self.role_of]:
            found = f"roles_to_train names {', '.join(unknown)}, and known are {', '.join(self.role_of)}"
            raise UserError(f"{found}. Correct the name, or name it under roles.")

    @cached_property
    def role_of(self) -> dict[str, str]:
        """Every known name of a role in the file -> its name in the template."""
        own = {theirs: ours for ours, names in self.roles.items() for theirs in names}
        return USUAL_ROLES | {role: role for role in self.roles} | own

    @cached_property
    def names(self) -> dict[str, str]:
        """What the template calls a field of a message -> what the file calls it."""
        return {"role": "role", "content": "content"} | self.message_property_mappings

    # prompt.json

    def to_json(self) -> str:
        """The text of prompt.json."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: object = "prompt.json") -> Self:
        """The format that a prompt.json describes."""
        return expect(str(where), text, cls, is_json=True)
