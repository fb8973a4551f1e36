"""Quantized weights in the compressed-tensors layouts, which transformers and vLLM read.

``pack-quantized``   several codes in an int32, for vLLM on GPUs. ``weight_packed`` [out, in * bits / 32],
                     ``weight_shape`` [2], ``weight_scale`` [out, groups], and, if there are zero points,
                     ``weight_zero_point`` [out * bits / 32, groups]
``int-quantized``    a code in an int8, for vLLM on CPUs. ``weight`` [out, in], ``weight_scale`` [out, 1]
``float-quantized``  e4m3 codes. ``weight`` [out, in], ``weight_scale`` [out, 1], or [1] for the whole tensor
``nvfp4-pack-quantized``, ``mxfp4-pack-quantized``
                     two e2m1 codes in a byte, the first in its low half. ``weight_packed`` uint8 [out, in / 2],
                     ``weight_scale`` [out, groups] as e4m3, with ``weight_global_scale`` [1] that divides them, or as
                     exponents (uint8)

``kv_cache_scheme`` describes a KV cache with a scale for all keys of a layer, and one for all its values: ``k_scale``
and ``v_scale`` [1] of its attention.

Codes and scales are those that training simulated, scales in fp32 as there; no library derives them again.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant.config import QuantConfig
from qat.quant.number_format import FULL_PRECISION, Format, Quantized
from qat.quant.quantizers import mxfp4, nvfp4
from qat.quant.quantizers.base import FloatFormat, Grid, Quantizer
from qat.store.weight_files import FLOATS

PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"

INPUT_SCALES = {"tensor_group": "input_global_scale", "tensor": "input_scale"}
"""The tensor [1] that holds the scale of a layer's inputs, by the strategies of the formats that have one."""

_TENSOR = "tensor"

