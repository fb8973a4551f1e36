"""Two DeepSpeed engines: the student, which learns, and the teacher, which only runs forward.

Under ZeRO-3 both are partitioned while they are read from disk, and both are sharded over all ranks.
"""

import copy
import os
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
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from qat import ds_json, kv_cache, models, prepare, ranks, weight_files
from qat.data import Sample
from qat.distill import Distiller, LabelTargets, TeacherTargets, run
from qat.errors import UserError
from qat.files import appearing_folder
from qat.kv_cache import AttentionRecord
from qat.machine import local_ranks, take_gpu
from qat.model_folder import shapes, write_companions
from qat.prepare import QuantConfig
from qat.products import speed_up


def init_distributed() -> None:
    """Join the other ranks that the launcher started, and watch them; without a launcher, be the only one.

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
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks()))
    ranks.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    deepspeed.init_distributed(timeout=ranks.TIMEOUT)
    with ranks.doing("the first collective", patience=300):  # ranks whose network is not set up right hang in it
        dist.barrier()


def student_engine(
    model: str,
    quant: QuantConfig,
    ds_config: dict[str, Any],
    lr_factor: Callable[[int], float],
    gradient_checkpointing: bool,
    loss: str,
    input_magnitudes: dict[str, Tensor] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """The quantized student, with its optimizer: ``engine(input_ids, targets)`` gives (loss, KL).

    Args:
        lr_factor: what the learning rate is multiplied with at each step
        loss: one of distill.LOSSES
        input_magnitudes: ``Teacher.input_magnitudes``, where activations have a learned step
    """
    student = _read_partitioned(model, ds_config)
    prepare.prepare(student, quant)
    if input_magnitudes is not None:
        prepare.initialise_steps(student, input_magnitudes)
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
    _check_rope(student)
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
        language_model = _read_partitioned(model, ds_config).requires_grad_(False)
        speed_up(language_model)
        if loss == "logits+attention":
            kv_cache.attend(language_model)
        self._loss = loss
        self._engine, *_ = deepspeed.initialize(model=_HiddenStates(language_model), config=ds_config)
        self._engine.eval()
        _check_rope(language_model)

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
        with ranks.doing(f"writing {directory.name}/"):
            own = {name.removeprefix("student."): weight for name, weight in weights.items()}
            steps = {name: own.pop(name) for name in list(own) if name.endswith(prepare.STEP_SUFFIX)}
            student = engine.module.student
            names = [name for name in shapes(student) if not name.endswith(prepare.STEP_SUFFIX)]
            with appearing_folder(directory) as partial:
                weight_files.write(partial, ((name, own[name]) for name in names))
                write_companions(companions, partial, dtype=str(student.dtype).removeprefix("torch."))
                quant.save(partial)
                prepare.save_steps(steps, partial)
    ranks.meet(f"{directory.name}/ is written")


def _read_partitioned(model: str, ds_config: dict[str, Any]) -> PreTrainedModel:
    """The model at ``model`` for an engine, each rank with its part of the weights."""
    with partitioned_reading(ds_config):
        language_model = models.load(model, ds_json.dtype(ds_config))
    models.renew_rope(language_model)
    models.place(language_model.get_submodule("model.rotary_emb"))  # zero.Init has placed the rest
    return language_model


def _check_rope(model: PreTrainedModel) -> None:
    """Raise UserError if the engine has changed RoPE's frequencies: what is trained would not be what is served."""
    rope: Any = model.base_model.rotary_emb
    for name, expected in type(rope)(model.config).named_buffers():
        found = rope.get_buffer(name)
        if found.dtype != expected.dtype or not torch.equal(found.cpu(), expected):
            raise UserError(
                f"DeepSpeed has rounded the model's RoPE frequencies ({name} is {found.dtype}, which must be "
                f"{expected.dtype}): install the deepspeed of requirements.txt."
            )


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
