"""Before and after: the domain score and the plain text, and what a run makes of its evaluations."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import transformers
from paths import ROOT
from peft_witness import dequantised_transformers
from safetensors.torch import load_file
from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, write_rows, write_run

import train
from nanoqlora.config.load import load_config
from nanoqlora.run.early_stopping import Progress
from nanoqlora.run.inputs import prepare_data, tokenizer_of
from nanoqlora.run.quality import domain_score, domain_words, plain_samples, plain_text, words_of
from nanoqlora.tokenizer.tokenizer import load_tokenizer


def pirate(name: str, role: str) -> list[str]:
    rows = map(json.loads, (ROOT / "data" / f"{name}.jsonl").read_text("utf-8").splitlines())
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]


def test_words():
    assert words_of("Ye've 3 doubloons o' gold, it's über-fein!") == ["ye've", "doubloons", "o'", "gold"] + [
        "it's",
        "über",
        "fein",
    ]
    assert words_of("_ 12 a1b") == ["a", "b"]


def test_domain_words_by_hand():
    """ "the" is usual, "arr" marks, "gold" stands in one answer only, "sea" is not three times as frequent."""
    answers, plain = ["arr the sea", "arr the gold gold"], "the sea the sky the sun the"
    assert domain_words(answers, plain) == {"arr"}
    assert domain_score(["Arr, arr!", "the sea"], {"arr"}) == 0.5
    assert domain_score([], {"arr"}) == domain_score(["12"], {"arr"}) == 0


def test_score_tells_pirates_from_others():
    """Answers that were never trained on score as the data's own, plain text next to nothing."""
    marks = domain_words(pirate("pirate", "assistant"), plain_text())
    own, unseen = (domain_score(pirate(name, "assistant"), marks) for name in ("pirate", "pirate-heldout"))
    assert abs(own - unseen) < 0.05 and unseen > 0.2
    assert domain_score([plain_text()], marks) < 0.03
    assert {"ye", "yer", "matey"} <= marks and not marks & {"the", "and", "water"}
    frequent = Counter(words_of(" ".join(pirate("pirate", "assistant")))).most_common(20)
    assert "the" in dict(frequent)  # it is frequent there and still marks nothing


def test_plain_loss_is_that_of_transformers(tmp_path):
    """The perplexity on plain text in the report, before training, against transformers on the dequantised base."""
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(6))
    path = write_run(tmp_path / "train.yml", model, data, val_set_size=2, max_steps=2, sequence_len=512)
    done = run_here(train.main, path)
    assert done.code == 0, done.err
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    before, after = map(float, re.search(r"plain text.*: ([\d.]+) before, ([\d.]+) after", report).groups())
    theirs = dequantised_transformers(model)
    nll = count = 0.0
    for sample in plain_samples(load_tokenizer(model), 512):
        ids = torch.tensor(list(sample.tokens))
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        nll, count = nll + losses.item(), count + len(ids) - 1
    assert before == pytest.approx(torch.tensor(nll / count).exp().item(), abs=0.0051)
    assert after != before
    assert re.search(r"Domain score.*: \d+% of the answers below before, \d+% after, \d+% of the data's own", report)


# ------------------------------------------------------------------------------------------------ the best so far


def evaluated(*losses: float) -> Progress:
    """After these held-out losses, the first of them before the first step."""
    progress = Progress()
    for step, loss in enumerate(losses):
        progress.evaluated(step, loss)
    return progress


def test_best_is_the_first_lowest_after_the_start():
    nan = float("nan")
    assert evaluated(0.1, 3.0, 2.0, 2.0, 2.5).best_step == evaluated(0.1, nan, 2.0, nan, 2.5).best_step == 2
    assert evaluated(0.1).best_step == evaluated().best_step == 0


@pytest.mark.parametrize(
    ("losses", "stops"), [((9, 3, 2, 2.5), False), ((9, 3, 2, 2.5, 2.6), True), ((9, 2, 3, 1, 2), False), ((9,), False)]
)
def test_early_stopping_counts_evaluations_since_the_best(losses, stops):
    config = SimpleNamespace(early_stopping_patience=2, loss_watchdog_threshold=None, loss_watchdog_patience=3)
    assert bool(evaluated(*losses).reason_to_stop(config)) is stops
    config.early_stopping_patience = None
    assert not evaluated(*losses).reason_to_stop(config)


@pytest.mark.parametrize(
    ("losses", "stops"), [((9, 9, 9), True), ((9, 4, 9), False), ((1, 9, 9), False), ((9, 9), False)]
)
def test_watchdog_wants_all_of_the_last_ones_above(losses, stops):
    config = SimpleNamespace(early_stopping_patience=None, loss_watchdog_threshold=5.0, loss_watchdog_patience=3)
    progress = Progress()
    for loss in losses:
        progress.logged(loss, config.loss_watchdog_threshold)
    assert bool(progress.reason_to_stop(config)) is stops


