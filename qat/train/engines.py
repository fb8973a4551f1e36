"""The student, which learns in a DeepSpeed engine, and the teacher, which only runs forward.

Under ZeRO-3 both are partitioned while they are read from disk, and sharded over all ranks; but where a plan says that
it fits, each rank holds all of the teacher, and receives nothing of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from qat.data.sequences import Row
from qat.quant import architecture, kernels
from qat.quant.config import QuantConfig
from qat.quant.layer_settings import layer_settings
from qat.quant.learned_scales import TRAINED, initialise_steps, learn_scales, scales_that_learn, train_only_scales
from qat.quant.number_format import grid_of
from qat.quant.prepare import prepare
from qat.quant.products import speed_up
from qat.quant.quantizers.base import Grid
from qat.quant.tensor_scales import largest_magnitudes, scales_from, set_tensor_scales
from qat.runtime import machine, memory, ranks
from qat.runtime.errors import UserError
from qat.runtime.files import writing
from qat.runtime.machine import take_gpu
from qat.store import models, student_folder
from qat.store.run_folder import STUDENT_PREFIX
from qat.train import code_gather, deepspeed_internals, deepspeed_json
from qat.train.deepspeed_internals import partitioned_reading
from qat.train.distill import Distiller, LabelTargets, TeacherTargets
from qat.train.losses import LOSSES, Loss, Records

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOKEN = ".shared"
"""A file in the folder of a run, with which the ranks find out whether they all see it."""

_OF_NFS = 60.0
"""Seconds after which a file that another node has written is seen on NFS."""


def init_distributed() -> None:
    """Join the other ranks that the launcher started, and watch them; without a launcher, be the only one.

    DeepSpeed's shared-memory op is switched off: on CPUs it needs a compiler at start-up and fails under torchrun.
    The ranks divide the host's cores among them, for what they compute there.
    """
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(alone)
    take_gpu()
    if not torch.cuda.is_available():
        deepspeed_internals.without_shared_memory()
    ranks.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with ranks.doing("the first collective", patience=300):  # ranks with a misconfigured network hang in it
        deepspeed.init_distributed(timeout=ranks.TIMEOUT)  # connects GPUs at once
        dist.barrier()
    _share_cores()


def _share_cores() -> None:
    """Divide the cores among the ranks that may use the same ones: some launchers give each rank its own."""
    own, host = frozenset(os.sched_getaffinity(0)), socket.gethostname()
    sharing = sum(host == other and bool(own & cores) for other, cores in ranks.gather((host, own)))
    threads = max(1, len(own) // sharing)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for an offloaded optimizer's library, which is loaded later
    torch.set_num_threads(threads)


def check_shared(directory: Path) -> None:
    """Raise UserError if a rank sees another folder ``directory`` than the first: a checkpoint
    that is spread over the nodes' own disks would never be complete."""
    (token,) = ranks.broadcast(secrets.token_hex(8))
    file = directory / _TOKEN
    if dist.get_rank() == 0:
        with writing(directory):
            file.write_text(token)
    ranks.meet("the output folder is marked")
    until = time.monotonic() + _OF_NFS
    with ranks.doing("looking for the output folder"):
        while not (seen := file.is_file() and file.read_text() == token) and time.monotonic() < until:
            time.sleep(1)
    everywhere = least(float(seen)) == 1
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    if not everywhere:
        raise UserError(
            f"{directory} is not the same folder on all nodes: give an --output on a file system that they share."
        )


def empty(folders: Iterable[Path]) -> None:
    """Delete folders on each node's own disks: what an earlier start has left there would get into checkpoints."""
    with ranks.doing("emptying folders on NVMe"):
        for folder in folders if os.environ.get("LOCAL_RANK", "0") == "0" else ():
            shutil.rmtree(folder, ignore_errors=True)
    ranks.meet("folders on NVMe are empty")


