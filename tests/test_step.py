"""How a step runs changes nothing that it computes: which weights are fetched together, where the teacher stands, when
figures are read. On two CPU ranks, in bf16 and fp32."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from commands import ROOT
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from forked import run_ranks
from tiny import tiny_model
from torch import Tensor
from training import NOTHING_KEPT

from qat.data.sequences import Sample
from qat.quant import architecture
from qat.quant.config import QuantConfig
from qat.quant.learned_scales import learn_scales, train_only_scales
from qat.quant.prepare import prepare
from qat.store import models
from qat.train import deepspeed_json, engines, plan
from qat.train.checkpoint import TrainState
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets
from qat.train.loop import Taken, read, take_step

sys.path.append(str(ROOT / "benchmarks"))
from gpu_checks.waits import ours, waits

LENGTHS = (24, 9, 17, 30, 12, 21)
CONFIG = TrainConfig(steps=2, lr=1e-3, batch_size=4)  # two sequences of each rank
QUANT = QuantConfig(4, 8, 4, kv_rotation="hadamard")
FIRST_WHOLE = replace(QUANT, overrides={"model.layers.0.*": {"w_bits": 16}})
LAYER = sum(parameter.numel() for parameter in architecture.decoder_layers(tiny_model())[0].parameters())
WAYS: dict[str, dict[str, Any]] = {
    "layers": {"stage3_allgather_sequential": True},
    "side by side": {"stage3_allgather_sequential": False},
    "ahead": {f"stage3_{name}": "auto" for name in ("prefetch_bucket_size", "max_live_parameters")},
    "whole student": {"stage3_param_persistence_threshold": 1e12},
    "whole teacher": {},
    "reused": {"stage3_max_reuse_distance": 2 * LAYER},
    "modules": {"leaf_module": {"classes": []}},
}
"""Changes to a JSON that keeps nothing: how weights are gathered, which are there before they are needed, and, last,
one fetch for each module."""


class Sequences:
    def sample(self, number: int) -> Sample:
        generator = torch.Generator().manual_seed(number)
        return Sample(number, torch.randint(2, 300, (1, LENGTHS[number % len(LENGTHS)]), generator=generator))


@pytest.mark.parametrize("json_file", ["zero3.json", "zero3_cpu.json"], ids=["bf16", "fp32"])
def test_every_way_of_running_a_step_computes_what_plain_pytorch_does(json_file, tmp_path):
    """Losses, gradients and final weights bit for bit, with weights that are released as soon as they can be; and none
    waits for the device in between, DeepSpeed apart.

    But where each module fetches its weights: DeepSpeed's hooks between the modules of a layer then change the order in
    which autograd adds up the gradients of what several of them read.
    """
    tiny_model(num_hidden_layers=3, tie_word_embeddings=False).save_pretrained(tmp_path / "model")
    run_ranks(_rank, 2, tmp_path, json_file)


def test_the_random_state_is_kept_for_every_name_of_dropout():
    model = tiny_model()
    assert not engines._drops_out(model)
    model.config.hidden_dropout_prob = 0.1
    assert engines._drops_out(model)
    del model.config.hidden_dropout_prob
    model.model.drop = torch.nn.Dropout(0.1)
    assert engines._drops_out(model)


def _rank(rank: int, folder: Path, json_file: str) -> None:
    engines.init_distributed()
    ds_config = json.loads((ROOT / "ds_configs" / json_file).read_text())
    dtype = deepspeed_json.dtype(ds_config)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    plain = _plain(str(folder / "model"), dtype, "weights")
    layers = _trained(folder, rank, ds_config, "layers")
    _check(layers, plain, "layers")
    for way in WAYS:
        if way == "modules":
            _check(_trained(folder, rank, ds_config, way), plain, way, rounding)
        elif way != "layers":
            _check(_trained(folder, rank, ds_config, way), layers, way)
    # The first layer's input has no gradient then, so that DeepSpeed would take its modules' too early; nor has that of
    # the layer behind one in which nothing learns.
    for quant, checkpointing in ((QUANT, True), (QUANT, False), (FIRST_WHOLE, False)):
        scales = _trained(folder, rank, ds_config, "layers", "scales", quant, checkpointing)
        expected = _plain(str(folder / "model"), dtype, "scales", quant)
        _check(scales, expected, f"scales, {quant}, {checkpointing}", rounding)


def _check(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, rounding: float = 0) -> None:
    for name, tensor in expected.items():
        off, largest = (found[name] - tensor).abs().max().item(), tensor.abs().max().item()
        assert off <= rounding * largest, f"{what}: {name} differs by {off}"


def _plain(model: str, dtype: torch.dtype, train: str, quant: QuantConfig = QUANT) -> dict[str, Tensor]:
    """The first step's loss, KL and gradients without DeepSpeed, reduced as it does: after each pair of sequences."""
    teacher = models.load(model, dtype)
    student = prepare(models.load(model, dtype), quant)
    if train == "scales":
        learn_scales(student, engines._own_grids(student))
        train_only_scales(student)
    distiller = Distiller(student.train())
    learned = torch.zeros(2, dtype=torch.float64)
    gradients: dict[str, Tensor] = {}
    for numbers in ((0, 1), (2, 3)):
        pairs: list[dict[str, Tensor]] = []
        for ids in (Sequences().sample(number).input_ids for number in numbers):
            loss, kl = distiller(ids, TeacherTargets.of(teacher, ids))
            learned += torch.stack([loss.detach(), kl])
            loss.backward()
            pairs.append({name: p.grad for name, p in distiller.named_parameters() if p.requires_grad})
            distiller.zero_grad()
        for name, gradient in pairs[0].items():
            gradients[name] = gradients.get(name, 0) + (gradient + pairs[1][name]).float() / CONFIG.batch_size
    return {"learned": learned} | {f"first gradient of {name}": gradient for name, gradient in gradients.items()}


