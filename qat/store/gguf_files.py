"""GGUF: one file that llama.cpp runs.

Its block types store 32 codes and an fp16 scale: Q4_0 holds every symmetric code of 2 to 4 bits, Q5_0 of 5, Q8_0 of 6
to 8. So the codes are stored without loss, the scale of a longer group repeated in each of its blocks. A scale that was
trained in fp16, as those of ggml_q4_0 are, is stored as it is; others are rounded, by at most 1 part in 2048 (below
6e-5, by at most 3e-8). Q4_1 holds codes with a zero point, of 2 to 4 bits, as a scale and a minimum, both in fp16.
Types with a finer structure (Q4_K, Q6_K, IQ4_XS: blocks of 256 with scales of their own) need a rounding of the weights
that was not trained.

MXFP4 and NVFP4 have types of their own, without any loss. The scale of an NVFP4 tensor stands beside it, as
``blk.0.ffn_gate.scale``; llama.cpp multiplies the product by it.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from qat.quant.architecture import architecture_of, head_dim, scaled_frequencies, windowed_layers
from qat.quant.number_format import Format, Quantized, dequantize
from qat.quant.products import speed_up
from qat.quant.quantizers.base import Grid
from qat.runtime.errors import UserError
from qat.runtime.files import read_json, using, writing
from qat.store.models import load_tokenizer
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FILE = "model.gguf"

_BLOCK = 32
_FILE_TYPES = {
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.MXFP4: gguf.LlamaFileType.MOSTLY_MXFP4_MOE,  # the only one with it
    Type.NVFP4: gguf.LlamaFileType.MOSTLY_NVFP4,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q5_0: gguf.LlamaFileType.MOSTLY_Q5_0,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
_FLOAT_FILE_TYPES = {
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
}
_LARGEST_ERROR, _SMALLEST_STEP = 2.0**-11, 2.0**-24
"""Largest relative error of a scale rounded to fp16, and fp16's smallest step. Scales so small that half a step is more
than that error may be off by half a step: their rows or groups are next to nothing. A scale that is off by more
overflows."""

_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
_ROPES = {
    "default": set(),
    "dynamic": {"factor"},  # the default, up to max_position_embeddings
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""The supported kinds of scaled positions, and their parameters; llama.cpp supports llama3's only in its LLaMA."""

_ROPE_FREQUENCIES = "rope_freqs.weight"
_ROPE_PARAMETERS = "qat.rope_parameters"
"""A tensor that divides the frequencies; and, for ``load``, the parameters from which it and the metadata were made."""

_LOAD = """
import os, sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads, settings.warmup = 64, 1, 1, False
try:
    server = xllamacpp.Server(settings)
except RuntimeError:
    time.sleep(1)
    raise
os._exit(0)
"""
"""Program for another Python process that tells whether llama.cpp loads a file. It does not wait for the server to
stop, which may never happen. If the file is rejected it waits for llama.cpp's log, which a thread writes: the reason
would be lost on a busy machine."""

_LOADING = 600.0
"""Timeout of that process, in seconds, for a small file."""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_SPLITS = {"{1,3}".join(_SPLIT): "llama-bpe", "".join(_SPLIT): "qwen2"}
"""llama.cpp's names for the ways in which a text is split before BPE."""


class Unsupported(UserError):
    """A model or student that GGUF, or llama.cpp, cannot hold. Another export format may."""


def find(path: Path) -> Path | None:
    """Return the GGUF file at ``path``: the file itself, or that of the folder of an export; None if there is none."""
    file = path / FILE if path.is_dir() else path
    return file if file.suffix == ".gguf" and file.is_file() else None


def max_positions_of(file: Path) -> int:
    """Return the number of positions that the model in a GGUF file declares."""
    fields = gguf.GGUFReader(file).fields
    architecture = fields["general.architecture"].contents()
    return int(fields[f"{architecture}.context_length"].contents())


