"""Write a trained student as an integer checkpoint that inference engines load.

python launch/export.py --checkpoint runs/NAME/final --output DIR
"""

from dataclasses import dataclass
from pathlib import Path

from launch import cli
from qat import export, models, report


@dataclass(frozen=True)
class Export:
    """What to export, and where to.

    Args:
        checkpoint: the final/ of a training run
        output: folder of the export; must not exist
        verify: load the export and compare its logits with the checkpoint's before it appears
    """

    checkpoint: Path
    output: Path
    verify: bool = True


def main() -> None:
    (settings,) = cli.parse(__doc__, Export)
    models.resolve(str(settings.checkpoint))
    export.export(settings.checkpoint, settings.output, settings.verify)
    print(f"{settings.output}: {export.FORMAT}, {report.weights_size(settings.output) / 1e6:.0f} MB")
    if settings.verify:
        print("verified: its logits equal the checkpoint's, bit for bit")


if __name__ == "__main__":
    cli.run(main)