def test_run_stops_early_and_ends_with_its_best_adapter(tmp_path):
    """A rate so high that the second evaluation is worse: the first checkpoint is kept, and becomes the result."""
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(8))
    keys = {"val_set_size": 2, "eval_steps": 1, "saves_per_epoch": 0, "num_epochs": 20, "learning_rate": 0.5}
    keys |= {"early_stopping_patience": 2, "save_total_limit": 1, "save_first_step": True, "warmup_steps": 2}
    path = write_run(tmp_path / "train.yml", model, data, **keys)
    done = run_here(train.main, path)
    assert done.code == 0, done.err
    rows = metrics_of(tmp_path / "out")
    scores = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row and row["step"]}
    best = min(scores, key=scores.get)
    assert (
        max(scores) == best + 2 < 60
        and f"ends here, 2 evaluations without a better one than after step {best}" in done.err
    )
    assert f"checkpoint-{best}" in {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    ours, kept = (
        load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("", f"checkpoint-{best}")
    )
    assert all(torch.equal(ours[name], kept[name]) for name in kept)
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"{scores[best]:.4f} after" in report


def test_resumed_report_has_figures_of_before(tmp_path):
    """The same summary and the same answers as those of the run that was not interrupted."""
    model = save_tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", alpaca_rows(8))
    path = write_run(tmp_path / "train.yml", model, data, val_set_size=2, save_steps=2, num_epochs=2)
    assert run_here(train.main, path).code == 0
    whole = (tmp_path / "out" / "report.md").read_text("utf-8").split("## Memory")[0]
    assert "before" in whole
    done = run_here(train.main, path, "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-2")
    assert done.code == 0, done.err
    resumed = (tmp_path / "out" / "report.md").read_text("utf-8").split("## Memory")[0]
    assert resumed == whole


# ------------------------------------------------------------------------------------------------ tokens of the run


def test_default_system_message_is_what_transformers_gets_with_one(tmp_path):
    """For conversations without a system message, and only for them."""
    model = save_tiny_model(tmp_path / "model")
    chats = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr"}],
        [{"role": "system", "content": "Be nice."}, *({"role": r, "content": "x"} for r in ("user", "assistant"))],
    ]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": chat} for chat in chats])
    default = 'You are: {a} "pirate"\n\'tis so'
    path = write_run(
        tmp_path / "train.yml",
        model,
        data,
        datasets=[{"path": str(data), "type": "chat_template"}],
        default_system_message=default,
    )
    config = load_config([str(path)])
    samples = prepare_data(config, tokenizer_of(config), 1).samples
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    with_default = [{"role": "system", "content": default}, *chats[0]]
    for sample, chat in zip(samples, (with_default, chats[1]), strict=True):
        assert list(sample.tokens) == theirs.apply_chat_template(chat)["input_ids"]


def test_special_tokens_take_the_place_of_the_model_s_own(tmp_path):
    """The end of an answer is the token that the run names, and it is saved with the adapter."""
    model, rows = save_tiny_model(tmp_path / "model"), alpaca_rows(4)
    data = write_rows(tmp_path / "data.jsonl", rows)
    keys = {"special_tokens": {"eos_token": "<|im_start|>", "pad": "<|endoftext|>"}, "eot_tokens": ["<|im_end|>"]}
    path = write_run(tmp_path / "train.yml", model, data, max_steps=1, **keys)
    config = load_config([str(path)])
    (sample, *_) = prepare_data(config, tokenizer_of(config), 1).samples
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    assert sample.tokens[-1] == theirs.convert_tokens_to_ids("<|im_start|>") and sample.supervised[-1]
    assert run_here(train.main, path).code == 0
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (saved.eos_token, saved.pad_token, saved.bos_token) == ("<|im_start|>", "<|endoftext|>", "<|endoftext|>")
    ids = load_tokenizer(tmp_path / "out").encode("a<|im_end|>")
    assert theirs.convert_tokens_to_ids("<|im_end|>") not in ids


@pytest.mark.parametrize("key", ["special_tokens", "eot_tokens", "tokens"])
def test_token_that_the_vocabulary_has_not(tmp_path, key):
    model, data = save_tiny_model(tmp_path / "model"), write_rows(tmp_path / "data.jsonl", alpaca_rows(4))
    value = {"special_tokens": {"pad_token": "<pad>"}, "eot_tokens": ["<pad>"], "tokens": ["<pad>"]}[key]
    ended = run_here(train.main, write_run(tmp_path / "train.yml", model, data, **{key: value}))
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert all(word in ended.err for word in (key, "'<pad>'", "not in the vocabulary", "<|im_end|>"))
