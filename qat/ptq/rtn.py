"""RTN, round to nearest: the quantization of training, without the training."""

from pathlib import Path

from qat.store import weight_files
from qat.store.model_folder import ModelFolder


def write(source: ModelFolder, output: Path) -> None:
    """Write the model's weights as they are: ``quant_config.json``, which comes beside them, says how to round."""
    weight_files.write(output, source.tensors())
