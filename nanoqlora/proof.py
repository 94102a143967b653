"""Is what stands in a .gguf file the model that was trained? Asked of the file itself, just written.

Four questions, without llama.cpp, by our own reader:

    tensors     is each of them the merged weight, rounded once to the type of the table, bit by bit?
    words       do texts get the ids that they had in training, from the vocabulary in the file?
    prompts     do conversations, through the Jinja in the file, get the ids that they had in training?
    answers     how far are the distributions on held-out texts from those of the trained model? (certificate.py)

And where the package xllamacpp is installed, real llama.cpp is asked for words, prompts and answers as well. It runs as
a process of its own: a file that it cannot stand may end it, and nothing of ours.
"""

import importlib.util
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapter import adapter_hash, read_updates
from .certificate import Form, Texts, score_forms
from .checkpoint import GGUFWeights, Weights, open_weights
from .cli import UserError, read_json, write_text
from .config import Config
from .forms import Rounded, bytes_on_disk, trained_form
from .held_out import held_out_texts
from .ollama import PROBES
from .prompts import PromptFormat
from .tokenizer import Tokenizer, load_tokenizer

WORDS = [
    *(
        "",
        " ",
        "  \n\n\t ",
        "Hello world",
        "a  b   c",
        "line\r\nbreak\n\n\nend ",
        "it's they'll we'VE",
        "x = 12345 + 6.78e9;",
    ),
    *(
        "\u00fc\u00df\u0153 na\u00efve",
        "\u4f60\u597d\uff0c\u4e16\u754c",
        "\u0645\u0631\u062d\u0628\u0627",
        "\U0001f642\U0001f468\u200d\U0001f469",
    ),
    *(
        "def f(x):\n    return x\n",
        "<|im_start|>user</s>[INST]",
        "https://a.b/c?d=e&f",
        "\u00a0\u2003\u3000",
        "!?...---___",
    ),
]


def prove_file(
    out: Path,
    model: Path,
    config: Config | None,
    tok: Tokenizer,
    fmt: PromptFormat,
    file_type: str,
    data: str | None,
    max_tokens: int,
) -> None:
    """Compare the file with what was trained, print it, and write it into the certificate of the merged model.

    The trained model is base and adapter of `config`, the run that the user named, if merge.json has the hash of that
    adapter; else the folder is the truth. The paths in merge.json are not followed: the folder may come from anybody.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source, certificate = open_weights(model), model / "merge.json"
    record = read_json(certificate) if certificate.exists() else {}
    proof = prove(out, source, tok, fmt, file_type, device)
    merged = Form("merged", source, bytes_on_disk(model))
    trained, adapter = merged, Path(config.output_dir if config else model.parent)
    if config and record.get("adapter_sha256") == adapter_hash(adapter):
        _, updates = read_updates(adapter)
        trained = trained_form(open_weights(config.base_model), updates, adapter, device)
    else:
        print(f"compared with {model}, not with base and adapter: give the YAML file of their run first")
    texts = held_out_texts(config, tok, fmt, data, max_tokens)
    if texts:
        proof |= {"held_out": texts[0], "forms": score_file(out, trained, merged, texts[1], device)}
    proof["llama_cpp"] = ask_llama_cpp(out, tok, fmt, texts and texts[1])
    if certificate.exists():
        record.setdefault("gguf", {})[out.name] = proof
        write_text(certificate, json.dumps(record, indent=2) + "\n")
        print(f"{certificate}: has the proof of {out.name}")
    else:
        write_text(out.with_suffix(".proof.json"), json.dumps(proof, indent=2) + "\n")
        print(f"{out.with_suffix('.proof.json')}: the proof")


def prove(file: Path, source: Weights, tok: Tokenizer, fmt: PromptFormat, file_type: str, device) -> dict[str, Any]:
    """Tensors, words and prompts. Returns facts for the certificate.

    Args:
        source: the weights that were exported, with their tokenizer and prompt format as trained.
    Raises:
        UserError: the file is not what it should be, and where.
    """
    stored, rounded = GGUFWeights(file), Rounded(source, file_type, device)
    worst = 0.0
    for name in stored.names():
        w, ours = stored.load(name).to(device), source.load(name).to(device, torch.float32)
        if not torch.equal(w, rounded.load(name)):
            raise _wrong(file, f"tensor {name} is not the merged model's, rounded to {rounded.types[name]}")
        worst = max(worst, ((w - ours).norm() / ours.norm().clamp(min=1e-30)).item())
    print(f"tensors   {len(stored.names())} equal the merged weights, rounded once (at most {worst:.2%} off)")

    read = load_tokenizer(file)
    if read.pre != tok.pre:
        raise _wrong(file, f"its vocabulary splits text by the rule {read.pre!r}, in training it was {tok.pre!r}")
    words = with_spaces_of(tok, file)
    for text in WORDS:
        if read.encode(text) != words.encode(text):
            raise _wrong(file, f"its vocabulary gives {text!r} other token ids than in training")
    print(f"words     {len(WORDS)} hard texts have the ids of training")

    chats = renderable(tok, fmt)
    for chat in chats:
        if ids_in_file(file, read, chat) != fmt.encode_prompt(tok, chat):
            raise _wrong(file, f"its chat template gives {chat!r} other token ids than in training")
    print(f"prompts   {len(chats)} conversations have the ids of training")
    return {
        "type": file_type.lower(),
        "tensors": len(stored.names()),
        "largest_relative_error": worst,
        "texts": len(WORDS),
        "conversations": len(chats),
    }


def renderable(tok: Tokenizer, fmt: PromptFormat) -> list[list[dict[str, str]]]:
    """The conversations that this format takes: some allow no system message."""
    chats = []
    for chat in PROBES:
        try:
            if fmt.render(tok, chat):
                chats.append(chat)
        except UserError:
            continue
    return chats


def ids_in_file(file: Path, read: Tokenizer, chat: list[dict[str, str]]) -> list[int]:
    """A prompt as llama.cpp makes it: the file's Jinja, then its tokenizer, which may put a BOS in front: only one."""
    metadata = GGUFWeights(file).file.metadata
    fmt = PromptFormat(type="chat_template", chat_template=metadata["tokenizer.chat_template"])
    text = fmt.render(read, chat, add_generation_prompt=True)
    add_bos = metadata["tokenizer.ggml.add_bos_token"]
    if add_bos:
        text = text.removeprefix(read.vocab[read.bos_id])
    return read.encode(text, bos=add_bos, special=True)


