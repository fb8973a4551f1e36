import math
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch
from compiler import needs_compiler, really_compiles
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from layers import same

from qat.quant import fused, number_format
from qat.quant.number_format import (
    Format,
    Quantized,
    dequantize,
    fake_quantize,
    grid_of,
    inside,
    learned_gradients,
    quantize,
    round_to_grid,
)
from qat.quant.quantizers import QUANTIZERS, lsq
from qat.quant.quantizers.base import Grid, divided
from qat.store import gguf_files

BITS = st.integers(2, 8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)  # denormals and huge outliers included
# tests/test_floats.py has the laws of floats, tests/test_ggml.py those of llama.cpp's blocks.
INTEGERS = {name: by for name, by in QUANTIZERS.items() if not by.is_float and by.scale_dtype == torch.float32}
FIXED = [name for name, quantizer in INTEGERS.items() if not quantizer.learned]  # the grid: a function of the tensor
EXACT = [QUANTIZERS[name] for name in FIXED if QUANTIZERS[name].is_exact and name != "ternary"]  # it is minmax_full's
MINMAX, ASYMMETRIC, LSQ = (QUANTIZERS[name] for name in ("minmax", "minmax_asymmetric", "lsq"))
EVERY = [Format(bits, name) for name in FIXED for bits in QUANTIZERS[name].allowed_bits]
FORMATS = st.sampled_from(EVERY)


@st.composite
def tensors(draw):
    values = draw(arrays("float32", array_shapes(min_dims=1, max_dims=3, max_side=9), elements=FLOATS))
    return torch.from_numpy(values).to(draw(DTYPES)).nan_to_num(0.0, 0.0, 0.0)  # what overflows fp16 counts as 0


@given(tensors(), FORMATS)
def test_fake_equals_integer_bit_for_bit(x, form):
    quantized = quantize(x, form)
    lowest, highest = form.code_range
    assert quantized.codes.dtype == torch.int8
    assert lowest <= quantized.codes.min()
    assert quantized.codes.max() <= highest
    assert quantized.grid.scale.dtype == torch.float32
    values, grid = round_to_grid(x, form)
    assert values.dtype == x.dtype
    same(values, dequantize(quantized, x.dtype))
    if form.by.grid_gives_codes:  # what backward relies on
        same(values, round_to_grid(x, form, grid)[0])
        same(quantized.codes, quantize(x, form, grid).codes)
    same(values, fake_quantize(x, form))


@given(tensors(), st.sampled_from([form for form in EVERY if not form.clips and form.by.grid_gives_codes]))
def test_minmax_clips_nothing_and_errs_by_half_a_step(x, form):
    x = x.float().clamp(-1e30, 1e30)
    quantized = quantize(x, form)
    error = (dequantize(quantized, x.dtype) - x).abs()
    rounding = x.abs().amax(-1, keepdim=True) * 2**-20  # of the fp32 divisions and products
    assert (error <= quantized.grid.scale * form.by.half_step + rounding).all()


@given(tensors(), BITS)
def test_the_largest_element_has_the_largest_code(x, bits):
    codes = quantize(x, Format(bits)).codes
    reached = codes.abs().amax(-1) == Format(bits).qmax
    assert (reached | (x.float().abs().amax(-1) < 1e-35)).all()


@given(tensors(), BITS)
def test_a_full_grid_has_compressed_tensors_scale(x, bits):
    scale, largest = grid_of(x, Format(bits, "minmax_full")).scale, x.float().abs().amax(-1)
    theirs, _ = calculate_qparams(-largest, largest, QuantizationArgs(num_bits=bits))
    normal = largest > 1e-35
    assert torch.equal(scale.view(largest.shape)[normal], theirs.view(largest.shape)[normal])


def test_a_full_grid_uses_every_code():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert quantize(x, Format(3, "minmax_full")).codes.unique().tolist() == list(range(-4, 4))


@given(tensors(), BITS)
def test_a_signed_scale_puts_the_extreme_on_the_lowest_code(x, bits):
    """It is exact; what is clipped is of the other sign, moves by a step at most, and gets no gradient."""
    x, form = x.float().clamp(-1e30, 1e30), Format(bits, "minmax_signed")
    codes, grid = quantize(x, form)
    largest = x.abs().amax(-1, keepdim=True)
    extreme, normal = x.abs() == largest, largest > 1e-35
    reached = (codes == form.code_range[0]) & extreme & (dequantize(Quantized(codes, grid), x.dtype) == x)
    assert (reached.any(-1, keepdim=True) | ~normal).all()
    passes = inside(x, form, grid)
    steps = x / grid.scale
    assert torch.equal(passes, (codes - steps).abs() <= 0.5)
    assert (~passes <= (steps > form.qmax + 0.5)).all()
    assert ((codes - steps).abs() <= 1).all()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = x.clone().requires_grad_()
    fake_quantize(y, form).backward(grad)
    same(y.grad, grad * passes)


