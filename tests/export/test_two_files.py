"""Base and adapter as two .gguf files: what llama.cpp computes of them is what was trained over the base's blocks."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kept_gguf import save_in_blocks
from llama_tools import needs
from llama_tools import run as run_tool
from small_runs import alpaca_rows, assert_refused, metrics_of, run_here, write_rows, write_run

import export_gguf
import merge
import nanoqlora as nq
import train
from nanoqlora.evaluate import main as evaluate
from nanoqlora.export import gguf_model
from nanoqlora.export.certificate import BASE_AND_ADAPTER
from nanoqlora.qlora import lora_layers
from nanoqlora.weights.adapter import Trained, save_adapter
from nanoqlora.weights.checkpoint import fingerprint, open_weights

TOKENS = torch.randint(300, (1, 120), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama_cpp() -> ModuleType:
    return pytest.importorskip("llama_cpp")


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean over the tokens, in nats, of logits."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@needs("llama-quantize")
@pytest.mark.parametrize("file_type", ["q4_k_m", "q5_k_m", "q6_k", "q8_0", "mixed"])
def test_logits_in_llama_cpp_are_those_of_training(file_type: str, tmp_path: Path, llama_cpp: ModuleType):
    """With activations in float32, for which llama.cpp itself dequantises the base to a file of float32; measured:
    1e-11. Of quantised blocks its CPU kernels round activations to 8 bits; measured: 0.005."""
    base, adapter = save_in_blocks(tmp_path / "base.gguf", file_type, 4), tmp_path / "out"
    model = nq.Llama.from_pretrained(base, keep_gguf_blocks=True)
    nq.inject_lora(model, 8, 16)
    g = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g) / 20
    save_adapter(model, adapter, str(base), Trained(False, torch.float32, fingerprint(open_weights(base))))
    ended = run_here(export_gguf.main, "--adapter", adapter, "--model", base)
    assert ended.code == 0, ended.err
    run_tool("llama-quantize", "--allow-requantize", base, tmp_path / "f32.gguf", "F32")
    trained, alone = model(TOKENS)[0].detach(), nq.Llama.from_pretrained(base)(TOKENS)[0]
    for file, bound in ((tmp_path / "f32.gguf", 1e-8), (base, 0.02)):
        with llama_cpp.LlamaCpp(file) as llama:
            llama.add_lora(adapter / "adapter-f32.gguf")
            found = kl(trained, torch.from_numpy(llama.logits(TOKENS[0].tolist())))
        assert found < bound, found
        assert kl(trained, alone) > 10 * bound, "the adapter changes much more"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a small run over a Q4_K_M file, which has been trained into `out`."""
    folder = tmp_path_factory.mktemp("run")
    base = save_in_blocks(folder / "base.gguf", "q4_k_m", 4)
    data, held = (write_rows(folder / f"{n}.jsonl", alpaca_rows(16, seed=n)) for n in (2, 3))
    keys = {
        "max_steps": 12,
        "eval_steps": 12,
        "keep_gguf_blocks": True,
        "test_datasets": [{"path": str(held), "type": "alpaca"}],
    }
    path = write_run(folder / "run.yml", base, data, **keys)
    assert run_here(train.main, path).code == 0
    return path


def proved(run: Path, adapter: Path, *words: object):
    return run_here(export_gguf.main, run, "--adapter", adapter, "--out", run.parent / "a.gguf", "--prove", *words)


def test_two_files_are_proven(run: Path, llama_cpp: ModuleType):
    ended = proved(run, run.parent / "out")
    assert ended.code == 0, ended.out + ended.err
    said = "verdict: a.gguf on base.gguf is what was trained: base and adapter, two files, 0 nats a token from"
    assert ended.out.splitlines()[-1].startswith(said)
    found = json.loads((run.parent / "a.proof.json").read_text())
    trained, both = found["forms"]
    assert both["form"] == BASE_AND_ADAPTER and both["mean_kl"] < 1e-8 and both["top1_agreement"] == 1
    assert both["num_bytes"] == sum((run.parent / name).stat().st_size for name in ("base.gguf", "a.gguf"))
    assert trained["perplexity"] == pytest.approx(both["perplexity"], rel=1e-6)
    assert found["llama_cpp"]["conversations"] == 1, "with training's own template, which the base's file has not"
    assert found["llama_cpp"]["kl_of_file"] < 0.02 and found["wrong"] == []


