"""RTN, round to nearest: the quantization of training, without the training."""

import shutil
from pathlib import Path

from qat.weight_files import INDEX, weight_files


def write(source: Path, output: Path) -> None:
    """Copy the model's weights as they are: ``quant_config.json``, which comes beside them, says how to round."""
    index = source / INDEX
    for file in [*weight_files(source), *([index] if index.exists() else [])]:
        shutil.copy(file, output)
