"""RTN, round to nearest: the quantization of training, without the training."""

from pathlib import Path

from torch import Tensor

from qat.ptq.method import Method
from qat.quant.config import QuantConfig
from qat.store import weight_files
from qat.store.model_folder import ModelFolder


class RTN(Method):
    meaning = "rounds every weight to the nearest value of its grid"
    needs_text = False

    def write(self, output: Path, quant: QuantConfig, sequences: list[Tensor]) -> None:
        """Write the model's weights unchanged: ``quant_config.json``, written beside them, specifies the rounding."""
        weight_files.write(output, ModelFolder.read(self.source).tensors())
