"""How fast does what was trained answer on this machine, in each of its forms?

Prefill is how many tokens of a prompt are read a second, decode how many tokens of an answer are written a second; one
conversation at a time, greedy. The forms are those that a run's folder holds: the base, the adapter on the 4-bit base,
the merged model, and every .gguf file in llama.cpp, if the package xllamacpp is installed: on the CPU, with as many
threads as PyTorch has, as a process of its own.
"""

import time
from pathlib import Path
from typing import Any

import torch

from ..config.errors import UserError
from ..config.options import ModelOptions
from ..config.parser import read_yaml
from ..fast.decode import Decoder
from ..gguf.reader import read_gguf
from ..run.usable import load_for_use
from .llama_cpp import NotAsked, Refused, Server


def speed_of(decoder: Decoder, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Tokens a second of our own code; the best of two runs, after one that warms up."""
    model, prefill, decode = decoder.model, [], []
    ids = torch.randint(model.config.vocab_size, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    for count in (2, new_tokens + 1, new_tokens + 1):
        start = time.perf_counter()
        answer = decoder.generate([ids], set(), count)
        next(answer)  # the answer's first token comes out of the prompt
        first = time.perf_counter()
        made = sum(1 for _ in answer)
        prefill.append(prompt_tokens / (first - start))
        decode.append(made / (time.perf_counter() - first))
    return {"prefill": max(prefill[1:]), "decode": max(decode[1:])}


def speed_in_llama_cpp(file: Path, prompt_tokens: int, new_tokens: int, **settings: str) -> dict[str, float]:
    """The same from llama.cpp, by its own clock and with its own defaults; `settings` as of `llama_cpp.Server`.

    Raises:
        NotAsked, Refused: as `llama_cpp.Server`.
    """
    ids = torch.randint(len(read_gguf(file).metadata["tokenizer.ggml.tokens"]), (prompt_tokens,)).tolist()
    size, found = prompt_tokens + new_tokens + 1, []
    with Server(file, n_ctx=size, exact=False, threads=torch.get_num_threads(), **settings) as llama:
        for count in (2, new_tokens + 1, new_tokens + 1):
            found.append(llama.complete(ids, count, ignore_eos=True, cache_prompt=False)["timings"])
    names = {"prefill": "prompt_per_second", "decode": "predicted_per_second"}
    return {name: max(timings[theirs] for timings in found[1:]) for name, theirs in names.items()}


def bench_deploy(folder: Path, prompt_tokens: int, new_tokens: int) -> list[dict[str, Any]]:
    """Measure every form in a run's output folder and print the table.

    Raises:
        UserError: the folder is no run's, or a form in it cannot be used.
    """
    run = folder / "train.yml"
    if not run.exists():
        raise UserError(f"{folder}: has no train.yml, so it is no run's output folder. Give the output_dir of a run.")
    trained = read_yaml(str(run))
    base, in_4bit = str(trained.get("base_model")), trained.get("load_in_4bit", True) is True
    form = {"load_in_4bit": in_4bit, "keep_gguf_blocks": trained.get("keep_gguf_blocks") is True}
    options: dict[str, dict[str, Any]] = {"base": {"model": base}}
    options[f"adapter on {'4-bit ' * in_4bit}base"] = {"model": base, "adapter": str(folder)} | form
    if (folder / "merged").exists():
        options["merged"] = {"model": str(folder / "merged")}
    rows = []
    print(f"{prompt_tokens} tokens of prompt, {new_tokens} of answer, {torch.get_num_threads()} threads, tokens/s")
    print(f"{'':34}  {'prefill':>9}  {'decode':>9}")

    def add(name: str, speeds: dict[str, float]) -> None:
        rows.append({"form": name, **speeds})
        print(f"{name:34}  {speeds['prefill']:9.1f}  {speeds['decode']:9.1f}", flush=True)

    for name, given in options.items():
        used = load_for_use(ModelOptions.model_validate(given | {"bf16": trained.get("bf16", "auto")}))
        add(name, speed_of(used.decoder, prompt_tokens, new_tokens))
    for file in sorted(folder.glob("model-*.gguf")):
        try:
            add(f"{file.name} in llama.cpp", speed_in_llama_cpp(file, prompt_tokens, new_tokens))
        except NotAsked as error:
            print(f"{file.name} in llama.cpp: not asked, because {error}")
        except Refused as error:
            raise UserError(f"{file}: llama.cpp refuses it ({error}). Export it again.") from error
    return rows
