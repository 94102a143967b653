"""What the tests share: one thread, real tokenizers, the real small model, a small hub."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from paths import ROOT

if TYPE_CHECKING:  # xdist's main process reads this file too, and runs no test: torch would cost it seconds
    import torch

    from nanoqlora.tokenizer.tokenizer import Tokenizer

# Before torch is imported: xdist starts a worker for each core, and sums of one thread have the same bits here as in
# the processes that the tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct as GGUF, which `make setup` puts there."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.exists(), f"{path} is missing; make setup brings it"
    return path


def _witness(name: str) -> Path:
    """A folder with the real tokenizer.model of a family, which `make witnesses` puts there."""
    folder = ROOT / "models" / name
    assert (folder / "tokenizer.model").exists(), f"{folder / 'tokenizer.model'} is missing; make witnesses brings it"
    return folder


@pytest.fixture(scope="session")
def llama3_ranks_folder() -> Path:
    """Llama-3's list of tokens, as Meta publishes it."""
    return _witness("llama-3")


@pytest.fixture(scope="session")
def mistral_folder() -> Path:
    """The sentencepiece model of Mistral 7B."""
    return _witness("mistral")


@pytest.fixture(scope="session")
def tok(smollm2_path: Path) -> "Tokenizer":
    from nanoqlora.tokenizer.tokenizer import load_tokenizer

    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def llama3(tok: "Tokenizer") -> "Tokenizer":
    """The same vocabulary with the names, the BOS and the template of Llama-3."""
    from nanoqlora.data.prompts import CHAT_TEMPLATES

    names = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    vocab = [*names, *tok.vocab[len(names) :]]
    return replace(tok, vocab=vocab, bos_id=1, eos_id=0, add_bos=True, chat_template=CHAT_TEMPLATES["llama3"])


@pytest.fixture(scope="session")
def hf(tok: "Tokenizer", tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    from nanoqlora.tokenizer.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(tok, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama3_hf(llama3: "Tokenizer", tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    from nanoqlora.tokenizer.tokenizer import save_tokenizer

    folder = tmp_path_factory.mktemp("llama3")
    save_tokenizer(llama3, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from small_runs import save_tiny_model

    folder = save_tiny_model(tmp_path_factory.mktemp("hub") / "model")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    not_needed = ("consolidated.safetensors", "original/consolidated.00.pth", "pytorch_model.bin", "README.md")
    return files | {name: b"must not be fetched" * 1000 for name in not_needed}


@pytest.fixture
def hub(tmp_path, monkeypatch, model_files):
    """A hub with a model and a data set, and an empty cache. The client's settings are read when it is imported."""
    import huggingface_hub
    from fake_hub import FakeHub
    from huggingface_hub import constants

    hub = FakeHub()
    hub.files["someone/tiny-llama"] = model_files
    hub.files["datasets/someone/rows"] = {"data/train.jsonl": b"{}\n" * 9, "data/test.jsonl": b"{}\n", "README.md": b""}
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def rng() -> "torch.Generator":
    import torch

    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; on other machines they are counted as skipped."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
