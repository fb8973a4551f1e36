"""A rounded model's forward pass, as evaluation runs it, beside the full-precision model's.

python benchmarks/evaluation.py --w_bits 8 --a_bits 8 --kv_bits 8
"""

from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import PreTrainedModel

from launch import cli
from qat.infer import simulated
from qat.quant.config import QuantConfig
from qat.quant.prepare import freeze, prepare
from qat.runtime import machine
from qat.runtime.machine import device
from qat.store import models, smollm2


@dataclass(frozen=True)
class EvaluationBenchmark:
    """What is measured.

    Args:
        model: a full-precision model
        batch: sequences of a batch
        length: tokens of each; the tasks' questions have about a hundred
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    model: str = smollm2.EMBEDDED
    batch: int = 8
    length: int = 120
    repeats: int = 5
    json: Path | None = None


def main() -> None:
    config, quant = cli.parse(__doc__, EvaluationBenchmark, QuantConfig)
    name = models.resolve_full_precision(config.model)
    full, rounded = load(name), prepare(load(name), quant)
    freeze(rounded)
    ids = torch.randint(5, full.config.vocab_size, (config.batch, config.length), device=device())
    run = torch.no_grad()(lambda model: model(ids, logits_to_keep=20))
    seconds = common.median_seconds({str(quant): lambda: run(rounded), "full": lambda: run(full)}, config.repeats)
    print(f"{common.machine()}: " + ", ".join(f"{way} {time:.2f} s" for way, time in seconds.items()))
    common.write(config.json, {"vs_full_precision": seconds[str(quant)] / seconds["full"]})


def load(name: str) -> PreTrainedModel:
    model = simulated.load(name, machine.inference_dtype())
    machine.place(model)
    return model


if __name__ == "__main__":
    cli.run(main)
