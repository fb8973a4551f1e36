"""RTN, round to nearest: the quantization of training, without the training."""

import shutil
from pathlib import Path


def write(source: Path, output: Path) -> None:
    """Copy the model's weights as they are: ``quant_config.json``, which comes beside them, says how to round."""
    for file in source.glob("*.safetensors*"):
        shutil.copy(file, output)
