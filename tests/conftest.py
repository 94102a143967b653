"""What the tests share: one thread count, the real small model, and tiny random ones."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paths import ROOT
from transformers import AutoTokenizer

from nanoqlora.data.prompts import CHAT_TEMPLATES
from nanoqlora.tokenizer.tokenizer import Tokenizer, load_tokenizer, save_tokenizer


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
def tok(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def llama3(tok: Tokenizer) -> Tokenizer:
    """The same vocabulary with the names, the BOS and the template of Llama-3."""
    names = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    vocab = [*names, *tok.vocab[len(names) :]]
    return replace(tok, vocab=vocab, bos_id=1, eos_id=0, add_bos=True, chat_template=CHAT_TEMPLATES["llama3"])


@pytest.fixture(scope="session")
def hf(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("smollm2")
    save_tokenizer(tok, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def llama3_hf(llama3: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("llama3")
    save_tokenizer(llama3, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """In this process as in those that the tests start, so that sums have the same order and bits are equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device; on other machines they are counted as skipped."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
