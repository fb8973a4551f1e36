"""The fake-quantization op, forward and backward: ours, the released code's, torchao's.

python benchmarks/ops.py; and what the integer products of the forward pass cost beside those of floats. torchao takes
part where it is installed (pip install --no-deps torchao==0.18.0).
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import common
import released
import torch
from torch import Tensor

from launch import cli
from qat import products
from qat.quantizers import Format, dequantize, fake_quantize, quantize

SHAPES = {
    "SmolLM2 weight": (1536, 576, 4),
    "SmolLM2 activation": (256, 576, 8),
    "LLaMA weight": (4096, 4096, 4),
    "LLaMA activation": (1024, 4096, 8),
}
"""Rows, columns, bits."""


@dataclass(frozen=True)
class OpsBenchmark:
    """What is measured.

    Args:
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    repeats: int = 20
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, OpsBenchmark)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{common.machine()}; {dtype}")
    ratios: dict[str, list[float]] = {}
    for name, (rows, columns, bits) in SHAPES.items():
        x = torch.randn(rows, columns, device=device, dtype=dtype, requires_grad=True)
        grad = torch.randn_like(x)
        ops: dict[str, Callable[[], object]] = {
            "ours": lambda x=x, grad=grad, bits=bits: run(x, grad, lambda x: fake_quantize(x, Format(bits))),
            "released": lambda x=x, grad=grad, bits=bits: run(
                x, grad, lambda x: released.ThreePassQuantizer.apply(x, bits)
            ),
        }
        if find_spec("torchao"):
            theirs = torchao_op(name, bits)
            ops["torchao"] = lambda x=x, grad=grad, theirs=theirs: run(x, grad, theirs)
        seconds = common.median_seconds(ops, config.repeats)
        print(f"{name:20} {rows:5} x {columns:4}  " + "  ".join(f"{op} {s * 1e3:.3f} ms" for op, s in seconds.items()))
        for op in seconds.keys() - {"ours"}:
            ratios.setdefault(op, []).append(seconds["ours"] / seconds[op])
    for rows, columns, out in ((256, 576, 1536), (1024, 4096, 4096)):
        compare_products(rows, columns, out, device, dtype, config.repeats)
    common.write(config.json, {f"fake_quant_vs_{op}": max(of_shapes) for op, of_shapes in sorted(ratios.items())})


def run(x: Tensor, grad: Tensor, op: Callable[[Tensor], Tensor]) -> None:
    torch.autograd.grad(op(x), x, grad)


def torchao_op(name: str, bits: int) -> Callable[[Tensor], Tensor]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    weight = name.endswith("weight")  # it has no symmetric quantization per token
    granularity, dtype = "per_channel" if weight else "per_token", {4: torch.int4, 8: torch.int8}[bits]
    return FakeQuantizerBase.from_config(IntxFakeQuantizeConfig(dtype, granularity, is_symmetric=weight))


def compare_products(rows: int, columns: int, out: int, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
    """A forward pass of a W4A8 layer whose weight changes every step: quantize the weight, multiply."""
    weight = torch.randn(out, columns, device=device, dtype=dtype)
    x = quantize(torch.randn(rows, columns, device=device, dtype=dtype), Format(8))
    values = dequantize(x, dtype)
    ways: dict[str, Callable[[], object]] = {
        "torch.mm, full precision": lambda: values @ weight.t(),
        "ours, full precision": lambda: products.matmul(values, weight.t()),
        "ours, rounded floats": lambda: products.matmul(values, fake_quantize(weight, Format(4)).t()),
        **{
            f"ours, integers by {product.__name__}": lambda p=product: products.matmul_codes(
                p, x, quantize(weight, Format(4)), dtype
            )
            for product in ([products.int_mm, products.qlinear] if device.type == "cpu" else [products.int_mm])
        },
    }
    seconds = common.median_seconds(ways, repeats)
    print(f"W4A8 {rows} x {columns} -> {out}:  " + "  ".join(f"{name} {s * 1e3:.3f} ms" for name, s in seconds.items()))


if __name__ == "__main__":
    cli.run(main)
