"""Fold an adapter into its base: W + s B A, written as a Hugging Face folder that any tool loads.

    python merge.py [train.yml]
    python merge.py --model DIR --adapter DIR --out DIR [--base nf4 | original]

What is merged, and how the result is proven, is in nanoqlora/export/merge.py. From Python: `nanoqlora.merge`.
"""

from nanoqlora.config.load import answer_early, load_command
from nanoqlora.config.options import MergeOptions

if __name__ == "__main__":
    answer_early(MergeOptions)  # --help and wrong settings, before PyTorch is imported

from nanoqlora.config.commands import run_command
from nanoqlora.export.merge import write_merge


def main() -> None:
    config, options = load_command(MergeOptions)
    record = write_merge(options, config)
    if record["verdict"].startswith("verdict: NOT"):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