def least(value: float) -> float:
    """Return the least of all ranks' values."""
    found = torch.tensor(value, dtype=torch.float64, device=machine.device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return found.item()


def student_engine(
    model: str,
    quant: QuantConfig,
    ds_config: dict[str, Any],
    lr_factor: Callable[[int], float],
    gradient_checkpointing: bool,
    initial_steps: dict[str, Tensor] | None = None,
    tensor_scales: Mapping[str, float] | None = None,
    train: str = "weights",
    grids: dict[str, Grid] | None = None,
    as_codes: bool = True,
    room_for_codes: float = 0.0,
) -> deepspeed.DeepSpeedEngine:
    """Build the quantized student, with its optimizer: ``engine(input_ids, targets)`` returns (loss, KL).

    Args:
        lr_factor: the factor on the learning rate at each step
        initial_steps: ``Teacher.initial_steps``, where the quantizer of the activations is learned
        tensor_scales: scales of weights, inputs, keys and values, if their formats have any; by default those of
            the model's weights
        train: what learns, one of TRAINED
        grids: initial grids of learned weight scales, by layer; by default those of the weights' own values
        as_codes: gather weights as codes where possible; false only in comparisons
        room_for_codes: bytes in which gathered codes are kept from forward to backward, and for further rows of a step;
            the same on all ranks
    """
    student = _read_partitioned(model, ds_config)
    prepare(student, quant)
    if tensor_scales is None:
        tensor_scales = student_folder.weight_scales(Path(model), quant)
    set_tensor_scales(student, tensor_scales)
    if initial_steps is not None:
        initialise_steps(student, initial_steps)
    if TRAINED[train].scales:
        learn_scales(student, _on_device(grids) if grids else _own_grids(student))
    if not TRAINED[train].weights:
        train_only_scales(student)
    student.train()
    kernels.on(machine.device().type)  # tries them now, not in the first step
    if gradient_checkpointing:
        # To keep the state of random numbers waits for the GPU, in every layer.
        student.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": _drops_out(student)})
    distiller = Distiller(student)
    engine, *_ = deepspeed.initialize(
        model=distiller,
        model_parameters=[parameter for parameter in distiller.parameters() if parameter.requires_grad],
        config=_fetching_layers(student, ds_config),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lr_factor),
    )
    memory.free_unused_pinned()
    if engine.zero_nvme_offload_optimizer():
        _check_nvme_parts(engine)
    _check_rope(student)
    if as_codes:
        code_gather.gather_codes(engine, room_for_codes)
    return engine


def _drops_out(model: PreTrainedModel) -> bool:
    in_modules = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    return in_modules or any(value for name, value in model.config.to_dict().items() if "drop" in name)