def check(student: Student) -> None:
    """Raise Unsupported for weights that no GGUF type can hold, and for models that are not mapped here."""
    from transformers import AutoConfig

    for own in student.settings.values():
        types, has_zero_points = own.weights.by.gguf_types, not own.weights.symmetric
        if own.weights.quantizes and (
            own.w_bits not in types or has_zero_points != (types[own.w_bits] == Type.Q4_1.name)
        ):
            raise Unsupported(f"w_quantizer={own.w_quantizer} with w_bits={own.w_bits} fits no GGUF type.")
        if own.weights.group_size % _BLOCK and not own.weights.by.is_float:
            raise Unsupported(
                f"w_group_size={own.weights.group_size}: GGUF has one scale per {_BLOCK} codes, so it must be a "
                f"multiple of {_BLOCK}."
            )
    config = AutoConfig.from_pretrained(student.directory)
    _check_computed(config)
    block = max((gguf.GGML_QUANT_SIZES[type_of(form)][0] for form in student.weight_formats.values()), default=1)
    if config.hidden_size % block or config.intermediate_size % block:
        raise Unsupported(
            f"hidden_size={config.hidden_size} and intermediate_size={config.intermediate_size} must be multiples of "
            f"{block} for this GGUF type."
        )
    _tokenizer(student.directory)
    _special_tokens(student.directory, config.vocab_size)


def _check_computed(config: PreTrainedConfig) -> None:
    """Raise Unsupported for a model that llama.cpp would compute differently, or not load."""
    kind, rope, architecture = config.model_type, config.rope_parameters, architecture_of(config)
    if not architecture.gguf:
        raise Unsupported(f"The architecture {kind} is not mapped to GGUF here.")
    ropes = [name for name in _ROPES if architecture.llama_cpp.divides_frequencies or name != "llama3"]
    scaled = rope["rope_type"]
    reasons = []
    if config.hidden_act not in ("silu", "swish"):
        reasons.append(f"hidden_act={config.hidden_act!r}, where llama.cpp computes silu")
    if config.max_position_embeddings >= 2**32:
        reasons.append(f"max_position_embeddings={config.max_position_embeddings}, where GGUF has 32 bits")
    if not architecture.llama_cpp.has_attention_bias and config.attention_bias:
        reasons.append(f"attention_bias=True, which llama.cpp's {architecture.gguf} does not support")
    if scaled not in ropes:
        reasons.append(f"rope_type={scaled!r}, where llama.cpp's {kind} has {', '.join(ropes)}")
    elif scaled != "default" and (more := set(rope) - _ROPES[scaled] - {"rope_type", "type", "rope_theta"}):
        reasons.append(f"rope_parameters with {', '.join(sorted(more))}, which are not mapped to GGUF here")
    if reasons:
        raise Unsupported(f"The model has {'; and '.join(reasons)}.")


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence for which llama.cpp, which gives these architectures no sliding window, is right."""
    longest = config.max_position_embeddings
    return min(longest, config.sliding_window) if any(windowed_layers(config)) else longest


def type_of(form: Format) -> Type:
    """Return the type that holds the weights of a format."""
    return Type[form.by.gguf_types[form.bits]]


def held(quantized: Quantized, form: Format) -> Tensor:
    """Return the values of a weight as GGUF holds it, in fp32: its codes, with scale and minimum rounded to fp16, but
    for floats, which have their own scales."""
    if form.by.is_float:
        return dequantize(quantized, torch.float32)
    codes, grid = quantized
    scale = grid.scale.half().float()
    if grid.zero_point is None:
        return dequantize(Quantized(codes, Grid(scale)), torch.float32)
    minimum = _minimum(quantized).half().float()
    from_zero = (codes - codes.amin()).float().unflatten(-1, (scale.shape[-1], -1))
    return (from_zero * scale[..., None] + minimum[..., None]).flatten(-2)


def _minimum(quantized: Quantized) -> Tensor:
    """Return the value of the weight's lowest code, which is stored as 0, on the grid of each group."""
    assert quantized.grid.zero_point is not None
    return (quantized.codes.amin() - quantized.grid.zero_point) * quantized.grid.scale


