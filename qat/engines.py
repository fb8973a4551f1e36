"""Two DeepSpeed engines: the student, which learns, and the teacher, which only runs forward.

Under ZeRO-3 both are partitioned while they are read from disk, and both are sharded over all ranks.
"""

import copy
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations import HfDeepSpeedConfig

from qat import ds_json, kv_cache, models, prepare, weight_files
from qat.data import Sample
from qat.distill import Distiller, LabelTargets, TeacherTargets, run
from qat.errors import UserError
from qat.files import write_atomically
from qat.kv_cache import AttentionRecord
from qat.machine import device, take_gpu
from qat.model_folder import shapes, write_companions
from qat.prepare import QuantConfig
from qat.products import INTEGER_PRODUCTS, IntegerProduct, is_exact, speed_up


def init_distributed() -> None:
    """Join the other ranks that the launcher started; without a launcher, be the only one.

    DeepSpeed's shared-memory op is switched off: on CPU it wants a compiler at start-up and breaks under
    torchrun. Without a GPU the ranks share the cores.
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
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    deepspeed.init_distributed()


def integer_product(record: Path, quant: QuantConfig, ds_config: dict[str, Any]) -> IntegerProduct | None:
    """What multiplies codes in the student's forward pass; None for floats. All ranks must ask together.

    The first rank tries what pays, once for a run: its choice is kept in the file ``record``, or a resumed run, which
    may find otherwise, would not continue the losses bit for bit.
    """
    names = [""]
    if dist.get_rank() == 0:
        if not record.exists():
            product = prepare.integer_product(quant, device(), ds_json.dtype(ds_config))
            write_atomically(record, product.__name__ if product else "floats")
        names = [record.read_text()]
    dist.broadcast_object_list(names, 0)
    product = INTEGER_PRODUCTS.get(names[0])
    if product and not is_exact(product, device(), quant.weights.qmax):
        raise UserError(
            f"The run multiplies integers by {names[0]}, which is not exact on this machine, another one than it began "
            "on: go on with it on one like that."
        )
    return product


def student_engine(
    model: str,
    quant: QuantConfig,
    ds_config: dict[str, Any],
    lr_factor: Callable[[int], float],
    gradient_checkpointing: bool,
    loss: str,
    input_magnitudes: dict[str, Tensor] | None = None,
    integer_product: IntegerProduct | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The quantized student, with its optimizer: ``engine(input_ids, targets)`` gives (loss, KL).

    Args:
        lr_factor: what the learning rate is multiplied with at each step
        loss: one of distill.LOSSES
        input_magnitudes: ``Teacher.input_magnitudes``, where activations have a learned step
        integer_product: what multiplies codes in forward; see ``integer_product``
    """
    with partitioned_reading(ds_config):
        student = models.load(model, ds_json.dtype(ds_config))
    prepare.prepare(student, quant)
    if input_magnitudes is not None:
        prepare.initialise_steps(student, input_magnitudes)
    if integer_product is not None:
        prepare.multiply_integers(student, integer_product)
    student.train()
    if gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller = Distiller(student, loss)
    engine, *_ = deepspeed.initialize(
        model=distiller,
        model_parameters=distiller.parameters(),
        config=ds_config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lr_factor),
    )
    if engine.zero_nvme_offload_optimizer():
        _check_nvme_parts(engine.optimizer)
    return engine


def _check_nvme_parts(optimizer: Any) -> None:
    """Raise UserError if a part of the optimizer is too small for the disk: DeepSpeed keeps it in memory then, and in
    no checkpoint."""
    parts = range(len(optimizer.fp32_partitioned_groups_flat))
    if not all(optimizer._swappable_optimizer_subgroup(part) for part in parts):
        least = optimizer.optimizer_swapper.min_aio_bytes / 2**20
        raise UserError(
            f"With the optimizer on NVMe, each of a rank's parts (sub_group_size) must have {least:g} MiB or more, and "
            "one has less: give ds_configs/zero3_offload.json, or another sub_group_size."
        )


