"""Readers of the YAML file of a run, and of a command line."""

import json
from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import yaml
from mutate import STRINGS, any_value, dump, mutate_bytes, mutate_json
from right import base, put, work

from nanoqlora.config import schema
from nanoqlora.config.keys import keys_of


@cache
def all_keys() -> list[str]:
    """The keys of a run, of older spellings and of Axolotl's that are refused or ignored."""
    fates = schema.Config.fates
    others = [name for table in (fates.refused, fates.ignored) for names in table.values() for name in names.split()]
    return [*keys_of(schema.Config), *others, *fates.old]


def right_keys() -> dict[str, Any]:
    """A right run; the folders of a process are put in by `placed`, so that inputs can be kept."""
    run: dict[str, Any] = {"base_model": "BASE/hf", "adapter": "qlora", "learning_rate": 1e-4, "lora_r": 4}
    run |= {"datasets": [{"path": "BASE/alpaca.jsonl", "type": "alpaca"}], "lora_alpha": 8, "max_steps": 2}
    return run | {"output_dir": "WORK/yaml-out", "dataset_prepared_path": "WORK/yaml-prepared"}


def placed(text: bytes) -> bytes:
    """With the folders of this process."""
    return text.replace(b"BASE/", f"{base()}/".encode()).replace(b"WORK/", f"{work()}/".encode())


INNER = {
    "special_tokens": schema.SpecialTokens,
    "fsdp_config": schema.FsdpConfig,
    "bnb_config_kwargs": schema.BnbConfig,
}


def make_yaml_keys(rng: Random) -> bytes:
    """A run, as JSON or YAML, in which any key has any value."""
    tree: Any = right_keys()
    for _ in range(rng.choice([1, 1, 2, 4])):
        kind, datasets = rng.random(), tree.get("datasets")
        dataset = datasets[0] if isinstance(datasets, list) and datasets and isinstance(datasets[0], dict) else {}
        if kind < 0.6:
            tree[rng.choice(all_keys())] = any_value(rng)
        elif kind < 0.75:
            others = ["shards", "conversation", "temperature"]
            dataset[rng.choice([*keys_of(schema.DatasetConfig), *others])] = any_value(rng)
        elif kind < 0.85:
            name = rng.choice(list(INNER))
            names = [*keys_of(INNER[name]), "fsdp_x", "x"]
            tree[name] = {rng.choice(names): any_value(rng) for _ in range(2)}
        elif kind < 0.92:
            dataset["type"] = {rng.choice(list(keys_of(schema.FrameConfig))): any_value(rng) for _ in range(2)}
        else:
            tree = mutate_json(tree, rng, times=1)
            if not isinstance(tree, dict):
                break
    if rng.random() < 0.9:
        return dump(tree, rng)
    try:
        return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, yaml.YAMLError):
        return b"x: y"


