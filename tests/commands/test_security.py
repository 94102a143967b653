"""What strangers' files may do, and what SECURITY.md promises of that."""

# ruff: noqa: E501  # tables: a case is a line

import contextlib
import json
import random
import re
import resource
import signal
import stat
import struct
import sys
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch
from memory import read_each
from paths import ROOT
from peft_witness import save_random_adapter
from processes import context
from small_runs import CHATML, Ended, alpaca_rows, run_here, save_tiny_model, snapshot, write_rows, write_run

import export_gguf
import merge
import nanoqlora.chat as chat
import nanoqlora.evaluate as evaluate
import train
from nanoqlora.config import files
from nanoqlora.config.errors import UserError, printable
from nanoqlora.data.prompts import CHAT_TEMPLATES, PromptFormat
from nanoqlora.export import gguf_model
from nanoqlora.run.report import write_report
from nanoqlora.tokenizer import chat_template
from nanoqlora.tokenizer.chat_template import guard, render


def test_every_promise_names_tests_that_exist():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promised = text.split("## What is promised")[1].split("\n## ")[0]
    promises = [part for part in re.split(r"^- ", promised, flags=re.M) if part.startswith("**")]
    assert len(promises) >= 10
    for promise in promises:
        named = re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", promise)
        assert named, promise
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.M), (file, name)


# ------------------------------------------------------------------------------------------------ templates

HI = [{"role": "user", "content": "hi"}]
WITHOUT_END = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "much text": "{{ lipsum(n=1000000) }}",
    "a number": "{{ 10 ** (10 ** 8) }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a quotient": "{% set a = ('f' * 9999999) | int(base=16) %}{{ a // (a - 1) }}",
    "text": "{{ 'a' * 3000000000 }}",
    "doubled": "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a list": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "joined": "{{ range(99999) | join('x' * 1000000) }}",
    "replaced": "{{ ('a' * 1000000) | replace('a', 'b' * 100000) }}",
    "in the middle": "{{ 'x' | center(10000000000) }}",
    "zeros": "{{ '%02000000000d' | format(1) }}",
    "indented": "{{ messages | tojson(indent=1000000000) }}",
    "calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("where", ["plain", "guarded", "in a thread"])
@pytest.mark.parametrize("case", WITHOUT_END)
def test_templates_without_an_end_end(monkeypatch, case, where):
    """Time of a processor, memory and the size of numbers are bounded, and as before when the template has ended."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    messages, tracing = guard(HI)[0] if where == "guarded" else HI, sys.gettrace()

    def ended() -> str:
        with pytest.raises(UserError, match="the chat template stopped with") as found:
            render(WITHOUT_END[case], messages, False, {})
        assert sys.gettrace() is tracing
        return str(found.value)

    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(ended).result() if where == "in a thread" else ended()) < 300
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 << 20, "KB: a template took more than its share"


def test_limits_end_where_the_signal_comes_last(monkeypatch):
    """It comes when a long operation has ended, which may be within what ends the limits."""
    before, setitimer = (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)), signal.setitimer

    def late(which: int, seconds: float) -> None:
        setitimer(which, seconds)
        if not seconds:
            raise ValueError("late")

    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(UserError, match="late"):
        render("{{ 1 }}", HI, False, {})
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before


def test_limits_end_wherever_the_signal_comes(monkeypatch):
    """At a thousand moments of a short template, and of what begins and ends its limits: all is as before."""
    kinds, setitimer, moments = (resource.RLIMIT_AS, signal.SIGVTALRM), signal.setitimer, random.Random(0)
    before, alarm = (resource.getrlimit(kinds[0]), signal.getsignal(kinds[1])), signal.getsignal(signal.SIGALRM)

    def soon(_: int, seconds: float) -> None:  # by a clock that is finer than that of a processor's time
        setitimer(signal.ITIMER_REAL, seconds and moments.uniform(1e-6, 250e-6))

    def ring(*given: Any) -> None:
        if callable(handler := signal.getsignal(signal.SIGVTALRM)):
            handler(*given)

    signal.signal(signal.SIGALRM, ring)
    monkeypatch.setattr(signal, "setitimer", soon)
    try:
        for _ in range(3000):
            with contextlib.suppress(UserError):
                render("{{ 1 }}", HI, False, {})
            setitimer(signal.ITIMER_REAL, 0)
            chat_template._stopped.clear()
            assert (resource.getrlimit(kinds[0]), signal.getsignal(kinds[1])) == before
    finally:
        setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


def test_a_template_without_an_end_is_not_asked_again_and_again(world, monkeypatch):
    """A command asks a template many things before it is used."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)
    begun: list[float] = []
    setitimer = signal.setitimer
    monkeypatch.setattr(signal, "setitimer", lambda which, s: (begun.append(s) if s else None, setitimer(which, s))[1])
    world.template("{% for i in range(99998) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    ended = world.chat()
    assert ended.code == 2 and "it ran for more than 0.2 s" in ended.err and len(begun) == 2, (ended, begun)


@pytest.mark.parametrize(
    "case", ["{{ 'a' * 300000 }}", "{% for i in range(60000) %}{{ messages[0].content * 9 }}{% endfor %}"]
)
def test_a_template_writes_not_much_more_than_it_is_given(case):
    with pytest.raises(UserError, match="a text of 3?[0-9]+ characters"):
        render(case, HI, False, {})
    given = [{"role": "user", "content": "a" * 300_000}]
    assert len(render("{{ messages[0].content * 2 }}", given, False, {})) == 600_000


def test_templates_in_other_threads_run():
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(render("{{ 2 ** 10 }}", HI, False, {})))
    thread.start()
    thread.join()
    assert found == ["1024"]


