"""Measure a model directory: full precision, trained student, PTQ result or export.

python launch/evaluate.py --model DIR; with --method rtn, a full-precision model is rounded first. Under a launcher
(torchrun, deepspeed) the ranks share the windows; each holds a whole model.
"""

import hashlib
import importlib.metadata
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from datagen import heldout
from launch import cli
from qat import export, models
from qat.errors import UserError
from qat.evaluate import TextScore, WindowScore, score_windows, text_windows
from qat.files import write_atomically
from qat.prepare import CONFIG_FILE, QuantConfig, freeze, prepare


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, on what.

    Args:
        model: a Hugging Face directory or hub name, the final/ of a training run, or an export
        method: "as_is", or "rtn" to round a full-precision model to the bits below, untrained
        text: for perplexity; one or more, with commas between: encyclopedia or howto (built in, need no hub),
            wikitext2 or c4 (from the hub), or text files
        window: tokens per window; windows do not overlap. Models with fewer positions get as many as they have
        windows: how many windows of each text; 0 for the whole text
        teacher: full-precision model; where it is given, mean KL(teacher || model) is measured on the same tokens
        output: JSON file for the result; if it holds the result of the same evaluation, nothing is computed
    """

    model: str
    method: str = "as_is"
    text: str = heldout.ENCYCLOPEDIA
    window: int = 2048
    windows: int = 0
    teacher: str | None = None
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
    teacher_name = models.resolve_full_precision(evaluation.teacher) if evaluation.teacher else None
    stored = QuantConfig.load(Path(name)) if (Path(name) / CONFIG_FILE).is_file() else None
    rounded = quant if rtn else stored
    if rtn and quant.activations.learned:
        raise UserError("method=rtn rounds without training, and a_quantizer=lsq has learned steps: give minmax.")
    window = min(evaluation.window, models.positions(name), models.positions(teacher_name or name))
    tokenizer = models.load_tokenizer(name)
    texts = {
        text: text_windows(heldout.paragraphs(text), tokenizer, window, evaluation.windows)
        for text in evaluation.text.split(",")
    }
    settings = {
        **{key: value for key, value in asdict(evaluation).items() if key != "output"},
        "window": window,
        "quant": asdict(rounded) if rounded else None,
        "weights": models.weights_fingerprint(name),
        "teacher_weights": models.weights_fingerprint(teacher_name) if teacher_name else None,
        "tokens": {text: hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16] for text, windows in texts.items()},
    }
    output = evaluation.output
    if output and output.is_file() and json.loads(output.read_text())["settings"] == settings:
        print(f"{output} is there already.")
        return

    began = time.monotonic()
    _join_ranks()
    model = export.load(name, models.inference_dtype())
    models.place(model)
    if rtn:
        freeze(prepare(model, quant))
    teacher = None
    if teacher_name:
        teacher = export.load(teacher_name, models.inference_dtype())
        models.place(teacher)
    scores = {text: TextScore.of(_score(model, windows, teacher), window) for text, windows in texts.items()}
    if not cli.is_first_rank():
        return
    for text, score in scores.items():
        kl = "" if score.kl is None else f", KL to the teacher {score.kl:.4f} ± {score.kl_stderr:.4f} nats"
        print(f"perplexity {score.perplexity:.3f} on {score.tokens} tokens of {text}{kl}")
    if output:
        result = {
            "settings": settings,
            "texts": {text: asdict(score) for text, score in scores.items()},
            "seconds": round(time.monotonic() - began, 1),
            "ranks": cli.ranks(),
            "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(result, indent=2) + "\n")


def _join_ranks() -> None:
    """Join the other ranks, if a launcher started any; on CPUs they share the cores."""
    if cli.ranks() == 1:
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, torch.get_num_threads() // cli.ranks()))
    dist.init_process_group("gloo")


def _score(model: PreTrainedModel, windows: Tensor, teacher: PreTrainedModel | None) -> list[WindowScore]:
    """The scores of all windows, in order: this rank computes its share, and every rank gets all."""
    own = score_windows(model, windows[cli.rank() :: cli.ranks()], teacher, progress=cli.is_first_rank())
    return _interleave(_gather(own))


def _gather(own: list[Any]) -> list[list[Any]]:
    """Every rank's list, in the order of the ranks."""
    if cli.ranks() == 1:
        return [own]
    everyones: list[Any] = [None] * cli.ranks()
    dist.all_gather_object(everyones, own)
    return everyones


def _interleave(shares: list[list[Any]]) -> list[Any]:
    """The list whose every n-th elements are the n shares."""
    longest = max(len(share) for share in shares)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


if __name__ == "__main__":
    cli.run(main)
