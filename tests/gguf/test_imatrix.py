"""Importance matrices against llama.cpp's own programs: what is measured, both file formats, and whole files of it."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from llama_tools import needs, run
from small_gguf import write_random
from tiny import tiny_config

from nanoqlora.config.errors import UserError
from nanoqlora.data.batches import Sample, collate
from nanoqlora.export.certificate import Texts
from nanoqlora.export.gguf_model import model_tensors
from nanoqlora.export.importance import measure
from nanoqlora.gguf.file_types import FILE_TYPES, tensor_type
from nanoqlora.gguf.imatrix import Imatrix, read_imatrix, write_imatrix
from nanoqlora.gguf.reader import read_gguf
from nanoqlora.weights.checkpoint import open_weights

CPU = torch.device("cpu")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 1}  # attn_v is as in Llama 3: 4 heads share it
MODELS = {
    "tied": SIZES | {"tie_word_embeddings": True},
    "odd": SIZES | {"hidden_size": 192, "num_key_value_heads": 2, "num_hidden_layers": 2},  # rows of no 256
}
CHUNK = 32


def random_imatrix(path: Path) -> Imatrix:
    """For all layers of a model."""
    g = np.random.default_rng(0)
    shapes = {name: info.shape for name, info in read_gguf(path).tensors.items()}
    names = [name for name, shape in shapes.items() if name.startswith("blk.") and len(shape) == 2]
    sums = {name: torch.from_numpy(np.exp(g.standard_normal(shapes[name][1])).astype(np.float32)) for name in names}
    return Imatrix(sums, dict.fromkeys(names, 96), ["some text"], 3, CHUNK)


@needs("llama-quantize")
@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_files_are_those_of_llama_quantize(model: str, has_importance: bool, tmp_path: Path):
    """Of every file type: types and bytes of all tensors."""
    source, theirs, file = tmp_path / "model.gguf", tmp_path / "theirs.gguf", tmp_path / "imatrix.gguf"
    config = write_random(source, **MODELS[model])
    imatrix = random_imatrix(source) if has_importance else None
    if imatrix:
        write_imatrix(file, imatrix)
        imatrix = read_imatrix(file)
    for file_type in FILE_TYPES:
        run("llama-quantize", *(["--imatrix", file] if imatrix else []), source, theirs, file_type, 1)
        expected = read_gguf(theirs)
        tensors = model_tensors(open_weights(source), config, file_type, source, imatrix)
        assert {tensor.name for tensor in tensors} == expected.tensors.keys()
        for tensor in tensors:
            assert tensor.ggml_type == expected.tensors[tensor.name].ggml_type, (file_type, tensor.name)
            raw = tensor.produce()
            assert torch.equal(raw.flatten(), expected.raw(tensor.name).flatten()), (file_type, tensor.name)


@needs("llama-quantize")
@pytest.mark.parametrize("has_importance", [False, True])
@pytest.mark.parametrize("blocks, heads, kv_heads", [(80, 8, 1), (80, 8, 8), (32, 4, 1), (33, 4, 2), (17, 4, 4)])
def test_mixes_are_those_of_llama_quantize(
    blocks: int, heads: int, kv_heads: int, has_importance: bool, tmp_path: Path
):
    """Of deep models: the type of every tensor, as it is wanted and, as these rows are short, in its place."""
    source, file = tmp_path / "model.gguf", tmp_path / "imatrix.gguf"
    sizes = {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    is_tied = blocks % 2 == 1
    write_random(source, hidden_size=64, intermediate_size=64, tie_word_embeddings=is_tied, **sizes)
    write_imatrix(file, random_imatrix(source))
    for file_type in FILE_TYPES:
        option = ["--imatrix", file] if has_importance else []
        printed = run("llama-quantize", *option, "--dry-run", source, file_type)
        model = file_type, tiny_config(tie_word_embeddings=is_tied, **sizes), has_importance
        found = re.findall(r"\] +(\S+) +- .* MiB -> .*\((\w+)\)$", printed, re.M)
        assert len(found) >= 7 * blocks + (1 if is_tied else 2) or file_type == "F32"
        for name, ggml_type in found:
            assert tensor_type(name, (64, 64), *model) == ggml_type.upper(), (file_type, name)
        for name, ggml_type in re.findall(r"warning: (\S+) .*required for type +(\w+)\)", printed):
            assert tensor_type(name, (64, 256), *model) == ggml_type.upper(), (file_type, name)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and what llama-imatrix measured on it, in both formats."""
    folder = tmp_path_factory.mktemp("measured")
    write_random(folder / "model.gguf", **MODELS["odd"])
    (folder / "text").write_text("".join(f"line {i * i} of some text; " for i in range(20)))
    common = ["-c", CHUNK, "-b", CHUNK, "--no-ppl", "-ngl", 0, "-t", 1, "-fa", "off", "-ctk", "f32", "-ctv", "f32"]
    for name, form in (("imatrix.gguf", "gguf"), ("imatrix.dat", "dat")):
        out = ["-o", folder / name, "--output-format", form]
        run("llama-imatrix", "-m", folder / "model.gguf", "-f", folder / "text", *out, *common)
    return folder


