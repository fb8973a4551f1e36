"""NVFP4: e2m1 numbers in blocks of 16 channels of a head. Their e4m3 scales are in units of one number for all keys of
a layer, and one for all its values, which are measured before training.

The rule is that of weights and activations (qat.quant.quantizers.nvfp4). vLLM stores such a cache only on GPUs of
compute capability 10.0, in a layout that we cannot check: no engine is named.
"""

from dataclasses import dataclass

from qat.quant.kv_formats.tensor_scaled import TensorScaled
from qat.runtime.errors import UserError


@dataclass(frozen=True)
class NVFP4(TensorScaled):
    type = ""
    meaning = "NVFP4 in blocks of 16 channels, one scale per layer for keys and one for values; for qat.load"

    def check(self, head_dim: int) -> None:
        if head_dim % self.form.group_size:
            raise UserError(
                f"kv_format=nvfp4 has blocks of {self.form.group_size} channels, and this model's heads have "
                f"{head_dim}: give kv_format=int."
            )
