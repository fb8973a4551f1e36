"""The same numbers on a GPU as on a CPU, compiled as eager, at every shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import silu

from gpu_checks.bench import Bench, device_seconds, seconds
from qat.infer.integer_cache import IntegerLayer
from qat.ptq.gptq import GPTQConfig, error_of, gptq, hessian_of
from qat.quant import fused, kernels, products
from qat.quant.kv_cache import KVQuantizer
from qat.quant.kv_formats import KV_FORMATS
from qat.quant.kv_formats.integers import Integers
from qat.quant.number_format import Format, dequantize, quantize, round_to_grid
from qat.quant.packing import pack
from qat.quant.quantizers import QUANTIZERS
from qat.quant.quantizers.base import Grid

_W4 = Format(4)
_MINMAX = ("minmax", "minmax_asymmetric")
_FORMS = [
    Format(2),
    Format(2, "minmax_asymmetric"),
    Format(4),
    Format(4, "minmax_asymmetric"),
    Format(8, "minmax_asymmetric"),
]


def quantizers(bench: Bench) -> tuple[dict, dict]:
    """Codes, scales, values and LSQ's gradient, of every method and size: eager on the device = eager on the CPU."""
    found = _compare(bench, "eager", _FORMS)
    share = {}
    for length in _lengths(bench):
        x, form = _hard(256, length, torch.bfloat16), Format(4, "statsq")
        with _mode("eager"):
            share[length] = _different(quantize(x, form).codes, quantize(x.to(bench.device), form).codes) / x.numel()
    figures = {**found, "codes_that_differ_where_sums_do": max(share.values())}
    return figures, {"equal": not found["mismatches"], "statsq": max(share.values()) < 1e-3}


