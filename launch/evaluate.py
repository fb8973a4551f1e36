"""Measure perplexity of a model directory: full precision, trained student or export.

python launch/evaluate.py --model DIR; with --method rtn, a full-precision model is rounded first.
"""

import hashlib
import importlib.metadata
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import cli
from qat import export, models
from qat.errors import UserError
from qat.evaluate import ENCYCLOPEDIA, perplexity, text_windows
from qat.files import write_atomically
from qat.prepare import CONFIG_FILE, QuantConfig, freeze, prepare


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, on what.

    Args:
        model: a Hugging Face directory or hub name, the final/ of a training run, or an export
        method: "as_is", or "rtn" to round a full-precision model to the bits below, untrained
        text: "encyclopedia" (built in, needs no hub) or a text file
        window: tokens per window; windows do not overlap
        windows: how many windows; 0 for the whole text
        output: JSON file for the result; if it holds the result of the same evaluation, nothing is computed
    """

    model: str
    method: str = "as_is"
    text: str = ENCYCLOPEDIA
    window: int = 2048
    windows: int = 0
    output: Path | None = None

    def __post_init__(self) -> None:
        if self.method not in ("as_is", "rtn"):
            raise UserError(f"method={self.method!r} is not possible: give as_is or rtn.")
        if self.window < 2 or self.windows < 0:
            raise UserError("window must be 2 or more, and windows 0 or more.")


def main() -> None:
    evaluation, quant = cli.parse(__doc__, Evaluation, QuantConfig)
    rtn = evaluation.method == "rtn"
    name = models.resolve_full_precision(evaluation.model) if rtn else models.resolve(evaluation.model)
    stored = QuantConfig.load(Path(name)) if (Path(name) / CONFIG_FILE).is_file() else None
    rounded = quant if rtn else stored
    if rtn and quant.activations.learned:
        raise UserError("method=rtn rounds without training, and a_quantizer=lsq has learned steps: give minmax.")
    windows = text_windows(evaluation.text, models.load_tokenizer(name), evaluation.window, evaluation.windows)
    settings = {
        **{key: value for key, value in asdict(evaluation).items() if key != "output"},
        "quant": asdict(rounded) if rounded else None,
        "weights": models.weights_fingerprint(name),
        "tokens": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16],
    }
    output = evaluation.output
    if output and output.is_file() and json.loads(output.read_text())["settings"] == settings:
        print(f"{output} is there already.")
        return

    began = time.monotonic()
    model = export.load(name, models.inference_dtype())
    models.place(model)
    models.check_length(model, evaluation.window, "window")
    if rtn:
        freeze(prepare(model, quant))
    measured = perplexity(model, windows)
    print(f"perplexity {measured.perplexity:.3f} on {measured.tokens} tokens of {evaluation.text}")
    if output:
        result = {
            "settings": settings,
            **asdict(measured),
            "seconds": round(time.monotonic() - began, 1),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
