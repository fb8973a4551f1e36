"""A rounded model's forward pass, as evaluation runs it: by integer products, by floats, and in full precision.

python benchmarks/evaluation.py --w_bits 8 --a_bits 8 --kv_bits 8
"""

from dataclasses import dataclass
from pathlib import Path

import common
import torch
from transformers import PreTrainedModel

from launch import cli
from qat import loading, models
from qat.errors import UserError
from qat.machine import device
from qat.prepare import QuantConfig, freeze, integer_product, prepare
from qat.products import IntegerProduct


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

    model: str = models.EMBEDDED
    batch: int = 8
    length: int = 120
    repeats: int = 5
    json: Path | None = None


def main() -> None:
    config, quant = cli.parse(__doc__, EvaluationBenchmark, QuantConfig)
    name = models.resolve_full_precision(config.model)
    product = integer_product(quant, device(), models.inference_dtype())
    if product is None:
        raise UserError(f"{quant} has no integer products on this machine: give other bits, or measure elsewhere.")
    full, floats, integers = load(name), rounded(name, quant), rounded(name, quant, product)
    ids = torch.randint(5, full.config.vocab_size, (config.batch, config.length), device=device())
    run = torch.no_grad()(lambda model: model(ids, logits_to_keep=20))
    seconds = common.median_seconds(
        {"integers": lambda: run(integers), "floats": lambda: run(floats), "full precision": lambda: run(full)},
        config.repeats,
    )
    print(f"{common.machine()}; {quant}: " + ", ".join(f"{way} {time:.2f} s" for way, time in seconds.items()))
    common.write(
        config.json,
        {f"integers_vs_{way.replace(' ', '_')}": seconds["integers"] / seconds[way] for way in [*seconds][1:]},
    )


def load(name: str) -> PreTrainedModel:
    model = loading.load(name, models.inference_dtype())
    models.place(model)
    return model


def rounded(name: str, quant: QuantConfig, product: IntegerProduct | None = None) -> PreTrainedModel:
    """As ``launch/evaluate.py --method rtn`` prepares it."""
    model = prepare(load(name), quant)
    freeze(model, product)
    return model


if __name__ == "__main__":
    cli.run(main)
