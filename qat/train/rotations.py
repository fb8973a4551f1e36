"""Learns the rotations of a student that is then quantized: R1 and R2 as SpinQuant does (Liu et al. 2024, arXiv
2405.16406), by the distillation loss of training, before the weights are trained.

In full precision all rotations give the same function; the learned ones reduce the quantization error. The gradient
passes straight-through the fake quantization to the folded weights, and from these to the matrices. One process; the
model and its rotated copy are in memory.
"""

import copy
from dataclasses import dataclass
from math import cos, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qat.data.sequences import TrainingData
from qat.quant import architecture
from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.quant.rotated import RECORD, Rotation
from qat.runtime import machine, progress
from qat.runtime.errors import UserError, check_least
from qat.store import models, rotate
from qat.store.model_folder import ModelFolder, head_weight, without_weights
from qat.store.rotate import Matrices
from qat.train.distill import Distiller, TeacherTargets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LearnConfig:
    """How the rotations are learned.

    Args:
        steps: steps of Cayley SGD
        lr: initial learning rate, which decays to 0 with a cosine (SpinQuant: 1.5)
        batch_size: sequences per step
    """

    steps: int = 100
    lr: float = 1.5
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_least(self, steps=1, batch_size=1)
        if self.lr <= 0:
            raise UserError(f"lr={self.lr} is invalid: choose more than 0, say 1.5.")


def learn(
    folder: ModelFolder,
    rotation: Rotation,
    quant: QuantConfig,
    start: Matrices,
    data: TrainingData,
    config: LearnConfig,
) -> Matrices:
    """Return R1 and R2 for a student quantized by ``quant``, in fp64 on the CPU, beginning with ``start``.

    Raises UserError for quantizers that learn steps of their own, or have scales of tensors.
    """
    if quant.activations.learned:
        raise UserError(
            f"a_quantizer={quant.a_quantizer} has learned steps, and no weights are trained here: give minmax."
        )
    scaled = [f"w_quantizer={own.w_quantizer}" for own in quant.all_settings() if own.weights.scales_tensors]
    if scaled or quant.measures_scales:
        raise UserError(
            f"{(*scaled, quant.measured_setting)[0]} has scales of tensors, which change with the rotation: learn it "
            "for another format, or leave out --data."
        )
    rotating = Rotating(folder, rotation, quant)
    matrices = start.to(machine.device()).to(torch.float64)
    with progress.bar(range(config.steps), desc="learn rotations", unit="step") as bar:
        for step in bar:
            samples = [data.sample(step * config.batch_size + place).input_ids for place in range(config.batch_size)]
            kl, gradient = rotating.gradient(matrices, samples)
            rate = config.lr * (1 + cos(pi * step / config.steps)) / 2
            matrices = Matrices(
                cayley(matrices.residual, gradient.residual, rate), cayley(matrices.values, gradient.values, rate)
            )
            bar.set_postfix_str(f"KL {kl:.4f}", refresh=False)
    return matrices.to(torch.device("cpu"))


class Rotating:
    """A teacher, and its quantized student as a function of the rotations.

    Args:
        folder: the model
        rotation: what the student computes online
    """

    def __init__(self, folder: ModelFolder, rotation: Rotation, quant: QuantConfig):
        self._rotation = rotation
        self._teacher = models.load_here(str(folder.directory), machine.inference_dtype()).requires_grad_(False)
        self._config = folder.config
        weights = dict(self._teacher.named_parameters())
        self._norms = {name: weights[name].float() for name in rotate.norms_of(self._config)}
        config = copy.deepcopy(folder.config)
        setattr(config, RECORD, rotation.record())
        config.tie_word_embeddings = rotation.head_map
        student = prepare(without_weights(config, folder.directory), quant)
        models.renew_rope(student)
        machine.place(architecture.rotation(student))
        student.gradient_checkpointing_enable({"use_reentrant": False})
        self._student = Distiller(student.train())

    def gradient(self, matrices: Matrices, samples: list[Tensor]) -> tuple[float, Matrices]:
        """Return the mean KL to the teacher over the samples, token ids [1, tokens], and the loss's gradient for the
        matrices."""
        leaves = Matrices(*(part.float().requires_grad_() for part in (matrices.residual, matrices.values)))
        folded = dict(
            rotate.rotated(self._teacher.named_parameters(), self._config, self._rotation, leaves, self._norms)
        )
        own = {name: weight.detach().requires_grad_(weight.requires_grad) for name, weight in folded.items()}
        replace_weights(self._student.student, own)
        total = 0.0
        for ids in samples:
            ids = ids.to(machine.device())
            loss, kl = self._student(ids, TeacherTargets.of(self._teacher, ids))
            (loss / len(samples)).backward()
            total += kl.item()
        learning = [name for name, weight in own.items() if weight.grad is not None]
        torch.autograd.backward([folded[name] for name in learning], [own[name].grad for name in learning])
        return total / len(samples), Matrices(leaves.residual.grad, leaves.values.grad)  # type: ignore[arg-type]


def replace_weights(model: "PreTrainedModel", weights: dict[str, Tensor]) -> None:
    """Put tensors, by name, in the place of a model's Parameters: they may be results of other ones, and stay for the
    backward pass."""
    if model.config.tie_word_embeddings:
        embedding = f"{architecture.architecture_of(model.config).embedding}.weight"
        weights = weights | {head_weight(model.config): weights[embedding]}
    for name, weight in weights.items():
        place, _, own = name.rpartition(".")
        module = model.get_submodule(place)
        delattr(module, own)  # it is a Parameter, whose name no other tensor may take
        setattr(module, own, weight)


def cayley(matrix: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Take a step of gradient descent among orthogonal matrices [..., n, n], fp64: along the Cayley transform of the
    gradient's tangent part W, which ends on an orthogonal matrix (Li et al. 2020, arXiv 2002.01113).

    The step is at most 1 / ||W||_1, as there.
    """
    product = gradient.double() @ matrix.mT
    tangent = (product - product.mT) / 2
    norm = tangent.abs().sum(-2, keepdim=True).amax(-1, keepdim=True)
    half = tangent * torch.clamp(1 / (norm + 1e-30), max=rate) / 2
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(identity + half, (identity - half) @ matrix)
