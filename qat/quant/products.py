"""Matrix products: of integer codes, which are exact, and of floats.

A layer whose weights and inputs are integers with one scale per row computes, everywhere and for any number of rows,

    y = ((codes_x - zero_x) @ (codes_w - zero_w).T) * scale_x * scale_w

with the sum in exact integers, rounded to fp32 once, then scaled in fp32, as inference engines do. The result does not
depend on which instructions compute the sum, so the fastest that are exact here are used; on GPUs also a kernel that
scales the sums before it writes them (qat.quant.kernels), if it is faster than both steps. An int32 holds the sum up to
131,071 features, with zero points on both sides up to 33,025. Zero points cost no product: with n columns

    (codes_x - zero_x) @ (codes_w - zero_w).T =
        codes_x @ codes_w.T - zero_w sum(codes_x) - zero_x sum(codes_w) + n zero_x zero_w

Products of fp32 matrices on CPUs go to oneDNN, not to torch's own choice, MKL: on AMD processors with AVX-512 MKL runs
its AVX2 code, at less than half the speed.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qat.quant import kernels
from qat.quant.fused import fused
from qat.quant.kernels.sizes import FEW_ROWS
from qat.quant.number_format import Quantized, dequantize
from qat.quant.quantizers.base import Grid
from qat.runtime import operators

_logger = logging.getLogger(__name__)

_TEST_SIZE = {"cpu": 512, "cuda": 4096}
"""Rows, columns and outputs of the products that are timed: on a GPU smaller ones would measure the time of a
launch."""

_ROWS = 32
"""Integer products on GPUs need more than 16 rows, and full tiles are faster: rows are padded to multiples of this."""

_FEATURES = 8
"""They also need multiples of 8 columns and outputs."""

_EXACT_IN_FP32 = 2**24 // 128**2
"""Number of columns over which no sum of products of 8-bit codes is beyond 2^24, so that it is exact in fp32, in any
order."""

IntegerProduct = Callable[[Tensor, Tensor], Tensor]
"""Maps codes [rows, in] and weight codes [out, in], both int8, to their exact product [rows, out], in int32 or, rounded
once from it, in fp32."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a [rows, inner] @ b [inner, columns], without a gradient; either may be a transposed view."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and operators.has_onednn():
        return operators.onednn_linear(a, b.t())
    return a @ b


class Linear(nn.Linear):
    """A Linear whose forward pass, where it needs no gradient, is ``matmul``."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        y = matmul(x.flatten(0, -2), self.weight.t()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


def speed_up(model: nn.Module) -> None:
    """Make the plain Linear layers of a model that only runs forward use ``matmul``."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def matmul_codes(
    x: Quantized, weight: Quantized, weight_qmax: int, dtype: torch.dtype, product: IntegerProduct | None = None
) -> Tensor:
    """Multiply x [..., in], one scale per row, by weight [out, in], one scale per row; return [..., out] of ``dtype``.

    Args:
        x, weight: with or without zero points
        weight_qmax: the highest code that weights of this format have; the lowest is -weight_qmax or one less
        product: the matmul of the codes; by default the fastest exact one on the device. Results do not depend on it
    """
    device = x.codes.device
    codes, scales = x.codes.flatten(0, -2), (x.grid.scale.view(-1, 1), weight.grid.scale.view(1, -1))
    symmetric = x.grid.zero_point is None and weight.grid.zero_point is None
    zeros = None if symmetric else _zeros(x.grid, codes, weight)
    own = None if product else kernels.on(device.type)
    product = product or integer_product(device, weight_qmax)
    if own and own_is_faster(product, device, weight_qmax, len(codes) <= FEW_ROWS):
        y = own.multiply(codes, weight.codes, *scales, zeros, dtype)
    elif zeros:
        y = _corrected(_unrounded(product, codes, weight.codes, weight_qmax), *zeros, *scales, codes.shape[1], dtype)
    else:
        y = _scaled(product(codes, weight.codes), *scales, dtype)
    return y.view(*x.codes.shape[:-1], -1)