def test_signed_scales_give_ggmls_codes():
    """Those of gguf's own quantizer, which makes them with the fp32 scale too; on ties ggml's sign may differ."""
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    for bits, kind in ((4, gguf.GGMLQuantizationType.Q4_0), (5, gguf.GGMLQuantizationType.Q5_0)):
        theirs = torch.from_numpy(gguf.quants.quantize(x.numpy(), kind))
        codes, (scale, _) = quantize(x, Format(bits, "minmax_signed"))
        ours = torch.from_numpy(gguf_files.blocks(Quantized(codes, Grid(scale)), kind))
        assert (scale < 0).any(), "the extreme is positive in half of the groups"
        assert torch.equal(ours[:, :2], theirs[:, :2])
        differ = (ours != theirs).any(-1)
        assert differ.float().mean() < 1e-3, "halves, which ggml rounds up in the product with 1 / scale"


@given(tensors())
def test_paretoqs_grids_are_its_formulas(x):
    """StretchedElasticQuant's, in fp64: round(clamp(x / alpha) * n - shift) + shift over n, of alpha = max|x|."""
    x = x.double().clamp(-1e30, 1e30)
    alpha = x.abs().amax(-1, keepdim=True)
    for name, n, shift in (("seq", 2, 0.5), ("ternary", 1.5, 0)):
        share = (x / alpha.clamp(min=1e-300)).clamp(-0.99, 0.99) * n - shift
        expected = (share.round() + shift) / n * alpha
        values = round_to_grid(x.float(), Format(2, name))[0].double()
        near_half = ((share - share.floor() - 0.5).abs() < 1e-5) | (alpha < 1e-30)
        assert (((values - expected).abs() <= 1e-6 * alpha) | near_half).all()


