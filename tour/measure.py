"""What takes minutes, measured once: the results are in `tour/measured.json`, from which pictures are drawn.

    make demo && python -m tour.measure          all of it, after the demo's run; a quarter of an hour on two cores
    python -m tour.measure rounding              one part

Every part is a command of the project or a call of its functions, and says so.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "tour" / "measured.json"
RUN = ROOT / "outputs" / "pirate"
PARTS: dict[str, Callable[[], Any]] = {}


def measured(part: str) -> Any:
    return json.loads(MEASURED.read_text("utf-8"))[part]


def part(function: Callable[[], Any]) -> Callable[[], Any]:
    PARTS[function.__name__] = function
    return function


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


@part
def rounding() -> Any:
    """The table of `python -m tests.numerics`."""
    from tests.numerics import measure

    return {
        dtype: {key: [float(f"{x:.2e}") for x in pair] for key, pair in rows.items()}
        for dtype, rows in measure().items()
    }


@part
def merge() -> Any:
    """The certificate of `merge.py` for the demo's run, with several GGUF types."""
    command("merge.py", "train.yml", "--types", "q8_0,q6_k,q5_k_m,q4_k_m,q3_k_m,q2_k")
    record = json.loads((RUN / "merged" / "merge.json").read_text("utf-8"))
    names = ("form", "mean_kl", "top1_agreement", "perplexity", "num_bytes")
    return {
        "tokens": record["held_out"]["tokens"],
        "forms": [{name: form[name] for name in names} for form in record["forms"]],
    }


QUESTIONS = 12  # of the held-out chats
PROMPTS = {  # question -> what the model is given; None: as in training
    "as in training": None,
    "Question: ...  Answer:": "Question: {}\nAnswer:",
    "Llama-3's template": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant"
    "<|end_header_id|>\n\n",
    "the question alone": "{}\n",
}


@part
def prompts() -> Any:
    """The demo's trained model under four prompts: how it answers, and what it thinks of the right answers."""
    import torch

    from nanoqlora.config.options import ModelOptions
    from nanoqlora.data.batches import Sample
    from nanoqlora.run.scoring import score_samples
    from nanoqlora.run.usable import load_for_use
    from tour.recompute import MODEL

    torch.manual_seed(0)
    options = ModelOptions(model=str(MODEL), adapter=str(RUN), load_in_4bit=True, bf16=False)
    used = load_for_use(options)
    tok, fmt = used.tokenizer, used.prompt_format
    assert fmt is not None and tok.eos_id is not None
    chats = [json.loads(line)["messages"] for line in (ROOT / "data" / "pirate-heldout.jsonl").read_text().splitlines()]
    chats = [chat for chat in chats if len(chat) == 2 and len(chat[1]["content"]) < 300][:QUESTIONS]
    found: dict[str, Any] = {}
    for name, text in PROMPTS.items():
        asked = [
            tok.encode(text.format(chat[0]["content"])) if text else fmt.encode_prompt(tok, chat[:1]) for chat in chats
        ]
        wanted = [tok.encode(chat[1]["content"]) for chat in chats]
        answers = [Sample([*a, *w], [False] * len(a) + [True] * len(w)) for a, w in zip(asked, wanted, strict=True)]
        ends = [
            Sample([*a, *w, tok.eos_id], [False] * (len(a) + len(w)) + [True])
            for a, w in zip(asked, wanted, strict=True)
        ]
        scores, at_end = score_samples(used.model, answers), score_samples(used.model, ends)
        steps = [*used.decoder.generate(asked, {tok.eos_id}, 150)]
        lengths = [sum(step[i] is not None for step in steps) for i in range(len(asked))]
        found[name] = {
            "loss": round(sum(nll for nll, _ in scores) / sum(n for _, n in scores), 4),
            "p_end": round(sum(math.exp(-nll) for nll, _ in at_end) / len(at_end), 4),
            "ended": sum(length < 150 for length in lengths),
            "lengths": lengths,
        }
        print(name, found[name], flush=True)
    steps = [*used.decoder.generate([fmt.encode_prompt(tok, chats[0][:1])], set(), 150)]
    found["without the end token"] = tok.decode([step[0] for step in steps if step[0] is not None])
    print(chats[0][0]["content"], found["without the end token"])
    return {"questions": len(chats), "question": chats[0][0]["content"]} | found


@part
def kill() -> Any:
    """Losses of a tiny model: never stopped; resumed at step 20; the same, but without the optimizer's state."""
    sys.path += [str(ROOT / "tests" / "helpers")]
    from safetensors.torch import load_file, save_file
    from small_runs import alpaca_rows, metrics_of, run_here, save_tiny_model, write_rows, write_run

    import train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = save_tiny_model(folder / "model"), write_rows(folder / "rows.jsonl", alpaca_rows(120))
        losses: dict[str, list[float]] = {}
        for how in ("never stopped", "resumed at step 20", "resumed without AdamW's state"):
            out = folder / how.replace(" ", "-")
            keys = {
                "output_dir": str(out),
                "max_steps": 40,
                "save_steps": 20,
                "learning_rate": 0.01,
                "warmup_ratio": 0.1,
            }
            keys |= {"lora_dropout": 0.1, "save_total_limit": 3}
            file = write_run(folder / "run.yml", model, data, **keys)
            if how == "never stopped":
                assert run_here(train.main, file).code == 0
            else:
                shutil.copytree(folder / "never-stopped" / "checkpoint-20", out / "checkpoint-20")
                if "without" in how:
                    state = out / "checkpoint-20" / "optimizer.safetensors"
                    save_file({key: x * 0 for key, x in load_file(state).items()}, state)
                assert run_here(train.main, file, "--resume_from_checkpoint", out / "checkpoint-20").code == 0
            losses[how] = [row["loss"] for row in metrics_of(out) if "loss" in row]
    return losses


def main() -> None:
    found = json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {}
    for name in sys.argv[1:] or PARTS:
        found[name] = PARTS[name]()
        MEASURED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
