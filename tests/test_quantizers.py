import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from qat.quantizers import dequantize, fake_quantize, qmax, quantize

BITS = st.integers(2, 8)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)  # denormals and huge outliers included


@st.composite
def tensors(draw):
    values = draw(arrays("float32", array_shapes(min_dims=1, max_dims=3, max_side=9), elements=FLOATS))
    return torch.from_numpy(values).to(draw(DTYPES)).nan_to_num(0.0, 0.0, 0.0)  # what overflows fp16 counts as 0


@given(tensors(), BITS)
def test_fake_equals_integer_bit_for_bit(x, bits):
    codes, scale = quantize(x, bits)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert codes.abs().max() <= qmax(bits)
    fake = fake_quantize(x, bits)
    assert fake.dtype == x.dtype
    torch.testing.assert_close(fake, dequantize(codes, scale, x.dtype), rtol=0, atol=0, equal_nan=True)


@given(tensors(), BITS)
def test_error_is_at_most_half_a_step_and_nothing_is_clipped(x, bits):
    x = x.float().clamp(-1e30, 1e30)
    codes, scale = quantize(x, bits)
    error = (dequantize(codes, scale, x.dtype) - x).abs()
    rounding = x.abs() * 2**-22  # of the fp32 division and product
    assert (error <= scale / 2 + rounding).all()
    largest = x.abs().amax(-1)
    reached = codes.abs().amax(-1) == qmax(bits)
    assert (reached | (largest < 1e-35)).all(), "the largest element has the largest code"


@given(st.integers(1, 40), BITS)
def test_zero_rows_give_zeros_and_a_finite_scale(n, bits):
    codes, scale = quantize(torch.zeros(3, n), bits)
    assert not codes.any()
    assert scale.isfinite().all()


def test_nan_stays_in_its_own_group():
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    fake = fake_quantize(x, 4)
    assert fake[0].isnan().all()
    assert fake[1].isfinite().all()
    assert dequantize(*quantize(x, 4), x.dtype)[0].isnan().all()


def test_sixteen_bits_is_identity():
    x = torch.randn(3, 5)
    assert fake_quantize(x, 16) is x


def test_bf16_is_quantized_in_fp32_arithmetic():
    x = torch.randn(64, 256).bfloat16()
    codes, _ = quantize(x, 8)
    expected, _ = quantize(x.float(), 8)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_is_straight_through_for_outliers_too(bits):
    x = torch.tensor([[0.1, -3.0, 50.0]], requires_grad=True)
    grad = torch.tensor([[1.0, 2.0, 3.0]])
    fake_quantize(x, bits).backward(grad)
    assert torch.equal(x.grad, grad)