def test_numbers_that_templates_compute_with_stay():
    for expression, expected in {"7 // 2 * 3 % 5": "4", "2 ** 0.5 < 2": "True", "'ab' * 2": "abab"}.items():
        for messages in (HI, guard(HI)[0]):
            assert render("{{ " + expression + " }}", messages, False, {}) == expected
    assert render("{{ 2.567 | round(1) }} {{ 5 | round(-1, 'ceil') | int }}", HI, False, {}) == "2.6 10"
    assert render("{{ 5.5 | round(10 ** 9, 'floor') }}", HI, False, {}) == "5.5"


WAYS_OUT = """''.__class__ ~ ''['__class__'] ~ ''|attr('__class__') ~ ''|attr('__cla'+'ss__') ~ ''|attr(['_'*2,'class','_'*2]|join)
cycler.__init__.__globals__ ~ cycler['__init__'] ~ joiner|attr('__init__') ~ namespace.__init__ ~ lipsum.__globals__
(lipsum|attr('__globals__')).os ~ self.__init__ ~ self._TemplateReference__context ~ messages.__class__
raise_exception.__globals__ ~ strftime_now.__code__ ~ raise_exception.__closure__ ~ '{0.__class__}'.format(messages)
'{0.__class__}'|format(messages) ~ '{a.__init__.__globals__}'.format_map({'a': cycler})
['{0.__class__}'.format][0](messages) ~ ('{0.__class__}'|attr('format'))(messages) ~ ('{0.__class__}'|safe).format(1)
[messages]|map(attribute='__class__')|list ~ messages|groupby('__class__')|list ~ messages|sort(attribute='__class__')
messages|tojson(default=lipsum) ~ messages|tojson(cls=cycler) ~ [namespace]|tojson(default='{0.__init__.__globals__}'.format)
(messages|map('upper')).gi_frame ~ messages|map('attr','gi_frame')|list ~ messages[0].items.__self__ ~ dict.mro()
lipsum.__globals__.os.popen('id').read() ~ ''['\\x5f\\x5fclass\\x5f\\x5f'] ~ messages.append(1) ~ messages[0].update({'a': 1})
namespace(f='{0.__class__}'.format).f(1) ~ dict(x='{0.__class__}'.format)['x'](1) ~ (messages|groupby('role'))[0].__class__"""
INSIDES = re.compile(r"<class|__globals__|mappingproxy|<module|posix|uid=|<frame|<code|<function|<bound")