def write(student: Student, output: Path) -> None:
    """Write ``output/model.gguf``. The weights pass through a temporary file: one tensor is in memory at a time."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student.directory)
    architecture = _ARCHITECTURES[architecture_of(config).gguf]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    forms = student.weight_formats
    writer = new_writer(output / FILE, gguf.MODEL_ARCH_NAMES[architecture])
    _add_config(writer, config, _file_type(student))
    for key, value in _tokenizer(student.directory).items():
        getattr(writer, f"add_{key}")(value)
    _special_tokens(student.directory, config.vocab_size).add_to_gguf(writer, quiet=True)
    if (factors := _rope_factors(config)) is not None:
        add_tensor(writer, _ROPE_FREQUENCIES, factors.numpy())
    for name, weight in student.progress():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        if isinstance(weight, Quantized):
            form = forms[name.removesuffix(".weight")]
            kind = raw = type_of(form)
            grid = weight.grid.map(lambda part, name=name: _as_llama_cpp_rotates(name, part, config))  # type: ignore[misc]
            stored = Quantized(_as_llama_cpp_rotates(name, weight.codes, config), grid)
            if form.by.is_float:
                data = float_blocks(stored, form)
                if form.tensor_scale is not None:
                    add_tensor(writer, _scale_of(place), np.array([1 / form.tensor_scale], np.float32))
            else:
                _check_scale(name, grid.scale)
                per_block = grid.map(partial(_per_block, weight.codes.shape[1]))
                data = blocks(stored._replace(grid=per_block), kind)
        else:
            weight = _as_llama_cpp_rotates(name, weight, config)
            raw = None
            if weight.dim() > 1 and weight.dtype == torch.bfloat16:
                data, raw = weight.view(torch.uint16).numpy().view(np.uint8), Type.BF16
            elif weight.dim() > 1 and weight.dtype == torch.float16:
                data = weight.numpy()
            else:
                data = weight.float().numpy()
        add_tensor(writer, place, data, raw)
    with writing(output):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def new_writer(file: Path, architecture: str) -> gguf.GGUFWriter:
    """Return a writer for ``file`` that keeps the tensors in a temporary file beside it until their places are known,
    not in the system's folder for such files, which may be small or in memory."""
    writer = gguf.GGUFWriter(file, architecture, use_temp_file=True)
    with writing(file.parent):
        writer.temp_file = tempfile.TemporaryFile(dir=file.parent)  # type: ignore[assignment]  # noqa: SIM115  # the writer closes it
    return writer


def add_tensor(writer: gguf.GGUFWriter, name: str, data: np.ndarray, kind: Type | None = None) -> None:
    """Add a tensor, in bytes of ``kind`` if that is given, to the temporary file of ``writer``; raise UserError where
    that cannot be written."""
    assert writer.path is not None
    with writing(writer.path.parent):
        writer.add_tensor(name, data, raw_dtype=kind)


def _file_type(student: Student) -> gguf.LlamaFileType:
    """Return the type of most of the weights."""
    if student.quant.weights.quantizes:
        return _FILE_TYPES[type_of(student.quant.weights)]
    return _FLOAT_FILE_TYPES.get(student.dtype, gguf.LlamaFileType.ALL_F32)


