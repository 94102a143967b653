"""Which form of a trained model to serve: one table of all files of a run, at the end of each `export_gguf.py --prove`.

Each proof keeps in merge.json how far its file is from the trained model and how fast llama.cpp answers from it on this
machine. The table collects what was measured on the same texts, as long as the file is still the one that was measured.
"""

from pathlib import Path
from typing import Any

from ..config.files import sha256_of
from .answer_speed import speed_in_llama_cpp
from .certificate import GGUF, Score, recommend
from .llama_cpp import NotAsked, Refused

PROMPT_TOKENS, NEW_TOKENS = 64, 32  # of the conversation whose speed is measured


def tokens_per_second(file: Path) -> float | None:
    """How fast llama.cpp writes an answer, with its own defaults, as many threads as PyTorch has; None: not here."""
    try:
        return round(speed_in_llama_cpp(file, PROMPT_TOKENS, NEW_TOKENS)["decode"], 1)
    except (NotAsked, Refused):
        return None


def score_of(facts: dict[str, Any], name: str) -> Score | None:
    """What a proof found for a file of this name, as a line of the table; None: it was not scored."""
    found = next((form for form in facts.get("forms", ()) if form["form"] == f"{GGUF}{name}"[:26]), None)
    return Score(**found | {"form": name + " --imatrix" * bool(facts.get("imatrix"))}) if found else None


def print_table(folder: Path, proofs: dict[str, Any], latest: dict[str, Any]) -> str:
    """Print what is known of the trained model, the merged one and all files, and give the advice below it.

    Args:
        folder: of the files.
        proofs: by the file's name, what its proof found; `latest`: of the one that was just made.
    """
    texts = [latest["held_out"], latest["forms"][0]]
    rows = [(Score(**form), None) for form in latest["forms"] if not form["form"].startswith(GGUF)]
    files = []
    for name, facts in proofs.items():
        score, file = score_of(facts, name), folder / name
        is_comparable = score and [facts.get("held_out"), facts["forms"][0]] == texts and not facts.get("wrong")
        if score and is_comparable and file.exists() and sha256_of(file) == facts["file_sha256"]:
            files.append((score, facts.get("tokens_per_second")))
    print(f"which to serve, on held-out tokens of {latest['held_out']}; tokens/s of an answer in llama.cpp, here:")
    print(f"{'':32}  {'size':>10}  {'KL, nats':>9}  {'top-1':>7}  {'perplexity':>10}  {'tokens/s':>8}")
    for score, speed in [*rows, *sorted(files, key=lambda row: -row[0].num_bytes)]:
        numbers = f"{score.mean_kl:9.5f}  {score.top1_agreement:7.2%}  {score.perplexity:10.3f}"
        print(f"{score.form:32}  {score.num_bytes / 1e6:7.1f} MB  {numbers}  {speed or '':>8}")
    advice = recommend([score._replace(form=GGUF + score.form) for score, _ in files]).removeprefix(GGUF)
    print(f"advice: {advice}", flush=True)
    return advice
