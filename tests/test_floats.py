"""NVFP4, MXFP4 and FP8: our codes and scales are those of compressed-tensors, and what training rounds to is what is
stored."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from compiler import needs_compiler
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

torch._dynamo.config.disable = True  # compressed-tensors rounds to e2m1 by a compiled function
from compressed_tensors.compressors.mx_utils import compress_mx_scale  # noqa: E402
from compressed_tensors.quantization import preset_name_to_scheme  # noqa: E402
from compressed_tensors.quantization.lifecycle import forward as theirs  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402

from qat.quant import fused, number_format  # noqa: E402
from qat.quant.number_format import (  # noqa: E402
    Format,
    dequantize,
    fake_quantize,
    grid_of,
    inside,
    may_clip,
    quantize,
    round_to_grid,
)
from qat.quant.packing import pack, unpack  # noqa: E402
from qat.quant.quantizers.minifloat import E4M3, nearest, nearest_e4m3  # noqa: E402

torch._dynamo.config.disable = False

FORMATS = {
    "nvfp4": Format(4, "nvfp4", 16, tensor_scale=672.0),
    "nvfp4_4over6": Format(4, "nvfp4_4over6", 16, tensor_scale=672.0),
    "mxfp4": Format(4, "mxfp4", 32),
    "fp8": Format(8, "fp8"),
    "fp8 in groups": Format(8, "fp8", 32),
    "fp8_tensor": Format(8, "fp8_tensor", tensor_scale=2.0**-6),
}
SCHEMES = {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4A16", "fp8": "FP8_DYNAMIC"}
X = ((37 * torch.arange(64)) % 64 - 31).float()[None] / 8
"""The vector whose bytes are recorded below, of the packages themselves: compressed-tensors 0.17.0, ModelOpt 0.47.0,
torchao 0.18.0."""


def same(a, b):
    torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)


def stored(codes, form) -> str:
    """Two codes in a byte, the first in its low half; one of 8 bits."""
    bits = form.by.to_bits(codes).view(torch.uint8).flatten()
    return bytes((bits[0::2] | bits[1::2] << 4 if form.bits == 4 else bits).tolist()).hex()


def scales_stored(grid, form) -> str:
    return bytes(form.by_on(torch.device("cpu")).scale_to_bits(grid.scale).flatten().tolist()).hex()


SPREAD = st.sampled_from([1.0, 1e-3, 1e3, 1e-12, 1e9, 1e-30, 1e-39])


@st.composite
def blocks(draw):
    """Rows of 64 whose blocks are ordinary, sparse, zero, tiny, denormal or huge, on the halves between codes too."""
    values = draw(arrays("float32", (3, 64), elements=st.floats(-8, 8, width=16)))
    x = torch.from_numpy(values).view(3, 4, 16)
    return (x * torch.tensor(draw(st.lists(SPREAD, min_size=12, max_size=12))).view(3, 4, 1)).view(3, 64)


def compressed_tensors(x, name, tensor_scale=None):
    """Scales as fp32, and codes as values, of compressed-tensors' own functions."""
    args = preset_name_to_scheme(SCHEMES[name], ["Linear"]).weights
    rows = x.unflatten(-1, (-1, args.group_size)) if args.group_size else x
    scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args, tensor_scale)
    if not args.group_size:
        scale, zero = scale[:, None], zero[:, None]
    return scale, theirs.quantize(x, scale, zero, args, global_scale=tensor_scale)


@given(blocks(), st.sampled_from([1.0, 672.0, 2.0**-20, 2.0**9, 5e4]))
def test_nvfp4_is_that_of_compressed_tensors(x, tensor_scale):
    form = Format(4, "nvfp4", 16, tensor_scale=tensor_scale)
    scale, codes = compressed_tensors(x, "nvfp4", torch.tensor([tensor_scale]))
    ours = quantize(x, form)
    same(ours.codes, codes * 2)
    assert scales_stored(ours.grid, form) == bytes(scale.to(E4M3).view(torch.uint8).flatten().tolist()).hex()


@given(blocks())
def test_mxfp4_is_that_of_compressed_tensors(x):
    scale, codes = compressed_tensors(x, "mxfp4")
    ours = quantize(x, FORMATS["mxfp4"])
    same(ours.codes, codes * 2)
    same(ours.grid.scale * 2, scale)
    exponents = compress_mx_scale(scale, torch.uint8)
    assert scales_stored(ours.grid, FORMATS["mxfp4"]) == bytes(exponents.flatten().tolist()).hex()


