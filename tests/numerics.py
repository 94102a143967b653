"""How far is every layer from exact, and how far may it be?

    python -m tests.numerics [--json FILE]

Runs `tests/ops/test_numerics.py` and prints for each layer and tensor the largest error that was found and the largest
bound that its roundings allow, both as a share of the tensor's root mean square.
"""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest

LAYERS = {"test_norm": "norm", "test_rope": "RoPE", "test_mlp": "MLP", "test_attention": "attention"}
LAYERS |= {"test_linear_with_its_update": "linear with LoRA", "test_head_with_loss": "head and loss"}


def measure() -> dict[str, dict[str, tuple[float, float]]]:
    """dtype -> "layer, tensor" -> (error, bound), the largest over all shapes."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["-q", "-p", "no:cacheprovider", str(Path(__file__).parent / "ops" / "test_numerics.py")])
    if code:
        raise SystemExit(output.getvalue())
    found: dict[str, dict[str, tuple[float, float]]] = {"float32": {}, "bfloat16": {}}
    for test, tensor, error, bound in sys.modules["near"].MEASURED:
        name, variant = re.findall(r"::(\w+)\[(.*)\]", test)[0]
        rows, key = found["bfloat16" if "bfloat16" in variant else "float32"], f"{LAYERS[name]}, {tensor}"
        before = rows.get(key, (0.0, 0.0))
        rows[key] = max(before[0], error), max(before[1], bound)
    return found


def main() -> None:
    found = measure()
    print(f"{'':24} {'float32: error':>14} {'bound':>9}  {'bfloat16: error':>15} {'bound':>9}")
    for key in found["float32"]:
        cells = [f"{error:9.1e} {bound:9.1e}" for error, bound in (found[dtype][key] for dtype in found)]
        print(f"{key:24}      {cells[0]}        {cells[1]}")
    if "--json" in sys.argv:
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
