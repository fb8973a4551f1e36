"""QuantConfig: bits, quantizers and granularities of weights, activations and KV cache."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat.quant.kv_formats import DEFAULT_KV_FORMAT, KV_FORMATS, KVFormat
from qat.quant.number_format import FULL_PRECISION, Format
from qat.quant.quantizers import QUANTIZERS, quantizers_of
from qat.runtime.errors import UserError
from qat.runtime.files import read_json, write_atomically, writing
from qat.runtime.settings import LATER, is_later, recorded
from qat.runtime.table import check_choices, choice

CONFIG_FILE = "quant_config.json"
"""Name of the file beside the weights of every quantized model directory."""

CONFIG_VERSION = 1
"""Version of the files of a student or an export. Files of the first versions do not state it."""

_VERSION = "format_version"

GRIDS_FILE = "weight_grids.safetensors"
"""Name of a file beside the weights if they lie on a grid that their own largest values do not give: GPTQ's, or a
learned one."""

SCALES_FILE = "tensor_scales.safetensors"
"""Name of a file beside the weights with the scales of tensors that were fixed before training: those of NVFP4, and of
FP8 per tensor."""

_FILES = {"weight_grids": GRIDS_FILE, "tensor_scales": SCALES_FILE}
"""The entries of ``quant_config.json`` that name these files."""

_PER_LAYER = (
    "w_bits",
    "a_bits",
    "kv_bits",
    "w_quantizer",
    "a_quantizer",
    "kv_quantizer",
    "w_group_size",
    "w_scale_dtype",
    "kv_format",
)
"""The settings that an override can change."""

_SCALE_DTYPES = {
    "float32": "not rounded, unless the quantizer fixes a dtype",
    "bfloat16": "as vLLM keeps the scales of pack-quantized for a bfloat16 model",
    "float16": "as GGUF stores them, and vLLM keeps them for a float16 model",
}

_DETERMINED = ("kv_quantizer", "kv_site", "kv_granularity", "kv_rotation")
"""The settings that a KV format other than ``int`` determines."""

_SITES = {"post_rope": "what a cache stores", "pre_rope": "the paper's released code"}
_GRANULARITIES = {"token_head": "one scale per token and KV head", "token": "one per token (the paper)"}
_ROTATIONS = {"none": "the paper", "hadamard": "rotates Q, K and V over head_dim; needs post_rope"}


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a model. Norms stay in full precision; so do the embedding and the output layer (the paper's
    choice), unless ``overrides`` names them.

    Args:
        w_bits: weights: 2 to 8, or 16 for full precision
        a_bits: inputs of the linear layers: 2 to 8, or 16
        kv_bits: KV cache: 2 to 8, or 16; with another kv_format than int: the bits of its keys
        w_quantizer: quantizer of the weights
        a_quantizer: quantizer of the activations, with one scale per token, or per block of it if the quantizer has
            blocks
        kv_quantizer: quantizer of the KV cache
        w_group_size: weights share a scale in groups of this many input channels; 0 for one scale per output channel
        w_scale_dtype: dtype that weight scales are rounded to before quantizing
        kv_site: where keys and values are quantized
        kv_granularity: what shares a scale in the KV cache
        kv_rotation: rotation of the keys and values before they are quantized
        overrides: other bits, quantizers, w_group_size, w_scale_dtype or kv_format for layers whose names match a
            pattern, say {"*.down_proj": {"a_bits": 8}, "model.layers.-1.*": {"w_bits": 8}}; layers count from 0, or
            from -1 backwards, and a later pattern wins. Embedding and output layer need their full names, no pattern:
            {"model.embed_tokens": {"w_bits": 8}, "lm_head": {"w_bits": 8, "a_bits": 8}}; if they are tied, one entry is
            enough
        kv_format: how the KV cache is stored: int, defined by the other KV settings; or a format, such as an engine's,
            that fixes them; KEYS/VALUES if the engine can store them differently
    """

    w_bits: int = 4
    a_bits: int = 8
    kv_bits: int = 4
    w_quantizer: str = choice("minmax", partial(quantizers_of, "weights"))
    a_quantizer: str = choice("minmax", partial(quantizers_of, "activations"))
    kv_quantizer: str = choice("minmax", partial(quantizers_of, "kv"))
    w_group_size: int = 0
    w_scale_dtype: str = choice("float32", lambda: _SCALE_DTYPES, later=True)
    kv_site: str = choice("post_rope", lambda: _SITES)
    kv_granularity: str = choice("token_head", lambda: _GRANULARITIES)
    kv_rotation: str = choice("none", lambda: _ROTATIONS)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, metadata=LATER)
    kv_format: str = choice(DEFAULT_KV_FORMAT, lambda: KV_FORMATS, separator="/", later=True)

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "kv_bits"):
            bits = getattr(self, name)
            if bits not in (2, 3, 4, 5, 6, 7, 8, FULL_PRECISION):
                raise UserError(f"{name}={bits!r} is invalid: choose 2 to 8, or 16 for full precision.")
        check_choices(self)
        for bits, name in (("w_bits", "w_quantizer"), ("a_bits", "a_quantizer"), ("kv_bits", "kv_quantizer")):
            self._check_bits(bits, name)
        if (
            not isinstance(self.w_group_size, int) or self.w_group_size < 0 or self.w_group_size % 2
        ):  # two 4-bit codes share a byte
            raise UserError(f"w_group_size={self.w_group_size!r} is invalid: choose 0, or 32, 64, 128.")
        self._check_scales()
        if self.kv_rotation == "hadamard" and self.kv_site == "pre_rope":
            raise UserError(
                "kv_rotation=hadamard needs kv_site=post_rope: a rotation before RoPE would change the "
                "attention scores."
            )
        self._check_kv_format()
        for pattern, changes in self.overrides.items():
            self._check_override(pattern, changes)

    def _check_kv_format(self) -> None:
        """Raise UserError for a format beside settings that it determines, and for a pair that no engine has."""
        keys, values = self.kv_formats
        if keys != values and not (keys.pairs and values.engine == keys.engine):
            pairs = [name for name, known in KV_FORMATS.items() if known.pairs]
            raise UserError(
                f"No engine stores keys and values in kv_format={self.kv_format}: give one format, or two of "
                f"{', '.join(pairs)}."
            )
        if keys.adjustable:
            return
        for one in fields(self):
            if one.name in _DETERMINED and (given := getattr(self, one.name)) != one.default:
                raise UserError(
                    f"{one.name}={given} is invalid with kv_format={self.kv_format}, which determines it: leave it out."
                )
        if self.kv_bits not in (keys.bits, FULL_PRECISION):
            raise UserError(
                f"kv_bits={self.kv_bits} is invalid with kv_format={self.kv_format}: give kv_bits={keys.bits}."
            )

    def _check_bits(self, bits: str, name: str) -> None:
        """Raise UserError if the quantizer named by the setting ``name`` has not the bits of the setting ``bits``."""
        given, quantizer = getattr(self, bits), QUANTIZERS[getattr(self, name)]
        if given not in (*quantizer.allowed_bits, FULL_PRECISION):
            raise UserError(
                f"{bits}={given} is invalid with {name}={getattr(self, name)}: give {bits}="
                f"{' or '.join(map(str, quantizer.allowed_bits))}."
            )

    def _check_scales(self) -> None:
        """Raise UserError for weights' groups and scales that are not those of their quantizer."""
        quantizer, given = QUANTIZERS[self.w_quantizer], f"w_quantizer={self.w_quantizer}"
        if quantizer.group_size and self.w_group_size not in (0, quantizer.group_size):
            raise UserError(
                f"w_group_size={self.w_group_size} is invalid with {given}, whose scales are for "
                f"{quantizer.group_size} weights: leave w_group_size out."
            )
        if quantizer.scales_tensors and not quantizer.group_size and self.w_group_size:
            raise UserError(
                f"w_group_size={self.w_group_size} is invalid with {given}, which has one scale per tensor: leave "
                "w_group_size out."
            )
        if self.weights.by.scale_dtype == quantizer.scale_dtype:
            return
        if quantizer.scale_dtype != torch.float32 or quantizer.is_float:
            raise UserError(
                f"w_scale_dtype={self.w_scale_dtype} is invalid with {given}, which has scales of its own: leave "
                "w_scale_dtype out."
            )
        if not quantizer.symmetric:
            raise UserError(
                f"w_scale_dtype={self.w_scale_dtype} is invalid with {given}, which has zero points: give a symmetric "
                "quantizer, or leave w_scale_dtype out."
            )

    def _check_override(self, pattern: str, changes: Mapping[str, Any]) -> None:
        if not isinstance(changes, Mapping) or not changes.keys() <= set(_PER_LAYER):
            raise UserError(f"overrides={{{pattern!r}: {changes!r}}} is invalid: set {', '.join(_PER_LAYER)}.")
        try:
            layer = replace(self, overrides={}, **changes)
        except UserError as error:
            raise UserError(f"overrides: {pattern!r}: {error}") from error
        if bool(layer.activations.learned) != bool(self.activations.learned):
            raise UserError(
                f"overrides: {pattern!r} mixes learned and non-learned activation quantizers: give all layers "
                "a_quantizer=minmax, or all of them the learned one."
            )

    def of_layer(self, names: Iterable[str]) -> "QuantConfig":
        """Return the settings of a module, with the overrides that match one of its full names."""
        changes: dict[str, Any] = {}
        for pattern, override in self.overrides.items():
            if matches(pattern, names):
                changes |= override
        return replace(self, overrides={}, **changes) if self.overrides else self

    def of_vocabulary(self, name: str) -> "QuantConfig":
        """Return the settings of the embedding or the output layer ``name``: 16 bits, but for the overrides of this
        very name. Patterns reach neither: what ``*`` quantizes is the decoder."""
        bits = dict.fromkeys(("w_bits", "a_bits", "kv_bits"), FULL_PRECISION)
        return replace(self, overrides={}, **{**bits, **self.overrides.get(name, {})})

    def with_weights_of(self, other: "QuantConfig") -> "QuantConfig":
        """Return these settings with the number format of ``other``'s weights."""
        return replace(self, **{name: getattr(other, name) for name in _PER_LAYER if name.startswith("w_")})

    def all_settings(self) -> list["QuantConfig"]:
        """Return the settings of all layers, those of each override among them."""
        return [self, *(replace(self, overrides={}, **changes) for changes in self.overrides.values())]

    @property
    def measures_scales(self) -> bool:
        """Return whether activations, or the KV cache, need scales that are measured before training."""
        return bool(self.measured_setting)

    @property
    def measured_setting(self) -> str:
        """Return a setting, with its value, for which scales are measured before training; empty if there is none."""
        for own in self.all_settings():
            if own.activations.scales_tensors:
                return f"a_quantizer={own.a_quantizer}"
            if own.scaled_kv_formats:
                return f"kv_format={own.kv_format}"
        return ""

    def __str__(self) -> str:
        """Return the field's short form, W-A-KV: 4-8-4."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def weights(self) -> Format:
        """Return the number format of the weights."""
        group = QUANTIZERS[self.w_quantizer].group_size or self.w_group_size
        return Format(self.w_bits, self.w_quantizer, group, self.w_scale_dtype)

    @property
    def activations(self) -> Format:
        """Return the number format of the activations."""
        return Format(self.a_bits, self.a_quantizer, QUANTIZERS[self.a_quantizer].group_size)

    @property
    def kv(self) -> Format:
        """Return the number format of the KV cache, but for what an engine's ``kv_format`` determines."""
        return Format(self.kv_bits, self.kv_quantizer, QUANTIZERS[self.kv_quantizer].group_size)

    @property
    def kv_formats(self) -> tuple[KVFormat, KVFormat]:
        """Return the formats of keys and of values."""
        keys, _, values = self.kv_format.partition("/")
        settings = self.kv, self.kv_granularity, self.kv_rotation
        return KV_FORMATS[keys].of(*settings), KV_FORMATS[values or keys].of(*settings)

    @property
    def scaled_kv_formats(self) -> dict[str, KVFormat]:
        """Return the formats with a scale that is measured before training: of "keys", of "values", of both or none."""
        formats = dict(zip(("keys", "values"), self.kv_formats, strict=True)) if self.kv.quantizes else {}
        return {part: form for part, form in formats.items() if form.scales_tensors}

    @property
    def one_kv_format(self) -> bool:
        """Return whether no override changes the KV cache: engines store all layers alike."""
        return not any(name.startswith("kv_") for changes in self.overrides.values() for name in changes)

    def everywhere(self, **changes: Any) -> "QuantConfig":
        """Return these settings with ``changes`` in all layers, whatever their overrides."""
        overrides = {
            pattern: {name: changes.get(name, value) for name, value in override.items()}
            for pattern, override in self.overrides.items()
        }
        return replace(self, **changes, overrides=overrides)

    def record(self) -> dict[str, Any]:
        """Return the settings to record: the later ones only if they are not the default."""
        return recorded(self)

    @staticmethod
    def among(settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record of a QuantConfig from the settings of a run; raise KeyError if one is missing."""
        return {
            one.name: settings[one.name] for one in fields(QuantConfig) if not is_later(one) or one.name in settings
        }

    def save(self, directory: Path) -> None:
        """Write ``quant_config.json``, including whether there are grids, or scales of tensors, beside it."""
        files = {entry: name for entry, name in _FILES.items() if (directory / name).is_file()}
        with writing(directory):
            content = self.record() | files | {_VERSION: CONFIG_VERSION}
            write_atomically(directory / CONFIG_FILE, json.dumps(content, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "QuantConfig":
        """Read ``quant_config.json``; raise UserError if it names a file that is missing."""
        values = read_json(directory / CONFIG_FILE)
        if (version := values.pop(_VERSION, 1)) != CONFIG_VERSION:
            raise UserError(
                f"{directory / CONFIG_FILE} has format version {version!r}, and this program reads {CONFIG_VERSION}: "
                "install the version that wrote it."
            )
        for entry, name in _FILES.items():
            if values.pop(entry, None) and not (directory / name).is_file():
                raise UserError(
                    f"{directory} is incomplete: {name}, which defines how its weights are rounded, is missing. Copy "
                    "it again."
                )
        return cls.of(values, directory / CONFIG_FILE)

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> "QuantConfig":
        """Build the settings from the content of the file at ``path``; raise UserError if it is damaged, or of another
        version."""
        kinds = {one.name: dict if one.default is MISSING else type(one.default) for one in fields(cls)}
        if unknown := values.keys() - kinds:
            raise UserError(f"{path} has unknown settings {sorted(unknown)}: it was written by another version.")
        for name, value in values.items():
            if type(value) is not kinds[name]:
                raise UserError(f"{path} is damaged ({name} is {value!r}): copy it again, or recreate it.")
        return cls(**values)


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Return whether an override's pattern matches one of a module's full names; see ``Architecture.names``."""
    return any(fnmatchcase(name, pattern) for name in names)