@pytest.mark.parametrize("way", re.split(r" ~ |\n", WAYS_OUT))
def test_no_template_leaves_its_sandbox(way):
    for messages in (HI, guard(HI)[0]):
        try:
            text = render("{{ " + way + " }}", messages, True, {"bos_token": "<s>"})
        except UserError:
            continue
        assert not INSIDES.search(text.replace(way, "")), text
    assert HI == [{"role": "user", "content": "hi"}]


def test_no_template_reads_a_file():
    for text in ("{% include 'train.yml' %}", "{% import 'train.yml' as x %}", "{% extends 'train.yml' %}"):
        with pytest.raises(UserError, match="the chat template stopped with"):
            render(text, HI, False, {})


MARKERS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|im_",
    "end|>",
    "</s>",
    "<s>",
    "[INST]",
    "\ue000",
    "\uf8ff",
    "{{ x }}",
]
WRITES_ALL = "{{ tools | tojson }}" + CHATML.replace(
    "{{ message['content'] }}", "{{ message | tojson }}{{ message.content }}"
)


@pytest.mark.parametrize("name", [*CHAT_TEMPLATES, "all fields"])
def test_text_of_rows_is_never_special_in_the_templates_that_we_ship(tok, llama3, name):
    """As many special tokens as with harmless text, wherever a row can hold text."""
    template = CHAT_TEMPLATES.get(name, WRITES_ALL)
    tokenizer = llama3 if name == "llama3" else tok
    special = set(tokenizer.special_tokens.values())

    def count(text: str) -> int:
        call = {"function": {"name": text, "arguments": {text: [text, {text: text}]}}}
        messages = [{"role": "system", "content": text}, {"role": "user", "content": text, text: text}]
        messages += [{"role": "assistant", "content": text} | ({"tool_calls": [call]} if name == "all fields" else {})]
        tools = [{"type": "function", "function": {"name": text, "description": text, "parameters": {text: text}}}]
        ids, _ = PromptFormat(type="chat_template", chat_template=template).encode_row(
            tokenizer, {"messages": messages} | ({"tools": tools} if name == "all fields" else {})
        )
        return sum(id in special for id in ids)

    harmless = count("word")
    for text in [*MARKERS, "".join(MARKERS), "x".join(MARKERS), *(a + b for a in MARKERS for b in MARKERS)]:
        assert count(text) == harmless, text


# ------------------------------------------------------------------------------------------------ the terminal

STEERS = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2028\x7f"
RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2028\u2029]")
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class World:
    """A tiny model, an adapter, data, and a run over them."""

    def __init__(self, root: Path) -> None:
        self.root, self.model, self.adapter = root, root / "model", root / "adapter"
        self.data = write_rows(root / "data.jsonl", alpaca_rows(4))

    def run(self, **keys: Any) -> Path:
        return write_run(self.root / "train.yml", self.model, self.data, **({"max_steps": 1} | keys))

    def change(self, file: str, **changes: Any) -> None:
        path = self.root / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def template(self, text: str) -> None:
        self.change("model/tokenizer_config.json", chat_template=text)

    def merge(self) -> Ended:
        words = ("--model", self.model, "--adapter", self.adapter, "--out", self.root / "merged", "--max_tokens", 0)
        return run_here(merge.main, *words)

    def export(self) -> Ended:
        return run_here(export_gguf.main, "--model", self.model, "--out", self.root / "a.gguf")

    def chat(self, *words: object, model: Path | None = None) -> Ended:
        return run_here(chat.main, "--model", model or self.model, "--prompt", "x", "--max_new_tokens", 64, *words)

    def evaluate(self) -> Ended:
        return run_here(evaluate.main, "--model", self.model, "--data", self.data)

    def plan(self, **keys: Any) -> Ended:
        return run_here(train.main, self.run(**keys), "--plan")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model", num_hidden_layers=1, intermediate_size=64)
    save_random_adapter(tmp_path / "model", tmp_path / "adapter")
    return World(tmp_path)