class Teacher:
    """The full-precision teacher in an engine without an optimizer: a sample in, targets out.

    Args:
        loss: one of distill.LOSSES; it says what the targets hold
    """

    def __init__(self, model: str, ds_config: dict[str, Any], loss: str = "logits"):
        with partitioned_reading(ds_config):
            language_model = models.load(model, ds_json.dtype(ds_config)).requires_grad_(False)
        speed_up(language_model)
        if loss == "logits+attention":
            kv_cache.attend(language_model)
        self._loss = loss
        self._engine, *_ = deepspeed.initialize(model=_HiddenStates(language_model), config=ds_config)
        self._engine.eval()

    @torch.no_grad()
    def __call__(self, sample: Sample) -> TeacherTargets:
        """What the teacher predicts after each of the sample's tokens but the last."""
        record = AttentionRecord() if self._loss == "logits+attention" else None
        all_layers = self._loss == "logits+hidden"
        hidden, hidden_states = self._engine(sample.input_ids, record, all_layers)
        return TeacherTargets(hidden, self.head, hidden_states if all_layers else None, record)

    @torch.no_grad()
    def input_magnitudes(self, sample: Sample) -> dict[str, Tensor]:
        """Mean |x| of the input of every layer that ``prepare`` quantizes, by name, over all ranks' samples."""
        means: dict[str, Tensor] = {}
        language_model = self._engine.module.language_model
        hooks = [
            linear.register_forward_pre_hook(
                lambda _, inputs, name=name: means.__setitem__(name, inputs[0].float().abs().mean())
            )
            for name, linear in prepare.quantizable_linears(language_model).items()
        ]
        self(sample)
        for hook in hooks:
            hook.remove()
        together = torch.stack([means[name] for name in sorted(means)])
        dist.all_reduce(together)
        return dict(zip(sorted(means), together / dist.get_world_size(), strict=True))

    @contextmanager
    def head(self) -> Iterator[Tensor]:
        """The output weight [vocabulary, hidden], whole; all ranks must ask for it together."""
        weight = self._engine.module.language_model.lm_head.weight
        with deepspeed.zero.GatheredParameters([weight]):
            yield weight


def labels(sample: Sample) -> LabelTargets:
    """In a teacher's place: the sample's own next tokens."""
    return LabelTargets(sample.input_ids[0, 1:])


def save_student(
    engine: deepspeed.DeepSpeedEngine, directory: Path, quant: QuantConfig, companions: Mapping[str, bytes]
) -> None:
    """Write the student as a Hugging Face directory, gathered from all ranks' shards.

    Its weights are the trained ones, not yet rounded, in the dtype that the student computes in;
    ``quant_config.json`` beside them says how to round. The directory appears whole.

    Args:
        companions: ModelFolder.companions of the model that the student began with, read when the run started: its
            files may have moved since, and transformers would refuse to write some that it reads
    """
    weights = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        own = {name.removeprefix("student."): weight for name, weight in weights.items()}
        steps = {name: own.pop(name) for name in list(own) if name.endswith(prepare.STEP_SUFFIX)}
        student = engine.module.student
        partial.mkdir()
        weight_files.write(
            partial, ((name, own[name]) for name in shapes(student) if not name.endswith(prepare.STEP_SUFFIX))
        )
        write_companions(companions, partial, dtype=str(student.dtype).removeprefix("torch."))
        quant.save(partial)
        prepare.save_steps(steps, partial)
        partial.rename(directory)
    dist.barrier()


@contextmanager
def partitioned_reading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within it, ``from_pretrained`` partitions under ZeRO-3. transformers holds the object weakly: keep it."""
    keep = HfDeepSpeedConfig(copy.deepcopy(ds_config))
    yield
    del keep


class _HiddenStates(nn.Module):
    def __init__(self, language_model: nn.Module):
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor, record: AttentionRecord | None, all_layers: bool):
        return run(self.language_model, input_ids, record, all_layers)