def _fetching_layers(model: PreTrainedModel, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Make DeepSpeed fetch each decoder layer of ``model`` as a whole, by one hook instead of one for each of its 13
    modules, unless the JSON says otherwise; return the configuration for the engine."""
    layers = architecture.decoder_layers(model)
    if deepspeed_json.fetches_layers(ds_config):
        # DeepSpeed takes a whole layer's gradients when that of its input is there: the input must have one, from what
        # learns before the layer, or nothing may learn at all.
        input_learns = _learns(architecture.input_embedding(model)) or not _learns(model)
        for layer in layers:
            if input_learns:
                set_z3_leaf_module(layer, True)
            input_learns = input_learns or _learns(layer)
    largest = max(map(_elements, layers))
    ds_config = deepspeed_json.fetch_layers(ds_config, largest, _elements(architecture.output_layer(model)))
    return deepspeed_internals.without_sequential_gathering(ds_config)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _elements(module: nn.Module) -> int:
    """Return the number of elements of a module's Parameters, partitioned or not."""
    return sum(map(deepspeed_internals.elements, module.parameters()))


def follow(engine: deepspeed.DeepSpeedEngine, lr_factor: Callable[[int], float]) -> None:
    """Let the student's learning rate follow another schedule from the next step on."""
    engine.lr_scheduler.lr_lambdas = [lr_factor] * len(engine.lr_scheduler.lr_lambdas)


def _on_device(grids: dict[str, Grid]) -> dict[str, Grid]:
    return {name: grid.map(lambda part: part.to(machine.device())) for name, grid in grids.items()}


def _own_grids(student: PreTrainedModel) -> dict[str, Grid]:
    """Return the grids that the weights' values give, by layer; one weight at a time is gathered."""
    grids = {}
    for name, linear in scales_that_learn(student).items():
        with deepspeed.zero.GatheredParameters([linear.weight]):
            grids[name] = grid_of(linear.weight, linear.weight_format)
    return grids


def _check_nvme_parts(engine: deepspeed.DeepSpeedEngine) -> None:
    """Raise UserError if a part of the optimizer is too small for the disk, and would be in no checkpoint."""
    least = deepspeed_internals.part_that_nvme_does_not_take(engine)
    if least is not None:
        raise UserError(
            f"With the optimizer on NVMe, each of a rank's parts (sub_group_size) must have {least:g} MiB or more, and "
            "one has less: choose ds_configs/zero3_offload.json, or another sub_group_size."
        )


class Teacher:
    """The full-precision teacher, which only runs forward: samples in, targets out.

    Args:
        ds_config: the teacher's DeepSpeed JSON
        loss: name of the loss in LOSSES; it determines the content of the targets
        whole: replicate the teacher on each rank, without DeepSpeed, in the JSON's dtype; else an engine shards it over
            the ranks, which must call the teacher together

    Attributes:
        head: the output weight [vocabulary, hidden]; sharded, it would have to be gathered in every step
    """

    def __init__(self, model: str, ds_config: dict[str, Any], loss: str = "logits", whole: bool = False):
        self._loss = LOSSES[loss]
        self.language_model = (_read_whole if whole else _read_partitioned)(model, ds_config)
        self.language_model.requires_grad_(False)
        speed_up(self.language_model)
        weight = architecture.output_layer(self.language_model).weight
        with deepspeed.zero.GatheredParameters([weight], enabled=not whole):
            self.head = weight.detach() if whole else weight.detach().clone()
        self._run: nn.Module = _HiddenStates(self.language_model, self._loss)
        if not whole:
            ds_config = _fetching_layers(self.language_model, ds_config)
            self._run, *_ = deepspeed.initialize(model=self._run, config=ds_config)
            memory.free_unused_pinned()
        self._run.eval()
        _check_rope(self.language_model)

    @torch.no_grad()
    def __call__(self, row: Row) -> TeacherTargets:
        """Compute the teacher's predictions after each of the samples' tokens but the last."""
        hidden, records = self._run(row.input_ids, row.lengths)
        return TeacherTargets(hidden, self.head, self._loss, records, row.predicted)

    @torch.no_grad()
    def initial_steps(self, row: Row, quant: QuantConfig) -> dict[str, Tensor]:
        """Compute the initial steps of a learned quantizer of the activations, by layer: the mean over all ranks'
        samples."""
        found: dict[str, Tensor] = {}
        inputs = {name: own.activations for name, own in layer_settings(self.language_model, quant).items()}

        def note(name: str, x: Tensor) -> None:
            if learned := inputs[name].learned:
                found[name] = learned.initial(x, inputs[name].qmax)

        hooks = [
            linear.register_forward_pre_hook(lambda _, x, name=name: note(name, x[0]))
            for name, linear in architecture.quantizable_linears(self.language_model).items()
        ]
        self(row)
        for hook in hooks:
            hook.remove()
        together = torch.stack([found[name] for name in sorted(found)])
        dist.all_reduce(together)
        return dict(zip(sorted(found), together / dist.get_world_size(), strict=True))

    def measured_scales(self, row: Row, quant: QuantConfig) -> dict[str, float]:
        """Compute the scales of what is ``measured``, by name, for all ranks' rows."""
        found = largest_magnitudes(self.language_model, quant, lambda: self(row))
        together = torch.stack([found[name] for name in sorted(found)])
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return scales_from(self.language_model, quant, dict(zip(sorted(found), together.tolist(), strict=True)))


def labels(loss: str) -> Callable[[Row], LabelTargets]:
    """Return a replacement for the teacher, for a loss that needs none: samples in, their own next tokens out."""

    def targets(row: Row) -> LabelTargets:
        next_tokens = [ids[1:] for ids in row.input_ids[0].split(row.lengths)]
        return LabelTargets(torch.cat(next_tokens), LOSSES[loss], row.predicted)

    return targets


def save_student(
    engine: deepspeed.DeepSpeedEngine, directory: Path, quant: QuantConfig, companions: Mapping[str, bytes]
) -> None:
    """Write the student as a Hugging Face directory, gathered from all ranks' shards.

    Its weights are the trained ones, not yet rounded, in the dtype that the student computes in; ``quant_config.json``
    beside them specifies the rounding. The directory appears complete.

    Args:
        companions: ModelFolder.companions of the model that the student began with, read when the run started: its
            files may have moved since, and transformers would refuse to write some that it reads
    """
    weights = deepspeed_internals.gathered_weights(engine)
    if dist.get_rank() == 0:
        with ranks.doing(f"writing {directory.name}/"):
            student = engine.module.student
            own = {name.removeprefix(STUDENT_PREFIX): weight for name, weight in weights.items()}
            student_folder.write(directory, student, own, quant, companions)
    ranks.meet(f"{directory.name}/ is written")


def _read_partitioned(model: str, ds_config: dict[str, Any]) -> PreTrainedModel:
    """Load the model at ``model`` for an engine, each rank with its part of the weights."""
    with partitioned_reading(ds_config):
        language_model = models.load(model, deepspeed_json.dtype(ds_config), deepspeed_internals.own_part)
    models.renew_rope(language_model)
    machine.place(architecture.rotation(language_model))  # zero.Init has placed the rest
    return language_model


def _read_whole(model: str, ds_config: dict[str, Any]) -> PreTrainedModel:
    """Load the whole model at ``model`` onto each rank's device."""
    return models.load_here(model, deepspeed_json.dtype(ds_config))


def _check_rope(model: PreTrainedModel) -> None:
    """Raise UserError if the engine has changed RoPE's frequencies: the trained model would differ from the served
    one."""
    for name, expected in architecture.new_rotation(model).named_buffers():
        found = architecture.rotation(model).get_buffer(name)
        if found.dtype != expected.dtype or not torch.equal(found.cpu(), expected):
            raise UserError(
                f"DeepSpeed has rounded the model's RoPE frequencies ({name} is {found.dtype}, which must be "
                f"{expected.dtype}): install the deepspeed of requirements.txt."
            )


class _HiddenStates(nn.Module):
    def __init__(self, language_model: PreTrainedModel, loss: Loss):
        super().__init__()
        self.language_model, self._loss = language_model, loss

    def forward(self, input_ids: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Records]:
        return self._loss.run(self.language_model, input_ids, lengths)