def with_spaces_of(tok: Tokenizer, file: Path) -> Tokenizer:
    """The tokenizer with the file's rule of where spaces go, which is chosen so that prompts have the same ids."""
    read = load_tokenizer(file)
    return replace(tok, space_before=read.space_before, space_before_space=read.space_before_space)


def _wrong(file: Path, what: str) -> UserError:
    return UserError(
        f"{file}: {what}, so it would not answer as the trained model does. Do not serve it; export it again, and if "
        f"that does not help, report this line."
    )


def score_file(file: Path, trained: Form, merged: Form, texts: Texts, device: torch.device) -> list[dict[str, Any]]:
    """The held-out texts through the trained model, the merged folder and the file."""
    stored = Form(f"GGUF {file.name}"[:26], GGUFWeights(file), file.stat().st_size)
    return [vars(score) for score in score_forms([trained, merged, stored], texts, device)]


# ------------------------------------------------------------------------------------------------ real llama.cpp


def run_llama_cpp(file: Path, *words: object) -> subprocess.CompletedProcess:
    """llama_cpp.py as a process of its own, by its path: so it starts without the rest of this package, and PyTorch."""
    command = [sys.executable, "-P", Path(__file__).with_name("llama_cpp.py"), file, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def ask_llama_cpp(file: Path, tok: Tokenizer, fmt: PromptFormat, texts: Texts | None) -> dict[str, Any] | None:
    """The same questions to llama.cpp; None where it is not installed.

    Raises:
        UserError: it does not load the file, or its token ids are not those of training.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is not asked: the package xllamacpp is not installed")
        return None
    chats, rows = renderable(tok, fmt), []
    for row in texts.rows if texts else []:
        for _, start, end in row.segments.documents:
            ids = row.tokens.flatten()[start:end].tolist()
            places = [i - start for i in row.supervised.tolist() if start <= i < end]
            rows.append({"ids": ids, "places": places})
    with tempfile.TemporaryDirectory() as folder:
        question = Path(folder) / "question.json"
        question.write_text(json.dumps({"texts": WORDS, "chats": chats, "rows": [row["ids"] for row in rows]}))
        done = run_llama_cpp(file, "--questions", question)
        if done.returncode:
            raise _wrong(file, f"llama.cpp cannot use it ({' '.join(done.stderr.split())[-300:]})")
        answer = json.loads((Path(folder) / "answer.json").read_text())
        losses = np.concatenate(
            [np.asarray(values)[row["places"]] for values, row in zip(answer["losses"], rows, strict=True)] or [[]]
        )
    words = with_spaces_of(tok, file)
    for text, ids in zip(WORDS, answer["texts"], strict=True):
        if ids != words.encode(text):
            raise _wrong(file, f"llama.cpp gives {text!r} other token ids than in training")
    for chat, ids in zip(chats, answer["chats"], strict=True):
        if ids != fmt.encode_prompt(tok, chat):
            raise _wrong(file, f"llama.cpp gives {chat!r} other token ids than in training")
    found: dict[str, Any] = {"texts": len(WORDS), "conversations": len(chats)}
    line = f"llama.cpp  loads it; {len(WORDS)} texts and {len(chats)} conversations have the ids of training"
    if len(losses):
        found |= {"tokens": len(losses), "perplexity": math.exp(losses.mean())}
        line += f"; perplexity {found['perplexity']:.3f} on {len(losses)} held-out tokens"
    print(line)
    return found