def _trained(
    folder: Path,
    rank: int,
    ds_config: dict[str, Any],
    way: str,
    train: str = "weights",
    quant: QuantConfig = QUANT,
    checkpointing: bool = True,
) -> dict[str, Tensor]:
    """The figures, gradients and final weights of a run."""
    path, whole_teacher = folder / f"{rank}.json", way == "whole teacher"
    zero = ds_config["zero_optimization"] | NOTHING_KEPT | WAYS[way]
    path.write_text(json.dumps(ds_config | {"zero_optimization": zero}))
    resolved = deepspeed_json.resolve(path, CONFIG.ds_settings(2))
    model = str(folder / "model")
    teacher = engines.Teacher(model, deepspeed_json.for_teacher(resolved), whole=whole_teacher)
    student = engines.student_engine(model, quant, resolved, CONFIG.lr_factor, checkpointing, train=train)
    layers = architecture.decoder_layers(student.module.student)
    learning = {name: p for name, p in student.module.named_parameters() if p.requires_grad}
    found: dict[str, Tensor] = {}
    released, kept = [], 0
    backward, step = student.backward, student.step

    def backward_after_release(loss: Tensor) -> None:
        nonlocal kept
        kept = sum(all(p.ds_status == ZeroParamStatus.AVAILABLE for p in layer.parameters()) for layer in layers)
        sharded = [*student.module.parameters(), *(() if whole_teacher else teacher.language_model.parameters())]
        released.append(all(p.ds_status == ZeroParamStatus.NOT_AVAILABLE and p.numel() == 0 for p in sharded))
        backward(loss)

    def noting_step() -> None:
        if student.is_gradient_accumulation_boundary():
            for name, parameter in learning.items():
                gradient = safe_get_full_grad(parameter).clone()
                found.setdefault(f"first gradient of {name}", gradient)
                found[f"last gradient of {name}"] = gradient
        step()

    student.backward, student.step = backward_after_release, noting_step
    state: Any = TrainState()
    stop: Any = SimpleNamespace(received=False)
    for number in range(CONFIG.steps):
        taken: list[Taken] = []
        with _counted_fetches(student, teacher) as fetches:
            asked = waits(lambda: taken.append(take_step(student, teacher, Sequences(), CONFIG, state, stop)))  # noqa: B023
        assert ours(asked) == {}, asked
        read(taken[0], CONFIG, state, folder)
        found.setdefault("learned", taken[0].figures[:2])
        found[f"figures {number}"] = taken[0].figures
    for name, parameter in learning.items():
        found[name] = safe_get_full_fp32_param(parameter).clone()
    planned = plan.training(
        teacher.language_model.config, resolved, resolved, plan.Machine(gpus=2), 30, whole_teacher=whole_teacher
    )
    if train == "weights":
        assert len(fetches) == 2 * planned.fetches, (way, len(fetches), planned.fetches)  # two rows
    assert all(released) == (way not in ("ahead", "whole student", "reused")), way
    if way == "reused":
        head = engines._elements(architecture.output_layer(student.module.student))
        assert kept == deepspeed_json.reused(resolved, LAYER, head) / LAYER == 2
    student.destroy()
    return found


@contextmanager
def _counted_fetches(student, teacher) -> Iterator[list[object]]:
    """The modules in decoder layers that have their weights fetched."""
    models = student.module.student, teacher.language_model
    inside = {module for model in models for layer in architecture.decoder_layers(model) for module in layer.modules()}
    found: list[object] = []
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def counting(self, module, forward):
        found.extend([module] * (module in inside))
        return fetch(self, module, forward)

    with patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counting):
        yield found
