"""llama.cpp itself, through the C API that the wheel xllamacpp exports: logits, the bytes of its KV cache, and the
tensors that it computes on the way.

The structs are those of include/llama.h in one version of the wheel; another version is refused.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import statistics
import time
import weakref
from collections.abc import Iterable, Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from qat.evaluate.perplexity import Windows, WindowScore
from qat.quant.architecture import output_layer
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = "2026.10.11549"
"""The version of xllamacpp that was read."""

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20}
"""ggml's numbers of the types that a cache may have."""

_F16 = TYPES["f16"]
_FLASH_ATTENTION = 1


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p), ("buffer_types", c_void_p),
        *((name, c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        ("vocab_only", c_bool), *((f"bool_{number}", c_bool) for number in range(1, 6)),
    )  # fmt: skip


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_per_seq", c_uint32), ("n_threads", c_int32), ("n_threads_batch", c_int32),
        *((name, c_int32) for name in ("context_type", "rope_scaling", "pooling", "attention", "flash_attention")),
        *((f"float_{number}", c_float) for number in range(6)),
        ("yarn_orig_ctx", c_uint32), ("defrag", c_float), ("callback", c_void_p), ("callback_data", c_void_p),
        ("type_k", c_int32), ("type_v", c_int32), ("size", c_size_t), ("abort", c_void_p), ("abort_data", c_void_p),
        *((f"bool_{number}", c_bool) for number in range(6)),
        ("samplers", c_void_p), ("n_samplers", c_size_t), ("other", c_void_p),
    )  # fmt: skip


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("type", c_int32), ("buffer", c_void_p), ("ne", c_int64 * 4), ("nb", c_size_t * 4), ("op", c_int32),
        ("op_params", c_int32 * 16), ("flags", c_int32), ("src", c_void_p * 10), ("view_src", c_void_p),
        ("view_offs", c_size_t), ("data", c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


_SIZES = {_ModelParams: 80, _ContextParams: 168}
_Callback = ctypes.CFUNCTYPE(c_bool, POINTER(_Tensor), c_bool, c_void_p)
_Log = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)


@_Log
def _silent(level: int, text: bytes, data: Any) -> None:
    """Log nothing."""


