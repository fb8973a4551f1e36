"""ggml's Q5_0: Q4_0 with codes in [-16, 15] and d = m / -16."""

from qat.quant.quantizers.ggml_q4_0 import GgmlQ4_0


class GgmlQ5_0(GgmlQ4_0):
    meaning = "llama.cpp's Q5_0: Q4_0 with 5 bits"
    allowed_bits = (5,)
