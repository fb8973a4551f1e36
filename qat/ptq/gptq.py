"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round one input channel after another, and let the channels that are
not rounded yet compensate for the error, weighted by the inputs' second moments.

    minimise  tr((W - W_hat) H (W - W_hat)^T),   H = X^T X / tokens

With H^-1 = U^T U (U upper triangular), channel i leaves the error e = (w_i - w_hat_i) / U_ii, and every later channel j
becomes w_j - e U_ij. The grid is that of the weights before any of this: the same as RTN's. Compensated weights that
leave it are clipped.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.ptq.method import LayerByLayer
from qat.ptq.stream import Stream, Weights
from qat.quant.architecture import architecture_of, linear_in
from qat.quant.config import QuantConfig
from qat.quant.linear import QuantLinear
from qat.quant.number_format import Format, Quantized, dequantize, grid_of, quantize, round_to_grid
from qat.quant.products import matmul
from qat.quant.quantizers.base import Grid, values_of
from qat.runtime.errors import UserError

_BLOCK = 32
"""Number of channels whose corrections to all later ones are applied at once. It affects only the speed; in most layers
this many channels are few enough numbers for one thread, which is faster than two that wait for each other at every
channel."""


@dataclass(frozen=True)
class GPTQConfig:
    """The settings of GPTQ.

    Args:
        act_order: round the channels with the largest inputs first
        damping: added to the Hessian's diagonal, as a fraction of its mean
    """

    act_order: bool = True
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.damping <= 0:
            raise UserError(f"damping={self.damping} is invalid: choose more than 0, say 0.01.")


class GPTQ(LayerByLayer):
    meaning = "lets weights that are not rounded yet make up for the error of those that are (arXiv 2210.17323)"
    config = GPTQConfig

    @classmethod
    def check(cls, quant: QuantConfig) -> None:
        if not quant.weights.quantizes:
            raise UserError("method=gptq rounds weights, and w_bits is 16: give fewer, or method=rtn.")

    def quantize_layer(self, stream: Stream, weights: Weights) -> tuple[Weights, dict[str, Grid], str]:
        return quantize_layer(stream, weights, self.settings)


@torch.inference_mode()
def quantize_layer(stream: Stream, weights: Weights, config: GPTQConfig) -> tuple[Weights, dict[str, Grid], str]:
    """Round the layer at the stream's position; return its rounded weights, their grids by layer name, and a note on
    the error.

    The Linear layers that read the same tensor take their turns in the order of the forward pass, so that each one's
    inputs are what the quantized layers before it, in this decoder layer and in the earlier ones, make of the text.
    """
    layer = stream.load(weights).to(stream.dtype)
    rounded, grids = dict(weights), {}
    ours = rtn = 0.0
    for names in architecture_of(stream.model.config).shared_inputs:
        linears = {name: linear_in(layer, name) for name in names}
        linears = {name: own for name, own in linears.items() if _is_rounded(own)}
        if not linears:
            continue
        hessian = hessian_of(quantized_inputs(stream, layer, linears))
        for name, linear in linears.items():
            assert isinstance(linear, QuantLinear)
            stored = weights[f"{name}.weight"]
            weight = stored.to(stream.device, torch.float32)
            try:
                quantized = gptq(weight, hessian, linear.weight_format, config)
            except torch.linalg.LinAlgError as error:
                raise UserError(
                    f"The Hessian of {stream.prefix(stream.position)}{name} cannot be inverted: calibrate on more "
                    f"sequences, or give a larger damping than {config.damping}."
                ) from error
            values = dequantize(quantized, stored.dtype)
            again = quantize(values, linear.weight_format, quantized.grid).codes
            if not torch.equal(again.view(torch.int8), quantized.codes.view(torch.int8)):
                raise UserError(
                    f"Values of w_bits={linear.weight_format.bits}, w_quantizer={linear.weight_format.quantizer} in "
                    f"{stored.dtype}, the model's dtype, lose their codes: give w_quantizer=minmax, or fewer w_bits."
                )
            ours += error_of(weight - values.float(), hessian)
            rtn += error_of(weight - round_to_grid(weight, linear.weight_format)[0], hessian)
            rounded[f"{name}.weight"] = values.cpu()
            grids[name] = quantized.grid.map(Tensor.cpu)
            linear.weight.copy_(values)
            linear.hold(quantized)
    stream.unload()
    return rounded, grids, f"error {ours / (rtn or 1):.2f} of RTN's"


