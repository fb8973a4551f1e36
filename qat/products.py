"""The fastest matrix products that are exact here: of integer codes, and of floats.

A layer whose weights and inputs are symmetric integers computes ``(codes_x @ codes_w.T) * scale_x * scale_w``.
The product of the codes is exact in int32 while ``in_features * 127 * 127 < 2**31``, that is up to 133,144 features.

Products of fp32 matrices on CPUs go to oneDNN, not to torch's own choice, MKL: on AMD processors with AVX-512 MKL runs
its AVX2 code, at less than half the speed.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.fused import fused
from qat.machine import has_onednn
from qat.quantizers import Quantized

_logger = logging.getLogger(__name__)

_TEST_SIZE = {"cpu": 512, "cuda": 4096}
"""Rows, columns and outputs of the products that are timed: on a GPU smaller ones measure how long a launch takes."""

_WORTH_IT = 1.2
"""Times the speed of floats from which integers are used: scaling their products takes a pass of its own."""

IntegerProduct = Callable[[Tensor, Tensor], Tensor]
"""Codes [rows, in] and weight codes [out, in], both int8 -> their exact product [rows, out], in int32 or, rounded
once from it, in fp32."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [rows, inner] @ b [inner, columns], without a gradient; either may be a transposed view."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and has_onednn():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


class Linear(nn.Linear):
    """A Linear whose forward pass, where it needs no gradient, is ``matmul``."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return super().forward(x)
        y = matmul(x.flatten(0, -2), self.weight.t()).view(*x.shape[:-1], -1)
        return y if self.bias is None else y.add_(self.bias)


def speed_up(model: nn.Module) -> None:
    """Let the plain Linear layers of a model that only runs forward use ``matmul``."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def matmul_codes(product: IntegerProduct, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x [..., in], one scale per row, times weight [out, in], one scale per row -> [..., out] of ``dtype``.

    Both must be symmetric; see ``codes_fit``.
    """
    products = product(x.codes.flatten(0, -2), weight.codes)
    y = _scaled(products, x.grid.scale.view(-1, 1), weight.grid.scale.view(1, -1), dtype)
    return y.view(*x.codes.shape[:-1], -1)


def codes_fit(rows: int, columns: int, out: int, device: torch.device) -> bool:
    """Whether the integer product is possible for x [rows, columns]: GPUs want whole tiles."""
    return device.type == "cpu" or (rows > 16 and columns % 8 == 0 and out % 8 == 0)


def int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """An IntegerProduct on GPUs, and on CPUs that multiply bytes (VNNI); elsewhere a plain loop."""
    return torch._int_mm(codes, weight.t())


def qlinear(codes: Tensor, weight: Tensor) -> Tensor:
    """An IntegerProduct on CPUs, of inputs shifted to be unsigned.

    Without VNNI it adds pairs of products in 16 bits: exact up to 255 * 2 * 64, hence for weights of 7 bits at most.
    """
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    unsigned = codes.bitwise_xor(-128).view(torch.uint8)  # code + 128
    ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


INTEGER_PRODUCTS = {product.__name__: product for product in (int_mm, qlinear)}


@functools.cache
def integer_product(device: torch.device, dtype: torch.dtype, qmax: int) -> IntegerProduct | None:
    """The fastest product that is exact here for weight codes up to ``qmax``; None if products of ``dtype`` beat it."""
    codes, weight = _test_codes(device, qmax)
    exact = [product for product in INTEGER_PRODUCTS.values() if is_exact(product, device, qmax)]
    floats, weight_floats = codes.to(dtype), weight.to(dtype)
    speeds = {
        product: _speed(lambda p=product: p(codes, weight), lambda: matmul(floats, weight_floats.t()), device)  # type: ignore[misc]
        for product in exact
    }
    product = max(speeds, key=speeds.__getitem__, default=None)
    if product is None:
        _logger.info("no integer product is exact on this %s: floats are used", device.type)
        return None
    pays = speeds[product] >= _WORTH_IT
    verdict = "forward passes use them" if pays else "floats are used"
    _logger.info(
        "integer products (%s) are exact, at %.1f times the speed of %s: %s",
        product.__name__, speeds[product], dtype, verdict,
    )  # fmt: skip
    return product if pays else None


def is_exact(product: IntegerProduct, device: torch.device, qmax: int) -> bool:
    """Whether a product is there, and exact, for weight codes up to ``qmax``. The worst case is the one that saturates
    where a processor adds pairs in 16 bits."""
    codes, weight = _test_codes(device, qmax)
    largest, heaviest = torch.full_like(codes, 127), torch.full_like(weight, qmax)
    cases = ((largest, heaviest), (largest, -heaviest), (codes, heaviest), (largest, weight), (codes, weight))
    try:
        return all(torch.equal(product(a, b).double(), a.double() @ b.double().t()) for a, b in cases)
    except (AttributeError, NotImplementedError, RuntimeError):  # there is no such operator here
        return False


def _test_codes(device: torch.device, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes of inputs and of weights, [size, size] each."""
    generator = torch.Generator().manual_seed(0)
    shape = (_TEST_SIZE[device.type], _TEST_SIZE[device.type])
    codes = torch.randint(-127, 128, shape, generator=generator)
    weight = torch.randint(-qmax, qmax + 1, shape, generator=generator)
    return codes.to(device, torch.int8), weight.to(device, torch.int8)


def _speed(one: Callable[[], object], other: Callable[[], object], device: torch.device) -> float:
    """How many times faster ``one`` is, by the shortest of several runs each: what else the machine does must not
    count."""
    best = [float("inf"), float("inf")]
    for _ in range(10):
        for place, call in enumerate((one, other)):
            began = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[place] = min(best[place], time.perf_counter() - began)
    return best[1] / best[0]


@fused
def _scaled(products: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (products * x_scale * weight_scale).to(dtype)
