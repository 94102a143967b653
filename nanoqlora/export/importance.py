"""Measure an importance matrix with our own model: the mean squares of each linear layer's inputs on texts.

    output = W x, with x from some thousand tokens of the texts that the model will be used on

Equal to llama-imatrix's on the same tokens, but for the rounding of sums. The head and the embedding are not measured,
as there. What the numbers are for: `gguf/imatrix.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..config.errors import UserError
from ..config.files import check_file, whole_file
from ..config.schema import Config
from ..gguf.imatrix import Imatrix, read_imatrix, write_imatrix
from ..gguf.names import gguf_name
from ..run.inputs import prepare_data
from ..weights.checkpoint import Tensors, open_weights
from .certificate import Texts, held_out_texts, hidden_states
from .proof import words_of

MEASURED = "imatrix.gguf"
NUM_TOKENS = 4096  # to measure on: with 16,384 a file of the demo is no nearer
CHUNK = 512  # tokens that are called a chunk in the file, llama-imatrix's default
SAME_INPUT = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]  # read the same
SAME_INPUT += [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]


def imatrix_file(given: str, model: str, out: Path, config: Config | None, data: str | None) -> Path:
    """The file of the importance matrix that `--imatrix` asks for, and a line about it.

    Args:
        given: a file, or "true": it is measured on the training texts of the run, or on `data`, and kept beside `out`.
    Raises:
        UserError: there are no texts, or the file is damaged.
    """
    path = Path(given)
    if given == "true":
        path = out.with_name(MEASURED)
        for file in (out, path):
            check_file(file, "--out")
        name, texts = texts_to_measure(model, config, data)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        imatrix = measure(open_weights(model), texts, device, name)
        with whole_file(path) as fresh:
            write_imatrix(fresh, imatrix)
        print(f"--imatrix {path}: measured on {next(iter(imatrix.counts.values()))} tokens of {name}")
    else:
        imatrix = read_imatrix(path)
        where = f" of {', '.join(imatrix.datasets)}" if imatrix.datasets else ""
        print(f"--imatrix {path}: {len(imatrix.sums)} layers, measured on {imatrix.chunks} chunks{where}")
    return path


def texts_to_measure(model: str, config: Config | None, data: str | None) -> tuple[str, Texts]:
    """The first training texts of the run, which are not those of the certificate, or what the user names."""
    tok, fmt = words_of(model, config)
    if config:
        name = ", ".join(dataset.path for dataset in config.datasets)
        return name, Texts.of(prepare_data(config, tok, 1).samples, NUM_TOKENS)
    if not data:
        raise UserError("--imatrix has no texts to measure on. Give the run's YAML file first, or a file with --data.")
    texts = held_out_texts(None, tok, fmt, data, NUM_TOKENS)
    assert texts
    return texts


def measure(weights: Tensors, texts: Texts, device: torch.device, name: str) -> Imatrix:
    """Run the model over the texts, all tokens of them, supervised or not.

    Args:
        name: of the texts, for the file.
    """
    sums = dict[str, Tensor]()

    def add(names: list[str], layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares = inputs[0].flatten(0, 1).double().square().sum(0)
        sums.update({name: sums[name] + squares if name in sums else squares for name in names})

    def watch(number: int, block: nn.Module) -> None:
        for same in SAME_INPUT:
            names = [gguf_name(f"model.layers.{number}.{layer}.weight") for layer in same]
            block.get_submodule(same[0]).register_forward_pre_hook(partial(add, names))

    hidden_states(weights, texts, device, watch)
    num_tokens = sum(row.tokens.numel() for row in texts.rows)  # each text has a row of its own: no padding
    found = {name: total.float().cpu() for name, total in sums.items()}
    return Imatrix(found, dict.fromkeys(sums, num_tokens), [name], max(num_tokens // CHUNK, 1), CHUNK)
