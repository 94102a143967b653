"""What takes minutes, measured once: the results are in `tour/measured.json`, from which pictures are drawn.

    make demo && python -m tour.measure          all of it, after the demo's run; a quarter of an hour on two cores
    python -m tour.measure rounding              one part

Every part is a command of the project or a call of its functions, and says so.
"""

import json
import subprocess
import sys
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


def main() -> None:
    found = json.loads(MEASURED.read_text("utf-8")) if MEASURED.exists() else {}
    for name in sys.argv[1:] or PARTS:
        found[name] = PARTS[name]()
        MEASURED.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
