"""A run with its certificate's needs, for the tests of export."""

import shutil
from pathlib import Path

import pytest
from peft_witness import save_random_adapter, trained_in_float32
from small_runs import alpaca_rows, save_tiny_model, write_rows, write_run

from nanoqlora.data.prompts import PromptFormat


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float32 run: `run.yml`, base in `model`, adapter in `out`, held-out rows in `held.jsonl`."""
    folder = tmp_path_factory.mktemp("run")
    model = save_tiny_model(folder / "model")
    trained_in_float32(save_random_adapter(model, folder / "out"))
    held = write_rows(folder / "held.jsonl", alpaca_rows(8, seed=3))
    run = write_run(folder / "run.yml", model, held, test_datasets=[{"path": str(held), "type": "alpaca"}])
    shutil.copy(run, folder / "out" / "train.yml")
    (folder / "out" / "prompt.json").write_text(PromptFormat(type="alpaca").to_json())
    return folder
