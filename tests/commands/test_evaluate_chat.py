"""evaluate and chat: losses of rows and greedy tokens as in transformers and PEFT; seeds repeat; answers end."""

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft_witness import (
    Encoded,
    dequantised_transformers,
    encoded_by_tokenizers,
    peft_on_dequantised,
    save_random_adapter,
    sum_of_losses,
)
from processes import run_process
from small_runs import PIRATE, Ended, alpaca_rows, run_here, save_tiny_model, write_rows

import nanoqlora as nq
import nanoqlora.chat as chat
import nanoqlora.evaluate as evaluate
from nanoqlora.config.errors import visible
from nanoqlora.data.batches import Sample
from nanoqlora.data.prompts import PromptFormat
from nanoqlora.fast.decode import Decoder
from nanoqlora.run.generate import answer
from nanoqlora.run.scoring import mean_loss, score_samples
from nanoqlora.run.usable import Usable

QUESTION = [{"role": "user", "content": "Who are you?"}]
END = 2  # <|im_end|> of the small tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_adapter(model, tmp_path_factory.mktemp("run") / "adapter")


@pytest.fixture(scope="module")
def theirs(model: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


# ------------------------------------------------------------------------------------------------ evaluate


def evaluated(out: Path, *words: object) -> tuple[Ended, list[dict[str, Any]]]:
    ended = run_here(evaluate.main, "--bf16", "false", "--out", out, *words)
    assert ended.code == 0, ended.err
    return ended, [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def assert_scores(rows: list[dict[str, Any]], witness: Any, encoded: list[Encoded]) -> None:
    """Row for row, in the order of the file. Float32 loses 3e-8 of a sum here, which is measured; asked is 1e-6."""
    assert [row["tokens"] for row in rows] == [len(row.counted) for row in encoded]
    with torch.no_grad():
        expected = [sum_of_losses(witness, row).item() for row in encoded]
    assert [row["nll"] for row in rows] == pytest.approx(expected, rel=1e-6)


def encoded_by_transformers(tok: Any, messages: list[dict[str, str]]) -> Encoded:
    """A conversation that ends with an answer: what counts is that answer, to its end token."""
    start = tok.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    ids = tok.apply_chat_template(messages)["input_ids"]
    assert ids[: len(start)] == start
    return Encoded(ids, list(range(len(start), ids.index(END, len(start)) + 1)))


def test_rows_of_alpaca_data_have_the_losses_of_transformers(model, theirs, tmp_path):
    rows = alpaca_rows(9)
    data = write_rows(tmp_path / "data.jsonl", rows)
    ended, scores = evaluated(tmp_path / "nll.jsonl", "--model", model, "--data", data)
    assert_scores(scores, theirs, [encoded_by_tokenizers(model, row) for row in rows])

    nll, tokens = (sum(row[key] for row in scores) for key in ("nll", "tokens"))
    loss, perplexity, count = re.fullmatch(r"loss (\S+)  perplexity (\S+)  tokens (\d+)\n", ended.out).groups()
    assert float(loss) == pytest.approx(nll / tokens, abs=5e-5) and int(count) == tokens
    assert float(perplexity) == pytest.approx(math.exp(nll / tokens), abs=5e-4)


def test_rows_of_chats_have_the_losses_of_transformers(model, theirs, tmp_path):
    pairs = zip(PIRATE[:10:2], PIRATE[1:10:2], strict=True)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": messages} for messages in chats])
    _, scores = evaluated(tmp_path / "nll.jsonl", "--model", model, "--data", data)
    tok = transformers.AutoTokenizer.from_pretrained(model)
    assert_scores(scores, theirs, [encoded_by_transformers(tok, messages) for messages in chats])


def test_adapter_over_four_bits_has_the_losses_of_peft(model, adapter, tmp_path):
    """As a command of its own, on the path that a user takes."""
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(5))
    words = ["--model", model, "--adapter", adapter, "--load_in_4bit", "true", "--bf16", "false"]
    ended = run_process("-m", "nanoqlora.evaluate", *words, "--data", data, "--out", tmp_path / "nll.jsonl")
    assert ended.code == 0, ended.err
    scores = [json.loads(line) for line in (tmp_path / "nll.jsonl").read_text().splitlines()]
    encoded = [encoded_by_tokenizers(model, row) for row in alpaca_rows(5)]
    assert_scores(scores, peft_on_dequantised(model, adapter), encoded)
    with torch.no_grad():  # and four bits are not sixteen
        assert sum_of_losses(dequantised_transformers(model), encoded[0]).item() != pytest.approx(
            scores[0]["nll"], rel=1e-3
        )


def test_prompt_json_of_the_adapter_says_what_counts(model, adapter, theirs, tmp_path):
    """Trained on the prompt too, so all tokens but the first count; the rows alone would say otherwise."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "prompt.json").write_text(PromptFormat(type="alpaca", train_on_inputs=True).to_json())
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(3))
    words = ["--model", model, "--adapter", folder, "--load_in_4bit", "true", "--data", data]
    _, scores = evaluated(tmp_path / "nll.jsonl", *words)
    encoded = [encoded_by_tokenizers(model, row) for row in alpaca_rows(3)]
    whole = [Encoded(row.ids, list(range(1, len(row.ids)))) for row in encoded]
    assert_scores(scores, peft_on_dequantised(model, folder), whole)


def test_packing_does_not_change_scores(model):
    """Each alone, a few in a row, all in one: the same losses in the same order, in float32."""
    ours = nq.Llama.from_pretrained(model)
    samples = [
        Sample(row.ids, [place in row.counted for place in range(len(row.ids))])
        for row in (encoded_by_tokenizers(model, row) for row in alpaca_rows(8))
    ]
    alone = [score_samples(ours, [sample])[0] for sample in samples]
    for capacity in (1, 400, 10_000):
        scores = score_samples(ours, samples, capacity)
        assert [tokens for _, tokens in scores] == [tokens for _, tokens in alone]
        assert [nll for nll, _ in scores] == pytest.approx([nll for nll, _ in alone], rel=1e-6)
    assert mean_loss([(6.0, 2), (3.0, 1), (1.0, 7)]) == 1.0, "a mean over tokens, not over rows"


# ------------------------------------------------------------------------------------------------ chat


def told(model: Path, *words: object) -> str:
    """What `chat` prints."""
    ended = run_here(chat.main, "--model", model, "--bf16", "false", *words)
    assert ended.code == 0, ended.err
    return ended.out


def greedy(witness: Any, ids: list[int], count: int, end: int = END) -> list[int]:
    """The tokens of transformers' generate, without the end token."""
    options = {"do_sample": False, "max_new_tokens": count, "eos_token_id": end, "pad_token_id": end}
    new = witness.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    return new[:-1] if new[-1:] == [end] else new


def question_ids(model: Path, messages: list[dict[str, str]] = QUESTION) -> list[int]:
    tok = transformers.AutoTokenizer.from_pretrained(model)
    return tok.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_greedy_tokens_are_those_of_transformers(model, theirs):
    """Token for token, 60 of them. They are not all the same, so a wrong position or cache would lead elsewhere."""
    ids = question_ids(model)
    expected = greedy(theirs, ids, 60)
    ours = [token for (token,) in Decoder(nq.Llama.from_pretrained(model)).generate([ids], {END}, 60)]
    assert ours == expected and len(expected) == 60 and len(set(expected)) > 5


def test_chat_prints_what_transformers_would_say(model, theirs):
    expected = nq.load_tokenizer(model).decode(greedy(theirs, question_ids(model), 40))
    words = ["--temperature", "0", "--max_new_tokens", "40"]
    assert told(model, "--prompt", QUESTION[0]["content"], *words) == visible(expected) + "\n"

    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    expected = nq.load_tokenizer(model).decode(greedy(theirs, question_ids(model, messages), 40))
    system = "--prompt", QUESTION[0]["content"], "--system", "Be brief."
    assert told(model, *system, *words) == visible(expected) + "\n"


@pytest.mark.parametrize("count", range(1, 12))
def test_nothing_is_lost_at_the_end(model, theirs, count):
    """A random model writes bytes that are no characters yet; what is left of them at the end is shown as well."""
    expected = nq.load_tokenizer(model).decode(greedy(theirs, question_ids(model), count))
    ours = Usable(nq.Llama.from_pretrained(model), nq.load_tokenizer(model), None)
    assert "".join(answer(ours, QUESTION, count, 0.0, 0, ())) == expected


def test_characters_are_shown_whole(model):
    """One of three bytes, token by token: nothing before its last byte, then all of it."""
    tok, ours = nq.load_tokenizer(model), nq.Llama.from_pretrained(model)
    text = "a\u20acb"
    ids = [tok.encode(char)[0] for char in "a"] + [tok.vocab.index(c) for c in "\u00e2\u0124\u00ac"] + tok.encode("b")
    assert tok.decode(ids) == text
    used = Usable(ours, tok, None)
    used.__dict__["decoder"] = SimpleNamespace(generate=lambda *_: iter([[id] for id in ids]))
    assert list(answer(used, QUESTION, 256, 0.0, 0, ())) == ["a", "\u20ac", "b"]


def test_adapter_with_its_own_prompt_is_talked_to_as_it_was_trained(model, adapter, tmp_path):
    """Stanford's text around the question, over four bits; PEFT goes on from the same ids."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    (folder / "prompt.json").write_text(PromptFormat(type="alpaca").to_json())
    row = encoded_by_tokenizers(model, {"instruction": "Who are you?", "input": "", "output": "x"})
    expected = greedy(peft_on_dequantised(model, folder), row.ids[: row.counted[0]], 30)
    words = ["--adapter", folder, "--load_in_4bit", "true", "--temperature", "0", "--max_new_tokens", "30"]
    assert told(model, "--prompt", "Who are you?", *words) == visible(nq.load_tokenizer(model).decode(expected)) + "\n"


def test_answers_end_at_the_end_token(model, theirs, tmp_path):
    """The end token made one that the model says soon: transformers stops before it, and so do we."""
    ids = question_ids(model)
    said = greedy(theirs, ids, 60)
    end = next(token for i, token in enumerate(said) if i > 5 and token not in said[:i])
    other = shutil.copytree(model, tmp_path / "model")
    tok = nq.load_tokenizer(model)
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": tok.vocab[end]}))
    expected = greedy(theirs, ids, 60, end)
    assert expected == said[: said.index(end)] and 5 < len(expected) < 60
    words = ["--temperature", "0", "--max_new_tokens", "60"]
    assert told(other, "--prompt", QUESTION[0]["content"], *words) == visible(tok.decode(expected)) + "\n"


def test_answers_end_at_every_end_token_of_the_model(model, theirs, tmp_path):
    """A list in generation_config.json, by which transformers stops too."""
    ids, other = question_ids(model), shutil.copytree(model, tmp_path / "model")
    said = greedy(theirs, ids, 60)
    end = next(token for i, token in enumerate(said) if i > 5 and token not in said[:i])
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, end]}))
    settings = transformers.GenerationConfig.from_pretrained(other, do_sample=False, max_new_tokens=60)
    expected = theirs.generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()
    assert expected.pop() == end and expected == said[: said.index(end)]
    printed = told(other, "--prompt", QUESTION[0]["content"], "--temperature", "0", "--max_new_tokens", "60")
    assert printed == nq.load_tokenizer(model).decode(expected) + "\n"


def test_turns_follow_each_other(model, theirs, monkeypatch):
    """Typed one after the other, an empty line between: the second answer knows the first question and answer."""
    tok, messages, expected = nq.load_tokenizer(model), [], []
    for question in ("Who are you?", "Why?"):
        messages.append({"role": "user", "content": question})
        text = tok.decode(greedy(theirs, question_ids(model, messages), 20))
        assert "<|" not in text, "what looks special in an answer is text for us, and a token for transformers"
        messages.append({"role": "assistant", "content": text})
        expected.append(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n\n  Why? \n"))
    printed = told(model, "--temperature", "0", "--max_new_tokens", "20")
    assert printed == f"> {expected[0]}\n> > {expected[1]}\n> "


def test_sampling_draws_from_the_tempered_softmax_and_seeds_repeat(model, theirs):
    """Against a loop that is written out: transformers' logits, softmax(logits / T), one draw from a generator."""
    ours = Usable(nq.Llama.from_pretrained(model), nq.load_tokenizer(model), None)
    ids = question_ids(model)
    for seed, temperature in ((0, 1.0), (1, 1.0), (0, 0.3)):
        draw, expected = torch.Generator().manual_seed(seed), []
        for _ in range(15):
            with torch.no_grad():
                p = (theirs(torch.tensor([ids + expected])).logits[0, -1] / temperature).softmax(0)
            token = int(torch.multinomial(p, 1, generator=draw))
            if token == END:
                break
            expected.append(token)
        text = "".join(answer(ours, QUESTION, 15, temperature, seed, ()))
        assert text == ours.tokenizer.decode(expected)
    words = ["--prompt", "Who are you?", "--max_new_tokens", "15", "--temperature", "1"]
    same, again, other = (told(model, *words, "--seed", seed) for seed in (3, 3, 4))
    assert same == again != other