@given(blocks())
def test_fp8_is_that_of_compressed_tensors_down_to_the_least_scale(x):
    """Which is vLLM's, and keeps the same values: e4m3 of what is larger than the smallest normal number."""
    scale, codes = compressed_tensors(x, "fp8")
    ours, large = quantize(x, FORMATS["fp8"]), x.abs().amax(-1) >= 2**-9
    same(ours.codes[large], codes[large])
    same(ours.grid.scale[large], scale[large])
    assert (ours.grid.scale >= 1 / (448 * 512)).all()


def test_recorded_bytes():
    """-0 has no byte of its own here: it is the 8 in 6cf8 and 85."""
    nvfp4, mxfp4, fp8 = (quantize(X, FORMATS[name]) for name in ("nvfp4", "mxfp4", "fp8"))
    assert scales_stored(nvfp4.grid, FORMATS["nvfp4"]) == "7e7e7e7d"
    theirs = "2f5e6cf8d3b6174e6d7ae2c5963f5e7be0d4a6275e6cf9e3c5074f6d7be1d5a6"
    assert stored(nvfp4.codes, FORMATS["nvfp4"]) == theirs.replace("6cf8", "6cf0")
    assert scales_stored(mxfp4.grid, FORMATS["mxfp4"]) == "7f7f"
    theirs = "2e4d5be8c2a4063d5c69d1b4852e4c6a"
    assert stored(mxfp4.codes, FORMATS["mxfp4"])[:32] == theirs.replace("e8", "e0").replace("85", "05")
    assert stored(fp8.codes, FORMATS["fp8"])[:32] == "fe6af976f27bd6fc70f878ee7d5efb72"


