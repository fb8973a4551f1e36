"""GPTQ of real layers, from their inputs on: seconds, and output error as a part of RTN's; beside GPTQModel's.

python benchmarks/ptq.py --model smollm2-135m-instruct --data SHARDS
"""

from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import Tensor, nn

from launch import cli
from qat.data.sequences import TrainingData
from qat.ptq.gptq import GPTQConfig, error_of, gptq, hessian_of
from qat.ptq.stream import Stream, calibration_sequences
from qat.quant.config import QuantConfig
from qat.quant.number_format import dequantize, round_to_grid
from qat.runtime.errors import UserError
from qat.store import models, smollm2

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@dataclass(frozen=True)
class PTQBenchmark:
    """What is measured, on the first decoder layer.

    Args:
        data: folder of calibration shards, made by launch/generate.py
        model: a full-precision model
        sequences: calibrate on its first so many sequences; 0 for all
        act_order: round the channels with the largest inputs first
        gptqmodel: compare with the package GPTQModel
        json: file for the figures
    """

    data: Path
    model: str = smollm2.EMBEDDED
    sequences: int = 64
    act_order: bool = True
    gptqmodel: bool = False
    json: Path | None = None


@torch.inference_mode()
def main() -> None:
    (config,) = cli.parse(__doc__, PTQBenchmark)
    source = Path(models.resolve_full_precision(config.model))
    sequences = calibration_sequences(
        TrainingData(config.data, models.load_tokenizer(str(source)), seed=0), config.sequences
    )
    quant = QuantConfig(4, 16, 16)
    stream = Stream(source, quant, sequences)
    layer = stream.load(stream.files.layer(0)).to(stream.dtype)
    figures: dict[str, float] = {}
    print(f"{common.machine()}; {config.model}, {sum(map(torch.numel, sequences))} tokens")
    for name in LAYERS:
        linear = layer.get_submodule(name)
        inputs = list(stream.inputs(layer, linear))
        hessian, weight = hessian_of(inputs), linear.weight.float()  # type: ignore[operator]
        rounders = {"ours": lambda w=weight, x=inputs: ours(w, x, quant, config.act_order)}
        if config.gptqmodel:
            rounders["gptqmodel"] = lambda w=weight, x=inputs: theirs(w, x, config.act_order)
        seconds = common.median_seconds(rounders, repeats=3)
        rtn = error_of(weight - round_to_grid(weight, quant.weights)[0], hessian)
        for method, round_weight in rounders.items():
            figures[f"{name}_{method}_error_of_rtn"] = error_of(weight - round_weight(), hessian) / rtn
            figures[f"{name}_{method}_seconds"] = seconds[method]
    common.write(config.json, figures)


def ours(weight: Tensor, inputs: list[Tensor], quant: QuantConfig, act_order: bool) -> Tensor:
    return dequantize(gptq(weight, hessian_of(inputs), quant.weights, GPTQConfig(act_order)), torch.float32)


def theirs(weight: Tensor, inputs: list[Tensor], act_order: bool) -> Tensor:
    """The same by GPTQModel, on our grid."""
    try:
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
        from gptqmodel.quantization.quantizer import QQQQuantizer
    except ImportError as error:
        raise UserError("--gptqmodel needs the package GPTQModel: see docs/baselines.md.") from error
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    settings = QuantizeConfig(
        bits=4, group_size=-1, desc_act=act_order, act_group_aware=False, sym=True, damp_percent=0.01
    )
    task = GPTQ(linear, settings)
    task.quantizer = QQQQuantizer(settings)  # the one of theirs whose codes are in [-qmax, qmax], scale max / qmax
    task.quantizer.configure(perchannel=True)
    for x in inputs:
        task.add_batch(x[None], None)
    return task.quantize()[0].float()


if __name__ == "__main__":
    cli.run(main)