def chats(world: World, *rows: dict[str, Any], **keys: Any) -> Ended:
    write_rows(world.data, rows)
    return world.plan(datasets=[{"path": str(world.data), "type": "chat_template"}], **keys)


def rows(world: World, *given: dict[str, Any]) -> Ended:
    write_rows(world.data, given)
    return world.plan()


def named(world: World, name: str) -> Ended:
    path = world.root / name
    path.write_bytes(world.data.read_bytes())
    return world.plan(datasets=[{"path": str(path), "type": "completion"}])


def card(world: World, head: str) -> Ended:
    folder = world.root / "set"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    (folder / "train.jsonl").write_bytes(world.data.read_bytes())
    return world.plan(datasets=[{"path": str(folder), "type": "alpaca"}])


def gguf(world: World, old: bytes, new: bytes) -> Ended:
    gguf_model.export_gguf(world.model, world.root / "a.gguf", "F32")
    raw = (world.root / "a.gguf").read_bytes()
    assert old in raw and len(old) == len(new)
    (world.root / "b.gguf").write_bytes(raw.replace(old, new))
    return world.chat(model=world.root / "b.gguf")


def changed(world: World, file: str, run: Callable[[], Ended], **changes: Any) -> Ended:
    world.change(file, **changes)
    return run()


