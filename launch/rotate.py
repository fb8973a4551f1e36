"""Rotate a model's weights, so that activations without outliers are left to quantize.

python launch/rotate.py --model DIR --output DIR. The output computes the same function, and every command takes it as
--model; launch/train.py as --student too, with the original as --model.
"""

from dataclasses import dataclass
from pathlib import Path

from launch import cli
from qat.quant.rotated import DOWN
from qat.runtime.errors import UserError
from qat.runtime.files import check_partial
from qat.runtime.table import check_choices, choice
from qat.store import models, rotate
from qat.store.model_folder import ModelFolder


@dataclass(frozen=True)
class Settings:
    """The model to rotate, and how.

    Args:
        model: the full-precision model: a Hugging Face directory or hub name
        output: folder of the rotated model; must not exist
        kind: the matrices that the residual stream (R1) and the values of each head (R2) are multiplied by
        down: the online Hadamard transform in front of the MLP's last layer (R4)
        untie: give a model with tied embeddings an output layer of its own, which engines need; else it gets a matrix
            [hidden, hidden] in front of the tied one
        seed: of the random signs or matrices
    """

    model: str
    output: Path
    kind: str = choice("hadamard", lambda: rotate.KINDS)
    down: str = choice("hadamard", lambda: DOWN)
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.output.exists():
            raise UserError(f"{self.output} is there already: give another folder.")
        check_partial(self.output)


def main() -> None:
    (settings,) = cli.parse(__doc__, Settings)
    folder = ModelFolder.read(Path(models.resolve_full_precision(settings.model)))
    rotate.check_rotatable(folder.config)
    matrices = rotate.draw(folder.config, settings.kind, settings.seed)
    rotate.write(folder, settings.output, settings.down, matrices, settings.untie)
    print(f"{settings.output}: rotated, R4 {settings.down}")


if __name__ == "__main__":
    cli.run(main)
