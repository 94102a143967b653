"""`train.py --rehearse`: all that a run does after its first step, once, before it, so that nothing fails at its end.

    longest micro-batch, optimizer, a row of evaluation    done by run/forecast.py before we come here
    answer, save, resume                                   as the run will; what is read back must be what was saved
    merge.py, export_gguf.py                               the commands themselves, on a model of one block of the base

Everything goes into a folder beside output_dir, which is removed again; nothing that was there is touched.
"""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..config.errors import Failed, UserError
from ..config.files import temporary_folder, write_text
from ..config.scripts import PROGRAMS
from ..parallel import collectives
from ..tokenizer.tokenizer import Tokenizer, save_tokenizer
from ..weights.checkpoint import open_weights, write_shards
from .checkpoints import load_checkpoint, save_checkpoint
from .figure import plot_metrics
from .inputs import Data
from .log import Metrics, Say
from .optimizer_state import as_tensors
from .results import sample_answers, save_trained
from .state import Run


def rehearse(run: Run, data: Data, tokenizer: Tokenizer, say: Say) -> None:
    """Go through the end of the run. Raises what the run would have ended with."""
    started, beside = time.perf_counter(), Path(f"{Path(run.config.output_dir)}.rehearsal")

    def done(what: str) -> None:
        say(f"rehearsed after {time.perf_counter() - started:4.0f} s: {what}")

    done("the longest micro-batch, the optimizer's step" + (", an evaluation" if run.held_out else ""))
    with temporary_folder(beside) if run.rank == 0 else nullcontext(beside) as made:
        folder = collectives.gather_objects(made)[0]
        run.model.eval()
        sample_answers(run, tokenizer, data.prompt_format, count=1)
        run.model.train()
        done("an answer")
        save_and_resume(run, folder)
        done("a checkpoint, and going on from it")
        if run.rank == 0:
            save_trained(run, data, tokenizer, folder / "adapter")
            plot_metrics(run.metrics.rows, folder / "Fine-Tuning.png")
            keep_first_block(run, tokenizer, folder)
            command("merge.py", folder / "base", folder / "merged", "--adapter", folder / "adapter", "--max_tokens", 0)
            done("merge.py with one block")
            command("export_gguf.py", folder / "merged", folder / "model.gguf", "--type", "q8_0")
            done(f"export_gguf.py with one block, and its {(folder / 'Modelfile').name}")
        collectives.barrier()  # before rank 0 removes the folder
    say(f"rehearsed to the end in {time.perf_counter() - started:.0f} s; nothing is left of it")


def save_and_resume(run: Run, folder: Path) -> None:
    """Write a checkpoint and resume from it: the same values and the same optimizer state, to the bit."""
    paths = {"output_dir": str(folder), "resume_from_checkpoint": str(folder / "checkpoint-1")}
    config = run.config.model_copy(update=paths)
    mine = replace(run, config=config, metrics=Metrics(folder / "metrics.jsonl", writes=run.rank == 0))
    run.optimizer.step()  # with a rate of 0, as run/forecast.py left it: only to have a state
    values, state = run.flat.detach().clone(), as_tensors(run.optimizer.state_dict())
    before = {name: x.clone() for name, x in state.items()}
    save_checkpoint(mine, 1)
    run.flat.data.zero_()
    with collectives.together():
        load_checkpoint(mine)
    state = as_tensors(run.optimizer.state_dict())
    same = state.keys() == before.keys() and all(torch.equal(x, before[name]) for name, x in state.items())
    if not (same and torch.equal(run.flat, values)):
        raise RuntimeError("the checkpoint that was just written is read back with other values")


def keep_first_block(run: Run, tokenizer: Tokenizer, folder: Path) -> None:
    """The base as a folder with its first block alone, and the adapter cut to that block."""
    weights, base = open_weights(run.config.base_model), folder / "base"
    base.mkdir()
    names = [name for name in weights.names() if ".layers." not in name or ".layers.0." in name]
    kinds = {name: ((w := weights.load(name)).shape, w.dtype) for name in names}
    write_shards(base, weights, kinds, int(5e9))
    write_text(base / "config.json", json.dumps(weights.config | {"num_hidden_layers": 1}))
    save_tokenizer(tokenizer, base, tokenizer.chat_template)
    file = folder / "adapter" / "adapter_model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if ".layers.0." in name}
    save_file(state, file, metadata={"format": "pt"})


def command(script: str, model: Path, out: Path, *words: object) -> None:
    """Run one of our commands in a process of its own. Its error becomes ours."""
    line = [sys.executable, PROGRAMS / script, "--model", model, "--out", out, *words]
    ended = subprocess.run([str(word) for word in line], capture_output=True, text=True)
    if ended.returncode and "Traceback" not in ended.stderr:
        kind = UserError if ended.returncode == 2 else Failed  # such as a full disk
        raise kind(f"{script} would end with: {ended.stderr.strip().removeprefix('error: ')}")
    if ended.returncode:
        raise RuntimeError(f"{script} would fail:\n{ended.stderr}")