def read_yaml(data: bytes, rng: Random) -> None:
    """Read, written resolved and read again it is the same; then its data is read and its steps are planned."""
    from nanoqlora.config.load import load_config
    from nanoqlora.run.cadence import evaluations, learning_rates, saves, warmup_steps
    from nanoqlora.run.inputs import prepare_data, tokenizer_of

    config = load_config([str(put(work() / "run.yml", placed(data)))])
    again = load_config([str(put(work() / "again.yml", config.to_yaml().encode()))])
    assert again == config, "what to_yaml writes is read as something else"
    right = json.loads(placed(json.dumps(right_keys()).encode()))
    if rng.random() < 0.5 and all(
        getattr(config, key) == right[key] for key in ("base_model", "dataset_prepared_path")
    ):
        found = prepare_data(config, tokenizer_of(config), 1)
        for plan in (evaluations, saves, warmup_steps, learning_rates):
            plan(config, found.plan)


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(f'*{a}' for _ in range(10))}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
ODD_VALUES = [
    *("2024-99-99", "0b_", "0x_", "!!int x", "!!float x", "!!bool maybe", "!!timestamp x", "!!binary x", "!!null x"),
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!set {a, b}", "!!omap [a: 1]", "-.inf"),
    *("!!pairs [a: 1]", "9" * 5000, "1:99:99", ".nan", "0o99", "08", "1_000", "_", "190:20:30", "1e400", "&a [*a]"),
    *("&a {x: *a}", "*nope", "<<", "? x", "|\n  x", "'", '"\\ud800"', '"\\x1b[31m"', '"\\0"', "%TAG", "@x", "`x"),
    *("!x y", "!<tag:x> y", "2001-12-14t21:59:43.10-05:00", "2001-12-14t99:59:43Z", "0001-01-01t00:00:00+23:59"),
    *("2001-02-30", "=", "{a: 1, a: 2}", "[" * 1500, "{a: " * 600, "{? [a]: 1}", "{[a]: 1}", "1" * 700 + ":1"),
]
ODD_LINES = [
    *("<<: [1]\n", "<<: *x\n", "a: &x {lora_r: 3}\n<<: *x\n", "? [a, b]\n: c\n", "? {a: b}\n: c\n", "~: 1\n", "1: 2\n"),
    *("true: 1\n", "1.5: 2\n", "--- \nx: 1\n", "...\n", "\t", "lora_r: 5\n", "\x00", "\x1b[31m: 1\n", "'': 1\n"),
    *("!!binary aGVsbG8=: 1\n", "2001-01-01: 1\n", "? !!set {a}\n: b\n", "<<: {lora_r: 9}\n", "[" * 5000),
    *("<<: [{lora_r: 9}, {lora_r: 8}]\n", "special_tokens: &s {bos_token: *s}\n"),
]


def make_yaml_text(rng: Random) -> bytes:
    text, kind = yaml.safe_dump(right_keys(), sort_keys=False), rng.random()
    if kind < 0.5:
        lines = text.splitlines()
        lines.insert(rng.randrange(len(lines) + 1), f"{rng.choice(all_keys())}: {rng.choice(ODD_VALUES)}")
        text = "\n".join(lines) + "\n"
    elif kind < 0.6:
        text += rng.choice(ODD_LINES)
    elif kind < 0.63:
        keys = ["lora_target_modules", "datasets", "lora_r", "tokens", "x", "deepspeed", "special_tokens"]
        text += BOMB + f"{rng.choice(keys)}: *{rng.choice('efghi')}\n"
    else:
        return mutate_bytes(text.encode(), rng)
    return text.encode("utf-8", "surrogatepass")


def make_words(rng: Random) -> bytes:
    words = []
    for _ in range(rng.choice([1, 2, 3])):
        dashes = rng.choice(["--", "-", "---", "--="])
        words.append(dashes + rng.choice(all_keys()) if rng.random() < 0.9 else rng.choice(STRINGS))
        if rng.random() < 0.8:
            words.append(rng.choice([*STRINGS, *ODD_VALUES, "5", "-1", "1e9"]))
    return json.dumps(words).encode()


def read_words(data: bytes, rng: Random) -> None:
    from nanoqlora.config.load import load_command, load_options
    from nanoqlora.config.options import MergeOptions, ModelOptions, TrainOptions

    right = work() / "right.yml"
    if not right.exists():
        right.write_bytes(placed(json.dumps(right_keys()).encode()))
    words = [word for word in json.loads(data) if word not in ("-h", "--help")]
    kind = rng.choice([TrainOptions, MergeOptions, ModelOptions])
    if kind is ModelOptions:
        load_options(kind, ["--model", "x", *words])
    else:
        load_command(kind, [str(right), *words])


READERS: dict[str, tuple[Callable[[Random], bytes], Callable[[bytes, Random], None]]] = {
    "yaml_keys": (make_yaml_keys, read_yaml),
    "yaml_text": (make_yaml_text, read_yaml),
    "words": (make_words, read_words),
}