def block_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which blocks are multiplied in a model of ``dtype``: fp32, or fp64."""
    return torch.promote_types(dtype, torch.float32)


def matmul_blocks(x: Tensor, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """Multiply x, the values [..., in] in ``block_dtype`` of integers in blocks, by weight [out, in]; return [..., out]
    of ``dtype``.

    With fp16 scales, as ggml's, the values are exact: a code of 8 bits times a scale of 11.
    """
    values = dequantize(weight, x.dtype)
    return matmul(x.flatten(0, -2), values.t()).to(dtype).view(*x.shape[:-1], -1)


def _zeros(grid: Grid, codes: Tensor, weight: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the zero points of ``codes`` [rows, 1] and of ``weight`` [1, out], then the sums of both's codes."""
    return (
        _whole(grid.zero_point, codes).view(-1, 1),
        _whole(weight.grid.zero_point, weight.codes).view(1, -1),
        codes.sum(1, dtype=torch.int32).view(-1, 1),
        weight.codes.sum(1, dtype=torch.int32).view(1, -1),
    )


def _whole(zero_point: Tensor | None, codes: Tensor) -> Tensor:
    """Return the zero points of the rows of ``codes`` as int32."""
    return codes.new_zeros(len(codes), dtype=torch.int32) if zero_point is None else zero_point.int()


def _unrounded(product: IntegerProduct, codes: Tensor, weight: Tensor, weight_qmax: int) -> Tensor:
    """Return the product in int32, by so few columns at a time that fp32 would round none of the sums."""
    columns = 2**24 // (128 * (weight_qmax + 1))
    total = None
    for some, of_weight in zip(codes.split(columns, 1), weight.split(columns, 1), strict=True):
        part = product(some, of_weight).int()
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiply codes [rows, in] by [out, in], as an IntegerProduct, on GPUs and on CPUs that multiply bytes (VNNI);
    elsewhere it is a plain loop."""
    if codes.device.type == "cpu":
        return operators.int8_mm(codes, weight.t())
    rows, columns = codes.shape
    out, more = len(weight), -columns % _FEATURES
    codes = pad(codes, (0, more, 0, -rows % _ROWS))
    return operators.int8_mm(codes, pad(weight, (0, more, 0, -out % _FEATURES)).t())[:rows, :out]


def qlinear(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiply codes [rows, in] by [out, in], as an IntegerProduct, on CPUs, with inputs shifted to be unsigned.

    Without VNNI it adds pairs of products in 16 bits: exact for weights of 7 bits at most, as 255 * 2 * 64 < 2^15.
    """
    return operators.onednn_int8_linear(codes.bitwise_xor(-128).view(torch.uint8), weight)  # code + 128


def float_blocks(codes: Tensor, weight: Tensor) -> Tensor:
    """Multiply codes [rows, in] by [out, in], as an IntegerProduct, anywhere: as fp32 matrices, over so few columns at
    a time that no sum is rounded."""
    total = torch.zeros((), dtype=torch.int32, device=codes.device)
    for some, of_weight in zip(codes.split(_EXACT_IN_FP32, 1), weight.split(_EXACT_IN_FP32, 1), strict=True):
        total = total + matmul(some.float(), of_weight.float().t()).int()
    return total


INTEGER_PRODUCTS = (int_mm, qlinear, float_blocks)


@functools.cache
def integer_product(device: torch.device, qmax: int) -> IntegerProduct:
    """Return the fastest product that is exact on ``device`` for weight codes up to ``qmax``. All exact products give
    the same numbers, so it does no harm if another run chooses another one."""
    codes, weight = _test_codes(device, qmax)
    exact = exact_ones(INTEGER_PRODUCTS, device, qmax)
    product = min(exact, key=lambda product: _seconds(lambda: product(codes, weight), device))
    _logger.info("this %s multiplies integer weights of up to %d by %s", device.type, qmax, product.__name__)
    return product


