"""Quantize a model without training: rounding to nearest, GPTQ or SmoothQuant.

python launch/quantize.py --method gptq --model DIR --data SHARDS --output DIR. The output is like the final/ of a
training run: launch/evaluate.py and launch/export.py take it. A run that was stopped resumes.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import cli
from qat.data.sequences import TrainingData
from qat.ptq import METHODS, writer
from qat.ptq.stream import calibration_sequences, measured_scales
from qat.quant.config import SCALES_FILE, QuantConfig
from qat.quant.prepare import prepare
from qat.runtime.errors import UserError, check_least
from qat.runtime.machine import take_gpu
from qat.runtime.settings import recorded
from qat.runtime.table import check_choices, choice
from qat.store import models, rotate
from qat.store.model_folder import ModelFolder
from qat.store.sidecars import save_tensor_scales
from qat.store.student_folder import weight_scales


@dataclass(frozen=True)
class Quantization:
    """The model to quantize, the method, and the output.

    Args:
        model: the full-precision model: a Hugging Face directory or hub name
        output: folder of the quantized model
        method: the post-training method
        data: folder of calibration shards, made by launch/generate.py or from a corpus, for methods that need text, and
            for activations and KV caches whose scales are measured (nvfp4, say)
        sequences: number of sequences to calibrate on, the first of data; 0 for all
    """

    model: str
    output: Path
    method: str = choice("rtn", lambda: METHODS)
    data: Path | None = None
    sequences: int = 128

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, sequences=0)


def main() -> None:
    cli.load_plugins()  # the plug-ins' settings become flags
    settings, quant, *parsed = cli.parse(__doc__, Quantization, QuantConfig, *(m.config for m in METHODS.values()))
    options = dict(zip(METHODS, parsed, strict=True))
    check(settings, quant, options)
    source = Path(models.resolve_full_precision(settings.model))
    data = TrainingData(settings.data, models.load_tokenizer(str(source)), seed=0) if settings.data else None
    method = METHODS[settings.method](source, options[settings.method])
    record = described(settings, quant, method.settings, source, data)
    if writer.is_complete(settings.output, record):
        print(f"{settings.output} already exists.")
        return
    folder = ModelFolder.read(source)
    model = prepare(folder.skeleton(), quant)  # rejects what it cannot quantize before anything is written
    sequences = calibration_sequences(data, settings.sequences) if data else []
    if data:
        longest = max(ids.shape[1] for ids in sequences)  # of those that are read
        models.check_sequences(model.config, longest, data.largest, str(settings.data))
    take_gpu()
    with writer.appearing(folder, settings.output, quant, record, rotate.base_model(source, settings.model)) as output:
        if quant.measures_scales and not (output / SCALES_FILE).is_file():
            save_tensor_scales(weight_scales(source, quant) | measured_scales(source, quant, sequences), output)
        method.write(output, quant, sequences)
    print(f"{settings.output}: {settings.method}, {quant}")


def check(settings: Quantization, quant: QuantConfig, options: dict[str, Any]) -> None:
    """Raise UserError for settings that cannot be combined; ``options`` are the settings of each method."""
    if quant.activations.learned:
        raise UserError(f"a_quantizer={quant.a_quantizer} has learned steps, and nothing is trained here: give minmax.")
    METHODS[settings.method].check(quant)
    _check_text(settings, quant)
    for name, own in options.items():
        given = [key for key, value in asdict(own).items() if value != getattr(type(own)(), key)]
        if given and name != settings.method:
            raise UserError(
                f"{given[0]}={getattr(own, given[0])} is a setting of method={name}, and method is "
                f"{settings.method}: leave it out, or give method={name}."
            )


def _check_text(settings: Quantization, quant: QuantConfig) -> None:
    """Raise UserError for calibration text that is missing, or that nothing looks at."""
    if settings.data is None and METHODS[settings.method].needs_text:
        raise UserError(
            f"method={settings.method} needs calibration text: give --data, a folder of launch/generate.py."
        )
    if settings.data is None and quant.measures_scales:
        raise UserError(
            f"{quant.measured_setting} has scales that are measured on calibration text: give --data, a folder of "
            "launch/generate.py, or another format."
        )
    if settings.data is not None and not METHODS[settings.method].needs_text and not quant.measures_scales:
        others = [name for name, method in METHODS.items() if method.needs_text]
        raise UserError(
            f"method={settings.method} needs no calibration text: leave out --data, or give "
            f"method={' or '.join(others)}."
        )


def described(
    settings: Quantization, quant: QuantConfig, options: Any, source: Path, data: TrainingData | None
) -> dict[str, Any]:
    """Return the settings that the output depends on."""
    record: dict[str, Any] = {
        "method": settings.method,
        "model": models.weights_fingerprint(str(source)),
        "quant": quant.record(),
    }
    if data is not None:
        record |= {"data": data.fingerprint, "sequences": settings.sequences}
    return record | recorded(options)


if __name__ == "__main__":
    cli.run(main)
