"""The fake-quantization op, forward and backward, on all that one decoder layer quantizes: ours, the released code's,
torchao's.

python benchmarks/ops.py; the formats of floats beside the integers; and what the integer products of the forward pass
cost beside those of floats. torchao takes part where it is installed (pip install --no-deps torchao==0.18.0). A figure
is the worse of the two layers' ratios.
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
from qat.quant import products
from qat.quant.number_format import Format, dequantize, fake_quantize, quantize

IN_GROUPS = Format(4, group_size=16)
FLOATS = {"nvfp4": Format(4, "nvfp4", 16, tensor_scale=256.0), "mxfp4": Format(4, "mxfp4", 32), "fp8": Format(8, "fp8")}

LAYERS = {"SmolLM2": (576, 192, 1536, 256), "LLaMA": (4096, 4096, 11008, 1024)}
"""Hidden size, size of keys and values, intermediate size, tokens."""


@dataclass(frozen=True)
class OpsBenchmark:
    """What is measured.

    Args:
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    repeats: int = 10
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, OpsBenchmark)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{common.machine()}; {dtype}")
    ratios: dict[str, list[float]] = {}
    for name, sizes in LAYERS.items():
        tensors = quantized_tensors(*sizes, device, dtype)
        ops: dict[str, Callable[[], object]] = {
            "ours": lambda: run(tensors, lambda x, bits: fake_quantize(x, Format(bits))),  # noqa: B023
            "released": lambda: run(tensors, released.ThreePassQuantizer.apply),  # noqa: B023
        }
        if find_spec("torchao"):
            theirs = {4: torchao_op(4), 8: torchao_op(8)}
            ops["torchao"] = lambda: run(tensors, lambda x, bits: theirs[bits](x))  # noqa: B023
        seconds = common.median_seconds(ops, config.repeats)
        print(f"{name:8} layer, W4A8:  " + "  ".join(f"{op} {s * 1e3:.2f} ms" for op, s in seconds.items()))
        for op in seconds.keys() - {"ours"}:
            ratios.setdefault(f"fake_quant_vs_{op}", []).append(seconds["ours"] / seconds[op])
        in_floats = {
            form: lambda form=form: run(tensors, lambda x, _: fake_quantize(x, FLOATS[form]))  # noqa: B023
            for form in FLOATS
        }
        in_groups = {"integers in groups of 16": lambda: run(tensors, lambda x, _: fake_quantize(x, IN_GROUPS))}  # noqa: B023
        seconds = common.median_seconds({"integers": ops["ours"], **in_groups, **in_floats}, config.repeats)
        print(f"{name:8} layer, all in:  " + "  ".join(f"{op} {s * 1e3:.2f} ms" for op, s in seconds.items()))
        for form in FLOATS:
            ratios.setdefault(f"{form}_vs_integers", []).append(seconds[form] / seconds["integers"])
    for rows, columns, out in ((256, 576, 1536), (1024, 4096, 4096)):
        compare_products(rows, columns, out, device, dtype, config.repeats)
    common.write(config.json, {name: max(of_shapes) for name, of_shapes in sorted(ratios.items())})


def quantized_tensors(
    hidden: int, key_value: int, intermediate: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, int]]:
    """What one decoder layer quantizes in W4A8: its seven weights and their four inputs; (x, gradient, bits)."""
    weights = [(hidden, hidden), (key_value, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    inputs = [(tokens, hidden)] * 3 + [(tokens, intermediate)]
    shapes = [(shape, 4) for shape in weights] + [(shape, 8) for shape in inputs]
    made = [(torch.randn(shape, device=device, dtype=dtype), bits) for shape, bits in shapes]
    return [(x.requires_grad_(), torch.randn_like(x), bits) for x, bits in made]


def run(tensors: list[tuple[Tensor, Tensor, int]], op: Callable[[Tensor, int], Tensor]) -> None:
    for x, grad, bits in tensors:
        torch.autograd.grad(op(x, bits), x, grad)


def torchao_op(bits: int) -> Callable[[Tensor], Tensor]:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    weight = bits == 4  # it has no symmetric quantization per token
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
                x, quantize(weight, Format(4)), Format(4).qmax, dtype, p
            )
            for product in products.exact_ones(products.INTEGER_PRODUCTS, device, Format(4).qmax)
        },
    }
    seconds = common.median_seconds(ways, repeats)
    print(f"W4A8 {rows} x {columns} -> {out}:  " + "  ".join(f"{name} {s * 1e3:.3f} ms" for name, s in seconds.items()))


if __name__ == "__main__":
    cli.run(main)
