"""A post-training method as somebody else would add it: ``--plugin plugin_clipping --method clipping``."""

from dataclasses import dataclass

import torch

from qat.ptq import METHODS
from qat.ptq.method import LayerByLayer
from qat.quant.linear import quant_linears
from qat.quant.number_format import grid_of, round_to_grid


@dataclass(frozen=True)
class ClippingConfig:
    """How far it clips.

    Args:
        least_ratio: the narrowest grid that is tried, as a part of the one that clips nothing
    """

    least_ratio: float = 0.8


class Clipping(LayerByLayer):
    meaning = "rounds to nearest on a grid that clips as much as makes the squared error smallest"
    config = ClippingConfig
    needs_text = False

    def quantize_layer(self, stream, weights):
        rounded, grids = dict(weights), {}
        for name, linear in quant_linears(stream.layers[stream.position]).items():
            weight, form = weights[f"{name}.weight"], linear.weight_format
            widest = grid_of(weight, form)
            tried = [widest._replace(scale=widest.scale * r) for r in torch.linspace(self.settings.least_ratio, 1, 5)]
            values = [round_to_grid(weight, form, grid)[0] for grid in tried]
            best = min(range(5), key=lambda i: (values[i] - weight).square().sum())
            rounded[f"{name}.weight"], grids[name] = values[best], tried[best]
        return rounded, grids, ""


METHODS.add("clipping", Clipping)
