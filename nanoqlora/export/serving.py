"""Which form of a trained model to serve: one table of all files of a run, at the end of each `export_gguf.py --prove`.

Each proof keeps how far its file, or base and adapter as two files, is from the trained model and how fast llama.cpp
answers from it on this machine: in merge.json, or beside the file where no merge belongs to it. The table collects what
was measured on the same texts, as long as the file is still the one that was measured.
"""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from ..config.errors import UserError
from ..config.files import expect, read_json, sha256_of
from .answer_speed import speed_in_llama_cpp
from .certificate import BASE_AND_ADAPTER, GGUF, Score, recommend
from .llama_cpp import NotAsked, Refused

PROMPT_TOKENS, NEW_TOKENS = 64, 32  # of the conversation whose speed is measured
TWO_FILES = "base + "


class Proven(BaseModel):
    """What a proof keeps of a file, as far as the table needs it."""

    file_sha256: str
    held_out: str
    forms: Annotated[list[Score], Field(min_length=1)]  # of the trained model first
    wrong: list[str]
    imatrix: bool = False
    tokens_per_second: float | None = None


def tokens_per_second(file: Path, **settings: str) -> float | None:
    """How fast llama.cpp writes an answer, with its own defaults, as many threads as PyTorch has; None: not here."""
    try:
        return round(speed_in_llama_cpp(file, PROMPT_TOKENS, NEW_TOKENS, **settings)["decode"], 1)
    except (NotAsked, Refused):
        return None


def earlier_proofs(folder: Path) -> dict[str, Any]:
    """What is kept of the files in a folder, by their names: in the merge of the run, and beside each."""
    found = dict[str, Any]()
    for path in (folder / "merged" / "merge.json", *folder.glob("*.proof.json")):
        with suppress(UserError):  # missing or damaged
            record = read_json(path)
            alone = {path.name.replace(".proof.json", ".gguf"): record}
            found |= expect(path, record.get("gguf", alone), dict[str, Any])
    return found


def print_table(folder: Path, proofs: dict[str, Any], latest: dict[str, Any]) -> str:
    """Print what is known of the trained model, the merged one and all files, and give the advice below it.

    Args:
        folder: of the files.
        proofs: by the file's name, what its proof found; `latest`: of the one that was just made.
    """
    now = Proven.model_validate(latest)
    rows, files = dict[str, tuple[Score, float | None]](), []
    for name, facts in (earlier_proofs(folder) | proofs).items():
        with suppress(UserError, StopIteration):
            proven, file = expect(name, facts, Proven), folder / Path(name).name
            is_comparable = [proven.held_out, proven.forms[0]] == [now.held_out, now.forms[0]] and not proven.wrong
            if is_comparable and file.is_file() and sha256_of(file) == proven.file_sha256:
                rows |= {score.form: (score, None) for score in proven.forms if not score.form.startswith(GGUF)}
                score = next(score for score in proven.forms if score.form.startswith(GGUF))
                title = TWO_FILES * (score.form == BASE_AND_ADAPTER) + name + " --imatrix" * proven.imatrix
                files.append((score._replace(form=title), proven.tokens_per_second))
    print(f"which to serve, on held-out tokens of {now.held_out}; tokens/s of an answer in llama.cpp, here:")
    print(f"{'':32}  {'size':>10}  {'KL, nats':>9}  {'top-1':>7}  {'perplexity':>10}  {'tokens/s':>8}")
    for score, speed in [*rows.values(), *sorted(files, key=lambda row: -row[0].num_bytes)]:
        numbers = f"{score.mean_kl:9.5f}  {score.top1_agreement:7.2%}  {score.perplexity:10.3f}"
        print(f"{score.form:32}  {score.num_bytes / 1e6:7.1f} MB  {numbers}  {speed or '':>8}")
    advice = advise([score for score, _ in files])
    print(f"advice: {advice}", flush=True)
    return advice


def advise(scores: list[Score]) -> str:
    """Which file to serve; and where that is base and adapter, which for a program that takes one file only."""
    advice = recommend([score._replace(form=GGUF + score.form) for score in scores]).replace(GGUF, "")
    if advice.startswith(TWO_FILES):
        one = advise([score for score in scores if not score.form.startswith(TWO_FILES)])
        advice += f" llama-server takes the two. For Ollama, {one or 'merge it, and export that as q8_0.'}"
    return advice
