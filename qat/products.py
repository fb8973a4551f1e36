"""The fastest matrix products that are exact here: of integer codes, and of floats.

A layer whose weights and inputs are symmetric integers computes ``(codes_x @ codes_w.T) * scale_x * scale_w``.
The product of the codes is exact in int32 while ``in_features * 127 * 127 < 2**31``, that is up to 133,144 features.

Products of fp32 matrices on CPUs go to oneDNN where it beats torch's own choice, MKL: on AMD processors with AVX-512
MKL runs its AVX2 code, at less than half the speed.

What pays is tried once, when it is first asked for.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.fused import fused
from qat.quantizers import Quantized

_logger = logging.getLogger(__name__)

_TEST_SIZE = 512


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [rows, inner] @ b [inner, columns], without a gradient; either may be a transposed view."""
    if a.device.type == "cpu" and a.dtype == torch.float32 and onednn_pays():
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


def matmul_codes(x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x [..., in], one scale per row, times weight [out, in], one scale per row -> [..., out] of ``dtype``.

    Both must be symmetric; see ``codes_fit``.
    """
    products = torch._int_mm(x.codes.flatten(0, -2), weight.codes.t())
    y = _scaled(products, x.grid.scale.view(-1, 1), weight.grid.scale.view(1, -1), dtype)
    return y.view(*x.codes.shape[:-1], -1)


def codes_fit(rows: int, columns: int, out: int, device: torch.device) -> bool:
    """Whether the integer product is possible for x [rows, columns]: GPUs want whole tiles."""
    return device.type == "cpu" or (rows > 16 and columns % 8 == 0 and out % 8 == 0)


@functools.cache
def integers_pay(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether integer products are exact here, and at least half as fast again as those of ``dtype``.

    The worst case for exactness is the one that saturates where a processor adds pairs in 16 bits.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_TEST_SIZE, _TEST_SIZE)
    largest = torch.full(shape, 127, dtype=torch.int8, device=device)
    random = torch.randint(-127, 128, shape, generator=generator).to(device, torch.int8)
    try:
        for a, b in ((largest, largest), (largest, -largest), (random, largest), (random, random)):
            if not torch.equal(torch._int_mm(a, b.t()).double(), a.double() @ b.double().t()):
                _logger.warning("integer products are not exact on this %s: floats are used", device.type)
                return False
    except RuntimeError as error:
        _logger.warning("no integer products on this %s (%s): floats are used", device.type, error)
        return False
    floats = random.to(dtype)
    ratio = _speed(lambda: torch._int_mm(random, random.t()), lambda: matmul(floats, floats.t()), device)
    usable = ratio >= 1.5
    verdict = "forward passes use them" if usable else "floats are used"
    _logger.info("integer products are exact, at %.1f times the speed of %s: %s", ratio, dtype, verdict)
    return usable


@functools.cache
def onednn_pays() -> bool:
    """Whether oneDNN multiplies fp32 matrices at least a quarter faster than torch's own choice."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.randn(_TEST_SIZE, _TEST_SIZE, generator=torch.Generator().manual_seed(0))
    try:
        ratio = _speed(
            lambda: torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], ""), lambda: x @ x.t(), x.device
        )
    except (AttributeError, RuntimeError):  # a build without the operator
        return False
    if ratio >= 1.25:
        _logger.info("oneDNN multiplies fp32 matrices at %.1f times the speed of torch.mm: it is used", ratio)
    return ratio >= 1.25


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
