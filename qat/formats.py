"""Integer weights in the compressed-tensors layouts, which transformers and vLLM read.

``pack-quantized``   several codes in an int32: what vLLM wants on GPUs. ``weight_packed`` [out, in * bits / 32],
                     ``weight_shape`` [2], ``weight_scale`` [out, groups]
``int-quantized``    a code in an int8: what vLLM wants on CPUs. ``weight`` [out, in], ``weight_scale`` [out, 1]

Codes and scales are those that training simulated, scales in fp32 as there; no library derives them again.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qat.errors import UserError
from qat.prepare import QuantConfig
from qat.quantizers import FULL_PRECISION, Grid, Quantized

PACKED, INTEGERS = FORMATS = "pack-quantized", "int-quantized"

_STORED_BITS = {
    PACKED: {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8},
    INTEGERS: dict.fromkeys(range(2, 9), 8),
}
"""The bits that the format is told. Every code of 3 bits is one of 4 bits, with the same scale, and engines have
kernels for those. Of 3, 5, 6 and 7 bits in an int32 there are two layouts besides, compressed-tensors' and vLLM's. An
int8 has room for them all, and vLLM's 8-bit kernel for CPUs rounds activations as training does; its 4-bit one does
not, and on x86 is a plain loop."""

_ENGINE_A_BITS = {PACKED: (4, 8), INTEGERS: (8,)}
"""The bits to which engines can round activations."""


def stored_bits(quant: QuantConfig, form: str) -> int:
    return _STORED_BITS[form][quant.w_bits]


def served_a_bits(quant: QuantConfig, form: str) -> int:
    """The bits to which an engine rounds activations: those that were trained, or else 8."""
    return quant.a_bits if quant.a_bits in (FULL_PRECISION, *_ENGINE_A_BITS[form]) else 8


def check(quant: QuantConfig, form: str) -> None:
    """Raise UserError for what the format, or every engine that reads it, cannot hold."""
    if not quant.weights.symmetric:
        raise UserError(
            f"w_quantizer={quant.w_quantizer} has zero points, and the kernels that {form} is for have none: "
            "give --format hf-fake."
        )
    if form == INTEGERS and quant.a_bits == FULL_PRECISION:
        raise UserError(f"a_bits=16: {form} is for quantized activations. Give --format {PACKED}.")
    if form == INTEGERS and quant.w_group_size:
        raise UserError(
            f"w_group_size={quant.w_group_size}: engines read {form} with one scale per output channel. "
            f"Give --format {PACKED}."
        )


def quantization_config(quant: QuantConfig, form: str) -> dict[str, Any]:
    """What compressed-tensors, hence transformers and vLLM, read in ``config.json``."""
    grouped = {"strategy": "group", "group_size": quant.w_group_size}
    weights = {
        "num_bits": stored_bits(quant, form),
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        **(grouped if quant.w_group_size else {"strategy": "channel"}),
    }
    activations = {
        "num_bits": served_a_bits(quant, form),
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    quantized = quant.a_bits != FULL_PRECISION
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations if quantized else None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def encode(name: str, quantized: Quantized, quant: QuantConfig, form: str) -> dict[str, Tensor]:
    """The tensors that hold the layer ``name``'s weight [out, in]."""
    codes, (scale, _) = quantized
    if form == INTEGERS:
        return {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # takes seconds to import

    return {
        f"{name}.weight_packed": pack_to_int32(codes, stored_bits(quant, form)),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(codes.shape),
    }


def layout(
    name: str, shape: Sequence[int], config: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], frozenset[str]]]:
    """Shapes, and safetensors' names of the possible dtypes, of what ``encode`` gives for a weight [out, in]."""
    rows, columns = shape
    settings = config["config_groups"]["group_0"]["weights"]
    scale = (rows, columns // settings.get("group_size", columns)), frozenset({"F32"})
    if config["format"] == INTEGERS:
        return {f"{name}.weight": ((rows, columns), frozenset({"I8"})), f"{name}.weight_scale": scale}
    packed = -(-columns // (32 // settings["num_bits"]))
    return {
        f"{name}.weight_packed": ((rows, packed), frozenset({"I32"})),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": ((2,), frozenset({"I64"})),
    }


def decode(stored: Iterable[tuple[str, Tensor]], config: dict[str, Any]) -> Iterator[tuple[str, Tensor | Quantized]]:
    """The inverse, for a whole model, of which nothing may be missing: each weight by its own name; what was not
    quantized as it is.

    ``config`` is what ``quantization_config`` gave.
    """
    form = config["format"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    suffixes = ("weight_packed", "weight_scale", "weight_shape") if form == PACKED else ("weight", "weight_scale")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored:
        layer, _, suffix = name.rpartition(".")
        if suffix not in suffixes or (suffix == "weight" and tensor.dtype != torch.int8):
            yield name, tensor
            continue
        found = parts.setdefault(layer, {})
        found[suffix] = tensor
        if len(found) == len(suffixes):
            del parts[layer]
            yield f"{layer}.weight", _join(found, bits, form)


def _join(parts: dict[str, Tensor], bits: int, form: str) -> Quantized:
    grid = Grid(parts["weight_scale"])
    if form == INTEGERS:
        return Quantized(parts["weight"], grid)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # takes seconds to import

    shape = torch.Size(parts["weight_shape"].tolist())
    return Quantized(unpack_from_int32(parts["weight_packed"], bits, shape), grid)
