"""llama.cpp's blocks: our codes and scales are those of its own functions, which the package xllamacpp exports."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_quantizers import same

from qat.quant import fused, number_format
from qat.quant.number_format import Format, Quantized, dequantize, inside, quantize, round_to_grid
from qat.store.gguf_files import blocks

Q4_0, Q5_0, Q8_0 = (Format(bits, f"ggml_q{bits}_0", 32) for bits in (4, 5, 8))
FORMATS = [Q4_0, Q5_0, Q8_0]
BLOCK_BYTES = {4: 18, 5: 22, 8: 34}

package = importlib.util.find_spec("xllamacpp")
GGML = ctypes.CDLL(str(next(Path(package.submodule_search_locations[0]).glob("xllamacpp.*.so"))))
GGML.ggml_cpu_init()


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return x.ctypes.data_as(ctypes.c_void_p)


def ggmls(x: torch.Tensor, bits: int) -> np.ndarray:
    """The bytes of x [rows, columns] as the engine on this processor quantizes it: uint8 [rows, bytes]."""
    x = np.ascontiguousarray(x.float().numpy())
    found = np.zeros((len(x), x.shape[1] // 32 * BLOCK_BYTES[bits]), np.uint8)
    getattr(GGML, f"quantize_row_q{bits}_0")(pointer(x), pointer(found), ctypes.c_int64(x.size))
    return found


def ours(quantized: Quantized, form: Format) -> np.ndarray:
    return blocks(quantized.codes, quantized.grid.scale, gguf.GGMLQuantizationType[f"Q{form.bits}_0"])


ORDINARY = st.floats(-1, 1, width=32)
EXTREME = st.floats(width=32, allow_nan=False, allow_infinity=False)
"""Denormal ones, and those whose scale overflows or underflows in fp16, zeros of both signs, and ties."""
FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.9375, 1e-42, -1e-42, 2**-23, 3e38, 1e-7])
BLOCKS = st.one_of(*(arrays("float32", (2, 64), elements=kind) for kind in (ORDINARY, EXTREME, FEW)))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # infinite scales
@given(BLOCKS, st.sampled_from(FORMATS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_and_scales_are_ggmls(x, form, dtype):
    """Whatever the dtype of x: the engine's are those of its values in fp32."""
    x = torch.from_numpy(x).to(dtype).nan_to_num(0.0, 0.0, 0.0)
    found = ours(quantize(x, form), form)
    assert np.array_equal(found, ggmls(x, form.bits))
    values = torch.from_numpy(gguf.quants.dequantize(found, gguf.GGMLQuantizationType[f"Q{form.bits}_0"]))
    same(round_to_grid(x.float(), form)[0], values)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_and_scales_are_the_gguf_packages(form):
    """Of Q8_0 it rounds halves away from zero, and by another multiplier: one code or none in a hundred thousand."""
    x = torch.randn(512, 320, generator=torch.Generator().manual_seed(form.bits)) * torch.logspace(-6, 3, 512)[:, None]
    found = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[f"Q{form.bits}_0"])
    assert (found != ours(quantize(x, form), form)).sum() <= (3 if form == Q8_0 else 0)


@pytest.mark.parametrize(
    ("form", "known"),
    [
        (Q4_0, "00b8cf379d047be248bf269df36ad148ae15"),
        (Q5_0, "00b4d54aa5568f5d3b08e6b3916e4c19f7c4a27f5d2a"),
        (Q8_0, "08288518ad40d467fc9124b94be073089d30c457ec7f14a93cd063f88d20b547dc6f"),
    ],
    ids=str,
)
def test_known_bytes(form, known):
    """Also where xllamacpp is another version."""
    x = ((37 * torch.arange(32) % 64) - 31)[None] / 8
    assert ours(quantize(x, form), form).tobytes().hex() == known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [Q4_0, Q5_0], ids=str)
def test_what_is_clipped_gets_no_gradient(form, dtype):
    """It is more than half a step beyond the last code on the other side of the extreme element."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized = quantize(x, form)
    passes = inside(x, form, quantized.grid)
    steps = x.double() / quantized.grid.scale.double().repeat_interleave(32, -1)
    assert not passes.all()
    assert (steps[passes] < form.qmax + 0.51).all()  # the scale is rounded to fp16
    assert (steps[~passes] > form.qmax + 0.49).all()
    assert (quantized.codes[~passes] == form.qmax).all()


@pytest.mark.parametrize(
    ("form", "dtype", "function"),
    [
        (Q4_0, torch.float32, number_format._fused_round),
        (Q4_0, torch.bfloat16, number_format._fused_quantize),
        (Q8_0, torch.bfloat16, number_format._fused_round),
    ],
    ids=str,
)
def test_compiled_equals_eager_bit_for_bit(form, dtype, function):
    """The scale is rounded to fp16 in both, and the first of several extreme elements gives its sign."""
    needs_compiler()
    x = torch.randn(65, 32, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 3], x[3], x[4] = 0, 1e30, torch.arange(32) / 2 - 8, 1e-42
    x[5, ::3], x[6], x[7, 9] = -x[5].abs().max(), -0.0, torch.nan
    x[8:40] = (8 * x[8:40]).round()  # many ties
    eager = function.__wrapped__
    compiled = torch.compile(eager, dynamic=True, options=fused.options())
    arguments = x.to(dtype), form.by, form.qmax
    for one, other in zip(compiled(*arguments), eager(*arguments), strict=True):
        assert one is other is None or same(one, other) is None


def test_zeros_stay_zeros_and_small_blocks_become_zeros():
    for form in FORMATS:
        for x in (torch.zeros(1, 32), torch.full((1, 32), 1e-9)):
            values = dequantize(quantize(x, form), torch.float32)
            assert not values.any()
            assert values.isfinite().all()