def test_evaluate_measures_what_the_run_did(run: Path):
    """Over the blocks, and over the same weights in 32 bits; over NF4 it is another model."""
    words = ("--model", run.parent / "base.gguf", "--adapter", run.parent / "out", "--data", run.parent / "3.jsonl")
    losses = {}
    for form in (["--keep_gguf_blocks", "true"], [], ["--load_in_4bit", "true"]):
        ended = run_here(evaluate, *words, *form)
        assert ended.code == 0, ended.err
        losses[" ".join(form)] = float(re.search(r"loss ([\d.]+)", ended.out)[1])
    kept, plain, nf4 = losses.values()
    final = [row["eval_loss"] for row in metrics_of(run.parent / "out") if "eval_loss" in row][-1]
    assert kept == plain == pytest.approx(final, abs=1e-4) and abs(nf4 - kept) > 1e-3


def test_what_was_trained_on_nf4_is_not_proven_so(run: Path):
    words = ("--keep_gguf_blocks", "false", "--output_dir", run.parent / "nf4")
    assert run_here(train.main, run, *words).code == 0
    ended = proved(run, run.parent / "nf4")
    assert ended.code == 0, ended.out + ended.err
    assert "a.gguf on base.gguf computes on weights that it was not trained on" in ended.out.splitlines()[-1]


def test_rows_in_the_wrong_order_are_found(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_model, "permute_rows", lambda w, num_heads: w)
    ended = proved(run, run.parent / "out", "--type", "f16")
    assert ended.code == 1
    said = r"NOT what was trained: .*/a\.gguf: the update of model\.layers\.0\.self_attn\.[qk]_proj is not that of"
    assert re.search(said, ended.out.splitlines()[-1])


@pytest.mark.parametrize("file_type", ["f16", "bf16"])
def test_smaller_types_are_rounded_once(run: Path, file_type: str):
    ended = proved(run, run.parent / "out", "--type", file_type, "--max_tokens", 0)
    assert ended.code == 0 and f"rounded once to {file_type}" in ended.out, ended.out


def test_texts_may_be_named_without_a_yaml_and_a_folder_is_no_base(run: Path, tmp_path: Path):
    words = ("--adapter", run.parent / "out", "--out", tmp_path / "a.gguf", "--prove", "--model")
    ended = run_here(export_gguf.main, *words, run.parent / "base.gguf", "--data", run.parent / "3.jsonl")
    assert ended.code == 0 and "held-out texts" not in ended.out.splitlines()[-1], ended.out + ended.err
    assert_refused(run_here(export_gguf.main, *words, run.parent / "floats"), "is no .gguf file", "--model")


def test_the_template_beside_it_is_never_the_user_s(run: Path, tmp_path: Path):
    """It is there where the base's file has another than training, and no user's file is written over."""
    words = (run, "--adapter", run.parent / "out", "--out", tmp_path / "a.gguf")
    ended = run_here(export_gguf.main, *words)
    template = tmp_path / "a.jinja"
    (line,) = [line for line in ended.out.splitlines() if line.startswith("Ollama from 0.34.1 on is said to refuse")]
    both = f"-m {run.parent / 'base.gguf'} --lora {tmp_path / 'a.gguf'}"
    assert line.endswith(f" llama-server {both} --jinja --chat-template-file {template}")
    assert template.read_text().startswith("{# Written by export_gguf.py") and "### Response:" in template.read_text()
    assert run_here(export_gguf.main, *words).code == 0
    template.write_text("mine")
    (tmp_path / "a.gguf").unlink()
    assert_refused(run_here(export_gguf.main, *words), "a.jinja: is not one that export_gguf.py wrote")
    assert template.read_text() == "mine" and not (tmp_path / "a.gguf").exists()


