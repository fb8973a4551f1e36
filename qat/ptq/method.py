"""The interface of a post-training method."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qat.ptq import writer
from qat.ptq.stream import Stream, Weights
from qat.quant.config import QuantConfig
from qat.quant.quantizers.base import Grid
from qat.store.sidecars import load_tensor_scales


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none."""


class Method(ABC):
    """A post-training method. An object of it works on one model. A subclass defines:

    Attributes:
        meaning: half a sentence for ``--help``
        config: dataclass of its settings; each becomes a flag of launch/quantize.py
        needs_text: whether it needs calibration text

    Args:
        source: directory of the full-precision model
        settings: its settings, of the class ``config``
    """

    meaning: str
    config: type = NoSettings
    needs_text: bool = True

    def __init__(self, source: Path, settings: Any):
        self.source, self.settings = source, settings

    @classmethod
    def check(cls, quant: QuantConfig) -> None:
        """Raise UserError for a quantization that the method does not support."""
        return

    @abstractmethod
    def write(self, output: Path, quant: QuantConfig, sequences: list[Tensor]) -> None:
        """Write the quantized model's weight files into ``output``, which has the scales of tensors already if those of
        inputs had to be measured.

        Args:
            sequences: calibration text, token ids [1, tokens]; empty unless the method needs text
        """


class LayerByLayer(Method):
    """A method that quantizes one decoder layer after another, each for the hidden states that the quantized layers
    before it compute from the calibration text. A run that was stopped resumes after the last finished layer."""

    @abstractmethod
    def quantize_layer(self, stream: Stream, weights: Weights) -> tuple[Weights, dict[str, Grid], str]:
        """Quantize the decoder layer that reads ``stream.hidden`` next, and has ``weights``.

        Returns:
            its final weights, in the dtype of ``weights``, on the CPU;
            the grids that they lie on, by the names of the quantized layers in it, of all of them; none where the
            weights are to be rounded to nearest on the grids that their own values give, when they are loaded;
            a word for the progress bar
        """

    def write(self, output: Path, quant: QuantConfig, sequences: list[Tensor]) -> None:
        stream = Stream(self.source, quant, sequences, load_tensor_scales(output))
        writer.write(stream, output, self.quantize_layer)