_MXFP4_BLOCKS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_NVFP4_BLOCKS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_FLOAT_INPUTS: dict[FloatFormat, dict[str, Any]] = {
    FloatFormat.FP8: {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    FloatFormat.FP8_TENSOR: {"num_bits": 8, "type": "float", "symmetric": True, "strategy": _TENSOR, "dynamic": False},
    FloatFormat.MXFP4: {**_MXFP4_BLOCKS, "dynamic": True},
    FloatFormat.NVFP4: {**_NVFP4_BLOCKS, "dynamic": "local"},
}
"""The description of activations, or of a KV cache, that are rounded to floats."""

CACHE_SCALES = {"keys": "k_scale", "values": "v_scale"}
"""The tensors [1] that hold the scales of a layer's keys and values, by the ends of our names for them."""

_ZERO_POINT = "weight_zero_point"

Shapes = dict[str, tuple[tuple[int, ...], frozenset[str]]]
"""Shape of each tensor, and safetensors' names of its possible dtypes, by the tensor's name."""


class Layout(ABC):
    """The layout of a weight's codes in a file.

    Attributes:
        name: compressed-tensors' name of it
        suffixes: suffixes of the names of the tensors that hold a symmetric weight
        has_zero_points: whether engines that read it have kernels for weights with zero points
        declared_by_code_bits: the declared bits, by those of the codes. Every code of 3 bits is one of 4 bits,
            with the same scale, and engines have kernels for those
        engine_a_bits: the bits to which engines that read it can round activations, to integers
        float_inputs: the formats of floats to which engines that read it can round activations
        scale_dtype: safetensors' name of the dtype of ``weight_scale``
        code_dtypes: dtypes of a tensor ``weight`` that holds codes
    """

    name: str
    suffixes: tuple[str, ...]
    has_zero_points: bool = False
    declared_by_code_bits: ClassVar[Mapping[int, int]]
    engine_a_bits: tuple[int, ...] = ()
    float_inputs: tuple[FloatFormat, ...] = ()
    scale_dtype = "F32"
    code_dtypes: tuple[torch.dtype, ...] = ()

    def holds(self, form: Format) -> bool:
        """Return whether it has a place for weights of this format."""
        return (form.symmetric or self.has_zero_points) and not form.by.is_float

    def serves_inputs(self, quant: QuantConfig) -> bool:
        """Return whether engines that read it round activations at all, in this setting: not beside weights with zero
        points."""
        if quant.a_bits == FULL_PRECISION or not quant.weights.symmetric:
            return False
        by = quant.activations.by
        return by.float_format in self.float_inputs if by.is_float else bool(self.engine_a_bits)

    def served_a_bits(self, quant: QuantConfig) -> int:
        """Return the bits to which an engine rounds activations: those that were trained, or else 8."""
        return quant.a_bits if quant.a_bits in (FULL_PRECISION, *self.engine_a_bits) else 8

    def declared_bits(self, form: Format) -> int:
        """Return the declared bits. With zero points there are kernels for 4 and 8."""
        bits = self.declared_by_code_bits[form.code_bits]
        return bits if form.symmetric else max(bits, 4)

    def quantization_config(
        self, settings: Mapping[str, QuantConfig], kept: Sequence[str], vocabulary: Mapping[str, QuantConfig]
    ) -> dict[str, Any]:
        """Return the ``quantization_config`` that compressed-tensors, hence transformers and vLLM, read in
        ``config.json``.

        Args:
            settings: of each Linear layer of the decoder, by its name
            kept: the Linear layers outside the decoder
            vocabulary: the settings of the embedding and the output layer, where they are stored quantized
        """
        groups = self._groups(settings)
        if len(groups) == 1 and len(groups[0]["targets"]) == len(settings):
            groups[0]["targets"] = ["Linear"]
        groups += self._groups(vocabulary)
        quantized = {name for group in groups for name in group["targets"]}
        unquantized = [name for name, own in settings.items() if not own.weights.quantizes]
        return {
            "quant_method": "compressed-tensors",
            "format": self.name,
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": [*(name for name in kept if name not in quantized), *unquantized],
        }

    def _groups(self, settings: Mapping[str, QuantConfig]) -> list[dict[str, Any]]:
        """Return one group for all layers with the same settings, which names them."""
        groups: dict[str, dict[str, Any]] = {}
        for name, own in settings.items():
            if own.weights.quantizes:
                group = self._group(own)
                groups.setdefault(json.dumps(group), group)["targets"].append(name)
        return list(groups.values())

    def _group(self, quant: QuantConfig) -> dict[str, Any]:
        return {
            "targets": [],
            "weights": self._weights(quant),
            "input_activations": self._inputs(quant) if self.serves_inputs(quant) else None,
            "format": self.name,
        }

    def _weights(self, quant: QuantConfig) -> dict[str, Any]:
        grouped = {"strategy": "group", "group_size": quant.weights.group_size}
        return {
            "num_bits": self.declared_bits(quant.weights),
            "type": "int",
            "symmetric": quant.weights.symmetric,
            "dynamic": False,
            **(grouped if quant.weights.group_size else {"strategy": "channel"}),
        }

    def input_scale(self, quant: QuantConfig) -> str | None:
        """Return the name of the tensor with the scale of a layer's inputs; None if engines read none."""
        return INPUT_SCALES.get(self._inputs(quant)["strategy"]) if self.serves_inputs(quant) else None

    def _inputs(self, quant: QuantConfig) -> dict[str, Any]:
        if floats := quant.activations.by.float_format:
            return _FLOAT_INPUTS[floats]
        return {
            "num_bits": self.served_a_bits(quant),
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }

    @abstractmethod
    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        """Return the tensors that hold the layer ``name``'s weight [out, in], of the format ``form``."""

    @abstractmethod
    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        """Return the shapes of ``encode``'s tensors, except the scale, for a weight [rows, columns] of ``bits`` stored
        bits."""

    @abstractmethod
    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        """Undo ``encode``; ``parts`` are the tensors by their suffixes."""


class _Packed(Layout):
    """For 3, 5, 6 and 7 bits in an int32 there are two other layouts, compressed-tensors' and vLLM's."""

    name = PACK_QUANTIZED
    suffixes = "weight_packed", "weight_scale", "weight_shape"
    has_zero_points = True
    declared_by_code_bits: ClassVar[Mapping[int, int]] = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    engine_a_bits = 4, 8
    float_inputs = (FloatFormat.FP8,)

    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # takes seconds to import

        codes, (scale, zero_point) = quantized
        bits = self.declared_bits(form)
        parts = {
            f"{name}.weight_packed": pack_to_int32(codes, bits),
            f"{name}.weight_scale": scale,
            f"{name}.weight_shape": torch.tensor(codes.shape),
        }
        if zero_point is not None:
            packed = pack_to_int32(zero_point.to(torch.int8), bits, packed_dim=0)
            parts[f"{name}.{_ZERO_POINT}"] = packed.contiguous()
        return parts

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return {
            f"{name}.weight_packed": ((rows, -(-columns // (32 // bits))), frozenset({"I32"})),
            f"{name}.weight_shape": ((2,), frozenset({"I64"})),
        }

    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # takes seconds to import

        shape = torch.Size(parts["weight_shape"].tolist())
        scale, zero_point = parts["weight_scale"], None
        if _ZERO_POINT in parts:
            zero_point = unpack_from_int32(parts[_ZERO_POINT], bits, scale.shape, packed_dim=0).float()
        return Quantized(unpack_from_int32(parts["weight_packed"], bits, shape), Grid(scale, zero_point))


class _Integers(Layout):
    """An int8 has room for all codes, and vLLM's 8-bit kernel for CPUs rounds activations as training does; its 4-bit
    kernel does not, and on x86 is a plain loop."""

    name = INT_QUANTIZED
    suffixes = "weight", "weight_scale"
    declared_by_code_bits: ClassVar[Mapping[int, int]] = dict.fromkeys(range(2, 9), 8)
    engine_a_bits = (8,)
    code_dtypes = (torch.int8,)

    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        return {f"{name}.weight": quantized.codes, f"{name}.weight_scale": quantized.grid.scale}

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return {f"{name}.weight": ((rows, columns), frozenset({"I8"}))}

    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        return Quantized(parts["weight"], Grid(parts["weight_scale"]))


class _Float8(Layout):
    """Engines have kernels for a scale per output channel, and for one per tensor."""

    name = FLOAT_QUANTIZED
    suffixes = "weight", "weight_scale"
    declared_by_code_bits: ClassVar[Mapping[int, int]] = {8: 8}
    float_inputs = FloatFormat.FP8, FloatFormat.FP8_TENSOR
    code_dtypes = (torch.float8_e4m3fn,)

    def holds(self, form: Format) -> bool:
        return form.by.float_format in self.float_inputs and not form.group_size

    def _weights(self, quant: QuantConfig) -> dict[str, Any]:
        strategy = {"strategy": _TENSOR} if quant.weights.scales_tensors else {}
        return {**super()._weights(quant), "type": "float", **strategy}

    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        scale = quantized.grid.scale[0] if form.scales_tensors else quantized.grid.scale
        return {f"{name}.weight": quantized.codes, f"{name}.weight_scale": scale.clone()}

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return {f"{name}.weight": ((rows, columns), frozenset({"F8_E4M3"}))}

    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        codes, scale = parts["weight"], parts["weight_scale"]
        return Quantized(codes, Grid(scale.repeat(len(codes), 1) if scale.dim() == 1 else scale))


class _Float4(Layout):
    """The bytes are those that the quantizer itself keeps."""

    suffixes: tuple[str, ...] = "weight_packed", "weight_scale"
    declared_by_code_bits: ClassVar[Mapping[int, int]] = {4: 4}
    quantizer: Quantizer

    def holds(self, form: Format) -> bool:
        return form.by.float_format is self.quantizer.float_format

    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        by, scale = form.by_on(quantized.codes.device), quantized.grid.scale
        bits = by.to_bits(quantized.codes).view(torch.uint8)
        return {
            f"{name}.weight_packed": bits[:, 0::2] | bits[:, 1::2] << 4,
            f"{name}.weight_scale": by.scale_to_bits(scale),
        }

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return {f"{name}.weight_packed": ((rows, columns // 2), frozenset({"U8"}))}

    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        packed = parts["weight_packed"]
        by = self._quantizer(parts)
        codes = by.from_bits(torch.stack([packed & 15, packed >> 4], -1).flatten(-2).view(torch.int8))
        return Quantized(codes, Grid(by.scale_from_bits(parts["weight_scale"].view(torch.uint8))))

    def _quantizer(self, parts: Mapping[str, Tensor]) -> Quantizer:
        """Return the quantizer that reads the codes and scales of a weight."""
        return self.quantizer


class _MXFP4(_Float4):
    name = MXFP4
    quantizer = mxfp4.MXFP4()
    float_inputs = FloatFormat.MXFP4, FloatFormat.FP8
    scale_dtype = "U8"

    def _weights(self, quant: QuantConfig) -> dict[str, Any]:
        return {**_MXFP4_BLOCKS, "dynamic": False}


class _NVFP4(_Float4):
    name = NVFP4
    quantizer = nvfp4.NVFP4()
    suffixes = "weight_packed", "weight_scale", "weight_global_scale"
    float_inputs = (FloatFormat.NVFP4,)
    scale_dtype = "F8_E4M3"

    def _weights(self, quant: QuantConfig) -> dict[str, Any]:
        return {**_NVFP4_BLOCKS, "dynamic": False}

    def encode(self, name: str, quantized: Quantized, form: Format) -> dict[str, Tensor]:
        parts = super().encode(name, quantized, form)
        parts[f"{name}.weight_scale"] = parts[f"{name}.weight_scale"].view(torch.float8_e4m3fn)
        return parts | {f"{name}.weight_global_scale": torch.tensor([form.tensor_scale])}

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return super().shapes(name, rows, columns, bits) | {
            f"{name}.weight_global_scale": ((1,), frozenset({"F32"})),
        }

    def _quantizer(self, parts: Mapping[str, Tensor]) -> Quantizer:
        return self.quantizer.for_tensor(parts["weight_global_scale"].squeeze(0))


def kv_cache_scheme(settings: Iterable[QuantConfig]) -> dict[str, Any] | None:
    """Return the ``kv_cache_scheme`` of a model, given the settings of its layers' attention; None where it has no
    place for their KV cache, or they differ."""
    formats = {form.float_format if own.kv.quantizes else None for own in settings for form in own.kv_formats}
    described = formats.pop()
    return None if formats or described is None else _FLOAT_INPUTS[described]


def cache_layout(attentions: Iterable[str], config: dict[str, Any]) -> Shapes:
    """Return the shapes of the scales of the KV cache, given the names of the modules that attend; ``config`` is the
    result of ``quantization_config``."""
    names = [f"{name}.{scale}" for name in attentions for scale in CACHE_SCALES.values()]
    return dict.fromkeys(names if config.get("kv_cache_scheme") else [], ((1,), frozenset({"F32"})))


def transform_config(layers: list[str], width: int, block: int) -> dict[str, Any]:
    """Return the ``transform_config`` of R4: these layers' inputs, of ``width``, are to be multiplied by Sylvester's
    Hadamard matrix over sqrt(block) in blocks of ``block``. Its inverse is in their weights."""
    apply = [{"targets": layers, "location": "input", "inverse": False}]
    return {
        "config_groups": {
            "R4": {"type": "hadamard", "head_dim": None if block == width else block, "apply": apply},
        }
    }


LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (_Packed(), _Integers(), _Float8(), _NVFP4(), _MXFP4())
}


def layout(name: str, shape: Sequence[int], config: dict[str, Any]) -> Shapes:
    """Return the shapes of ``encode``'s tensors for the layer ``name``'s weight [out, in], which may be unquantized;
    ``config`` is the result of ``quantization_config``."""
    if (group := _group_of(name, config)) is None:
        return {f"{name}.weight": (tuple(shape), FLOATS)}
    settings, inputs = group["weights"], group["input_activations"]
    rows, columns = shape
    kind = LAYOUTS[config["format"]]
    shape = (1,) if settings["strategy"] == _TENSOR else (rows, columns // settings.get("group_size", columns))
    scale = shape, frozenset({kind.scale_dtype})
    known = kind.shapes(name, rows, columns, settings["num_bits"]) | {f"{name}.weight_scale": scale}
    if inputs and inputs["strategy"] in INPUT_SCALES:
        known[f"{name}.{INPUT_SCALES[inputs['strategy']]}"] = (1,), frozenset({"F32"})
    if not settings["symmetric"]:
        groups, per_word = columns // settings.get("group_size", columns), 32 // settings["num_bits"]
        known[f"{name}.{_ZERO_POINT}"] = (-(-rows // per_word), groups), frozenset({"I32"})
    return known


def _group_of(layer: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings in ``config`` of a layer; None if it is not quantized. As for compressed-tensors, a group
    with the layer's name goes before one for all that is Linear."""
    groups = config["config_groups"].values()
    by = next((target for target in (layer, "Linear") if any(target in group["targets"] for group in groups)), None)
    return next((group for group in groups if by in group["targets"]), None)


def names(layer: str, config: dict[str, Any]) -> bool:
    """Return whether ``config``, the result of ``quantization_config``, describes a layer by its name."""
    return any(layer in group["targets"] for group in config["config_groups"].values())


def decode(stored: Iterable[tuple[str, Tensor]], config: dict[str, Any]) -> Iterator[tuple[str, Tensor | Quantized]]:
    """Undo ``encode`` for a complete model, of which nothing may be missing: yield each weight by its own name; those
    that were not quantized unchanged.

    ``config`` is the result of ``quantization_config``.
    """
    kind = LAYOUTS[config["format"]]
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored:
        layer, _, suffix = name.rpartition(".")
        if suffix in (*INPUT_SCALES.values(), *CACHE_SCALES.values()):  # it stands in a file of our own, too
            continue
        if suffix not in (*kind.suffixes, _ZERO_POINT) or (suffix == "weight" and tensor.dtype not in kind.code_dtypes):
            yield name, tensor
            continue
        found = parts.setdefault(layer, {})
        found[suffix] = tensor
        settings = (_group_of(layer, config) or {})["weights"]
        if len(found) == len(kind.suffixes) + (not settings["symmetric"]):
            del parts[layer]
            yield f"{layer}.weight", kind.join(found, settings["num_bits"])
