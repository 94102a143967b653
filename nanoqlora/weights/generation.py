"""generation_config.json: at which tokens an answer of a model ends, and how its author would have them drawn.

Transformers takes from it, where there is one, and else from config.json, the end tokens: one id, or a list. A merge
keeps the base's and puts the token that training ended answers with first; the export writes them all.
"""

import json
from collections.abc import Iterable
from typing import Any

from ..config.errors import UserError
from ..config.files import read_json
from .checkpoint import Weights

# What Ollama calls transformers' settings. The first acts on every answer, the others where tokens are drawn.
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty", "temperature": "temperature"}
OLLAMA_NAMES |= {name: name for name in ("top_k", "top_p", "min_p", "typical_p")}
NAMED_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_generation(weights: Weights) -> dict[str, Any]:
    """generation_config.json beside a model's weights, with config.json's tokens where it names none.

    Raises:
        UserError: an end token that is no token, or a setting of `OLLAMA_NAMES` that is not a number.
    """
    path, num_tokens = weights.where.with_name("generation_config.json"), weights.config["vocab_size"]
    found = read_json(path) if path.is_file() and weights.where.name == "config.json" else {}
    where = path if "eos_token_id" in found else weights.where
    found = {name: weights.config[name] for name in NAMED_IDS if weights.config.get(name) is not None} | found
    for id in end_ids(found):
        if type(id) is not int or not 0 <= id < num_tokens:
            what = f"eos_token_id holds {json.dumps(id)}, and the tokens are 0 to {num_tokens - 1}"
            raise UserError(f"{where}: {what}. Answers would not end there. Correct or remove it.")
    for name in OLLAMA_NAMES:
        value = found.get(name)
        if value is not None and not (type(value) in (int, float) and abs(value) < 1e9):
            shown = json.dumps(value)[:40]
            raise UserError(f"{path}: {name} is {shown}, not a number that it can be. Correct or remove it.")
    return found


def end_ids(generation: dict[str, Any], first: Iterable[int | None] = ()) -> list[int]:
    """Every end token once, those of `first` in front."""
    ends = generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return [id for id in dict.fromkeys([*first, *map(_hashable, ends)]) if id is not None]


def _hashable(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict | list) else value


def ollama_parameters(generation: dict[str, Any]) -> list[tuple[str, int | float]]:
    """The same settings as PARAMETERs of a Modelfile, which has no other names for them than Ollama's options."""
    given = {name: generation[name] for name in OLLAMA_NAMES if generation.get(name) is not None}
    if generation.get("do_sample") is False:  # then transformers takes the likeliest token
        given = {name: given[name] for name in given if name == "repetition_penalty"} | {"temperature": 0}
    parameters = [(OLLAMA_NAMES[name], int(value) if name == "top_k" else value) for name, value in given.items()]
    # Transformers looks back on everything, Ollama by itself on 64 tokens.
    return parameters + [("repeat_last_n", -1)] * ("repetition_penalty" in given)
