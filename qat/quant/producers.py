"""The modules that compute the inputs of quantized layers: norms, and the MLP's product with its gate.

On GPUs a kernel of ours (qat.quant.kernels) computes what such a module gives together with its codes, which the layers
that read it then need not make; another computes its gradients. Sums and exponentials are not rounded as torch rounds
them there, so that a few codes differ by one; forward and backward use the same. Elsewhere, and for quantizers that
have no such kernel, the model's own functions run.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat.quant import kernels
from qat.quant.linear import InputQuantizer, QuantLinear
from qat.quant.number_format import Quantized
from qat.quant.quantizers.base import Grid
from qat.quant.rotated import rotation_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from qat.quant.architecture import Block
    from qat.quant.kernels.host import Normed


def join(layer: nn.Module, block: Block, config: PretrainedConfig) -> None:
    """Let the norms and the MLP of a decoder layer, whose Linear layers have been converted, offer codes to those that
    read what they give. ``config`` is the model's."""
    for name, reader in ((block.attention_norm, block.queries), (block.mlp_norm, block.gate)):
        if quantizer := _quantizer_of(layer, reader):
            norm = layer.get_submodule(name)
            norm.__class__ = _mixed(Norm, type(norm))  # type: ignore[arg-type]  # mypy: hashable?
            norm.reader, norm.eps = quantizer, config.rms_norm_eps  # type: ignore[assignment]
    place, _, down = block.down.rpartition(".")
    gate, up = (name.removeprefix(f"{place}.") for name in (block.gate, block.up))
    quantizer, rotation = _quantizer_of(layer, block.down), rotation_of(config)
    if rotation and rotation.down != "none":  # R4 changes what the last layer reads
        return
    if place and quantizer and getattr(config, "hidden_act", None) in ("silu", "swish") and "." not in gate + up:
        mlp = layer.get_submodule(place)
        mlp.__class__ = _mixed(Gated, type(mlp))  # type: ignore[arg-type]
        mlp.reader, mlp.parts = quantizer, (gate, up, down)  # type: ignore[assignment]


def _quantizer_of(layer: nn.Module, name: str) -> InputQuantizer | None:
    """Return the quantizer of a Linear layer's input, if it has one."""
    linear = layer.get_submodule(name)
    return linear.input_quantizer if isinstance(linear, QuantLinear) else None


@functools.cache
def _mixed(part: type[nn.Module], of: type[nn.Module]) -> type[nn.Module]:
    return type(of.__name__, (part, of), {"__module__": of.__module__})


class Norm(nn.Module):
    """Mixed into the class of an RMSNorm.

    Attributes:
        reader: quantizes its output
        eps: what is added to the mean square
    """

    reader: InputQuantizer
    eps: float
    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        own, form = kernels.on(x.device.type), self.reader.form
        if own is None or form.group_size:
            return super().forward(x)
        normed = own.norm(x.detach().flatten(0, -2), self.weight.detach(), self.eps, form.by, form.qmax)
        if normed is None:
            return super().forward(x)
        y = _Norm.apply(x, self.weight, normed)
        _offer(self.reader, y, normed.codes, normed.scale, normed.zero_point)
        return y


class Gated(nn.Module):
    """Mixed into the class of an MLP that computes down(silu(gate(x)) * up(x)).

    Attributes:
        reader: quantizes the input of the last layer
        parts: names of the layers gate, up and down
    """

    reader: InputQuantizer
    parts: tuple[str, str, str]

    def forward(self, x: Tensor) -> Tensor:
        own, form = kernels.on(x.device.type), self.reader.form
        if own is None or form.group_size:
            return super().forward(x)
        gate, up, down = (getattr(self, name) for name in self.parts)
        gate, up = gate(x), up(x)
        rows = (part.detach().flatten(0, -2) for part in (gate, up))
        product = own.gated(*rows, form.by, form.qmax)
        if product is None:
            return down(nn.functional.silu(gate) * up)
        y = _Gated.apply(gate, up, product)
        _offer(self.reader, y, *product[1:])
        return down(y)


def _offer(reader: InputQuantizer, y: Tensor, codes: Tensor, *grid: Tensor | None) -> None:
    """Hand over the codes [rows, n] and the grid [rows, 1] of y [..., n]."""
    scale, zero_point = (None if part is None else part.view(*y.shape[:-1], 1) for part in grid)
    assert scale is not None
    reader.offer(y, Quantized(codes.view(y.shape), Grid(scale, zero_point)))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, normed: Normed) -> Tensor:
        ctx.save_for_backward(x, weight, normed.roots)
        return normed.values.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, roots = ctx.saved_tensors
        own = kernels.on(x.device.type)
        assert own is not None
        of_x, of_weight = own.norm_gradients(grad.flatten(0, -2), x.flatten(0, -2), weight, roots)
        return of_x.view(x.shape), of_weight, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, product: tuple[Tensor, ...]) -> Tensor:
        ctx.save_for_backward(gate, up)
        return product[0].view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        own = kernels.on(grad.device.type)
        assert own is not None
        of_gate, of_up = own.gated_gradients(grad, *ctx.saved_tensors)
        return of_gate, of_up, None
