"""All of our code that uses DeepSpeed's private parts, with the reason for each.

tests/test_upstream.py checks that the parts still exist, so that an incompatible new version fails with a clear
message.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.git_version_info import installed_ops
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor
from torch.nn import Parameter
from torch.utils.cpp_extension import CUDA_HOME
from transformers.integrations import HfDeepSpeedConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

Sharded = Any
"""A Parameter with the attributes that ZeRO-3 gives it."""


def without_shared_memory() -> None:
    """Switch off DeepSpeed's shared-memory collectives, which need a compiler at the start and fail under torchrun."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextmanager
def partitioned_reading(ds_config: dict[str, Any]) -> Iterator[None]:
    """Make ``from_pretrained``, in this context, partition under ZeRO-3. transformers holds the object weakly: keep
    it."""
    keep = HfDeepSpeedConfig(copy.deepcopy(ds_config))
    yield
    del keep


def without_sequential_gathering(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration for an engine whose weights were read with ``stage3_allgather_sequential``.

    ``zero.Init`` determines how weights are gathered. An engine that finds the setting would, for no reason that its
    source gives, prefetch one Parameter at a time; most of a layer that is fetched whole would then be waited for.
    """
    zero = {key: value for key, value in ds_config["zero_optimization"].items() if key != "stage3_allgather_sequential"}
    return ds_config | {"zero_optimization": zero}


def gathered_weights(engine: DeepSpeedEngine) -> Mapping[str, Tensor]:
    """Return all weights, gathered, on the first rank, in the dtype that the engine computes in."""
    return engine._consolidated_16bit_state_dict()


class Writer(TorchCheckpointEngine):
    """DeepSpeed's writer of files. It keeps a failure until all ranks have met at DeepSpeed's barriers."""

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True  # so that an export can map the files into memory
        self.failure = ""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        try:
            super().save(state_dict, path)
        except (OSError, RuntimeError) as error:
            self.failure = self.failure or str(error)


def write_with(engine: DeepSpeedEngine, writer: Writer) -> None:
    """Make ``engine`` write its checkpoints by ``writer``, and nothing else: copying DeepSpeed's recovery script would
    fail on one rank alone, and the package contains it."""
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = lambda directory: None


@contextmanager
def before_the_gathering(engine: DeepSpeedEngine, meet: Callable[[], None]) -> Iterator[None]:
    """Make DeepSpeed, in this context, write or read each rank's files, call ``meet``, then gather small weights."""
    optimizer = engine.optimizer
    gather_weights = optimizer.checkpoint_event_epilogue

    def meet_first() -> None:
        meet()
        gather_weights()

    optimizer.checkpoint_event_epilogue = meet_first
    yield
    del optimizer.checkpoint_event_epilogue  # the attribute of this object: the class's method applies again


@contextmanager
def universal_loading(engine: DeepSpeedEngine, universal: bool) -> Iterator[None]:
    """Make ``engine``, in this context, read universal checkpoints, if ``universal``.

    Afterwards Adam's step counts are on the right devices. DeepSpeed gives all groups of Parameters one tensor for the
    count, on the CPU; each group increments it, and on a GPU a fused Adam needs it there.
    """
    engine._config.load_universal_checkpoint = universal
    yield
    engine._config.load_universal_checkpoint = False
    if universal:
        for part, group in engine.optimizer.optimizer.state.items():
            if torch.is_tensor(group["step"]):
                group["step"] = group["step"].to(part.device, torch.float32, copy=True)


def resume_adam_on_nvme(engine: DeepSpeedEngine, step: int) -> None:
    """Make Adam resume with the moments that are on the disk.

    DeepSpeed copies their files back and loads nothing else: Adam would begin with moments of 0, at step 1, with the
    learning rate of the first step.
    """
    adam, swapper = engine.optimizer.optimizer, engine.optimizer.optimizer_swapper
    for part in engine.optimizer.fp32_partitioned_groups_flat:
        stored = swapper.swap_params_info[part.ds_id]
        moments = {name: torch.empty(stored.numel()) for name in ("exp_avg", "exp_avg_sq")}
        adam.state[part] = {"step": step, **moments}
        swapper._update_param_state_info(stored, part)
        stored.release_memory()
    for group, lr in zip(adam.param_groups, engine.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr


def part_that_nvme_does_not_take(engine: DeepSpeedEngine) -> float | None:
    """Return the MiB that each part of the optimizer must have to be kept on NVMe, if one has less, else None:
    DeepSpeed keeps a smaller part in memory, and in no checkpoint."""
    parts = range(len(engine.optimizer.fp32_partitioned_groups_flat))
    if all(engine.optimizer._swappable_optimizer_subgroup(part) for part in parts):
        return None
    return engine.optimizer.optimizer_swapper.min_aio_bytes / 2**20


class Fetcher(ABC):
    """Gathers some Parameters on every rank, for forward and backward, in another form than their values.

    Attributes:
        parameters: the Parameters that it gathers
    """

    parameters: Collection[Parameter]

    @abstractmethod
    def begin(self, parameter: Parameter) -> Callable[[], None]:
        """Begin to gather a Parameter; return a function that waits until it is there."""

    @abstractmethod
    def end(self, parameter: Parameter) -> None:
        """Free what ``begin`` gathered, if anything."""

    @abstractmethod
    def changed(self) -> None:
        """Called when the weights have changed."""


def nvme_is_available() -> bool:
    """Return whether DeepSpeed has its extension for NVMe, or can compile it on this host: with GPUs that takes the
    CUDA toolkit."""
    return bool(installed_ops.get("async_io")) or CUDA_HOME is not None or not torch.cuda.is_available()


def own_part(parameter: Sharded) -> Tensor:
    """Return this rank's part of a Parameter, flat, without the padding of the last parts, which has no values; all of
    it if it is not partitioned."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach()
    part = parameter.ds_tensor.detach()
    begin = dist.get_rank() * part.numel() if dist.get_world_size() > 1 else 0
    return part[: max(0, parameter.ds_numel - begin)]


def elements(parameter: Sharded) -> int:
    """Return the number of elements of a Parameter, partitioned or not."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


def own_rows(parameter: Sharded) -> Tensor | None:
    """Return this rank's rows of a sharded weight [out, in]; None where a row is cut in two, or DeepSpeed keeps the
    weight elsewhere: whole on every rank, in each node once more, sharded in groups of ranks, or on NVMe."""
    elsewhere = parameter.ds_persist or parameter.ds_zero_param_process_group is not None
    elsewhere = elsewhere or parameter.ds_zero_partition_world_size != dist.get_world_size()
    if elsewhere or parameter.nvme_swapper is not None or parameter.ds_shape[0] % dist.get_world_size():
        return None
    return parameter.ds_tensor.view(-1, parameter.ds_shape[1])


def fetch_with(engine: DeepSpeedEngine, fetcher: Fetcher) -> None:
    """Let ``fetcher`` gather its Parameters for each layer's forward and backward pass. Their values are NaN then.

    What gathers Parameters for another purpose, as saving does, still gets their values.
    """
    for parameter in engine.module.parameters():
        _fetch_with(parameter, fetcher)
    step, load = engine.optimizer.step, engine.load_checkpoint

    def step_and_tell(*args: Any, **options: Any) -> Any:  # a hook of the optimizer inside misses those that stand in
        result = step(*args, **options)
        fetcher.changed()
        return result

    def load_checkpoint(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        fetcher.changed()
        return result

    engine.optimizer.step, engine.load_checkpoint = step_and_tell, load_checkpoint


def _fetch_with(parameter: Sharded, fetcher: Fetcher) -> None:
    """Replace the three functions that DeepSpeed has given to a Parameter, each of which is called for several."""
    fetch, gather, partition = parameter.all_gather_coalesced, parameter.all_gather, parameter.partition

    def all_gather_coalesced(parameters: Collection[Sharded], **options: Any) -> Any:
        own = sorted((one for one in parameters if one in fetcher.parameters), key=lambda one: one.ds_id)
        rest = [one for one in parameters if one not in fetcher.parameters]
        for one in own:
            one.ds_status = ZeroParamStatus.INFLIGHT
        waits = {one: fetcher.begin(one) for one in own}
        return _Fetched(waits, fetch(rest, **options) if rest else None)

    def all_gather(param_list: list[Sharded] | None = None, **options: Any) -> Any:
        for one in param_list or [parameter]:
            if one in fetcher.parameters and one.ds_status == ZeroParamStatus.AVAILABLE:
                one.partition()
        return gather(param_list, **options)

    def partition_and_drop(
        param_list: list[Sharded] | None = None, has_been_updated: bool = False, **options: Any
    ) -> None:
        partition(param_list, has_been_updated=has_been_updated, **options)
        for one in param_list or [parameter]:
            if one in fetcher.parameters:
                fetcher.end(one)
        if has_been_updated:
            fetcher.changed()

    parameter.all_gather_coalesced = all_gather_coalesced
    parameter.all_gather = all_gather
    parameter.partition = partition_and_drop


class _Fetched:
    """The handle that DeepSpeed waits on, for Parameters that a Fetcher gathers and for others."""

    def __init__(self, waits: Mapping[Sharded, Callable[[], None]], rest: Any):
        self._waits, self._rest = dict(waits), rest

    def wait(self, **options: Any) -> None:
        if self._rest is not None:
            self._rest.wait(**options)
        while self._waits:
            parameter, wait = self._waits.popitem()
            wait()
            parameter.data = _nothing(parameter.dtype, parameter.device).expand(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)