@pytest.mark.parametrize("name", FORMATS)
@given(x=blocks(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_fake_equals_stored_bit_for_bit(name, x, dtype):
    form, x = FORMATS[name], x.to(dtype).nan_to_num(0.0, 0.0, 0.0)
    values, grid = round_to_grid(x, form)
    assert values.dtype == dtype
    quantized = quantize(x, form)
    assert quantized.codes.dtype == form.by.code_dtype
    same(values, dequantize(quantized, dtype))
    same(values, fake_quantize(x, form))
    same(values, round_to_grid(x, form, grid)[0])  # what backward relies on
    same(quantized.codes, quantize(x, form, grid).codes)
    read = unpack(pack(quantized, form), form)
    same(values, dequantize(read, dtype))
    same(quantized.grid.scale, read.grid.scale)
    same(dequantize(quantize(x.float(), form), dtype), values)  # fp32 arithmetic, whatever the dtype


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
@given(x=blocks())
def test_values_of_4_bits_are_exact_in_bf16_and_stay_what_they_are(name, x):
    """With a tensor's scale that is a power of two, as ours are."""
    form = FORMATS[name] if name == "mxfp4" else Format(4, "nvfp4", 16, tensor_scale=2.0**9)
    values, grid = round_to_grid(x, form)
    normal = (values == 0) | (values.abs() >= 2.0**-126)
    same(values.bfloat16()[normal], values[normal])
    same(round_to_grid(values, form, grid)[0], values)


@given(st.floats(1e-25, 1e25), st.floats(1.0, 2.0))
def test_a_tensor_fits_its_scale_and_may_grow_to_twice_its_size(largest, growth):
    scale = FORMATS["nvfp4"].by.scale_of_tensor(largest)
    assert math.frexp(scale)[0] == 0.5
    assert largest * growth / 6 * scale <= 448
    x = torch.full((1, 16), largest * growth)
    form = Format(4, "nvfp4", 16, tensor_scale=scale)
    torch.testing.assert_close(round_to_grid(x, form)[0], x, rtol=2**-4, atol=0)
    assert inside(x, form, grid_of(x, form)).all()


def test_what_saturates_gets_no_gradient():
    form = Format(4, "nvfp4", 16, tensor_scale=1.0)
    x = torch.linspace(0, 3200, 16)[None].requires_grad_()  # 448 * 6 is 2688, and up to 448 * 7 rounds to it
    y = fake_quantize(x, form)
    y.sum().backward()
    assert y.max() == 2688
    assert x.grad.flatten().tolist() == [float(value <= 3136) for value in x.flatten()]


@given(blocks(), st.sampled_from([1.0, 672.0, 2.0**-20, 2.0**9, 5e4]))
def test_where_the_scales_say_so_nothing_was_clipped(x, tensor_scale):
    form = Format(4, "nvfp4", 16, tensor_scale=tensor_scale)
    grid = grid_of(x, form)
    assert may_clip(form, grid) or inside(x, form, grid).all()


def test_scales_say_so_but_for_the_smallest_and_the_largest():
    form = Format(4, "nvfp4", 16, tensor_scale=512.0)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert not may_clip(form, grid_of(x, form))
    assert may_clip(form, grid_of(torch.cat([x, x[:1] * 100]), form))
    assert may_clip(form, grid_of(torch.cat([x, x[:1] * 1e-5]), form))
    assert may_clip(form, grid_of(torch.cat([x, x[:1] * math.nan]), form))


@given(blocks(), st.sampled_from([1.0, 672.0, 2.0**9, 5e4]))
def test_four_over_six_takes_the_better_of_two_scales_that_nvfp4_can_store(x, tensor_scale):
    forms = [Format(4, name, 16, tensor_scale=tensor_scale) for name in ("nvfp4_4over6", "nvfp4")]
    better, usual = (quantize(x, form) for form in forms)
    error, most = (
        (dequantize(one, torch.float64) - x).unflatten(-1, (-1, 16)).square().sum(-1) for one in (better, usual)
    )
    changed = better.grid.scale != usual.grid.scale
    rounding = 16 * (usual.grid.scale.double() * 2.0**-20).square()
    assert (error <= most + rounding).all()
    assert torch.equal(error[~changed], most[~changed])
    assert may_clip(forms[0], better.grid) or inside(x, forms[0], better.grid).all()
    read = unpack(pack(better, forms[0]), forms[1])
    same(dequantize(read, torch.float32), round_to_grid(x, forms[0])[0])


def test_four_over_six_errs_less():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    error = {
        name: (round_to_grid(x, Format(4, name, 16, tensor_scale=256.0))[0] - x).square().mean()
        for name in ("nvfp4", "nvfp4_4over6")
    }
    assert error["nvfp4_4over6"] < 0.9 * error["nvfp4"]


@given(blocks(), st.integers(-12, 12))
def test_fp8_of_a_tensor_is_that_of_compressed_tensors_and_clips(x, exponent):
    """Whose scale is any number; and dividing by ours is multiplying by its inverse."""
    form, scale = Format(8, "fp8_tensor", tensor_scale=2.0**exponent), torch.tensor([2.0**exponent])
    args = preset_name_to_scheme("FP8", ["Linear"]).weights
    codes = theirs.quantize(x, scale, torch.zeros(1), args)
    values, grid = round_to_grid(x, form)
    same(quantize(x, form).codes, codes)
    same(values, codes.float() * scale)
    same(values.bfloat16(), values)
    assert torch.equal(inside(x, form, grid), x.abs() <= 448 * scale)


@given(st.floats(1e-25, 1e25))
def test_a_tensor_in_fp8_fits_its_scale(largest):
    scale = FORMATS["fp8_tensor"].by.scale_of_tensor(largest)
    assert math.frexp(scale)[0] == 0.5
    assert 224 * (1 - 1e-6) <= largest / scale <= 448 * (1 + 1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_nan_stays_in_its_own_group_and_a_scale_that_nobody_set_is_noticed(name):
    x = torch.ones(2, 32)
    x[0, 3] = math.nan
    values = round_to_grid(x, FORMATS[name])[0]
    lost = slice(3, 4) if name == "fp8_tensor" else slice(16)  # its scale does not follow the values
    assert values[0, lost].isnan().all()
    assert values[1].isfinite().all()
    read = dequantize(unpack(pack(quantize(x, FORMATS[name]), FORMATS[name]), FORMATS[name]), x.dtype)
    assert read[0, lost].isnan().all()
    assert read[1].isfinite().all()
    if FORMATS[name].scales_tensors:
        assert round_to_grid(x, replace(FORMATS[name], tensor_scale=None))[0].isnan().all()


@pytest.mark.parametrize(("mantissa", "normal", "largest"), [(1, 1.0, 6.0), (3, 2.0**-6, 448.0)])
def test_rounding_is_to_the_nearest_number_and_to_even_between_two(mantissa, normal, largest):
    """Against all numbers of the format, written down: sign, then exponents times mantissas."""
    step = normal * 2.0**-mantissa
    numbers = [step * i for i in range(2**mantissa)]
    numbers += [normal * 2**e * (1 + m / 2**mantissa) for e in range(16) for m in range(2**mantissa)]
    numbers = torch.tensor([number for number in numbers if number <= largest])
    middles = (numbers[1:] + numbers[:-1]) / 2
    even = torch.where(torch.arange(len(middles)) % 2 == 0, numbers[:-1], numbers[1:])
    round_ = partial(nearest, mantissa=mantissa, normal=normal, largest=largest)
    same(round_(numbers), numbers)
    same(round_(-middles), -even)
    below, above = (torch.nextafter(middles, torch.tensor(to)) for to in (-math.inf, math.inf))
    same(round_(below), numbers[:-1])
    same(round_(above), numbers[1:])
    assert round_(torch.tensor([largest * 1.1, -1e30])).tolist() == [largest, -largest]


@pytest.mark.parametrize(("mantissa", "normal", "largest"), [(1, 2.0, 12.0), (3, 2.0**-6, 448.0)])
def test_rounding_has_the_bits_of_a_division_by_the_step(mantissa, normal, largest):
    """The sign of zero and NaN for infinity among them; for all numbers of bf16, and many of fp32."""
    bf16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([bf16, bits.to(torch.int32).view(torch.float32)])
    step = torch.ldexp(torch.ones_like(x), torch.frexp(x.abs().clamp(min=normal)).exponent - 1 - mantissa)
    step = torch.where(x.isfinite(), step, torch.nan)
    expected, got = (torch.round(x / step) * step).clamp(-largest, largest), nearest(x, mantissa, normal, largest)
    same(got, expected)
    assert torch.equal(got.signbit()[x.isfinite()], expected.signbit()[x.isfinite()])


@given(st.floats(-448, 448, width=32))
def test_rounding_to_e4m3_is_torchs_cast(x):
    same(nearest_e4m3(torch.tensor([x])), torch.tensor([x]).to(E4M3))


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_4over6", "mxfp4", "fp8", "fp8_tensor"])
def test_compiled_equals_eager_bit_for_bit(name):
    """Denormal and huge blocks, zeros, halves and NaN; and another scale of the tensor compiles nothing again."""
    needs_compiler()
    form = FORMATS[name]
    x = torch.randn(66, form.group_size or 48, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-44, 30, len(x))[:, None]
    x[1], x[2], x[3, 3] = 0, torch.arange(x.shape[1]) / 4, math.nan
    function = number_format._fused_round.__wrapped__
    compiled = torch.compile(function, dynamic=True, options=fused.options())
    of_codes = torch.compile(number_format._fused_quantize.__wrapped__, dynamic=True, options=fused.options())
    graphs = torch._dynamo.utils.counters["stats"]
    made = []
    for scale in (512.0, 3.0, 1e-3):
        by = Format(form.bits, form.quantizer, form.group_size, tensor_scale=scale).by_on(x.device)
        with torch.no_grad():
            values, grid, _ = compiled(x, by, form.qmax)
            codes = of_codes(x, by, form.qmax)[0]
        expected, expected_grid, _ = function(x, by, form.qmax)
        same(values, expected)
        same(grid, expected_grid)
        sound = torch.arange(len(x)) != 3
        same(codes[sound], by.encode(x, form.qmax)[0][sound])
        made.append(graphs["unique_graphs"])
    assert made[0] == made[-1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and QAT_TEST_GPU=1")
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_eager_and_compiled_gives_the_bits_of_the_cpu(name):
    form = FORMATS[name]
    x = torch.randn(64, form.group_size or 576, generator=torch.Generator().manual_seed(0))
    x = x * torch.logspace(-44, 30, 64)[:, None]
    function = number_format._fused_round.__wrapped__
    for dtype in (torch.float32, torch.bfloat16):
        expected, expected_grid, _ = function(x.to(dtype), form.by_on(x.device), form.qmax)
        on_gpu = x.to(dtype).cuda()
        for run in (function, torch.compile(function, dynamic=True, options=fused.options())):
            with torch.no_grad():
                values, grid, _ = run(on_gpu, form.by_on(on_gpu.device), form.qmax)
            same(values.cpu(), expected)
            same(grid.cpu(), expected_grid)
