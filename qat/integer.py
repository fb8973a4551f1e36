"""Products of integer codes: exact in int32, and on processors made for it several times faster than floats.

A layer whose weights and inputs are symmetric integers computes ``(codes_x @ codes_w.T) * scale_x * scale_w``.
The product of the codes is exact while ``in_features * 127 * 127 < 2**31``, that is up to 133,144 features.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qat.fused import fused
from qat.quantizers import Quantized

_logger = logging.getLogger(__name__)

_TEST_SIZE = 512


def matmul(x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
    """x [..., in], one scale per row, times weight [out, in], one scale per row -> [..., out] of ``dtype``.

    Both must be symmetric; see ``fits``.
    """
    products = torch._int_mm(x.codes.flatten(0, -2), weight.codes.t())
    y = _scaled(products, x.grid.scale.view(-1, 1), weight.grid.scale.view(1, -1), dtype)
    return y.view(*x.codes.shape[:-1], -1)


def fits(rows: int, columns: int, out: int, device: torch.device) -> bool:
    """Whether the integer product is possible for x [rows, columns]: GPUs want whole tiles."""
    return device.type == "cpu" or (rows > 16 and columns % 8 == 0 and out % 8 == 0)


@functools.cache
def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether integer products are exact here, and at least half as fast again as those of ``dtype``. Tried once.

    The worst case for exactness is the one that saturates where a processor adds pairs in 16 bits.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (_TEST_SIZE, _TEST_SIZE)
    largest = torch.full(shape, 127, dtype=torch.int8, device=device)
    random = torch.randint(-127, 128, shape, generator=generator).to(device, torch.int8)
    try:
        for a, b in ((largest, largest), (largest, -largest), (random, largest), (random, random)):
            if not torch.equal(torch._int_mm(a, b.t()).double(), a.double() @ b.double().t()):
                _logger.warning("integer products are not exact on this %s: floats are used.", device.type)
                return False
    except RuntimeError as error:
        _logger.warning("no integer products on this %s (%s): floats are used.", device.type, error)
        return False
    floats = random.to(dtype)
    ratio = _seconds(lambda: floats @ floats.t(), device) / _seconds(lambda: torch._int_mm(random, random.t()), device)
    usable = ratio >= 1.5
    verdict = "integers are used forward" if usable else "floats are used"
    _logger.info("integer products are exact, at %.1f times the speed of %s: %s.", ratio, dtype, verdict)
    return usable


def _seconds(product: Callable[[], Tensor], device: torch.device) -> float:
    """The shortest of several runs: what else the machine does must not count."""
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


@fused
def _scaled(products: Tensor, x_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (products * x_scale * weight_scale).to(dtype)
