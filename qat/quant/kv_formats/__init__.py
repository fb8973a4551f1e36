"""KV cache formats: one file each, and one line here."""

from qat.quant.kv_formats.base import KVFormat
from qat.quant.kv_formats.ggml import Q8_0, Iq4Nl, Minimum, Signed
from qat.quant.kv_formats.integers import Integers
from qat.quant.kv_formats.nvfp4 import NVFP4
from qat.quant.kv_formats.vllm_fp8 import VllmFp8
from qat.quant.kv_formats.vllm_fp8_scaled import VllmFp8Scaled
from qat.quant.kv_formats.vllm_fp8_unscaled import VllmFp8Unscaled
from qat.quant.kv_formats.vllm_int4 import VllmInt4
from qat.quant.kv_formats.vllm_int8 import VllmInt8
from qat.quant.number_format import Format
from qat.runtime.table import Table

DEFAULT_KV_FORMAT = "int"
"""The format that the other settings of the KV cache determine."""

KV_FORMATS: Table[KVFormat] = Table(
    "KV cache format",
    int=Integers(Format(4), "token_head", "none"),
    vllm_int4=VllmInt4(),
    vllm_int8=VllmInt8(),
    vllm_fp8=VllmFp8(),
    vllm_fp8_unscaled=VllmFp8Unscaled(),
    vllm_fp8_scaled=VllmFp8Scaled(Format(8, "fp8_tensor")),
    ggml_q8_0=Q8_0(),
    ggml_q4_0=Signed("q4_0", 4),
    ggml_q5_0=Signed("q5_0", 5),
    ggml_q4_1=Minimum("q4_1", 4),
    ggml_q5_1=Minimum("q5_1", 5),
    ggml_iq4_nl=Iq4Nl(),
    nvfp4=NVFP4(Format(4, "nvfp4", 16)),
)
