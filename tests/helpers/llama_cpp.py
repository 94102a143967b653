"""llama.cpp as an outside witness: its C API, called through ctypes, for logits, tokens and quantized bytes.

The library sits inside the extension module of the `xllamacpp` package. The structs that the API passes by value are
opaque blocks of bytes here: the library fills in its defaults, and we change a few fields at known offsets, which are
checked against known default values when this file is imported. Chats are a matter of its server, which
nanoqlora/export/llama_cpp.py asks.
"""

import ctypes
import importlib.util
import struct
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint8, c_void_p
from pathlib import Path

import numpy as np


class Params(ctypes.Structure):
    """llama_model_params or llama_context_params; larger than either, of which the library reads the front."""

    _fields_ = [("bytes", c_uint8 * 512)]

    def get(self, offset: int) -> int:
        return struct.unpack_from("<i", self.bytes, offset)[0]

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("<i", self.bytes, offset, value)


class Batch(ctypes.Structure):
    """llama_batch: the tokens of one call, each with its position, its sequences, and whether its logits are wanted."""

    _fields_ = [
        ("num_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("num_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


# Offsets in llama_model_params and llama_context_params.
VOCAB_ONLY, USE_EXTRA_BUFFERS = 72, 74
N_CTX, N_BATCH, N_UBATCH, N_SEQ_MAX, N_THREADS, N_THREADS_BATCH = 0, 4, 8, 12, 28, 32
FLASH_ATTN, TYPE_K, TYPE_V = 52, 104, 108
F32, F16 = 0, 1  # ggml's type numbers, for the key/value cache

QUANT_TYPES = {  # ggml's type number, weights in a block, bytes of a block
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "BF16": (30, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22),
    "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34),
    "Q2_K": (10, 256, 84),
    "Q3_K": (11, 256, 110),
    "Q4_K": (12, 256, 144),
    "Q5_K": (13, 256, 176),
    "Q6_K": (14, 256, 210),
    "IQ4_NL": (20, 32, 18),
    "IQ4_XS": (23, 256, 136),
}


def _open_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None:
        raise ImportError("llama.cpp is reached through the package xllamacpp, which is not installed")
    (folder,) = spec.submodule_search_locations
    return ctypes.CDLL(str(next(Path(folder).glob("xllamacpp*.so"))))


lib = _open_library()
for _name, _result, _arguments in [
    ("llama_backend_init", None, []),
    ("llama_log_set", None, [c_void_p, c_void_p]),
    ("llama_model_default_params", Params, []),
    ("llama_context_default_params", Params, []),
    ("llama_model_load_from_file", c_void_p, [c_char_p, Params]),
    ("llama_model_free", None, [c_void_p]),
    ("llama_init_from_model", c_void_p, [c_void_p, Params]),
    ("llama_free", None, [c_void_p]),
    ("llama_model_get_vocab", c_void_p, [c_void_p]),
    ("llama_vocab_n_tokens", c_int32, [c_void_p]),
    ("llama_vocab_is_eog", c_bool, [c_void_p, c_int32]),
    ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    ("llama_token_to_piece", c_int32, [c_void_p, c_int32, c_char_p, c_int32, c_int32, c_bool]),
    ("llama_decode", c_int32, [c_void_p, Batch]),
    ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
    ("llama_get_memory", c_void_p, [c_void_p]),
    ("llama_memory_clear", None, [c_void_p, c_bool]),
    ("llama_model_meta_count", c_int32, [c_void_p]),
    ("llama_model_meta_key_by_index", c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    ("llama_model_meta_val_str_by_index", c_int32, [c_void_p, c_int32, c_char_p, c_size_t]),
    ("llama_adapter_lora_init", c_void_p, [c_void_p, c_char_p]),
    ("llama_set_adapters_lora", c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    (
        "ggml_quantize_chunk",
        c_size_t,
        [c_int, POINTER(c_float), c_void_p, c_int64, c_int64, c_int64, POINTER(c_float)],
    ),
]:
    _function = getattr(lib, _name)
    _function.restype, _function.argtypes = _result, _arguments

_log: list[str] = []  # what the library says: shown only when something fails


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _keep_log(level: int, text: bytes, user: int) -> None:
    _log.append(text.decode("utf-8", "replace"))
    del _log[:-40]


lib.llama_log_set(ctypes.cast(_keep_log, c_void_p), None)
lib.llama_backend_init()


def _check_offsets() -> None:
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    found = {
        "vocab_only": model.bytes[VOCAB_ONLY],
        "use_extra_bufts": model.bytes[USE_EXTRA_BUFFERS],
        "n_ctx": context.get(N_CTX),
        "n_batch": context.get(N_BATCH),
        "n_ubatch": context.get(N_UBATCH),
        "n_seq_max": context.get(N_SEQ_MAX),
        "flash_attn": context.get(FLASH_ATTN),
        "type_k": context.get(TYPE_K),
        "type_v": context.get(TYPE_V),
    }
    defaults = {
        "vocab_only": 0,
        "use_extra_bufts": 1,
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "n_seq_max": 1,
        "flash_attn": -1,
        "type_k": F16,
        "type_v": F16,
    }
    assert found == defaults, f"this xllamacpp lays out its structs in another way: {found} in place of {defaults}"


_check_offsets()


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on one thread of the CPU, in plain float32 attention.

    Args:
        vocab_only: only the tokenizer is loaded; logits are not available.
        n_ctx: space for so many tokens.
    """

    def __init__(self, path: str | Path, vocab_only: bool = False, n_ctx: int = 512):
        self.model = self.context = None
        params = lib.llama_model_default_params()
        params.bytes[VOCAB_ONLY] = vocab_only
        params.bytes[USE_EXTRA_BUFFERS] = False
        _log.clear()
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}: {''.join(_log)}")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocab_size = lib.llama_vocab_n_tokens(self.vocab)
        if vocab_only:
            return
        params = lib.llama_context_default_params()
        for offset, value in {
            N_CTX: n_ctx,
            N_BATCH: n_ctx,
            N_UBATCH: min(n_ctx, 512),
            N_THREADS: 1,
            N_THREADS_BATCH: 1,
            FLASH_ATTN: 0,
            TYPE_K: F32,  # half precision, the default, costs 0.05 in a logit
            TYPE_V: F32,
        }.items():
            params.set(offset, value)
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}: {''.join(_log)}")

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its context."""
        if self.context:
            lib.llama_free(self.context)
        if self.model:
            lib.llama_model_free(self.model)
        self.model = self.context = None

    def add_lora(self, path: str | Path) -> None:
        """Compute with the base model and this adapter from now on. It is freed with the model."""
        adapter = lib.llama_adapter_lora_init(self.model, str(path).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp does not load the adapter {path}: {''.join(_log)}")
        status = lib.llama_set_adapters_lora(self.context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
        assert status == 0, f"llama_set_adapters_lora fails with {status}"

    def meta(self) -> dict[str, str]:
        """The metadata of the file as llama.cpp shows it: everything as text, arrays left out."""
        key, entries = ctypes.create_string_buffer(512), {}
        for i in range(lib.llama_model_meta_count(self.model)):
            lib.llama_model_meta_key_by_index(self.model, i, key, len(key))
            size = lib.llama_model_meta_val_str_by_index(self.model, i, None, 0) + 1
            value = ctypes.create_string_buffer(size)
            lib.llama_model_meta_val_str_by_index(self.model, i, value, size)
            entries[key.value.decode()] = value.value.decode()
        return entries

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Text -> ids. `add_special`: BOS in front if the file says so; `parse_special`: <|x|> is a token, not text."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 16))()
        count = lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), add_special, parse_special)
        assert count >= 0, f"llama_tokenize wants space for {-count} tokens"
        return list(ids[:count])

    def piece(self, token: int, special: bool = True) -> bytes:
        """The bytes of one token."""
        buffer = ctypes.create_string_buffer(512)
        count = lib.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        assert count >= 0, f"llama_token_to_piece wants space for {-count} bytes"
        return buffer.raw[:count]

    def detokenize(self, ids: list[int], special: bool = True) -> str:
        """Ids -> text. `special` keeps control tokens as their text."""
        return b"".join(self.piece(token, special) for token in ids).decode("utf-8", "replace")

    def is_eog(self, token: int) -> bool:
        """Whether generation ends at this token."""
        return lib.llama_vocab_is_eog(self.vocab, token)

    def logits(self, ids: list[int]) -> np.ndarray:
        """(n, vocab) float32: the logits after each of the tokens."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        n, sequence = len(ids), (c_int32 * 1)(0)
        batch = Batch(
            num_tokens=n,
            token=(c_int32 * n)(*ids),
            embd=None,
            pos=(c_int32 * n)(*range(n)),
            num_seq_id=(c_int32 * n)(*[1] * n),
            seq_id=(POINTER(c_int32) * n)(*[ctypes.cast(sequence, POINTER(c_int32))] * n),
            logits=(c_int8 * n)(*[1] * n),
        )
        status = lib.llama_decode(self.context, batch)
        assert status == 0, f"llama_decode fails with {status}: {''.join(_log)}"
        rows = [lib.llama_get_logits_ith(self.context, i) for i in range(n)]
        return np.stack([np.ctypeslib.as_array(row, (self.vocab_size,)).copy() for row in rows])


def quantize_chunk(ggml_type: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of llama.cpp's own quantizer for float32 rows x (rows, n_in): (rows, row_bytes) uint8.

    Args:
        importance: (n_in,) float32, a row of an importance matrix.
    """
    type_id, block_size, block_bytes = QUANT_TYPES[ggml_type]
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows, n_in = x.shape
    out = np.empty((rows, n_in // block_size * block_bytes), dtype=np.uint8)
    data = x.ctypes.data_as(POINTER(c_float))
    weights = None if importance is None else importance.ctypes.data_as(POINTER(c_float))
    written = lib.ggml_quantize_chunk(type_id, data, out.ctypes.data, 0, rows, n_in, weights)
    assert written == out.nbytes, f"{written} bytes where {out.nbytes} were expected"
    return out
