"""The code that users would pick instead of ours, each used as its own documentation says; peers.py measures it.

Those that train bring no loss: theirs is the plain cross-entropy with the teacher's whole distribution that their users
would write. What each can export is from its documentation.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qat.quant.config import QuantConfig
from qat.quant.prepare import freeze, prepare
from qat.train.distill import Distiller, TeacherTargets

Loss = Callable[[Tensor], Tensor]
"""The loss of a sequence, token ids [1, tokens]."""


class Student(NamedTuple):
    """A quantized model, its loss for a sequence if it is to be trained, and what ends its training."""

    model: PreTrainedModel
    loss: Loss | None = None
    finish: Callable[[], object] = lambda: None


class Given(NamedTuple):
    """What every arm gets: the model's directory, the teacher, sequences to calibrate on, token ids [1, tokens], and
    how many weights share a scale, 0 for an output channel's."""

    directory: str
    teacher: PreTrainedModel
    sequences: list[Tensor]
    group: int


class Arm(NamedTuple):
    """One of the alternatives.

    Args:
        make: quantizes
        method: what it does, and to how many bits
        exports: what it can write, and what runs it
        packages: whose versions belong to the figures
    """

    make: Callable[[Given], Student]
    method: str
    exports: str
    packages: tuple[str, ...] = ()


def load(directory: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa").eval()


def ours(quantizer: str) -> Callable[[Given], Student]:
    def make(given: Given) -> Student:
        model = prepare(load(given.directory), QuantConfig(4, 8, 16, quantizer, w_group_size=given.group))
        distiller = Distiller(model).train()
        return Student(
            model, lambda ids: distiller(ids, TeacherTargets.of(given.teacher, ids))[0], lambda: freeze(model)
        )

    return make


def torchao(given: Given) -> Student:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = load(given.directory)
    weights = {"group_size": given.group} if given.group else {"granularity": "per_channel"}
    config = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int4, **weights, is_symmetric=True),
        step="prepare",
    )
    quantize_(model, config, filter_fn=_in_decoder)
    return Student(model, full_logits(model, given.teacher))


def modelopt(given: Given) -> Student:
    import modelopt.torch.quantization as mtq

    weights: dict[str, Any] = {"block_sizes": {-1: given.group}} if given.group else {"axis": 0}
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, **weights}},
            {
                "quantizer_name": "*input_quantizer",
                "cfg": {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}},
            },
            {"quantizer_name": "*lm_head*", "enable": False},
        ],
        "algorithm": "max",
    }
    model = load(given.directory)
    mtq.quantize(model, config, lambda model: [model(ids) for ids in given.sequences[:8]])
    return Student(model, full_logits(model, given.teacher))


def autoround(given: Given) -> Student:
    from auto_round import AutoRound

    # It takes rows of one length: the same text, joined and cut.
    length = max(ids.shape[1] for ids in given.sequences)
    text = torch.cat(given.sequences, 1)
    rows = list(text[:, : text.shape[1] // length * length].view(-1, length).split(1))
    quantizer = AutoRound(
        load(given.directory),
        tokenizer=AutoTokenizer.from_pretrained(given.directory),
        scheme="W4A16",
        group_size=given.group or -1,
        dataset=rows,
        nsamples=len(rows),
        seqlen=length,
        device_map="cpu",
    )
    quantized, _ = quantizer.quantize()
    return Student(quantized)


def gptqmodel(given: Given) -> Student:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # of two cores it takes one, and then fails, as it needs two
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=given.group or -1, act_group_aware=given.group > 0)
    quantized = GPTQModel.load(given.directory, config, device="cpu")
    calibration = [{"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])} for ids in given.sequences]
    quantized.quantize(calibration, batch_size=1)
    folder = tempfile.mkdtemp()
    quantized.save(folder)
    return Student(GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH).model)


_OUR_EXPORTS = "compressed-tensors for vLLM and transformers, GGUF for llama.cpp, packed for qat.load; bit for bit"

ARMS = {
    "ours": Arm(
        ours("minmax_asymmetric"),
        "QAT, W4A8, zero points in the weights, as the quickstart trains",
        _OUR_EXPORTS,
    ),
    "ours_symmetric": Arm(
        ours("minmax"),
        "QAT, W4A8, symmetric",
        _OUR_EXPORTS,
    ),
    "torchao": Arm(
        torchao,
        "QAT, W4A8, asymmetric activations",
        "torchao checkpoints for transformers and vLLM, ExecuTorch",
        ("torchao",),
    ),
    "modelopt": Arm(
        modelopt,
        "QAT, W4A8, symmetric",
        "not these 4-bit weights with 8-bit inputs; other formats, for TensorRT-LLM, vLLM, SGLang",
        ("nvidia-modelopt",),
    ),
    "autoround": Arm(autoround, "PTQ, W4A16, signed rounding", "AutoRound, GPTQ, AWQ, GGUF", ("auto-round",)),
    "gptqmodel": Arm(gptqmodel, "PTQ, W4A16, GPTQ", "GPTQ, for vLLM, SGLang and transformers", ("gptqmodel",)),
}


def full_logits(model: PreTrainedModel, teacher: PreTrainedModel) -> Loss:
    """Return the mean cross-entropy with the teacher's distribution, over all tokens but the first."""
    model.train()

    def loss(ids: Tensor) -> Tensor:
        with torch.no_grad():
            expected = teacher(ids, use_cache=False).logits[0, :-1].softmax(-1)
        return nn.functional.cross_entropy(model(ids, use_cache=False).logits[0, :-1], expected)

    return loss


def _in_decoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name