def row_kernels(bench: Bench) -> tuple[dict, dict]:
    """Our kernels that quantize: the bits of eager code on the CPU; microseconds of a call beside those of the compiled
    function, which has met the shapes in this order. Of a few numbers it is the host's time."""
    if kernels.on(bench.device.type) is None:
        return {}, {"on a CPU": bench.device.type == "cpu"}
    found = _compare(bench, "kernels", _FORMS)
    s, us = bench.shapes, {}
    for name, shape, form in (
        ("weight", (s.intermediate, s.hidden), _W4),
        ("weight, groups of 64", (s.intermediate, s.hidden), Format(4, group_size=64)),
        ("input", (s.tokens, s.hidden), Format(8)),
        ("long input", (s.tokens, s.intermediate), Format(8)),
        ("keys", (s.heads * s.tokens, s.hidden // s.heads), _W4),
        ("a few numbers", (64, 64), _W4),
    ):
        x = torch.randn(shape, device=bench.device, dtype=bench.dtype)
        codes = quantize(x, form)
        for mode in ("compiled", "kernels"):
            with _mode(mode):
                us[f"{name}, {mode}"] = {
                    "quantize": 1e6 * device_seconds(lambda: quantize(x, form), 50),  # noqa: B023
                    "round": 1e6 * device_seconds(lambda: round_to_grid(x, form), 50),  # noqa: B023
                    "dequantize": 1e6 * device_seconds(lambda: dequantize(codes, bench.dtype), 50),  # noqa: B023
                }
    return {**found, "us": us}, {"equal": not found["mismatches"]}


def product_kernel(bench: Bench) -> tuple[dict, dict]:
    """Our kernel for integer products, which scales its sums: the numbers of the two steps that it takes the place of;
    microseconds beside theirs."""
    own = kernels.on(bench.device.type)
    if own is None:
        return {}, {"on a CPU": bench.device.type == "cpu"}
    s, us, mismatches = bench.shapes, {}, 0
    product = products.integer_product(bench.device, _W4.qmax)
    weight = quantize(torch.randn(s.intermediate, s.hidden, device=bench.device), _W4)
    for rows in s.rows:
        x = quantize(torch.randn(rows, s.hidden, device=bench.device), Format(8))
        scales = x.grid.scale.view(-1, 1), weight.grid.scale.view(1, -1)
        steps = {
            "two steps": lambda: products.matmul_codes(x, weight, _W4.qmax, bench.dtype, product),  # noqa: B023
            "kernel": lambda: own.multiply(x.codes, weight.codes, *scales, None, bench.dtype),  # noqa: B023
        }
        mismatches += _different(*(call() for call in steps.values()))
        us[rows] = {name: 1e6 * device_seconds(call, 50) for name, call in steps.items()}
    used = {
        f"used for {rows} rows": products.own_is_faster(product, bench.device, _W4.qmax, few)
        for rows, few in (("few", True), ("many", False))
    }
    return {**used, "mismatches": mismatches, "us_by_rows": us}, {"equal": not mismatches}


def norm_and_gate_kernels(bench: Bench) -> tuple[dict, dict]:
    """Our kernels for RMSNorm and SwiGLU, which make codes too: how many of these are other than torch's, as both add
    up in orders of their own; microseconds beside torch's functions and the quantizer's kernel."""
    own = kernels.on(bench.device.type)
    if own is None:
        return {}, {"on a CPU": bench.device.type == "cpu"}
    s, form = bench.shapes, Format(8)
    us, off, most = {}, {}, {}
    made = {"device": bench.device, "dtype": bench.dtype}
    x, weight = torch.randn(s.tokens, s.hidden, **made), torch.rand(s.hidden, **made) + 0.5
    gate, up = (torch.randn(s.tokens, s.intermediate, **made) for _ in range(2))

    def norm() -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return quantize(weight * normed.to(x.dtype), form).codes

    for name, by_torch, by_kernel in (
        ("norm", norm, lambda: own.norm(x, weight, 1e-5, form.by, form.qmax).codes),
        ("gate", lambda: quantize(silu(gate) * up, form).codes, lambda: own.gated(gate, up, form.by, form.qmax)[1]),
    ):
        expected = by_torch()
        distance = (by_kernel().int() - expected.int()).abs()
        off[name] = distance.count_nonzero().item() / expected.numel()
        most[name] = distance.max().item()
        us[name] = {"torch": 1e6 * device_seconds(by_torch, 50), "kernel": 1e6 * device_seconds(by_kernel, 50)}
    # A scale that is rounded otherwise changes an eighth of its row's codes.
    return {"other_codes": off, "us": us}, {"few": max(off.values()) <= 1e-3, "by one": max(most.values()) <= 1}


def compiled_quantizers(bench: Bench) -> tuple[dict, dict]:
    """The same, compiled, of what is compiled apart: both grids and LSQ, in both dtypes; bits and sizes vary freely."""
    found = _compare(bench, "compiled", [Format(4, method) for method in _MINMAX])
    return found, {"equal": not found["mismatches"]}


def _compare(bench: Bench, mode: str, forms: list[Format]) -> dict:
    mismatches = elements = 0
    for dtype in (torch.bfloat16, torch.float32):
        for length in _lengths(bench):
            x = _hard(64 if length < 8192 else 16, length, dtype)
            for form in (*forms, Format(8), Format(4, "minmax", 64 if length % 64 == 0 else 0)):
                with _mode("eager"):
                    expected = _all_of(x, form)
                with _mode(mode):
                    found = _all_of(x.to(bench.device), form)
                elements += sum(part.numel() for part in expected)
                mismatches += sum(_different(a, b) for a, b in zip(expected, found, strict=True))
    return {"compared": elements, "mismatches": mismatches}


def _lengths(bench: Bench) -> tuple[int, ...]:
    return (128, 4096, 11008) if bench.device.type == "cuda" else (16, 128)


def integer_products(bench: Bench) -> tuple[dict, dict]:
    """Exact at the row counts that training and decoding have; their speed beside bf16's."""
    s, generator = bench.shapes, torch.Generator().manual_seed(0)
    product = products.integer_product(bench.device, _W4.qmax)
    failures = []
    for columns, out in ((s.hidden, s.hidden), (s.hidden, s.intermediate), (s.intermediate, s.hidden)):
        weight = torch.randint(-7, 8, (out, columns), generator=generator).to(bench.device, torch.int8)
        for rows in s.rows:
            codes = torch.randint(-127, 128, (rows, columns), generator=generator).to(bench.device, torch.int8)
            exact = codes.double() @ weight.double().t()
            if not torch.equal(product(codes, weight).double(), exact):
                failures.append((rows, columns, out))
    figures: dict = {"product": product.__name__, "failures": failures}
    for rows in (s.tokens, 2 * s.tokens):
        codes = torch.randint(-127, 128, (rows, s.hidden), dtype=torch.int8, device=bench.device)
        weight = torch.randint(-7, 8, (s.intermediate, s.hidden), dtype=torch.int8, device=bench.device)
        a, b = codes.to(bench.dtype), weight.to(bench.dtype)
        integers = device_seconds(lambda: product(codes, weight))  # noqa: B023
        floats = device_seconds(lambda: a @ b.t())  # noqa: B023
        scales = torch.rand(rows, 1, device=bench.device), torch.rand(1, s.intermediate, device=bench.device)
        sums = product(codes, weight)
        figures |= {
            f"TOPS_{rows}": 2 * rows * s.hidden * s.intermediate / integers / 1e12,
            f"bf16_over_int8_{rows}": floats / integers,
            f"scaling_ms_{rows}": 1e3 * device_seconds(lambda: products._scaled(sums, *scales, bench.dtype)),  # noqa: B023
        }
    return figures, {"exact": not failures, "by int_mm": product is products.int_mm or bench.device.type == "cpu"}


def caches(bench: Bench) -> tuple[dict, dict]:
    """The integer cache's bytes, and a packed weight's values, on the device as on the CPU, where they are eager."""
    head = bench.shapes.hidden // bench.shapes.heads
    mismatches = {}
    forms = {
        f"{granularity}_{bits}": Integers(Format(bits), granularity, "none")
        for granularity in ("token_head", "token")
        for bits in (4, 8)
    }
    forms |= {name: form for name, form in KV_FORMATS.items() if not form.adjustable}
    for name, form in forms.items():
        if form.scales_tensors:
            form = form.for_tensor(form.scale_of_tensor(4.0))
        keys, values = (torch.randn(1, 4, 33, head, dtype=bench.dtype) for _ in range(2))
        stored = []
        for device in (torch.device("cpu"), bench.device):
            layer = IntegerLayer(KVQuantizer(form, form))
            with _mode("kernels" if device.type == "cuda" else "eager"):
                read = layer.update(keys.to(device), values.to(device))
            stored.append([part.cpu() for part in (layer.keys, layer.values, *(one.tensor for one in read))])
        mismatches[name] = sum(_different(a, b) for a, b in zip(*stored, strict=True))
    rotated = [Integers(Format(4), "token_head", "hadamard").keys(keys.to(d)).cpu() for d in ("cpu", bench.device)]
    codes = [quantize(part, Format(4)).codes for part in rotated]
    weight = torch.randn(bench.shapes.hidden, bench.shapes.hidden, dtype=bench.dtype)
    packed = [pack(quantize(weight.to(d), _W4), _W4).cpu() for d in ("cpu", bench.device)]
    figures = {
        "mismatches": mismatches,
        "packed_weight_mismatches": _different(*packed),
        "rotated_codes_that_differ": _different(*codes) / codes[0].numel(),
    }
    return figures, {"equal": not any(mismatches.values()) and not figures["packed_weight_mismatches"]}


def gptq_layer(bench: Bench) -> tuple[dict, dict]:
    """One Linear layer, on the device and on the CPU: the errors that the two roundings leave."""
    size = min(bench.shapes.hidden, 2048)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    mixing = torch.randn(size, size, generator=generator) / size**0.5
    inputs = [torch.randn(1024, size, generator=generator) @ mixing for _ in range(4)]
    errors, took = {}, {}
    for device in (torch.device("cpu"), bench.device):
        hessian = hessian_of(x.to(device) for x in inputs)
        on_device = weight.to(device)
        gptq(on_device[:64], hessian, _W4, GPTQConfig())  # what is loaded at a first call is not counted
        took[device.type] = seconds(lambda: gptq(on_device, hessian, _W4, GPTQConfig()), 1)  # noqa: B023
        rounded = dequantize(gptq(on_device, hessian, _W4, GPTQConfig()), torch.float32)
        errors[device.type] = error_of(on_device - rounded, hessian)
        errors[f"rtn_{device.type}"] = error_of(on_device - round_to_grid(on_device, _W4)[0], hessian)
    off = abs(errors[bench.device.type] / errors["cpu"] - 1)
    return {"seconds": took, "errors": errors, "error_off_by": off}, {"error within 1 %": off < 0.01}


def _all_of(x: Tensor, form: Format) -> list[Tensor]:
    quantized = quantize(x, form)
    values, grid = round_to_grid(x, form)
    on_grid = quantize(x, form, Grid(grid.scale * 1.25, grid.zero_point))
    parts = [quantized.codes, quantized.grid.scale, values, on_grid.codes, dequantize(on_grid, x.dtype)]
    if form.symmetric and not form.group_size:
        step = torch.full((1,), 0.05, device=x.device)
        learned = QUANTIZERS["lsq"]
        inside = x.detach().requires_grad_()
        rounded = learned.fake_quantize(inside, step, form.qmax)
        rounded.backward(x)
        assert inside.grad is not None
        parts += [rounded.detach(), inside.grad]
    return [part.cpu() for part in parts]


def _hard(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all sizes, halves between codes, outliers, a row of zeros, one of denormals."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x = x * torch.logspace(-30, 30, rows)[:, None]
    x[0], x[1] = 0, 1e-42
    x[2] = torch.arange(columns) % 41 / 2 - 10
    x[3, 5] = 1e30
    return x.to(dtype)


def _different(a: Tensor, b: Tensor) -> int:
    return int((a.cpu() != b.cpu()).sum())


@contextmanager
def _mode(mode: str) -> Iterator[None]:
    """Run fused functions eagerly, compiled, or by our kernels where there are some."""
    if mode == "kernels":
        yield
        return
    with patch.object(kernels, "on", lambda device: None):
        if mode == "compiled":
            yield
            return
        with patch.object(fused, "compiles", lambda device: False):
            yield