@cache
def library() -> ctypes.CDLL:
    """Return the C library; raise UserError if it is not installed, or not the version that this file describes."""
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"llama.cpp is not installed here: pip install xllamacpp=={VERSION}.") from error
    if found != VERSION:
        raise UserError(
            f"xllamacpp {found} is installed, but version {VERSION} is required: pip install xllamacpp=={VERSION}."
        )
    from xllamacpp import xllamacpp

    library = ctypes.CDLL(xllamacpp.__file__)
    for name, result, arguments in (
        ("llama_model_default_params", _ModelParams, ()),
        ("llama_context_default_params", _ContextParams, ()),
        ("llama_model_load_from_file", c_void_p, (c_char_p, _ModelParams)),
        ("llama_init_from_model", c_void_p, (c_void_p, _ContextParams)),
        ("llama_model_free", None, (c_void_p,)),
        ("llama_free", None, (c_void_p,)),
        ("llama_model_get_vocab", c_void_p, (c_void_p,)),
        ("llama_vocab_n_tokens", c_int32, (c_void_p,)),
        ("llama_tokenize", c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
        ("llama_get_memory", c_void_p, (c_void_p,)),
        ("llama_memory_clear", None, (c_void_p, c_bool)),
        ("llama_batch_init", _Batch, (c_int32, c_int32, c_int32)),
        ("llama_batch_free", None, (_Batch,)),
        ("llama_decode", c_int32, (c_void_p, _Batch)),
        ("llama_get_logits", POINTER(c_float), (c_void_p,)),
        ("llama_state_seq_get_size", c_size_t, (c_void_p, c_int32)),
        ("llama_state_seq_get_data", c_size_t, (c_void_p, POINTER(c_uint8), c_size_t, c_int32)),
        ("ggml_backend_tensor_get", None, (POINTER(_Tensor), c_void_p, c_size_t, c_size_t)),
        ("ggml_quantize_chunk", c_size_t, (c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
        ("llama_log_set", None, (_Log, c_void_p)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_silent, None)
    defaults = library.llama_context_default_params()
    usual = (defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.n_threads, defaults.type_k, defaults.type_v)
    known = (*usual, defaults.flash_attention) == (512, 2048, 512, 4, _F16, _F16, -1)
    if not known or any(ctypes.sizeof(struct) != size for struct, size in _SIZES.items()):
        raise UserError(
            f"This build of xllamacpp {VERSION} has different C structs than PyPI's wheel: install the wheel."
        )
    library.llama_backend_init()
    return library


def types_of(quant: QuantConfig) -> tuple[str, str]:
    """Return the types of the cache, of keys and of values, with which llama.cpp serves a student: those of its
    kv_format if they are llama.cpp's and those of all layers, else f16."""
    keys, values = quant.kv_formats
    if quant.kv.quantizes and keys.engine == "llama.cpp" and quant.one_kv_format:
        return keys.type, values.type
    return "f16", "f16"


def _load(file: Path, **settings: Any) -> Any:
    """Load a GGUF file, with ``settings`` of _ModelParams; return llama.cpp's model. Raises UserError if it does not
    load."""
    how = library().llama_model_default_params()
    for name, value in settings.items():
        setattr(how, name, value)
    model = library().llama_model_load_from_file(str(file).encode(), how)
    if not model:
        raise UserError(
            f"llama.cpp does not load {file}: give a complete GGUF file of an architecture that xllamacpp {VERSION} "
            "supports."
        )
    return model


class Ids(NamedTuple):
    """Token ids, where callers of transformers' tokenizers look for them."""

    input_ids: list[int]


class Vocabulary:
    """How a GGUF file reads text, by llama.cpp's own tokenizer; called as one of transformers. Raises UserError if
    llama.cpp does not load the file.

    Attributes:
        size: number of tokens
    """

    def __init__(self, file: Path):
        self._library = library()
        model = _load(file, vocab_only=True)
        weakref.finalize(self, self._library.llama_model_free, model)
        self._vocabulary = self._library.llama_model_get_vocab(model)
        self.size = self._library.llama_vocab_n_tokens(self._vocabulary)

    def __call__(self, text: str, **how: Any) -> Ids:
        """Return the ids of a text, no special ones among them."""
        encoded = text.encode()
        most = len(encoded) + 1
        found = (c_int32 * most)()
        count = self._library.llama_tokenize(self._vocabulary, encoded, len(encoded), found, most, False, False)
        return Ids(found[:count])


def types(cache: str) -> tuple[str, str]:
    """Return the types of keys and values that ``cache`` names: TYPE for both, or KEYS/VALUES; raise UserError for
    types that a cache cannot have."""
    keys, _, values = cache.partition("/")
    if unknown := {keys, values or keys} - TYPES.keys():
        raise UserError(
            f"cache={cache} has the type {min(unknown)!r}, which llama.cpp's KV cache cannot have: choose "
            f"{', '.join(TYPES)}, one, or two as KEYS/VALUES."
        )
    return keys, values or keys


class CachedLayer(NamedTuple):
    """The cache of one layer, as bytes: uint8 [tokens, bytes of a row]; a row holds all heads."""

    keys: Tensor
    values: Tensor


class Engine:
    """A GGUF file that llama.cpp runs on the CPU, in one sequence. A context manager.

    Args:
        file: the GGUF file
        longest: tokens of the longest sequence
        keys, values: types of the cache, of TYPES
        threads: the result does not depend on them, if keys and values are quantized
        watched: whether ``tensors`` will be asked for; llama.cpp then calls Python for each tensor, and is slower

    Raises UserError if llama.cpp does not load the file, or cannot run it with such a cache.
    """

    def __init__(
        self,
        file: Path,
        longest: int,
        keys: str = "f16",
        values: str = "f16",
        threads: int = 1,
        watched: bool = False,
    ):
        self._library = library()
        self._seen: dict[str, Tensor] = {}
        self._names: frozenset[str] = frozenset()
        self._callback = _Callback(self._see) if watched else None
        self._context = None
        self._model = _load(file, n_gpu_layers=0)
        settings = self._library.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = longest
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k, settings.type_v, settings.flash_attention = TYPES[keys], TYPES[values], _FLASH_ATTENTION
        if self._callback:
            settings.callback = ctypes.cast(self._callback, c_void_p)
        self._context = self._library.llama_init_from_model(self._model, settings)
        if not self._context:
            self.close()
            raise UserError(f"llama.cpp cannot run {file} with a cache of {keys} keys and {values} values.")
        self.vocabulary = self._library.llama_vocab_n_tokens(self._library.llama_model_get_vocab(self._model))
        self._position = 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free what the library holds."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def forget(self) -> None:
        """Empty the cache: the next tokens begin a sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._position = 0

    def logits(self, tokens: Tensor) -> Tensor:
        """Append token ids [tokens] to the sequence in one batch; return their logits [tokens, vocabulary], fp32."""
        count = len(tokens)
        batch = self._library.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for place, token in enumerate(tokens.tolist()):
            batch.token[place], batch.pos[place] = token, self._position + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        failed = self._library.llama_decode(self._context, batch)
        self._library.llama_batch_free(batch)
        if failed:
            raise UserError(
                f"llama.cpp failed (error {failed}) on {count} tokens after {self._position}: give a smaller --window."
            )
        self._position += count
        found = np.ctypeslib.as_array(self._library.llama_get_logits(self._context), (count, self.vocabulary))
        return torch.from_numpy(found.copy())

    def tokens_per_second(self, tokens: Tensor) -> float:
        """Return how fast it writes: the median over the last half of token ids [tokens], one after another in a
        sequence that begins with the first half."""
        self.forget()
        context, following = tokens.chunk(2)
        self.logits(context)
        seconds = []
        for token in following.split(1):
            began = time.perf_counter()
            self.logits(token)
            seconds.append(time.perf_counter() - began)
        self.forget()
        return 1 / statistics.median(seconds)

    def tensors(self, tokens: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Append token ids as ``logits`` does; return fp32 tensors of the computation by llama.cpp's names, such as
        Kcur-0, each [..., channels] in rows as it stands in memory. Of tensors of one name it is the last. For an
        engine that is ``watched``."""
        assert self._callback, "the engine is not watched"
        self._names, self._seen = frozenset(names), {}
        self.logits(tokens)
        self._names = frozenset()
        return self._seen

    def _see(self, tensor: Any, ask: bool, data: Any) -> bool:
        seen = tensor.contents
        name = seen.name.decode()
        if ask:
            return name in self._names
        assert seen.type == TYPES["f32"], f"{name} is not in fp32"
        assert seen.nb[1] == 4 * seen.ne[0], f"{name} is a view in another order"
        values = np.empty(tuple(seen.ne)[::-1], np.float32)
        self._library.ggml_backend_tensor_get(tensor, values.ctypes.data_as(c_void_p), 0, values.nbytes)
        self._seen[name] = torch.from_numpy(values).squeeze(0)
        return True

    def cache(self) -> list[CachedLayer]:
        """Return the cache of each layer, as the engine stores it."""
        size = self._library.llama_state_seq_get_size(self._context, 0)
        buffer = np.zeros(size, np.uint8)
        pointer = buffer.ctypes.data_as(POINTER(c_uint8))
        self._library.llama_state_seq_get_data(self._context, pointer, size, 0)
        return _parse(buffer)


def _parse(state: np.ndarray) -> list[CachedLayer]:
    """Read the cache out of the bytes of llama_state_seq_get_data: a header; the cells' positions and sequences; four
    numbers; then the keys of all layers, and the values, each with its type, the bytes of a row, and the rows."""
    place = 8  # magic, sequence

    def number(kind: str = "<u4") -> int:
        nonlocal place
        found = np.frombuffer(state, kind, 1, place)[0]
        place += found.nbytes
        return int(found)

    def rows() -> Tensor:
        nonlocal place
        number()
        width = number("<u8")
        found = state[place : place + cells * width].reshape(cells, width)
        place += found.nbytes
        return torch.from_numpy(found.copy())

    streams, cells = number(), number()
    assert streams == 1, streams
    for _ in range(cells):
        number()
        for _ in range(number()):
            number()
    transposed, layers, _, _ = number(), number(), number(), number()
    assert not transposed, "flash attention is on"
    keys = [rows() for _ in range(layers)]
    return [CachedLayer(key, rows()) for key in keys]


@torch.inference_mode()
def score_windows(
    engines: Sequence[Engine], windows: Windows, teacher: PreTrainedModel | None = None, progress: bool = True
) -> list[list[WindowScore]]:
    """Score what llama.cpp serves, as qat.evaluate.perplexity.score_windows does; return the scores of each engine. The
    teacher predicts each window once."""
    scores: list[list[WindowScore]] = [[] for _ in engines]
    for number, window in enumerate(bar(windows.ids, desc="windows in llama.cpp", unit="window", disable=not progress)):
        rows = slice(None) if windows.counted is None else windows.counted[number]
        expected = None
        if teacher is not None:
            hidden = predicting(teacher, window[None].to(teacher.device))[rows]
            expected = output_layer(teacher)(hidden).float().log_softmax(-1).cpu()
        for engine, own in zip(engines, scores, strict=True):
            engine.forget()
            log_p = engine.logits(window)[:-1][rows].log_softmax(-1)
            nll = cross_entropy(log_p, window[1:][rows]).item()
            if expected is None:
                own.append(WindowScore(nll, None, len(log_p)))
                continue
            kl = kl_div(log_p, expected, reduction="none", log_target=True).sum(-1)
            top1 = (log_p.argmax(-1) == expected.argmax(-1)).float().mean().item()
            own.append(WindowScore(nll, kl.mean().item(), len(log_p), top1, kl))
        ranks.progress()
    return scores
