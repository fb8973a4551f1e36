"""Write a trained student as an integer checkpoint that inference engines load.

python launch/export.py --checkpoint runs/NAME/final --output DIR
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from launch import cli
from qat import export, models
from qat.errors import UserError


@dataclass(frozen=True)
class Export:
    """What to export, and where to.

    Args:
        checkpoint: the final/ of a training run
        output: folder of the export; must not exist
        verify: load the export again and compare its logits with the checkpoint's
    """

    checkpoint: Path
    output: Path
    verify: bool = True


def main() -> None:
    (settings,) = cli.parse(__doc__, Export)
    models.resolve(str(settings.checkpoint))
    export.export(settings.checkpoint, settings.output)
    size = sum(file.stat().st_size for file in settings.output.iterdir())
    print(f"{settings.output}: {export.FORMAT}, {size / 1e6:.0f} MB")
    if settings.verify:
        verify(settings.checkpoint, settings.output)


@torch.inference_mode()
def verify(checkpoint: Path, exported: Path) -> None:
    """Raise UserError unless both give the same logits, bit for bit, on a sequence of random tokens."""
    in_memory = export.load(str(checkpoint), torch.float32)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(in_memory.config.vocab_size, (1, 128), generator=generator)
    expected = in_memory(input_ids).logits
    got = export.load(str(exported), torch.float32)(input_ids).logits
    if not torch.equal(got, expected):
        raise UserError(f"{exported} is wrong: its logits differ by up to {(got - expected).abs().max():.3g}.")
    print(f"verified: the logits of {exported} equal the checkpoint's, bit for bit")


if __name__ == "__main__":
    cli.run(main)
