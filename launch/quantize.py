"""Quantize a model without training: rounding to nearest, GPTQ or SmoothQuant.

python launch/quantize.py --method gptq --model DIR --data SHARDS --output DIR. The output is like the final/ of a
training run: launch/evaluate.py and launch/export.py take it. A run that was stopped is gone on with.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch import cli
from qat import models
from qat.data import TrainingData
from qat.errors import UserError, check_choice, check_least
from qat.model_folder import ModelFolder
from qat.prepare import QuantConfig, prepare
from qat.ptq import layerwise, rtn
from qat.ptq.calibrate import Stream, calibration_sequences
from qat.ptq.gptq import GPTQConfig, quantize_layer
from qat.ptq.smoothquant import SmoothQuant, SmoothQuantConfig
from qat.quantizers import FULL_PRECISION

METHODS = ("rtn", "gptq", "smoothquant")


@dataclass(frozen=True)
class Quantization:
    """What to quantize, how, and where to.

    Args:
        model: the full-precision model: a Hugging Face directory or hub name
        output: folder of the quantized model
        method: rtn, gptq or smoothquant
        data: folder of calibration shards, made by launch/generate.py or from a corpus; rtn needs none
        sequences: calibrate on its first so many sequences; 0 for all
    """

    model: str
    output: Path
    method: str = "rtn"
    data: Path | None = None
    sequences: int = 128

    def __post_init__(self) -> None:
        check_choice(self, method=METHODS)
        check_least(self, sequences=0)
        if self.method != "rtn" and self.data is None:
            raise UserError(
                f"method={self.method} needs calibration text: give --data, a folder of launch/generate.py."
            )


def main() -> None:
    settings, quant, gptq, smooth = cli.parse(__doc__, Quantization, QuantConfig, GPTQConfig, SmoothQuantConfig)
    check(settings, quant, gptq, smooth)
    source = Path(models.resolve_full_precision(settings.model))
    data = TrainingData(settings.data, models.load_tokenizer(str(source)), seed=0) if settings.data else None
    record = described(settings, quant, gptq, smooth, source, data)
    if layerwise.is_complete(settings.output, record):
        print(f"{settings.output} is there already.")
        return
    folder = ModelFolder.read(source)
    model = prepare(folder.skeleton(), quant)  # nothing is written if it cannot be quantized so
    sequences = calibration_sequences(data, settings.sequences) if data else []
    for ids in sequences:
        models.check_length(model.config, ids.shape[1], "The length of a calibration sequence")
    if data:
        models.check_ids(model.config, data.largest, f"The text in {settings.data}")
    with layerwise.appearing(folder, settings.output, quant, record) as output:
        if settings.method == "rtn":
            rtn.write(folder, output)
        else:
            quantize_layer = layer_quantizer(settings.method, source, gptq, smooth)
            layerwise.write(Stream(source, quant, sequences), output, settings.method, quantize_layer)
    print(f"{settings.output}: {settings.method}, {quant}")


def layer_quantizer(method: str, source: Path, gptq: GPTQConfig, smooth: SmoothQuantConfig) -> layerwise.QuantizeLayer:
    """What ``method`` does to one layer."""
    if method == "gptq":
        return lambda stream, weights: quantize_layer(stream, weights, gptq)
    smoothquant = SmoothQuant(source, smooth)
    return smoothquant.quantize_layer


def check(settings: Quantization, quant: QuantConfig, gptq: GPTQConfig, smooth: SmoothQuantConfig) -> None:
    """Raise UserError for settings that do not go together."""
    if quant.activations.learned:
        raise UserError("a_quantizer=lsq has learned steps, and nothing is trained here: give minmax.")
    if settings.method == "rtn" and settings.data is not None:
        raise UserError("method=rtn looks at no text: leave out --data, or give method=gptq or smoothquant.")
    if settings.method == "gptq" and quant.w_bits == FULL_PRECISION:
        raise UserError("method=gptq rounds weights, and w_bits is 16: give fewer, or method=rtn.")
    for method, options in (("gptq", gptq), ("smoothquant", smooth)):
        if settings.method != method and options != type(options)():
            raise UserError(f"{', '.join(asdict(options))} belong to method={method}, and method is {settings.method}.")


def described(
    settings: Quantization,
    quant: QuantConfig,
    gptq: GPTQConfig,
    smooth: SmoothQuantConfig,
    source: Path,
    data: TrainingData | None,
) -> dict[str, Any]:
    """What the output depends on."""
    record: dict[str, Any] = {
        "method": settings.method,
        "model": models.weights_fingerprint(str(source)),
        "quant": asdict(quant),
    }
    if data is not None:
        record |= {"data": data.fingerprint, "sequences": settings.sequences}
        record |= asdict(gptq if settings.method == "gptq" else smooth)
    return record


if __name__ == "__main__":
    cli.run(main)