@needs("llama-imatrix")
def test_both_formats_are_those_of_llama_imatrix(measured: Path, tmp_path: Path):
    imatrix, older = read_imatrix(measured / "imatrix.gguf"), read_imatrix(measured / "imatrix.dat")
    assert imatrix.chunk_size == CHUNK and imatrix.datasets == older.datasets == [str(measured / "text")]
    assert imatrix.sums.keys() == older.sums.keys() and len(imatrix.sums) == 2 * 7
    assert imatrix.chunks == older.chunks > 5
    for name in imatrix.sums:
        torch.testing.assert_close(imatrix.sums[name] / imatrix.counts[name], older.sums[name] / older.counts[name])
    for file, is_older in (("imatrix.gguf", False), ("imatrix.dat", True)):
        write_imatrix(tmp_path / file, imatrix, is_older)
        assert (tmp_path / file).read_bytes() == (measured / file).read_bytes()


@needs("llama-imatrix")
def test_what_we_measure_is_what_llama_imatrix_measures(measured: Path):
    expected = read_imatrix(measured / "imatrix.gguf")
    text = (measured / "text").read_text().replace(" ", "\u2581").encode()  # sentencepiece's space
    ids = [1, *(byte + 3 for byte in text)]  # as add_bos says; then every chunk begins with it
    chunks = [[1, *ids[i + 1 : i + CHUNK]] for i in range(0, expected.chunks * CHUNK, CHUNK)]
    texts = Texts([collate([[Sample(chunk, [True] * CHUNK)]]) for chunk in chunks])
    found = measure(open_weights(measured / "model.gguf"), texts, CPU, str(measured / "text"))
    assert (
        len(ids) >= expected.chunks * CHUNK
        and found.counts == expected.counts
        and found.sums.keys() == expected.sums.keys()
    )
    for name, sums in expected.sums.items():
        torch.testing.assert_close(found.sums[name], sums, rtol=3e-5, atol=0)


def test_what_is_written_is_read(tmp_path: Path):
    write_random(tmp_path / "model.gguf", **MODELS["odd"])
    imatrix = random_imatrix(tmp_path / "model.gguf")
    for older in (False, True):
        write_imatrix(tmp_path / "file", imatrix, older)
        found = read_imatrix(tmp_path / "file")
        assert found.sums.keys() == imatrix.sums.keys() and found.chunks == 3 and found.datasets == ["some text"]
        for name, sums in imatrix.sums.items():
            torch.testing.assert_close(found.sums[name] / found.counts[name], sums / 96)


def test_the_gguf_package_reads_it(tmp_path: Path):
    gguf = pytest.importorskip("gguf")
    write_random(tmp_path / "model.gguf", **MODELS["odd"])
    imatrix = random_imatrix(tmp_path / "model.gguf")
    write_imatrix(tmp_path / "file", imatrix)
    reader = gguf.GGUFReader(tmp_path / "file")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["some text"]
    assert [reader.fields[f"imatrix.chunk_{what}"].contents() for what in ("count", "size")] == [3, CHUNK]
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(found) == 2 * len(imatrix.sums)
    for name, sums in imatrix.sums.items():
        assert np.array_equal(found[f"{name}.in_sum2"].flatten(), sums.numpy()) and found[f"{name}.counts"].item() == 96


def broken(imatrix: Imatrix, **changes: object) -> Imatrix:
    name = min(imatrix.sums)
    return imatrix._replace(**{key: getattr(imatrix, key) | {name: value} for key, value in changes.items()})


@pytest.mark.parametrize("older", [False, True])
def test_damaged_files_are_refused(older: bool, tmp_path: Path):
    write_random(tmp_path / "model.gguf", **MODELS["odd"])
    imatrix, path = random_imatrix(tmp_path / "model.gguf"), tmp_path / "imatrix"
    for value in (float("nan"), float("inf"), -1.0):
        write_imatrix(path, broken(imatrix, sums=torch.full((192,), value)), older)
        with pytest.raises(UserError, match=r"imatrix: blk.0.attn_k.weight has numbers that are no mean squares"):
            read_imatrix(path)
    write_imatrix(path, imatrix, older)
    data = path.read_bytes()
    for length in (0, 3, 4, 5, 40, 300, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="imatrix: "):
            read_imatrix(path)
    g = np.random.default_rng(0)
    for _ in range(300):  # bytes changed anywhere, most of them in what describes the numbers
        changed = bytearray(data)
        for place in g.integers(0, len(data) if g.random() < 0.3 else 400, g.integers(1, 4)):
            changed[place] = g.integers(256)
        path.write_bytes(changed)
        try:
            found = read_imatrix(path)
            write_imatrix(tmp_path / "again", found)
            assert found.note(path)
        except UserError as error:
            assert str(path) in str(error)
    path.write_bytes(data)
    shapes = {"model.layers.0.self_attn.q_proj.weight": (8, 96)}
    with pytest.raises(
        UserError, match=r"imatrix: is of another model: blk.0.attn_q.weight has 192 numbers, and the layer 96"
    ):
        read_imatrix(path).of_model(shapes)
    with pytest.raises(UserError, match="names no layer of this model"):
        read_imatrix(path).of_model({"model.norm.weight": (192,)})
    with pytest.raises(UserError, match="cannot be read"):
        read_imatrix(tmp_path / "none")
