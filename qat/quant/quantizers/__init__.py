"""Quantizers: one file each, and one line here."""

from qat.quant.quantizers.base import Quantizer
from qat.quant.quantizers.fp8 import FP8
from qat.quant.quantizers.fp8_tensor import FP8Tensor
from qat.quant.quantizers.ggml_q4_0 import GgmlQ4_0
from qat.quant.quantizers.ggml_q5_0 import GgmlQ5_0
from qat.quant.quantizers.ggml_q8_0 import GgmlQ8_0
from qat.quant.quantizers.lsq import LSQ
from qat.quant.quantizers.minmax import MinMax
from qat.quant.quantizers.minmax_asymmetric import MinMaxAsymmetric
from qat.quant.quantizers.minmax_full import MinMaxFull
from qat.quant.quantizers.minmax_signed import MinMaxSigned
from qat.quant.quantizers.mse import MSE
from qat.quant.quantizers.mxfp4 import MXFP4
from qat.quant.quantizers.nvfp4 import NVFP4
from qat.quant.quantizers.nvfp4_4over6 import NVFP4FourOverSix
from qat.quant.quantizers.seq import SEQ
from qat.quant.quantizers.statsq import StatsQ
from qat.quant.quantizers.ternary import Ternary
from qat.runtime.table import Table

QUANTIZERS: Table[Quantizer] = Table(
    "quantizer",
    minmax=MinMax(),
    minmax_asymmetric=MinMaxAsymmetric(),
    minmax_full=MinMaxFull(),
    minmax_signed=MinMaxSigned(),
    mse=MSE(),
    statsq=StatsQ(),
    seq=SEQ(),
    ternary=Ternary(),
    lsq=LSQ(),
    ggml_q4_0=GgmlQ4_0(),
    ggml_q5_0=GgmlQ5_0(),
    ggml_q8_0=GgmlQ8_0(),
    nvfp4=NVFP4(),
    nvfp4_4over6=NVFP4FourOverSix(),
    mxfp4=MXFP4(),
    fp8=FP8(),
    fp8_tensor=FP8Tensor(),
)


def quantizers_of(part: str) -> Table[Quantizer]:
    """Return the quantizers for ``part``: "weights", "activations" or "kv"."""
    return QUANTIZERS.those(lambda quantizer: part in quantizer.parts)
