"""QuantConfig: bits, quantizers and granularities of weights, activations and KV cache."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qat.quant.quantizers import FULL_PRECISION, Format
from qat.runtime.errors import UserError, check_choice
from qat.runtime.files import writing

CONFIG_FILE = "quant_config.json"
"""Lies beside the weights of every quantized model directory."""


_CHOICES = {
    "w_quantizer": ("minmax", "minmax_asymmetric", "statsq"),
    "a_quantizer": ("minmax", "minmax_asymmetric", "lsq"),
    "kv_quantizer": ("minmax", "minmax_asymmetric"),
    "kv_site": ("post_rope", "pre_rope"),
    "kv_granularity": ("token_head", "token"),
    "kv_rotation": ("none", "hadamard"),
}


@dataclass(frozen=True)
class QuantConfig:
    """What is quantized, and how. Embedding, norms and lm_head stay in full precision (the paper's choice).

    Args:
        w_bits: weights: 2 to 8, or 16 for full precision
        a_bits: inputs of the linear layers: 2 to 8, or 16
        kv_bits: KV cache: 2 to 8, or 16
        w_quantizer: minmax (symmetric, no clipping: the paper), minmax_asymmetric, or statsq (clips; the paper's
            comparison), with one scale per output channel
        a_quantizer: minmax, minmax_asymmetric (one scale per token), or lsq (one learned step per layer; clips)
        kv_quantizer: minmax or minmax_asymmetric
        w_group_size: weights share a scale in groups of so many input channels; 0 for one scale per output channel
        kv_site: post_rope (what a cache stores) or pre_rope (the paper's released code)
        kv_granularity: token_head (one scale per token and KV head) or token (one per token, the paper)
        kv_rotation: none (the paper) or hadamard (rotates Q, K and V over head_dim; needs post_rope)
    """

    w_bits: int = 4
    a_bits: int = 8
    kv_bits: int = 4
    w_quantizer: str = "minmax"
    a_quantizer: str = "minmax"
    kv_quantizer: str = "minmax"
    w_group_size: int = 0
    kv_site: str = "post_rope"
    kv_granularity: str = "token_head"
    kv_rotation: str = "none"

    def __post_init__(self) -> None:
        for name in ("w_bits", "a_bits", "kv_bits"):
            bits = getattr(self, name)
            if bits not in (2, 3, 4, 5, 6, 7, 8, FULL_PRECISION):
                raise UserError(f"{name}={bits} is not possible: give 2 to 8, or 16 for full precision.")
        check_choice(self, **_CHOICES)
        if self.w_group_size < 0 or self.w_group_size % 2:  # two 4-bit codes lie in a byte
            raise UserError(f"w_group_size={self.w_group_size} is not possible: give 0, or 32, 64, 128.")
        if self.kv_rotation == "hadamard" and self.kv_site == "pre_rope":
            raise UserError(
                "kv_rotation=hadamard needs kv_site=post_rope: a rotation before RoPE would change the "
                "attention scores."
            )

    def __str__(self) -> str:
        """The field's short form, W-A-KV: 4-8-4."""
        return f"{self.w_bits}-{self.a_bits}-{self.kv_bits}"

    @property
    def weights(self) -> Format:
        return Format(self.w_bits, self.w_quantizer, self.w_group_size)

    @property
    def activations(self) -> Format:
        return Format(self.a_bits, self.a_quantizer)

    @property
    def kv(self) -> Format:
        return Format(self.kv_bits, self.kv_quantizer)

    def save(self, directory: Path) -> None:
        with writing(directory):
            (directory / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "QuantConfig":
        path = directory / CONFIG_FILE
        values = json.loads(path.read_text())
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"{path} has unknown settings {sorted(unknown)}: it was written by another version.")
        return cls(**values)
