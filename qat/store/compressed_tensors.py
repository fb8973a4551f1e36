"""Integer weights in the compressed-tensors layouts, which transformers and vLLM read.

``pack-quantized``   several codes in an int32, for vLLM on GPUs. ``weight_packed`` [out, in * bits / 32],
                     ``weight_shape`` [2], ``weight_scale`` [out, groups], and, if there are zero points,
                     ``weight_zero_point`` [out * bits / 32, groups]
``int-quantized``    a code in an int8, for vLLM on CPUs. ``weight`` [out, in], ``weight_scale`` [out, 1]

Codes and scales are those that training simulated, scales in fp32 as there; no library derives them again.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.quant.config import QuantConfig
from qat.quant.number_format import FULL_PRECISION, Quantized
from qat.quant.quantizers.base import Grid
from qat.store.weight_files import FLOATS

PACKED, INTEGERS = "pack-quantized", "int-quantized"

_ZERO_POINT = "weight_zero_point"

Shapes = dict[str, tuple[tuple[int, ...], frozenset[str]]]
"""Shape of each tensor, and safetensors' names of its possible dtypes, by the tensor's name."""


class Layout(ABC):
    """The layout of a weight's codes in a file.

    Attributes:
        name: what compressed-tensors calls it
        suffixes: of the names of the tensors that hold a symmetric weight
        has_zero_points: whether engines that read it have kernels for weights with zero points
        stored_bits: the bits that the format is told, by those of the codes. Every code of 3 bits is one of 4 bits,
            with the same scale, and engines have kernels for those
        engine_a_bits: the bits to which engines that read it can round activations
    """

    name: str
    suffixes: tuple[str, ...]
    has_zero_points: bool = False
    stored_bits: ClassVar[Mapping[int, int]]
    engine_a_bits: tuple[int, ...]

    def served_a_bits(self, quant: QuantConfig) -> int:
        """Return the bits to which an engine rounds activations: those that were trained, or else 8; 16 beside weights
        with zero points, for which kernels with integer activations have no place."""
        if not quant.weights.symmetric:
            return FULL_PRECISION
        return quant.a_bits if quant.a_bits in (FULL_PRECISION, *self.engine_a_bits) else 8

    def bits(self, quant: QuantConfig) -> int:
        """Return the bits that the format is told. With zero points there are kernels for 4 and 8."""
        bits = self.stored_bits[quant.weights.code_bits]
        return bits if quant.weights.symmetric else max(bits, 4)

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
        grouped = {"strategy": "group", "group_size": quant.weights.group_size}
        weights = {
            "num_bits": self.bits(quant),
            "type": "int",
            "symmetric": quant.weights.symmetric,
            "dynamic": False,
            **(grouped if quant.weights.group_size else {"strategy": "channel"}),
        }
        activations = {
            "num_bits": self.served_a_bits(quant),
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
        return {
            "targets": [],
            "weights": weights,
            "input_activations": activations if self.served_a_bits(quant) != FULL_PRECISION else None,
            "format": self.name,
        }

    @abstractmethod
    def encode(self, name: str, quantized: Quantized, quant: QuantConfig) -> dict[str, Tensor]:
        """Return the tensors that hold the layer ``name``'s weight [out, in]."""

    @abstractmethod
    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        """Return the shapes of ``encode``'s tensors, except the scale, for a weight [rows, columns] of ``bits`` stored
        bits."""

    @abstractmethod
    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        """Undo ``encode``; ``parts`` are the tensors by their suffixes."""


class _Packed(Layout):
    """For 3, 5, 6 and 7 bits in an int32 there are two other layouts, compressed-tensors' and vLLM's."""

    name = PACKED
    suffixes = "weight_packed", "weight_scale", "weight_shape"
    has_zero_points = True
    stored_bits: ClassVar[Mapping[int, int]] = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
    engine_a_bits = 4, 8

    def encode(self, name: str, quantized: Quantized, quant: QuantConfig) -> dict[str, Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # takes seconds to import

        codes, (scale, zero_point) = quantized
        bits = self.bits(quant)
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

    name = INTEGERS
    suffixes = "weight", "weight_scale"
    stored_bits: ClassVar[Mapping[int, int]] = dict.fromkeys(range(2, 9), 8)
    engine_a_bits = (8,)

    def encode(self, name: str, quantized: Quantized, quant: QuantConfig) -> dict[str, Tensor]:
        return {f"{name}.weight": quantized.codes, f"{name}.weight_scale": quantized.grid.scale}

    def shapes(self, name: str, rows: int, columns: int, bits: int) -> Shapes:
        return {f"{name}.weight": ((rows, columns), frozenset({"I8"}))}

    def join(self, parts: Mapping[str, Tensor], bits: int) -> Quantized:
        return Quantized(parts["weight"], Grid(parts["weight_scale"]))


def transform_config(layers: list[str], width: int, block: int) -> dict[str, Any]:
    """Return the ``transform_config`` of R4: these layers' inputs, of ``width``, are to be multiplied by Sylvester's
    Hadamard matrix over sqrt(block) in blocks of ``block``. Its inverse is in their weights."""
    apply = [{"targets": layers, "location": "input", "inverse": False}]
    return {
        "config_groups": {
            "R4": {"type": "hadamard", "head_dim": None if block == width else block, "apply": apply},
        }
    }


LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (_Packed(), _Integers())}


def layout(name: str, shape: Sequence[int], config: dict[str, Any]) -> Shapes:
    """Return the shapes of ``encode``'s tensors for the layer ``name``'s weight [out, in], which may be unquantized;
    ``config`` is the result of ``quantization_config``."""
    if (settings := _weights_of(name, config)) is None:
        return {f"{name}.weight": (tuple(shape), FLOATS)}
    rows, columns = shape
    groups, bits = columns // settings.get("group_size", columns), settings["num_bits"]
    parts = LAYOUTS[config["format"]].shapes(name, rows, columns, bits)
    parts[f"{name}.weight_scale"] = (rows, groups), frozenset({"F32"})
    if not settings["symmetric"]:
        parts[f"{name}.{_ZERO_POINT}"] = (-(-rows // (32 // bits)), groups), frozenset({"I32"})
    return parts


def _weights_of(layer: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings in ``config`` of a layer's weight; None if it is not quantized. As for compressed-tensors, a
    group with the layer's name goes before one for all that is Linear."""
    groups = config["config_groups"].values()
    by = next((target for target in (layer, "Linear") if any(target in group["targets"] for group in groups)), None)
    return next((group["weights"] for group in groups if by in group["targets"]), None)


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
        if suffix not in (*kind.suffixes, _ZERO_POINT) or (suffix == "weight" and tensor.dtype != torch.int8):
            yield name, tensor
            continue
        found = parts.setdefault(layer, {})
        found[suffix] = tensor
        settings = _weights_of(layer, config) or {}
        if len(found) == len(kind.suffixes) + (not settings["symmetric"]):
            del parts[layer]
            yield f"{layer}.weight", kind.join(found, settings["num_bits"])