ANSWER = {"role": "assistant", "content": "y"}
SHOWN: dict[str, Callable[[World], Ended]] = {
    "a template's own error": lambda w: (w.template("{{ raise_exception('" + STEERS + "') }}"), w.chat())[1],
    "the same at export": lambda w: (w.template("{{ raise_exception('" + STEERS + "') }}"), w.export())[1],
    "an answer": lambda w: w.chat("--temperature", 5, "--seed", 1),
    "rows": lambda w: rows(w, *({"instruction": f"{i}{STEERS}", "output": STEERS} for i in range(3))),
    "a column": lambda w: rows(w, {STEERS: "x"}),
    "a column that is not read": lambda w: rows(w, *({"instruction": "a", "output": f"b{i}", STEERS: 1} for i in "01")),
    "a column of another command": lambda w: (write_rows(w.data, [{STEERS: "x"}]), w.evaluate())[1],
    "a role": lambda w: chats(w, {"messages": [{"role": STEERS, "content": "x"}, ANSWER]}),
    "a key of messages": lambda w: chats(w, {"messages": [{"role": "user", "content": "x", STEERS: 1}, ANSWER]}),
    "a part of another type": lambda w: chats(
        w, {"messages": [{"role": "user", "content": [{"type": STEERS}]}, ANSWER]}
    ),
    "a file": lambda w: named(w, "d\x1b[2J\u202e.jsonl"),
    "a configuration of a card": lambda w: card(
        w, f"configs: [{{config_name: {json.dumps(STEERS)}}}, {{config_name: b}}]"
    ),
    "a path of a card": lambda w: card(w, f"configs: [{{data_files: {json.dumps('../' + STEERS)}}}]"),
    "a tensor": lambda w: gguf(w, b"blk.0.attn_q.weight", b"\x1b[2J\x1b]0;owned\x07!!!!!"),
    "an architecture in GGUF": lambda w: gguf(w, b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0\x1b[2J\x07"),
    "an architecture": lambda w: changed(w, "model/config.json", w.chat, architectures=[STEERS]),
    "a dtype": lambda w: changed(w, "model/config.json", w.chat, hidden_act=STEERS),
    "an end token": lambda w: changed(w, "model/tokenizer_config.json", w.export, eos_token=STEERS),
    "a base in an adapter": lambda w: changed(
        w, "adapter/adapter_config.json", w.merge, base_model_name_or_path=STEERS
    ),
    "a key in an adapter": lambda w: changed(w, "adapter/adapter_config.json", w.merge, **{STEERS: 5}),
    "a pattern in an adapter": lambda w: changed(
        w, "adapter/adapter_config.json", w.merge, rank_pattern={STEERS + "(": 4}
    ),
    "a value of the YAML": lambda w: w.plan(lora_r=STEERS),
    "a key of the YAML": lambda w: w.plan(**{STEERS: 1}),
}


@pytest.mark.parametrize("case", SHOWN)
def test_nothing_steers_the_terminal(world, case):
    ended = SHOWN[case](world)
    shown = COLOURS.sub("", ended.out + ended.err)
    assert ended.code in (0, 2) and "Traceback" not in shown and not RAW.search(shown), ended


def test_report_is_text(world, tmp_path):
    """Neither control characters, nor HTML, nor pictures and links that somebody else chose."""
    evil = f"![x](http://evil.example/p.png) [click](javascript:alert(1)) <img src=x> | ``` {STEERS}"
    write_rows(world.data, [{"instruction": f"{evil} {i}", "output": evil} for i in range(4)])
    ended = run_here(
        train.main, world.run(val_set_size=2, sequence_len=1024, output_dir=str(tmp_path / "out"), eval_table_size=1)
    )
    assert ended.code == 0, ended
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    outside = re.sub(r"^(`{3,}).*?^\1$", "", report, flags=re.M | re.S)
    pictures = re.findall(r"(?<!\\)\[[^\]]*\]\([^)]*\)", outside)
    assert "evil.example" in report and pictures == ["[Loss, gradient norm, learning rate and memory](Fine-Tuning.png)"]
    assert "<img" not in outside and not RAW.search(report)


# ------------------------------------------------------------------------------------------------ memory

SHARE, MUCH = 32 << 20, 200 << 20  # bytes that a file gets here, and those that wrong ones ask for


def parquet(path: Path, column: Any, **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", **options)
    return path


def arrow(path: Path, column: Any, codec: str | None = None) -> Path:
    table, options = pyarrow.table({"text": column}), pyarrow.ipc.IpcWriteOptions(compression=codec)
    with pyarrow.ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table)
    return path


def pickled(path: Path, text: bytes) -> Path:
    """What torch.load takes for a file of tensors, with another pickle in it."""
    torch.save({"w": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, part in parts.items():
            file.writestr(name, text if name.endswith("data.pkl") else part)
    return path


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux counts memory so that it can be bounded")
def test_small_files_take_little_memory(tmp_path):
    """Whatever they say of their size; and right ones that compress well are read."""
    value, rows = ["a" * MUCH], ["b" * 2**20] * (MUCH >> 20)
    integer = b"J" + struct.pack("<i", MUCH)
    wrong = [
        parquet(tmp_path / "a value.parquet", value, use_dictionary=False),
        parquet(tmp_path / "a page.parquet", rows, use_dictionary=False, data_page_size=2**30),
        parquet(tmp_path / "a list.parquet", pyarrow.array([[0] * (MUCH // 8)])),
        arrow(tmp_path / "zstd.arrow", value, "zstd"),
        arrow(tmp_path / "lz4.arrow", value, "lz4"),
        pickled(tmp_path / "bytes.pth", b"\x80\x02c__builtin__\nbytearray\n" + integer + b"\x85R."),
        pickled(tmp_path / "bytes.bin", b"\x80\x02c__builtin__\nbytearray\n" + integer + b"\x85R."),
        pickled(tmp_path / "storage.pth", b"\x80\x02ctorch.storage\nUntypedStorage\n" + integer + b"\x85R."),
    ]
    texts = [f"A row, {i % 7}, of many." * 10 for i in range(20_000)]
    right = [parquet(tmp_path / "right.parquet", texts), arrow(tmp_path / "right.arrow", texts, "zstd")]
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "right.pth")
    right.append(tmp_path / "right.pth")
    assert all(path.stat().st_size < 2**20 for path in wrong)
    receiver, sender = context().Pipe(duplex=False)
    process = context().Process(target=read_each, args=(right, wrong, SHARE, sender))
    process.start()
    sender.close()
    said, grown = receiver.recv()
    process.join()
    assert said[: len(right)] == [""] * len(right)
    for path, why, size in zip(wrong, said[len(right) :], grown, strict=True):
        assert path.name in why and size < 2 * SHARE, (path.name, why, size >> 20)


# ------------------------------------------------------------------------------------------------ secrets and places

SECRET = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    "words",
    [
        ["--comet_api_key", SECRET],
        ["--hf_use_auth_token", SECRET],
        ["--base_model", f"https://me:{SECRET}@hub.example/a/b"],
        ["--datasets", json.dumps([{"path": f"s3://me:{SECRET}@bucket/a.jsonl", "type": "alpaca"}])],
        ["--lora_r", SECRET],  # as when a shell puts a variable into the wrong place
        ["--wandb_name", f"run {SECRET}"],
    ],
    ids=lambda words: words[0],
)
def test_no_secret_is_shown_or_kept(world, monkeypatch, words):
    """Of the environment, of addresses, of keys: neither on the terminal nor in any file of the run."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET[::-1])
    before = snapshot(world.root)
    ended = run_here(train.main, world.run(val_set_size=1), *words)
    assert ended.code == (0 if words[0] == "--wandb_name" else 2), ended
    assert SECRET not in ended.out + ended.err and SECRET[::-1] not in ended.out + ended.err
    made = {name: content for name, content in snapshot(world.root).items() if before.get(name) != content}
    kept = [name for name, content in made.items() if SECRET.encode() in content or SECRET[::-1].encode() in content]
    assert set(kept) <= {"out/train.yml"}, kept  # which has to repeat what the user calls the run


def test_keys_and_passwords_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789abc")
    monkeypatch.setenv("SHORT_TOKEN", "a")
    for text, expected in {
        "fetching https://me:pass@host/x failed": "fetching https://me:***@host/x failed",
        "train.py a.yml --comet_api_key abc --lora_r 4": "train.py a.yml --comet_api_key *** --lora_r 4",
        'comet_api_key: "abc", lora_r: 4': "comet_api_key: ***, lora_r: 4",
        "the key is 0123456789abc.": "the key is ***.",
        "eos_token: a, tokens_per_second: 300, the password is wrong": None,
        "12:30 //a:b @ c": None,
    }.items():
        assert printable(text) == (expected or text)
    write_report(tmp_path / "report.md", {"command": "train.py --wandb_api_key 0123456789abc"})
    assert "0123456789abc" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_are_for_those_whom_the_user_lets_read(tmp_path, monkeypatch, umask):
    monkeypatch.setattr(files, "UMASK", umask)
    files.write_text(tmp_path / "a", "text")
    with files.whole_folder(tmp_path / "folder") as folder:
        (folder / "b").write_text("text")
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "folder", "folder/b")}
    assert modes == {"a": 0o666 & ~umask, "folder": 0o777 & ~umask, "folder/b": 0o666 & ~umask}


def test_nothing_in_an_adapter_decides_what_is_read_or_written(world):
    """Its train.yml names a private file, and a folder below the user's home."""
    private, home = world.root / "private.txt", world.root / "home"
    private.write_text("one\ntwo\nthree\nfour\n")
    run = {"datasets": [{"path": str(private), "ds_type": "text", "type": "completion"}], "val_set_size": 2}
    write_run(world.adapter / "train.yml", world.model, private, **run, dataset_prepared_path=str(home))
    before = snapshot(world.root)
    words = ("--model", world.model, "--adapter", world.adapter, "--out", world.root / "merged")
    ended = run_here(merge.main, *words)
    assert ended.code == 0, ended
    after = snapshot(world.root)
    assert not home.exists() and {name for name in after if not name.startswith("merged")} == {*before}
    assert not any(b"three" in content for name, content in after.items() if name.startswith("merged"))
