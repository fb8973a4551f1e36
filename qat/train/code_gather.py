"""Ranks exchange the student's quantized weights as codes.

Once a step each rank quantizes its own rows of a weight, and ZeRO-3 gathers their codes, packed, instead of their
values: 4 bits of each weight for 16 or 32. Layers multiply what is gathered (qat.quant.linear). A grid lies within a
row, so the codes are those that each rank would compute from the gathered values: no number changes. Master weights,
checkpoints and saved students stay what they are.

A weight takes part if its rows are whole in a rank's part, its grid follows from its values alone, and all of its
gradient passes: not those that clip or have a learned scale. Weights that every rank holds completely, or that are on
NVMe, do not take part either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from deepspeed import comm
from torch import Tensor
from torch.nn import Parameter

from qat.quant.embedding import QuantEmbedding
from qat.quant.linear import QuantLinear
from qat.quant.number_format import quantize
from qat.quant.packing import STAND_IN, makes_rows, pack_rows
from qat.quant.prepare import weight_holders
from qat.runtime import machine
from qat.train import deepspeed_internals
from qat.train.deepspeed_internals import Fetcher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def gather_codes(engine: DeepSpeedEngine, room: float) -> WeightCodes:
    """Make the engine of a prepared student gather codes wherever it can; return them.

    Args:
        room: bytes in which a rank may keep gathered codes, the same on all ranks
    """
    parameters = dict(engine.module.named_parameters())
    holders = {parameters[name]: layers for name, layers in weight_holders(engine.module).items()}
    owners = Counter(own for module in engine.module.modules() for own in module.parameters(recurse=False))
    suitable = {
        parameter: layers
        for parameter, layers in holders.items()
        if _is_suitable(parameter, layers) and len(layers) == owners[parameter]
    }
    codes = WeightCodes(suitable, room)
    deepspeed_internals.fetch_with(engine, codes)
    return codes


def _is_suitable(parameter: Parameter, layers: list[QuantLinear | QuantEmbedding]) -> bool:
    if any(own.weight_format != layers[0].weight_format for own in layers):
        return False
    if any(isinstance(own, QuantLinear) and own.scale_change is not None for own in layers):
        return False
    rows = deepspeed_internals.own_rows(parameter)
    return rows is not None and makes_rows(layers[0].weight_format, tuple(rows.shape), parts=1)


class WeightCodes(Fetcher):
    """The codes of a student's weights, made when a weight is needed for the first time after they have changed.

    Args:
        layers: the weights, and the layers that have each of them
        room: bytes in which gathered codes are kept until the weights change: they are then gathered once a step, not
            once for every pass. Those of the first weights are kept
    """

    def __init__(self, layers: Mapping[Parameter, list[QuantLinear | QuantEmbedding]], room: float):
        self.parameters = layers.keys()
        self._layers, self._room = layers, room
        self._parts: dict[Parameter, Tensor] = {}
        self._kept: dict[Parameter, Tensor | None] = {}

    def changed(self) -> None:
        self._parts.clear()
        self._kept.clear()

    def begin(self, parameter: Parameter) -> Callable[[], None]:
        if not self._parts:
            self._make()
        work, gathered = None, self._kept.get(parameter)
        if gathered is None:
            gathered, work = gather(self._parts[parameter])
            if parameter in self._kept:
                self._kept[parameter] = gathered

        def wait() -> None:
            if work is not None:
                work.wait()
            setattr(parameter, STAND_IN, gathered)

        return wait

    def end(self, parameter: Parameter) -> None:
        if hasattr(parameter, STAND_IN):
            if machine.device().type == "cuda":  # it was allocated on another stream
                getattr(parameter, STAND_IN).record_stream(torch.cuda.current_stream())
            delattr(parameter, STAND_IN)

    def _make(self) -> None:
        """Quantize this rank's rows of all weights. On a GPU that is done on DeepSpeed's stream for gathering."""
        if machine.device().type == "cuda":
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())  # which has changed them
        for parameter, layers in self._layers.items():
            form = layers[0].weight_format
            rows = deepspeed_internals.own_rows(parameter)
            assert rows is not None
            self._parts[parameter] = pack_rows(quantize(rows.to(machine.device()), form), form)
        room = self._room
        for parameter, part in self._parts.items():
            room -= dist.get_world_size() * part.nbytes
            if room < 0:
                break
            self._kept[parameter] = None


def gather(part: Tensor) -> tuple[Tensor, dist.Work | None]:
    """Begin to gather each rank's uint8 [bytes]; return where they come to, [ranks, bytes], and what to wait for."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return part[None], None
    gathered = part.new_empty(ranks, len(part))
    return gathered, comm.all_gather_into_tensor(gathered.view(-1), part, async_op=True)