def blocks(quantized: Quantized, kind: Type) -> np.ndarray:
    """Encode int8 codes [out, in] and their grid [out, in / 32] as the bytes of GGUF blocks: uint8 [out, bytes]."""
    codes, grid = quantized
    rows, columns = codes.shape
    q = codes.numpy().reshape(rows, columns // _BLOCK, _BLOCK)
    halves = [grid.scale] if grid.zero_point is None else [grid.scale, _minimum(quantized)]
    parts = [half.half().numpy()[..., None].view(np.uint8) for half in halves]
    if kind == Type.Q8_0:
        parts.append(q.view(np.uint8))
    else:
        offset = {Type.Q4_0: 8, Type.Q4_1: -int(codes.amin()), Type.Q5_0: 16}[kind]
        q = (q + offset).astype(np.uint8)
        if kind == Type.Q5_0:
            parts.append(np.packbits(q >> 4, axis=-1, bitorder="little"))
        low, high = np.split(q & 15, 2, axis=-1)
        parts.append(low | (high << 4))
    return np.concatenate(parts, -1).reshape(rows, -1)


def float_blocks(weight: Quantized, form: Format) -> np.ndarray:
    """Encode a weight [out, in] of e2m1 codes as the bytes of GGUF blocks: uint8 [out, bytes]. A block has the scales
    of its parts, then of each part the codes, one of the first half and one of the second in a byte."""
    by, rows = form.by_on(weight.codes.device), len(weight.codes)
    bits = by.to_bits(weight.codes).view(torch.uint8).view(rows, -1, 2, form.group_size // 2)
    codes = (bits[:, :, 0] | bits[:, :, 1] << 4).flatten(1)
    size, _ = gguf.GGML_QUANT_SIZES[type_of(form)]
    scales = by.scale_to_bits(weight.grid.scale).view(rows, -1, size // form.group_size)
    return torch.cat([scales, codes.view(rows, -1, size // 2)], -1).view(rows, -1).numpy()


def _scale_of(place: str) -> str:
    """Return the name of the scale of the tensor ``place``, which ends with .weight."""
    return f"{place.removesuffix('.weight')}.scale"


def load(directory: Path) -> PreTrainedModel:
    """Load the model in ``directory/model.gguf`` as transformers reads it, in fp32 and without activation quantization;
    one with scales of tensors, which it cannot read, by gguf's own dequantizer.

    Biases and scaled positions, which transformers' reader ignores, are read here. Raises UserError if the latter are
    not those of ``write``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    config = AutoConfig.from_pretrained(directory, gguf_file=FILE)
    reader = gguf.GGUFReader(directory / FILE)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    config.attention_bias, config.mlp_bias = (f"blk.0.{name}.bias" in tensors for name in ("attn_output", "ffn_down"))
    if _ROPE_PARAMETERS in reader.fields:  # files of the first version, which scale nothing, have none
        config.rope_parameters = json.loads(reader.fields[_ROPE_PARAMETERS].contents())
    factors = _rope_factors(config)
    written = {key: field.contents() for key, field in reader.fields.items() if ".rope.scaling." in key}
    frequencies = np.ones(0) if factors is None else factors.numpy()
    if written != _rope_metadata(config) or not np.array_equal(tensors.get(_ROPE_FREQUENCIES, np.ones(0)), frequencies):
        raise UserError(f"{directory / FILE} is wrong: its RoPE scaling differs from the model's.")
    if any(name.endswith(".scale") for name in tensors):
        return _load_scaled(config, reader)
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, gguf_file=FILE, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True),
        attn_implementation="sdpa",
    )  # fmt: skip
    speed_up(model)
    return model.eval()


def _load_scaled(config: PreTrainedConfig, reader: gguf.GGUFReader) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    names = gguf.get_tensor_name_map(_ARCHITECTURES[architecture_of(config).gguf], config.num_hidden_layers)
    read = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        place = names.get_name(name, try_suffixes=(".weight", ".bias")) or ""
        value = torch.from_numpy(read[place] * read.get(_scale_of(place), np.float32(1)))
        parameter.data = _as_llama_cpp_rotates(name, value, config, back=True)
    speed_up(model)
    return model.eval()


def is_installed() -> bool:
    """Return whether the package xllamacpp is installed, which is llama.cpp."""
    return importlib.util.find_spec("xllamacpp") is not None


def is_loaded(directory: Path) -> bool:
    """Return whether llama.cpp, which is installed, loads ``directory/model.gguf``; False if that cannot be determined:
    it takes more than ten minutes and a second for every 10 MB.

    Runs in another process, which llama.cpp may end if it cannot compute the model. Raises Unsupported if it rejects
    the file.
    """
    limit = _LOADING + (directory / FILE).stat().st_size / 10e6
    command = [sys.executable, "-c", _LOAD, str(directory / FILE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        reason = (reasons or ["no reason given"])[0].strip()
        raise Unsupported(f"{directory / FILE} is wrong: llama.cpp does not load it ({reason}).")
    return True


def _per_block(columns: int, part: Tensor) -> Tensor:
    """Repeat a part of the grid [out, groups] of ``columns`` columns for each block of a group."""
    return part.repeat_interleave(columns // _BLOCK // part.shape[1], 1)


def _check_scale(name: str, scale: Tensor) -> None:
    errors = (scale.half().float() - scale).abs()
    wrong = ~(errors <= (_LARGEST_ERROR * scale.abs()).clamp(min=_SMALLEST_STEP / 2))  # it may be 0, or negative
    if wrong.any():
        raise Unsupported(
            f"GGUF stores scales in fp16, which cannot represent {scale[wrong][0]:.3g}, a scale of {name}."
        )


def _as_llama_cpp_rotates(name: str, tensor: Tensor, config: PreTrainedConfig, back: bool = False) -> Tensor:
    """Reorder output channels of q and k for llama.cpp, whose LLaMA rotates neighbours, where transformers rotates the
    two halves; or back."""
    architecture = architecture_of(config)
    block = architecture.block
    if not architecture.interleaves or block is None:
        return tensor
    heads = {block.queries: config.num_attention_heads, block.keys: config.num_key_value_heads}
    for layer, count in heads.items():
        if f".{layer}." in name:
            return (
                tensor.unflatten(0, (count, -1, 2) if back else (count, 2, -1))
                .transpose(1, 2)
                .flatten(0, 2)
                .contiguous()
            )
    return tensor


def _add_config(writer: gguf.GGUFWriter, config: PreTrainedConfig, file_type: gguf.LlamaFileType) -> None:
    writer.add_name(config.name_or_path or config.model_type)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(max_positions(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_string(_ROPE_PARAMETERS, json.dumps(config.rope_parameters))
    add: dict[type, Callable[..., None]] = {
        str: writer.add_string, float: writer.add_float32, int: writer.add_uint32
    }  # fmt: skip
    for key, value in _rope_metadata(config).items():
        add[type(value)](key, value)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))


def _rope_metadata(config: PreTrainedConfig) -> dict[str, str | float | int]:
    """Return the GGUF metadata of scaled positions, by key."""
    rope = config.rope_parameters
    kind, architecture = rope["rope_type"], architecture_of(config).gguf
    if kind not in ("linear", "yarn"):
        return {}
    metadata: dict[str, str | float | int]
    metadata = {gguf.Keys.Rope.SCALING_TYPE: kind, gguf.Keys.Rope.SCALING_FACTOR: float(np.float32(rope["factor"]))}
    if kind == "yarn":
        metadata[gguf.Keys.Rope.SCALING_ORIG_CTX_LEN] = int(rope["original_max_position_embeddings"])
    return {key.format(arch=architecture): value for key, value in metadata.items()}


def _rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """Return the divisors of the frequencies for llama.cpp, fp32 [head_dim / 2]; None if the frequencies are the
    default ones or follow from the metadata."""
    rope = config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    frequencies = scaled_frequencies(config)
    size = 2 * len(frequencies)
    return 1 / (rope["rope_theta"] ** (torch.arange(0, size, 2) / size)) / frequencies


def _tokenizer(directory: Path) -> dict[str, object]:
    """Return the tokenizer's data for GGUFWriter, by its ``add_`` methods."""
    from transformers import AutoConfig

    vocabulary_size = AutoConfig.from_pretrained(directory).vocab_size
    if (directory / "tokenizer.model").is_file():
        # As many tokens as the embedding has rows: llama.cpp accepts no other number. The model cannot read the
        # tokenizer's further ones.
        with using(directory / "tokenizer.model"):
            tokens = list(gguf.SentencePieceVocab(directory).all_tokens())[:vocabulary_size]
            file = directory / "tokenizer_config.json"
            described = read_json(file) if file.is_file() else {}
        tokens += [(f"[PAD{i}]".encode(), -1000.0, gguf.TokenType.UNUSED) for i in range(len(tokens), vocabulary_size)]
        # The model's own file does not say which tokens are added, nor which of them a text cannot contain.
        for number, token in load_tokenizer(str(directory)).added_tokens_decoder.items():
            if number < vocabulary_size and tokens[number][2] != gguf.TokenType.UNKNOWN:
                kind = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
                tokens[number] = (token.content.encode(), -1000.0, kind)
        space = described.get("add_prefix_space")
        return ({} if space is None else {"add_space_prefix": space}) | {
            "tokenizer_model": "llama",
            "token_list": [text for text, _, _ in tokens],
            "token_scores": [score for _, score, _ in tokens],
            "token_types": [kind for _, _, kind in tokens],
        }
    split = _split(directory)
    tokenizer = load_tokenizer(str(directory))
    added, special = tokenizer.get_added_vocab(), set(tokenizer.all_special_tokens)
    texts, kinds = [], []
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    for number in range(vocabulary_size):
        text = by_id.get(number)
        texts.append(text if text is not None else f"[PAD{number}]")
        if text is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif text in special or (text in added and tokenizer.added_tokens_decoder[number].special):
            kinds.append(gguf.TokenType.CONTROL)
        else:
            kinds.append(gguf.TokenType.USER_DEFINED if text in added else gguf.TokenType.NORMAL)
    return {"tokenizer_model": "gpt2", "tokenizer_pre": split, "token_list": texts, "token_types": kinds}


def _special_tokens(directory: Path, vocabulary_size: int) -> gguf.SpecialVocab:
    """Return the tokens with a meaning of their own, the merges, and the chat template."""
    with using(directory):  # of which it reads several files
        return gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocabulary_size)


def _split(directory: Path) -> str:
    """Return llama.cpp's name for how the tokenizer splits a text before BPE; raise Unsupported if it has none here."""
    file = directory / "tokenizer.json"
    content = read_json(file) if file.is_file() else {}
    with using(file):
        splits = content.get("pre_tokenizer") or {"pretokenizers": []}
        steps = splits.get("pretokenizers", [splits])
        kinds = [step["type"] for step in steps]
        by_regex = kinds[-1:] == ["ByteLevel"] and steps[-1].get("use_regex", True)  # older files do not state it
        if kinds == ["ByteLevel"] and by_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := _SPLITS.get(steps[0]["pattern"].get("Regex"))):
            return name
    raise Unsupported(
        f"The tokenizer of {directory} splits text in a way that is not mapped to llama.cpp's here, but may be in "
        "llama.cpp's own conversion script."
    )
