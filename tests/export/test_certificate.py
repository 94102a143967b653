"""merge.json: its figures against transformers and the gguf package in float64, its advice, and what it stops."""

import json
import math
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers
from peft_witness import dequantised_transformers, encoded_by_tokenizers, peft_on_dequantised
from small_runs import alpaca_rows, merged, run_here, snapshot, write_rows, write_run

import merge
from nanoqlora.config.load import load_config
from nanoqlora.export import merge as merge_module
from nanoqlora.export.certificate import GGUF, ON_NF4, ON_ORIGINAL, TRAINED, Score, recommend
from nanoqlora.export.forms import Merged
from nanoqlora.qlora import QLoRALinear
from nanoqlora.run.inputs import prepare_data
from nanoqlora.tokenizer.tokenizer import load_tokenizer


def distributions(model: torch.nn.Module, run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """log-probabilities (N, V), float64, at the supervised tokens of the held-out rows, and those tokens."""
    found, targets = [], []
    for line in (run / "held.jsonl").read_text().splitlines():
        row = encoded_by_tokenizers(run / "model", json.loads(line))
        with torch.no_grad():
            logits = model.double()(torch.tensor([row.ids])).logits[0]
        places = torch.tensor(row.counted)
        found.append(torch.log_softmax(logits, -1)[places - 1])
        targets.append(torch.tensor(row.ids)[places])
    return torch.cat(found), torch.cat(targets)


def test_figures_are_those_of_transformers(run, tmp_path):
    """Every form built anew by others: PEFT, a plain sum, numpy's quantizer of the gguf package; 1e-5 of float32."""
    package = pytest.importorskip("gguf")
    ended = merged(run, tmp_path / "out", "--dtype", "bf16", "--types", "q8_0, Q4_0", "--max_tokens", "100000")
    assert ended.code == 0, ended.err
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    found = {form.pop("form"): form for form in written["forms"]}

    load = transformers.LlamaForCausalLM.from_pretrained
    trained, targets = distributions(peft_on_dequantised(run / "model", run / "out"), run)
    whole = peft_on_dequantised(run / "model", run / "out").merge_and_unload()
    original = load(run / "model", dtype=torch.float32)
    original = merge_in_peft(original, run / "out")
    expected = {
        TRAINED: whole,
        "base without adapter": dequantised_transformers(run / "model"),
        ON_NF4: in_bfloat16(peft_on_dequantised(run / "model", run / "out").merge_and_unload()),
        ON_ORIGINAL: in_bfloat16(original),
        GGUF + "q8_0": load(tmp_path / "out", dtype=torch.float32),
        GGUF + "q4_0": load(tmp_path / "out", dtype=torch.float32),
    }
    for name in ("Q8_0", "Q4_0"):
        kind = package.GGMLQuantizationType[name]
        for key, parameter in expected[GGUF + name.lower()].named_parameters():
            if parameter.ndim == 2:
                is_head = key == "lm_head.weight" and name == "Q4_0"
                used = package.GGMLQuantizationType.Q8_0 if is_head else kind  # 64 is no multiple of 256: no Q6_K
                raw = package.quantize(parameter.data.numpy(), used)
                parameter.data = torch.from_numpy(package.dequantize(raw, used))
    assert found.keys() == expected.keys() and written["held_out"]["tokens"] == len(targets)
    for name, model in expected.items():
        log_q, _ = distributions(model, run)
        kl = (trained.exp() * (trained - log_q)).sum(-1).mean().item()
        assert found[name]["mean_kl"] == pytest.approx(kl, abs=1e-5, rel=1e-3), name
        equal = (trained.argmax(-1) == log_q.argmax(-1)).double().mean().item()
        assert found[name]["top1_agreement"] == pytest.approx(equal, abs=1.5 / len(targets)), name
        loss = -log_q.gather(1, targets[:, None]).mean().item()
        assert found[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4), name
    assert found[ON_ORIGINAL]["mean_kl"] > 100 * found[ON_NF4]["mean_kl"] > 0
    assert found[ON_NF4]["num_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert "recommended" in ended.out and written["recommendation"] in ended.out


def merge_in_peft(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def in_bfloat16(model: torch.nn.Module) -> torch.nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().double()
    return model


def test_too_far_from_the_trained_model_writes_nothing(run, tmp_path):
    before = snapshot(tmp_path)
    ended = merged(run, tmp_path / "out", "--base", "original", "--max_kl", "1e-4")
    assert ended.code == 2 and "merged on original" in ended.err and "--max_kl allows 0.0001" in ended.err, ended.err
    ended = merged(run, tmp_path / "out", "--types", "q4_0", "--max_kl", "1e-6")
    assert ended.code == 2 and "GGUF q4_0" in ended.err, ended.err
    assert snapshot(tmp_path) == before


def test_default_limit_holds_what_is_not_the_trained_model(run, tmp_path, monkeypatch):
    """As if the merge had taken weights that training never saw."""
    good = Merged.as_training_saw
    monkeypatch.setattr(merge_module, "MAX_KL", 1e-4)
    monkeypatch.setattr(
        Merged,
        "as_training_saw",
        lambda self, name, w: QLoRALinear(w) if self.dtype == torch.bfloat16 else good(self, name, w),
    )
    ended = merged(run, tmp_path / "out", "--dtype", "bf16")
    assert ended.code == 2 and "merged on nf4" in ended.err and not (tmp_path / "out").exists()


def test_verdict_is_the_last_line_and_the_exit_code(run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def verdict(*words: object) -> tuple[int, str]:
        ended = merged(run, out, *words)
        line = json.loads((out / "merge.json").read_text())["verdict"]
        assert ended.out.splitlines()[-1] == line and ended.out.count("verdict:") == 1 and not ended.err
        return ended.code, line

    code, line = verdict()
    assert code == 0 and line.startswith(f"verdict: {out} is what was trained: ") and "held-out tokens" in line
    code, line = verdict("--base", "original")
    assert code == 0 and "which is not the model that was trained: " in line
    code, line = verdict("--max_tokens", 0)
    assert code == 0 and line.startswith("verdict: not proven: ")
    # A limit that the user has lifted does not make another model the trained one.
    good = Merged.as_training_saw
    other = lambda self, name, w: good(self, name, w * (-1 if self.dtype == torch.bfloat16 else 1))  # noqa: E731
    monkeypatch.setattr(Merged, "as_training_saw", other)
    code, line = verdict("--dtype", "bf16", "--max_kl", 100)
    assert code == 1 and line.startswith(f"verdict: NOT what was trained: {out}: ") and "Do not serve it" in line


def test_texts_that_are_not_there(run, tmp_path):
    """No YAML, or the run's own are missing: a line that names the reason. Named by the user: an error."""
    words = ("--model", run / "model", "--adapter", run / "out", "--out")
    ended = run_here(merge.main, *words, tmp_path / "a")
    assert ended.code == 0 and "Nothing is scored" in ended.out and "--data" in ended.out
    assert "forms" not in json.loads((tmp_path / "a" / "merge.json").read_text())
    absent = [{"path": str(tmp_path / "absent.jsonl"), "type": "alpaca"}]
    path = write_run(tmp_path / "run.yml", run / "model", run / "held.jsonl", test_datasets=absent)
    ended = run_here(merge.main, path, *words, tmp_path / "a")
    assert ended.code == 0 and "Nothing is scored" in ended.out and "absent.jsonl" in ended.out
    ended = run_here(merge.main, *words, tmp_path / "b", "--data", run / "held.jsonl")
    assert ended.code == 0 and ON_NF4 in ended.out
    ended = run_here(merge.main, *words, tmp_path / "c", "--data", tmp_path / "nothing.jsonl")
    assert ended.code == 2 and "nothing.jsonl" in ended.err and not (tmp_path / "c").exists()


def test_rows_that_the_run_set_aside_are_found_again(run, tmp_path, monkeypatch):
    """With val_set_size there is no file of them: they are the run's own choice out of its data."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(run / "out", tmp_path / "out")
    data = write_rows(tmp_path / "rows.jsonl", alpaca_rows(30, seed=4))
    path = write_run(tmp_path / "run.yml", run / "model", data, val_set_size=5)
    ended = run_here(merge.main, path)
    assert ended.code == 0, ended.err
    found = json.loads((folder / "merged" / "merge.json").read_text())["held_out"]
    config = load_config([str(path)])
    expected = prepare_data(config, load_tokenizer(run / "model"), 1).held_out
    assert found == {"data": "val_set_size 5", "tokens": int(expected.num_targets.sum())} and len(expected) == 5


def test_no_space_is_noticed_before(run, tmp_path, monkeypatch):
    before = snapshot(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "free")(100_000))
    ended = merged(run, tmp_path / "out")
    assert ended.code == 2 and " MB free" in ended.err and snapshot(tmp_path) == before


def test_another_base_than_the_adapter_names_is_noted(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "copy")
    words = ("--model", tmp_path / "copy", "--adapter", run / "out", "--out", tmp_path / "out", "--max_tokens", 0)
    ended = run_here(merge.main, *words)
    assert ended.code == 0 and "note:" in ended.out and str(run / "model") in ended.out


def score(form: str, kl: float, perplexity: float, size: int = 100) -> Score:
    return Score(form, kl, 1.0, perplexity, size)


def test_advice():
    better = recommend([score(ON_NF4, 0.0001, 10.0), score(ON_ORIGINAL, 0.03, 9.0)])
    assert better.startswith("--base original") and "10.0% lower" in better
    same = recommend([score(ON_NF4, 0.0001, 10.0), score(ON_ORIGINAL, 0.03, 9.95)])
    assert same.startswith("--base nf4") and "gain only 0.5%" in same
    assert "lose 5.0%" in recommend([score(ON_NF4, 0.0001, 10.0), score(ON_ORIGINAL, 0.03, 10.5)])
    files = [score("GGUF q8_0", 0.001, 10, 80), score("GGUF q5_k_m", 0.015, 10, 60), score("GGUF q4_0", 0.2, 12, 40)]
    assert recommend(files).startswith("GGUF q5_k_m")
    assert recommend(files, limit=0.01).startswith("GGUF q8_0")
    assert recommend(files[2:]).startswith("GGUF q4_0: none of these")
