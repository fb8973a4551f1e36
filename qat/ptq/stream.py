"""Calibration: text, and the hidden states that the quantized model's layers compute from it, one layer in memory at a
time.

The model is a skeleton on the meta device. A layer gets its weights for its turn and loses them after it, so that a
model of any size needs the memory of one layer, its Hessians, and the sequences' hidden states.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.data.sequences import TrainingData
from qat.quant.architecture import architecture_of, decoder_layers, input_embedding
from qat.quant.config import QuantConfig
from qat.quant.embedding import QuantEmbedding
from qat.quant.linear import quant_linears
from qat.quant.number_format import FULL_PRECISION
from qat.quant.prepare import prepare, prepared_with
from qat.quant.quantizers.base import Grid
from qat.quant.tensor_scales import largest_magnitudes, scales_from, set_tensor_scales, tensor_scales
from qat.runtime import machine
from qat.runtime.machine import device
from qat.store import models
from qat.store.model_folder import ModelFolder

Weights = dict[str, Tensor]
"""The weights of one decoder layer, by their names in it, in the dtype of the file."""


def calibration_sequences(data: TrainingData, most: int) -> list[Tensor]:
    """Return token ids [1, tokens] of the first ``most`` sequences of a shard folder; of all, if ``most`` is 0."""
    return [data.sequence(index).input_ids for index in range(min(most or len(data), len(data)))]


class WeightFiles:
    """The weights of a model folder, read on demand."""

    def __init__(self, folder: ModelFolder):
        self._folder = folder
        self._architecture = architecture_of(folder.config)

    def layer(self, number: int) -> Weights:
        """Read the weights of decoder layer ``number``."""
        prefix = self._architecture.prefix(number)
        return self._read(lambda name: name.startswith(prefix), prefix)

    def rest(self) -> Weights:
        """Read the weights outside the decoder layers, by their full names."""
        return self._read(lambda name: not name.startswith(f"{self._architecture.layers}."), "")

    def _read(self, wanted: Callable[[str], bool], prefix: str) -> Weights:
        return {name.removeprefix(prefix): weight for name, weight in self._folder.tensors(wanted)}


class Stream:
    """The calibration sequences on their way through the quantized model: hidden states [1, tokens, hidden] at the
    input of decoder layer ``position``.

    Attributes:
        model: the skeleton, prepared; only the layer in use has weights
        position: the layer that reads the hidden states next
        hidden: they themselves, on the CPU
    """

    def __init__(
        self, source: Path, quant: QuantConfig, sequences: list[Tensor], scales: Mapping[str, float] | None = None
    ):
        """Begin before the first layer. ``scales`` are those of inputs, and of weights, that were measured before; by
        default weights give their own.

        Raise UserError if the model's blocks cannot be quantized, or its weights are not those of its config."""
        self.device = device()
        self.dtype = machine.inference_dtype()
        folder = ModelFolder.read(source)
        self.files = WeightFiles(folder)
        self.model = prepare(folder.skeleton(), quant)
        self._scales = dict(scales or {})
        set_tensor_scales(self.model, self._scales)
        self.layers = decoder_layers(self.model)
        self.position = 0
        self._arguments: dict[int, list[dict[str, Any]]] = {}
        self.hidden = self._embed(sequences)

    def prefix(self, number: int) -> str:
        """Return the prefix of the names of layer ``number``'s weights."""
        return architecture_of(self.model.config).prefix(number)

    @torch.inference_mode()
    def advance(self, weights: Weights, grids: dict[str, Grid]) -> None:
        """Pass the hidden states through the layer at ``position``, given its final weights."""
        if self.hidden and self.position + 1 < len(self.layers):
            self.run_all(weights, grids)
        self.position += 1

    def run_all(self, weights: Weights, grids: dict[str, Grid]) -> None:
        """Replace the hidden states by the output of the layer at ``position``, with these weights."""
        layer = self.load_rounded(weights, grids)
        self.hidden = [self.run(layer, hidden).cpu() for hidden in self.hidden]
        self.unload()

    def load(self, weights: Weights) -> nn.Module:
        """Return the layer at ``position`` with ``weights``, not rounded, on the device."""
        layer, prefix = self.layers[self.position], self.prefix(self.position)
        fill(layer, weights, self.device)
        named = ((prefix + name, weight) for name, weight in weights.items())
        set_tensor_scales(self.model, tensor_scales(self.model, prepared_with(self.model), named) | self._scales)
        for linear in quant_linears(layer).values():
            linear.thaw()  # it may have been rounded before
        return layer

    def load_rounded(self, weights: Weights, grids: dict[str, Grid]) -> nn.Module:
        """Return the layer at ``position`` as it is evaluated: rounded in the dtype of the file, on the given grids or
        the weights' own."""
        layer = self.load(weights)
        for name, linear in quant_linears(layer).items():
            grid = grids.get(name)
            linear.freeze(grid and grid.map(lambda part: part.to(self.device)))
        return layer.to(self.dtype)

    def unload(self) -> None:
        """Free the weights of the layer at ``position``."""
        self.layers[self.position].to("meta")

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Return the output [1, tokens, hidden] of a layer at ``position`` for one sequence's hidden states [1, tokens,
        hidden], on the device."""
        arguments = self._arguments[hidden.shape[1]][self.position]
        return layer(hidden.to(self.device), **arguments)

    def inputs(self, layer: nn.Module, module: nn.Module) -> Iterator[Tensor]:
        """Yield the input [tokens, in] of ``module`` in ``layer``, sequence by sequence. The layer runs no further."""

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        hook = module.register_forward_pre_hook(stop)
        try:
            for hidden in self.hidden:
                try:
                    self.run(layer, hidden)
                except _Reached as reached:
                    yield reached.x.flatten(0, -2)
        finally:
            hook.remove()

    @torch.inference_mode()
    def _embed(self, sequences: list[Tensor]) -> list[Tensor]:
        """Run the model around its layers, which only record their inputs: hidden states, and positions and mask."""
        architecture, rest = architecture_of(self.model.config), self.files.rest()
        for prefix in (f"{architecture.embedding}.", f"{architecture.norm}."):
            module = self.model.get_submodule(prefix.removesuffix("."))
            fill(module, {key.removeprefix(prefix): w for key, w in rest.items() if key.startswith(prefix)}, "cpu")
            if isinstance(module, QuantEmbedding):
                module.freeze()
            module.to(self.dtype)
        models.renew_rope(self.model)
        noted: list[dict[str, Any]] = []
        embedded: list[Tensor] = []

        def note(hidden: Tensor, **arguments: Any) -> Tensor:
            if not noted:
                embedded.append(hidden)
            noted.append(arguments)
            return hidden

        for layer in self.layers:
            layer.forward = note
        for ids in sequences:
            self.model.base_model(ids, use_cache=False)
            moved: dict[int, Tensor] = {}  # the layers share their positions, on another device too
            self._arguments[ids.shape[1]] = [_moved(arguments, self.device, moved) for arguments in noted]
            noted.clear()
        for layer in self.layers:
            del layer.forward
        input_embedding(self.model).to("meta")
        return embedded


@torch.inference_mode()
def measured_scales(source: Path, quant: QuantConfig, sequences: list[Tensor]) -> dict[str, float]:
    """Measure the scales of the inputs, keys and values that need one (``QuantConfig.measures_scales``), by name: the
    model in full precision reads the sequences [1, tokens], one decoder layer in memory at a time."""
    bits = dict.fromkeys(("w_bits", "a_bits", "kv_bits"), FULL_PRECISION)
    stream = Stream(source, quant.everywhere(**bits), sequences)

    def run() -> None:
        for number in range(len(stream.layers)):
            stream.run_all(stream.files.layer(number), {})
            stream.position += 1

    return scales_from(stream.model, quant, largest_magnitudes(stream.model, quant, run))


def fill(module: nn.Module, weights: Weights, device: torch.device | str) -> None:
    """Replace all of the module's weights by ``weights``, which must be complete."""
    own = {name: weight.to(device, copy=True) for name, weight in weights.items()}  # may be rounded in place
    module.load_state_dict(own, assign=True)


def _moved(arguments: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    """Return ``arguments`` with each tensor on ``device``, moved once: ``moved`` holds the moved ones, by the id of the
    original."""
    if isinstance(arguments, dict):
        return {name: _moved(value, device, moved) for name, value in arguments.items()}
    if isinstance(arguments, tuple):
        return tuple(_moved(value, device, moved) for value in arguments)
    if not isinstance(arguments, Tensor):
        return arguments
    if id(arguments) not in moved:
        moved[id(arguments)] = arguments.to(device)
    return moved[id(arguments)]


class _Reached(Exception):
    """Raised with a module's input to end a forward pass whose remainder is not needed."""

    def __init__(self, x: Tensor):
        self.x = x