def _is_rounded(linear: nn.Linear) -> bool:
    return isinstance(linear, QuantLinear) and linear.weight_format.quantizes


def quantized_inputs(stream: Stream, layer: nn.Module, linears: dict[str, nn.Linear]) -> Iterable[Tensor]:
    """Yield, for each sequence, the input [tokens, in] that the given layers, which share it, multiply by their
    weights."""
    first = next(iter(linears.values()))
    assert isinstance(first, QuantLinear)
    form = first.input_format
    for x in stream.inputs(layer, first):
        yield round_to_grid(x, form)[0] if form.quantizes else x


def hessian_of(inputs: Iterable[Tensor]) -> Tensor:
    """Compute X^T X / tokens, fp32 [in, in], of inputs [tokens, in]."""
    total, tokens = None, 0
    for x in inputs:
        x = x.float()
        product = matmul(x.t(), x)
        total = product if total is None else total.add_(product)
        tokens += len(x)
    assert total is not None
    return total.div_(tokens)


def error_of(difference: Tensor, hessian: Tensor) -> float:
    """Compute tr(D H D^T): the mean over tokens of the squared output error caused by the weight difference D [out,
    in]."""
    return (matmul(difference, hessian) * difference).sum().item()


def gptq(weight: Tensor, hessian: Tensor, form: Format, config: GPTQConfig) -> Quantized:
    """Round weight, fp32 [out, in], for ``hessian`` [in, in], to codes on the grid that ``form`` lays over it.

    Raises torch.linalg.LinAlgError if the damped Hessian is not positive definite.
    """
    size = weight.shape[1]
    grid = grid_of(weight, form)
    order = torch.arange(size, device=weight.device)
    if config.act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], config.damping)
    group = order // form.group_size if form.group_size else torch.zeros_like(order)
    scales, zero_points = (None if part is None else part[:, group].t().contiguous() for part in grid)

    left = weight[:, order].t().contiguous()  # [in, out]: a channel is a row
    codes = torch.empty_like(left, dtype=torch.int8)  # their bits: not all operations take floats of 8 bits
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        errors = torch.empty_like(left[start:end])
        for i in range(start, end):
            channel_grid = Grid(scales[i], None if zero_points is None else zero_points[i])  # type: ignore[index]
            channel = form.by.codes(left[i], channel_grid, form.qmax)
            codes[i] = channel.to(form.by.code_dtype).view(torch.int8)
            errors[i - start] = (left[i] - values_of(channel, channel_grid, torch.float32)) / factor[i, i]
            left[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return Quantized(in_order.t().contiguous().view(form.by.code_dtype), grid)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Compute the upper triangular U [in, in] with U^T U = (H + d)^-1, where H is [in, in] and d is ``damping`` times
    its mean diagonal.

    Where H is zero, as all inputs are, d is 1: weights are then rounded to nearest.

    Cholesky from the last row up gives H = R R^T with R upper triangular, and U = R^-1: H is never inverted.
    """
    added = damping * hessian.diagonal().mean()
    backwards = hessian.flip(0, 1)
    backwards.diagonal().add_(torch.where(added == 0, 1.0, added))
    factor = torch.linalg.cholesky(backwards)
    del backwards  # each of these has 3 GB where a layer has 28,000 inputs
    factor = factor.flip(0, 1)
    identity = torch.eye(len(factor), device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=True)
