"""Write a trained student as a model that inference engines load.

python launch/export.py --checkpoint runs/NAME/final --output DIR
"""

from dataclasses import dataclass, field
from pathlib import Path

from launch import cli
from qat.evaluate import heldout
from qat.evaluate.perplexity import text_windows
from qat.export import export, model_card
from qat.export.formats import DEFAULT_EXPORT_FORMAT, EXPORT_FORMATS
from qat.runtime.files import appearing_folder, check_new
from qat.runtime.table import check_choices, choice
from qat.store import models, student_folder
from qat.store.model_folder import read_config

_WINDOW, _WINDOWS = 512, 4


@dataclass(frozen=True)
class Export:
    """The student to export, and the export's folder and format.

    Args:
        checkpoint: the final/ or a checkpoints/step-N of a training run, or what launch/quantize.py wrote
        output: folder of the export; must not exist
        format: export format
        model: the model that the run started from; by default where the run found it
        verify: read the export back and compare its logits and perplexity with the student's before publishing it
        text: text to measure perplexity on: encyclopedia or howto (built in), or a text file
        base_model: hub name of the model that the run started from, for the model card; by default the run's --model,
            or, if that was a folder, what its README.md declares
        license: license of that model, for the model card; by default what its README.md declares
        results: JSON files of launch/evaluate.py, for the model card
    """

    checkpoint: Path
    output: Path
    format: str = choice(DEFAULT_EXPORT_FORMAT, lambda: EXPORT_FORMATS)
    model: str | None = None
    verify: bool = True
    text: str = heldout.ENCYCLOPEDIA
    base_model: str = ""
    license: str = ""
    results: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choices(self)
        check_new(self.output)


def main() -> None:
    (settings,) = cli.parse(__doc__, Export)
    student = student_folder.find(settings.checkpoint, settings.model)
    export.check(student, settings.format)
    windows = None
    if settings.verify:
        tokenizer = models.load_tokenizer(str(student.directory))
        window = min(_WINDOW, EXPORT_FORMATS[settings.format].max_positions(student))
        windows = text_windows(heldout.paragraphs(settings.text), tokenizer, window, _WINDOWS)
        models.check_ids(read_config(str(student.directory)), int(windows.max()), f"The text {settings.text}")
    print(f"{student.quant} student of {settings.checkpoint} -> {settings.format}", flush=True)
    checks = ""
    with appearing_folder(settings.output) as partial:
        export.export(student, partial, settings.format)
        if windows is not None:
            checks = export.verify(student, partial, settings.format, windows).sentence(settings.text)
        model_card.write(student, settings.format, _origin(settings, student), checks, partial)
    kind = EXPORT_FORMATS[settings.format]
    size = sum(file.stat().st_size for file in settings.output.glob(kind.weight_files))
    print(checks or "not verified")
    for sentence in kind.all_deviations(student):
        print(f"differs: {sentence}")
    print(f"{settings.output}: {settings.format}, {size / 1e6:.0f} MB; details in README.md there")


def _origin(settings: Export, student: student_folder.Student) -> model_card.Origin:
    name = settings.base_model or student.base_model
    known = model_card.origin_of(name)
    base_model = settings.base_model or known.base_model
    return model_card.Origin(base_model, settings.license or known.license, settings.results)


if __name__ == "__main__":
    cli.run(main)