@functools.cache
def own_is_faster(product: IntegerProduct, device: torch.device, qmax: int, few: bool) -> bool:
    """Return whether our kernel, which multiplies and scales, gives the numbers of ``product`` and ``_scaled``, or
    ``_corrected``, and for ``few`` rows, or for many, is faster than the former."""
    own = kernels.on(device.type)
    assert own is not None
    codes, weight = _test_codes(device, qmax)
    codes = codes[:FEW_ROWS] if few else codes
    scales = torch.rand(len(codes), 1, device=device), torch.rand(1, len(weight), device=device)
    # Zero points may be any codes: these are.
    zeros = _zeros(Grid(scales[0], codes[:, 0]), codes, Quantized(weight, Grid(scales[1], weight[:, 0])))

    def in_one_step(rows: int = len(codes), zeros: Any = None) -> Tensor:
        return own.multiply(codes[:rows], weight, scales[0][:rows], scales[1], zeros, torch.bfloat16)

    def in_two_steps(rows: int = len(codes)) -> Tensor:
        return _scaled(product(codes[:rows], weight), scales[0][:rows], scales[1], torch.bfloat16)

    def corrected() -> Tensor:
        total = _unrounded(product, codes, weight, qmax)
        return _corrected(total, *zeros, *scales, codes.shape[1], torch.bfloat16)

    try:
        faster = all(torch.equal(in_one_step(rows), in_two_steps(rows)) for rows in (17, len(codes)))
        faster = faster and torch.equal(in_one_step(zeros=zeros), corrected())
        faster = faster and _seconds(in_one_step, device) < _seconds(in_two_steps, device)
    except Exception as error:  # what a GPU lacks, memory for tiles above all
        _logger.info("our kernel for integer products does not run here: %s", error)
        return False
    use, rows = "used" if faster else "not the fastest", "few" if few else "many"
    _logger.info("our kernel for integer products of %s rows is %s here", rows, use)
    return faster


def exact_ones(products: Iterable[IntegerProduct], device: torch.device, qmax: int) -> list[IntegerProduct]:
    """Return those of the products that are available, and exact, for weight codes from -qmax-1 to qmax. The worst
    cases are those that saturate on processors that add pairs in 16 bits."""
    codes, weight = _test_codes(device, qmax)
    extremes = [torch.full_like(codes, code) for code in (127, -128)]
    heaviest = [torch.full_like(weight, code) for code in (qmax, -qmax, -qmax - 1)]
    cases = [(a, b) for a in (*extremes, codes) for b in (*heaviest, weight)]
    some_rows = ((codes[:rows], weight) for rows in (1, 17, 333))
    strided = ((pad(codes, (0, 4))[:, :-4], weight), (codes, pad(weight, (0, 4))[:, :-4]), (codes.t(), weight.t()))
    exact = list(products)
    for a, b in (*cases, *some_rows, *strided):
        expected = a.double() @ b.double().t()
        exact = [product for product in exact if _gives(product, a, b, expected)]
    return exact


def _gives(product: IntegerProduct, codes: Tensor, weight: Tensor, expected: Tensor) -> bool:
    try:
        return torch.equal(product(codes, weight).double(), expected)
    except (AttributeError, NotImplementedError, RuntimeError):  # the operator is not available here
        return False


def _test_codes(device: torch.device, qmax: int) -> tuple[Tensor, Tensor]:
    """Return codes of inputs and of weights, [size, size] each."""
    generator = torch.Generator().manual_seed(0)
    shape = (_TEST_SIZE[device.type], _TEST_SIZE[device.type])
    codes = torch.randint(-128, 128, shape, generator=generator)
    weight = torch.randint(-qmax - 1, qmax + 1, shape, generator=generator)
    return codes.to(device, torch.int8), weight.to(device, torch.int8)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several runs, in seconds, so that other load on the machine does not count."""
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


@fused
def _scaled(products: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (products.float() * x_scale * weight_scale).to(dtype)


@fused
def _corrected(
    products: Tensor,
    x_zero: Tensor,
    weight_zero: Tensor,
    x_sum: Tensor,
    weight_sum: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    whole = products - weight_zero * x_sum - x_zero * (weight_sum - columns * weight_zero)
    return (whole.float() * x_scale * weight_scale).to(dtype)
