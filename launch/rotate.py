"""Rotate a model's weights, which spreads activation outliers before quantization.

python launch/rotate.py --model DIR --output DIR. The output computes the same function, and every command but
launch/generate.py takes it as --model; launch/train.py as --student too, with the original as --model. With --data, R1
and R2 are learned first.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import cli
from qat.data.sequences import TrainingData
from qat.quant.config import QuantConfig
from qat.quant.rotated import DOWN
from qat.runtime.errors import UserError
from qat.runtime.files import check_new
from qat.runtime.machine import take_gpu
from qat.runtime.table import check_choices, choice
from qat.store import models, rotate
from qat.store.model_folder import BASE_MODEL, ModelFolder
from qat.train.rotations import LearnConfig, learn


@dataclass(frozen=True)
class Settings:
    """The model to rotate, and how.

    Args:
        model: the full-precision model: a Hugging Face directory or hub name
        output: folder of the rotated model; must not exist
        kind: how the rotations of the residual stream (R1) and of each head's values (R2) are drawn
        down: the online Hadamard transform in front of the MLP's last layer (R4)
        untie: give a model with tied embeddings a separate output layer, as engines need; otherwise a matrix
            [hidden, hidden] is added in front of the tied one
        seed: seed for the random signs or matrices, and for the data order
        data: shards of launch/generate.py; learns R1 and R2 on them, for the quantization given by the flags below
    """

    model: str
    output: Path
    kind: str = choice("hadamard", lambda: rotate.KINDS)
    down: str = choice("hadamard", lambda: DOWN)
    untie: bool = False
    seed: int = 0
    data: Path | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        check_new(self.output)


def main() -> None:
    settings, config, quant = cli.parse(__doc__, Settings, LearnConfig, QuantConfig)
    if not settings.data and (config, quant) != (LearnConfig(), QuantConfig()):
        raise UserError("Without --data nothing is learned: leave out the flags of learning and of the quantization.")
    folder = ModelFolder.read(Path(models.resolve_full_precision(settings.model)))
    rotation = rotate.rotation_for(folder.config, settings.down, settings.untie)
    matrices = rotate.draw(folder.config, settings.kind, settings.seed)
    origin: dict[str, Any] = {
        BASE_MODEL: settings.model,
        "weights": models.weights_fingerprint(str(folder.directory)),
        "kind": settings.kind,
        "seed": settings.seed,
    }
    take_gpu()
    if settings.data:
        data = TrainingData(settings.data, models.load_tokenizer(str(folder.directory)), settings.seed)
        models.check_sequences(folder.config, data.longest, data.largest, str(settings.data))
        origin |= {"learned": asdict(config), "data": data.fingerprint, "quant": quant.record()}
        matrices = learn(folder, rotation, quant, matrices, data, config)
    rotate.write(folder, settings.output, rotation, matrices, origin)
    learned = f", learned in {config.steps} steps for {quant}" if settings.data else ""
    print(f"{settings.output}: rotated{learned}; computed online: {rotation}")


if __name__ == "__main__":
    cli.run(main)