def test_gradients_of_a_learned_scale_are_lsqs():
    """Against autograd over its definition: round as identity, clip by clamp; with zero points, negative scales, odd
    codes and groups."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(6, 32, generator=generator), torch.randn(6, 32, generator=generator)
    for form in (Format(bits, name, 16) for name in FIXED for bits in (QUANTIZERS[name].allowed_bits[0], 4)):
        if form.bits not in form.by.allowed_bits:
            continue
        grid = grid_of(x, form)._replace(scale=grid_of(x, form).scale * 0.5)
        of_x, of_scale = learned_gradients(grad, x, form, grid)
        x2, scale = x.double().requires_grad_(), grid.scale.double().requires_grad_()
        zero_point = torch.zeros(()) if grid.zero_point is None else grid.zero_point[..., None]
        lowest, highest = (code - zero_point for code in form.code_range)
        half = form.by.half_step
        steps = x2.unflatten(-1, (2, 16)) / scale[..., None]
        clipped = torch.where(steps > highest + half, highest, torch.where(steps < lowest - half, lowest, steps))
        codes = quantize(x, form, grid).codes.unflatten(-1, (2, 16)) - zero_point
        values = (clipped + (codes - clipped).detach()) * scale[..., None]
        torch.testing.assert_close(values.flatten(1).float(), round_to_grid(x, form, grid)[0])
        values.flatten(1).backward(grad.double())
        torch.testing.assert_close(of_x, x2.grad.float())
        torch.testing.assert_close(of_scale, scale.grad.float(), rtol=1e-4, atol=1e-4)
        assert not of_x.all(), "something is clipped"


@given(st.integers(1, 40), FORMATS)
def test_zero_rows_give_zeros_and_a_finite_scale(n, form):
    quantized = quantize(torch.zeros(3, n), form)
    assert (dequantize(quantized, torch.float32).abs() < 1e-37).all()  # seq has no 0
    assert quantized.grid.scale.isfinite().all()


@given(FORMATS, st.sampled_from([1, 2, 4]))
def test_a_group_is_quantized_like_a_row_of_its_own(form, groups):
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(form.bits))
    grouped = Format(form.bits, form.quantizer, 8 // groups)
    values, grid = round_to_grid(x, grouped)
    assert grid.scale.shape == (3, 5, groups)
    alone = round_to_grid(x.view(3, 5, groups, -1), form)[0]
    same(values, alone.view_as(x))
    same(dequantize(quantize(x, grouped), x.dtype), values)


@given(tensors(), BITS, st.sampled_from(["bfloat16", "float16"]), st.sampled_from(["minmax", "statsq"]))
def test_codes_are_made_with_the_rounded_scale(x, bits, scales, method):
    """It is a number of its dtype. Without clipping, no value is off by more than half a step, if the scale is normal
    in that dtype: rounded down to 8 bits, it leaves the largest element below 127.5 steps."""
    form = Format(bits, method, scale_dtype=scales)
    (codes, (scale, _)), exact = quantize(x, form), grid_of(x, Format(bits, method)).scale
    rounded = exact.to(getattr(torch, scales)).float()
    same(scale, torch.where(rounded == 0, 1.0, rounded))
    same(codes, quantize(x, Format(bits, method), Grid(scale)).codes)
    ordinary = ((exact > 2**-14) & (exact < 2**14)).expand(x.shape)
    error = (dequantize(Quantized(codes, Grid(scale)), torch.float32) - x.float()).abs()
    half = (scale / 2).expand(x.shape) * (1 + 2**-16)
    assert method == "statsq" or (error <= half)[ordinary].all()


def test_asymmetric_spends_its_codes_on_the_range_that_is_there():
    x = torch.linspace(0, 1, 16)[None]
    torch.testing.assert_close(round_to_grid(x, Format(4, "minmax_asymmetric"))[0], x)
    assert (round_to_grid(x, Format(4))[0] - x).abs().max() > 0.05


def test_statsq_clips_outliers_and_stops_their_gradient():
    x = torch.tensor([[1.0, -1.0, 1.0, 50.0]])
    form = Format(8, "statsq")
    grid = grid_of(x, form)
    torch.testing.assert_close(grid.scale * form.qmax, 2 * x.abs().mean(-1, keepdim=True))
    assert round_to_grid(x, form)[0].max() == grid.scale * form.qmax
    assert inside(x, form, grid).tolist() == [[True, True, True, False]]


def test_lsq_gradients_are_the_papers():
    """Against autograd over its definition: round as identity, clip by clamp."""
    form = Format(4, "lsq")
    x = torch.randn(7, 33, dtype=torch.float64).requires_grad_()
    step = (LSQ.initial(x.detach(), form.qmax) / 3).float().requires_grad_()  # some clipping
    grad = torch.randn(7, 33, dtype=torch.float64)
    y = LSQ.fake_quantize(x, step, form.qmax)
    y.backward(grad)
    x2, step2 = x.detach().requires_grad_(), step.detach().requires_grad_()
    clipped = (x2 / step2).clamp(-form.qmax, form.qmax)
    expected = (clipped + (clipped.round() - clipped).detach()) * step2
    expected.backward(grad)
    assert (clipped.abs() == form.qmax).any(), "something must be clipped for this test to say anything"
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(step.grad * (x.numel() * form.qmax) ** 0.5, step2.grad)


@pytest.mark.parametrize("form", [next(f for f in EVERY if f.quantizer == name) for name in FIXED], ids=str)
def test_nan_stays_in_its_own_group(form):
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    values = round_to_grid(x, form)[0]
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    assert dequantize(quantize(x, form), x.dtype)[0].isnan().all()


def test_sixteen_bits_is_identity():
    x = torch.randn(3, 5)
    assert fake_quantize(x, Format(16)) is x


def test_halves_are_rounded_to_even():
    codes = quantize(torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), Format(4)).codes
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("form", [[f for f in EVERY if f.quantizer == name][-1] for name in FIXED], ids=str)
def test_bf16_is_quantized_in_fp32_arithmetic(form):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    (codes, grid), (expected, expected_grid) = quantize(x, form), quantize(x.float(), form)
    same(codes, expected)
    same(grid.scale, expected_grid.scale)


@given(tensors(), st.floats(1e-3, 10), BITS)
def test_a_learned_step_gives_integers_times_that_step(x, step, bits):
    form, learned = Format(bits, "lsq"), torch.tensor([step])
    grid = Grid(learned.expand(*x.shape[:-1], 1))
    same(LSQ.fake_quantize(x, learned, form.qmax), dequantize(quantize(x, form, grid), x.dtype))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_is_straight_through_for_outliers_too(bits):
    x = torch.tensor([[0.1, -3.0, 50.0]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0]])
    fake_quantize(x, Format(bits)).backward(grad)
    same(x.grad, grad)


@given(st.integers(0, 127).map(lambda half: 2 * half + 1), st.integers(0, 2**31))
def test_division_by_qmax_is_exact_even_where_a_compiler_takes_the_reciprocal(number, seed):
    bits = torch.randint(0x7F800000, (4096,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    x = bits.view(torch.float32)  # all finite numbers, denormal ones too
    exact = x / torch.full_like(x, number)
    assert torch.equal(divided(x, number), exact)
    assert torch.equal((x.double() * (1 / number)).float(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_bit_for_bit(dtype, monkeypatch):
    """The fused functions themselves, on what makes rounding hard: halves, outliers, zero rows, denormals, NaN."""
    needs_compiler()
    x = torch.randn(65, 96, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 3], x[3] = 0, 1e30, torch.arange(96) / 2 - 20
    x[4], x[5, 5] = 1e-42, math.nan
    x = x.to(dtype)
    zero_point = torch.arange(65.0)[:, None] % 5
    scale = grid_of(x, Format(4)).scale
    codes = torch.randint(-7, 8, (65, 96), dtype=torch.int8)
    calls = [
        (number_format._fused_quantize, (x, MINMAX, 7)),
        (number_format._fused_quantize, (x, ASYMMETRIC, 127)),
        (number_format._fused_round, (x, MINMAX, 7)),
        (number_format._fused_round, (x, ASYMMETRIC, 7)),
        (number_format._fused_gradients, (x.flip(0), x, scale, zero_point, ASYMMETRIC, 7)),
        (number_format._fused_gradients, (x.flip(0), x, scale, None, QUANTIZERS["seq"], 1)),
        (number_format._fused_quantize_on, (x, scale, None, MINMAX, 7)),
        (number_format._fused_round_on, (x, scale, zero_point, ASYMMETRIC, 7)),
        (number_format._fused_dequantize, (codes, scale, zero_point, dtype)),
        (lsq._gradients, (x.flip(0), x, torch.tensor([0.3]), 7)),
    ]
    for function, arguments in calls:
        eager = function.__wrapped__
        compiled = torch.compile(eager, dynamic=True, options=fused.options())
        outputs = zip(_tuple(compiled(*arguments)), _tuple(eager(*arguments)), strict=True)
        assert all(_equal(a, b) for a, b in outputs), eager.__name__


def _tuple(output):
    return output if isinstance(output, tuple) else (output,)


def _equal(a, b):
    """NaN codes are whatever the processor makes of them."""
    if a is None or a.dtype == torch.int8:
        return a is b or torch.equal(a[torch.arange(65) != 5], b[torch.arange(65) != 5])
    return torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))


@pytest.mark.parametrize("by", EXACT)
def test_compiled_quantizers_give_the_same_bits_as_eager_ones(by, monkeypatch):
    needs_compiler()
    monkeypatch.setattr(fused, "compiles", lambda device: True)
    quantize_rows, round_rows, dequantize_rows = (
        fused.fused(function.__wrapped__)
        for function in (
            number_format._fused_quantize,
            number_format._fused_round,
            number_format._fused_dequantize,
        )
    )
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((7, 33), (64, 576)):
            x = (torch.randn(shape) * torch.logspace(-42, 30, shape[0])[:, None]).to(dtype)
            x[1], x[2, 3] = 0, 1e4
            for qmax in {2 ** (bits - 1) - 1 for bits in by.allowed_bits} & {1, 7, 127}:
                codes, *grid = quantize_rows(x, by, qmax)
                expected_codes, *expected_grid = number_format._fused_quantize.__wrapped__(x, by, qmax)
                assert torch.equal(codes, expected_codes)
                assert all(a is b is None or torch.equal(a, b) for a, b in zip(grid, expected_grid, strict=True))
                values = number_format._fused_round.__wrapped__(x, by, qmax)[0]
                assert torch.equal(round_rows(x, by, qmax)[0], values)
                assert torch.equal(dequantize_rows(codes, *grid, dtype), values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and QAT_TEST_GPU=1")
@pytest.mark.parametrize("by", EXACT)
def test_a_gpu_eager_and_compiled_gives_the_bits_of_the_cpu(by):
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(64, 576) * torch.logspace(-30, 30, 64)[:, None]).to(dtype)
        for qmax in {2 ** (bits - 1) - 1 for bits in by.allowed_bits} & {1, 7, 127}:
            for function in (number_format._fused_quantize, number_format._fused_round):
                eager = function.__wrapped__
                expected = eager(x, by, qmax)
                for on_gpu in (eager, torch.compile(eager, dynamic=True, options=fused.options())):
                    found = on_gpu(x.cuda(), by, qmax)
                    assert all(a is b is None or torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in FIXED if QUANTIZERS[name].symmetric])
def test_zero_rows_give_zeros_with_scales_of_16_bits_too(name, dtype):
    form = Format(QUANTIZERS[name].allowed_bits[-1], name, scale_dtype=dtype)
    assert dequantize(quantize(torch.zeros(3, 32), form), torch.float32).abs().max() < 1e-6


def test_every_thread_may_compile_as_many_variants(monkeypatch):
    """torch's limit is the thread's own, and on GPUs backward runs in another one."""
    needs_compiler()
    monkeypatch.setattr(fused, "compiles", really_compiles)

    def limit() -> int:
        quantize(torch.randn(4, 32), Format(4))
        return torch._dynamo.config.recompile_limit

    with ThreadPoolExecutor(1) as other:
        assert other.submit(limit).result() == limit() == fused._VARIANTS
