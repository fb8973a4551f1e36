"""llama.cpp's own quantization of a full-precision file, without training.

The wheel xllamacpp has llama.cpp's quantizers of tensors (ggml_quantize_chunk), but not the function that applies them
to a file (llama_model_quantize, which the program llama-quantize calls). That function's choice of a type for each
tensor is restated here from src/llama-quant.cpp of the wheel's sources: for dense models of fewer than 80 layers,
without an importance matrix.
"""

import re
from collections.abc import Callable
from ctypes import c_void_p
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from qat.evaluate.llama_cpp import library
from qat.runtime.errors import UserError
from qat.runtime.files import writing
from qat.store.gguf_files import add_tensor, new_writer

_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
"""The type that replaces one with blocks of 256 if these do not divide the rows."""

_FILE_TYPE = "general.file_type"


def _mostly_q4_0(name: str, layers: int) -> Type:
    return Type.Q4_0


def _mostly_q4_k_m(name: str, layers: int) -> Type:
    """Return Q4_K; Q6_K for the values' and the MLP's last weights in the first and last eighth of the layers, and in
    every third between."""
    found = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight", name)
    if not found:
        return Type.Q4_K
    layer, eighth = int(found[1]), layers // 8
    return Type.Q6_K if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else Type.Q4_K


KINDS: dict[str, tuple[gguf.LlamaFileType, Callable[[str, int], Type]]] = {
    "q4_0": (gguf.LlamaFileType.MOSTLY_Q4_0, _mostly_q4_0),
    "q4_k_m": (gguf.LlamaFileType.MOSTLY_Q4_K_M, _mostly_q4_k_m),
}
"""The kinds of file, by llama-quantize's names for them."""


def quantize_file(source: Path, output: Path, kind: str) -> None:
    """Quantize the full-precision GGUF file ``source`` as llama.cpp does, into the file ``output``; ``kind`` is one of
    KINDS. Its matrices are in memory one at a time. Raises UserError for widths that 32 does not divide."""
    file_type, rule = KINDS[kind]
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    layers = int(reader.fields[f"{architecture}.block_count"].contents())
    is_tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    writer = new_writer(output, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", _FILE_TYPE):
            is_list = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if is_list else None)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim < 2 or not tensor.name.endswith(".weight"):
            add_tensor(writer, tensor.name, values)
            continue
        is_output = tensor.name == "output.weight" or (is_tied and tensor.name == "token_embd.weight")
        wanted = Type.Q6_K if is_output else rule(tensor.name, layers)
        fits = values.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
        held = wanted if fits else _FALLBACKS.get(wanted, wanted)
        if values.shape[1] % gguf.GGML_QUANT_SIZES[held][0]:
            raise UserError(
                f"{tensor.name} is {values.shape[1]} wide, but llama.cpp's 4-bit types need multiples of 32: leave "
                "--method out."
            )
        add_tensor(writer, tensor.name, _quantized(values, held), held)
    with writing(output.parent):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _quantized(values: np.ndarray, kind: Type) -> np.ndarray:
    """Return the bytes [rows, bytes of a row] of a matrix in ggml's type."""
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(values, np.float32)
    packed = np.empty((rows, columns // block * size), np.uint8)
    of = (part.ctypes.data_as(c_void_p) for part in (values, packed))
    library().ggml_quantize_chunk(int(kind), *of, 0, rows, columns, None)
    return packed