def test_the_certificate_of_a_merge_has_both_files(run: Path):
    ended = run_here(merge.main, run, "--types", "q8_0,q4_k_m")
    assert ended.code == 0, ended.err
    record = json.loads((run.parent / "out" / "merged" / "merge.json").read_text())
    assert record["base"] == "original" and record["verdict"].startswith("verdict: ")
    assert "is what was trained: 0 nats" in record["verdict"]
    scores = {score["form"]: score for score in record["forms"]}
    both, q8_0, q4_k_m = (scores[name] for name in (BASE_AND_ADAPTER, "GGUF q8_0", "GGUF q4_k_m"))
    assert both["mean_kl"] < 1e-8 < q8_0["mean_kl"] < q4_k_m["mean_kl"]
    assert both["num_bytes"] < q8_0["num_bytes"], "the base is Q4_K_M"
    assert "GGUF base + adapter: the smallest" in record["recommendation"]
    assert f"export_gguf.py --adapter {run.parent / 'out'} --model {run.parent / 'base.gguf'}" in ended.out


def test_both_files_are_in_the_table_of_the_run(run: Path, tmp_path: Path, llama_cpp: ModuleType):
    """With what was merged, whichever was exported last, as long as they are the files that were scored."""
    out = shutil.copytree(run.parent / "out", tmp_path / "out", ignore=shutil.ignore_patterns("merged"))
    assert run_here(merge.main, run, "--output_dir", out, "--max_tokens", 0).code == 0

    def export(*words: object) -> dict[str, list[str]]:
        ended = run_here(export_gguf.main, run, "--output_dir", out, "--prove", *words)
        assert ended.code == 0, ended.out + ended.err
        lines = ended.out.split("which to serve")[1].split("advice: ")
        assert lines[1].startswith("base + adapter-f32.gguf: ") and " For Ollama, " in lines[1]
        return {row[:32].strip(): row[32:].split() for row in lines[0].splitlines()[2:]}

    alone = export("--adapter", out)
    assert list(alone) == ["adapter on base", "base + adapter-f32.gguf"]
    assert export("--type", "q8_0").keys() == {*alone, "merged", "model-q8_0.gguf"}
    (tmp_path / "out" / "other.proof.json").write_text("{}")
    table = export("--adapter", out)
    assert table.keys() == {*alone, "merged", "model-q8_0.gguf"}
    size = sum(file.stat().st_size for file in (run.parent / "base.gguf", out / "adapter-f32.gguf"))
    megabytes, _, kl, top_1, perplexity, speed = table["base + adapter-f32.gguf"]
    assert (megabytes, kl, top_1) == (f"{size / 1e6:.1f}", "0.00000", "100.00%") and float(speed) > 0
    assert perplexity == table["adapter on base"][4], "exactly what was trained"
    assert float(table["model-q8_0.gguf"][2]) > 0

    with (out / "model-q8_0.gguf").open("ab") as file:
        file.write(b"\0")
    assert "model-q8_0.gguf" not in export("--adapter", out)


def test_on_another_base_nothing_is_advised(run: Path, tmp_path: Path):
    """What `--other_base` computes is no form of the trained model, so its distance from that is not known."""
    other = save_in_blocks(tmp_path / "other.gguf", "q8_0", 4)
    words = ("--other_base", "true", "--data", run.parent / "3.jsonl", "--out", tmp_path / "a.gguf", "--prove")
    ended = run_here(export_gguf.main, "--adapter", run.parent / "out", "--model", other, *words)
    assert ended.code == 0, ended.out + ended.err
    assert "which to serve" not in ended.out and "advice" not in ended.out
    assert "computes on weights that it was not trained on" in ended.out.splitlines()[-1]
