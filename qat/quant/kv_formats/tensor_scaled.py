"""The base of formats with a scale for all keys of a layer, and one for all its values.

Both are measured before training and stay: scales that followed the text would look at later tokens, and cached
decoding would differ from the full forward pass. Codes, scales and clipping are those of a quantizer for activations.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.quant.kv_formats.base import KVFormat
from qat.quant.number_format import Format, dequantize, fake_quantize, quantize
from qat.quant.packing import pack, unpack


@dataclass(frozen=True)
class TensorScaled(KVFormat):
    """A format without a rotation.

    Args:
        form: the number format, of a quantizer that ``scales_tensors``
    """

    form: Format
    scales_tensors = True

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.form.bits

    @property
    def margin(self) -> float:  # type: ignore[override]
        return self.form.by.margin

    @property
    def tensor_scale(self) -> float | None:  # type: ignore[override]
        return self.form.tensor_scale

    def scale_of_tensor(self, largest: float) -> float:
        return self.form.by.scale_of_tensor(largest)

    def for_tensor(self, scale: float) -> "TensorScaled":
        return replace(self, form=replace(self.form, tensor_scale=scale))

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return fake_quantize(x, self.form)

    def encode(self, x: Tensor) -> Tensor:
        return pack(quantize(x, self.form), self.form)

    def decode(self, packed: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
        return dequantize(unpack(packed, self.form), dtype)
