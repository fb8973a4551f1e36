"""DeepSpeed's JSON files, which determine how a run computes. The flags determine what it learns, and the two must not
contradict each other."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from qat.runtime.errors import UserError

SHIPPED = Path(__file__).parents[2] / "ds_configs"
"""The folder of the JSONs that come with this program."""

_FP32_BUFFERS = "inv_freq"
"""RoPE's frequencies. ``zero.Init`` and the engine cast all floating tensors to bf16, which would shift a phase of
thousands of radians by whole radians; DeepSpeed leaves the buffers in this list alone."""

_OF_THE_MODEL = ("zero_optimization.stage3_prefetch_bucket_size", "zero_optimization.stage3_max_live_parameters")
"""Settings that may be "auto" until the model is known: ``fetch_layers`` fills them in."""

_WHOLE_OF_TEACHER = 100_000
"""The elements up to which a weight of a sharded teacher may stay whole on each rank: DeepSpeed's own default."""

_REFUSED = {
    "fp16.enabled": "the student computes in bf16 on GPUs and in fp32 on CPUs",
    "torch_autocast.enabled": "it would cast what the quantizers compute in fp32",
    "bf16.bf16_master_weights_and_grads": "in bf16 most updates at the paper's learning rate round to nothing",
    "bf16.bf16_optimizer_states": "Adam's moments are kept in fp32",
    "tensor_parallel": "AutoTP replaces the quantized layers by its own",
    "expert_parallel": "it replaces layers by its own",
    "hybrid_engine": "it replaces layers by its own",
    "zero_optimization.zero_quantized_weights": "it would quantize the teacher and the student a second time",
    "zero_optimization.zero_quantized_nontrainable_weights": "it would quantize the teacher",
    "zero_optimization.zero_quantized_gradients": "it would round the student's gradients",
    "zero_optimization.offload_optimizer.super_offload": "it steps in another process, with an optimizer of its own",
    "zero_optimization.mics_shard_size": "this program shards weights over all ranks",
    "zero_optimization.zenflow": "it updates the weights late, and pending updates are not checkpointed",
    "zero_optimization.elastic_checkpoint": "not needed: resuming on another number of ranks works without it",
    "checkpoint": "checkpoints are managed by this program",
    "scheduler": "the learning rate is set by --lr, --warmup_steps and --min_lr_ratio",
}

_OFFLOADED = ("offload_optimizer", "offload_param")


def read(path: Path) -> dict[str, Any]:
    """Read the DeepSpeed JSON at ``path``; raise UserError if it is not suitable for training. ds_configs/NAME is the
    shipped one where the working directory has none, as with an installed package."""
    if path.parent == Path(SHIPPED.name) and not path.exists():
        path = SHIPPED / path.name
    try:
        ds_config = json.loads(path.read_text())
    except OSError as error:
        shipped = ", ".join(sorted(f"ds_configs/{file.name}" for file in SHIPPED.glob("*.json")))
        raise UserError(f"There is no DeepSpeed configuration at {path}: choose {shipped}, or your own.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{path} is not JSON: {error}.") from error
    ds_config = _with_homes(ds_config)
    if _get(ds_config, "zero_optimization.stage") != 3:
        raise UserError(f"{path} must set zero_optimization.stage to 3: teacher and student are sharded.")
    for key, reason in _REFUSED.items():
        if _get(ds_config, key):
            raise UserError(f"{path} sets {key}, which is refused: {reason}. Remove it.")
    if (ratio := _get(ds_config, "zero_optimization.offload_optimizer.ratio")) not in (None, 1):
        raise UserError(
            f"{path} sets zero_optimization.offload_optimizer.ratio to {ratio}, but the moments of the part that would "
            "stay on the GPU are in no checkpoint: remove it, for all of the optimizer to be offloaded."
        )
    kept = _get(ds_config, "data_types.keep_in_fp32_modules")
    _set(ds_config, "data_types.keep_in_fp32_modules", [*(kept if isinstance(kept, list) else []), _FP32_BUFFERS])
    ds_config.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the GPU twice in a step
    return ds_config


def _with_homes(value: Any) -> Any:
    """Return the content of a JSON with "~" expanded in its paths, which DeepSpeed takes literally."""
    if isinstance(value, dict):
        return {key: _with_homes(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_homes(inner) for inner in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def read_for_here(path: Path) -> dict[str, Any]:
    """Read the JSON as ``read`` does; raise UserError also if it names an NVMe folder that does not exist on this
    machine."""
    ds_config = read(path)
    for part in _OFFLOADED:
        nvme = _get(ds_config, f"zero_optimization.{part}.nvme_path")
        if nvme and not Path(nvme).is_dir():
            raise UserError(f"{path} puts {part} on {nvme}, which does not exist: give a folder on a local NVMe disk.")
    return ds_config


def with_own_folders(ds_config: dict[str, Any], output: Path) -> dict[str, Any]:
    """Return the configuration with a folder in each NVMe folder for the run in ``output`` alone: DeepSpeed names its
    files there by rank and parameter, and two runs on one machine would write into each other's."""
    config, own = copy.deepcopy(ds_config), hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]
    for part in _OFFLOADED:
        if nvme := _get(config, f"zero_optimization.{part}.nvme_path"):
            _set(config, f"zero_optimization.{part}.nvme_path", str(Path(nvme) / f"llm-qat-{own}"))
    return config


def nvme_folders(ds_config: dict[str, Any]) -> list[Path]:
    """Return the folders on NVMe that a configuration offloads to."""
    folders = (_get(ds_config, f"zero_optimization.{part}.nvme_path") for part in _OFFLOADED)
    return [Path(folder) for folder in folders if folder]


def layout(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return what the files of a checkpoint, or the numbers in them, depend on."""
    names = ("zero_optimization.sub_group_size", "data_types.grad_accum_dtype")
    on_nvme = _get(ds_config, "zero_optimization.offload_optimizer.device") == "nvme"
    return {name: _get(ds_config, name) for name in names} | {"optimizer on NVMe": on_nvme}


def resolve(path: Path, learning: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON at ``path``, for this machine, and fill in the flags.

    ``learning`` maps dotted keys of the JSON to the flags' values. A key that the JSON leaves out, or sets to "auto",
    takes the flag's value; raises UserError if it holds another one.
    """
    ds_config = read_for_here(path)
    for key, value in learning.items():
        there = _get(ds_config, key)
        if there not in (None, "auto", value):
            raise UserError(
                f'{path} says {key} = {there}, the flags say {value}: change one, or write "auto" in the JSON.'
            )
        _set(ds_config, key, value)
    if unresolved := [key for key in _autos(ds_config) if key not in _OF_THE_MODEL]:
        raise UserError(f'{path} says {unresolved[0]} = "auto", but no flag sets it: give a value.')
    return ds_config


def for_teacher(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration without anything that learns: the teacher is sharded like the student."""
    config = copy.deepcopy(ds_config)
    learning = ("optimizer", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size")
    for key in (*learning, "tensorboard", "wandb"):
        config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = 1  # DeepSpeed wants to know a batch, which means nothing here
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    whole = "stage3_param_persistence_threshold"
    if whole in zero:  # CPU ranks keep the student's weights whole; a sharded teacher's would all stay once gathered
        zero[whole] = min(zero[whole], _WHOLE_OF_TEACHER)
    if nvme := _get(zero, "offload_param.nvme_path"):
        # An engine empties its parameter folder when it is made: student and teacher must not share one.
        zero["offload_param"]["nvme_path"] = str(Path(nvme) / "teacher")
    return config


def fetch_layers(ds_config: dict[str, Any], layer: int, head: int) -> dict[str, Any]:
    """Return the configuration with what is "auto" until the model is known, when each decoder layer is fetched whole:
    while one computes, the next one is on its way, beside the layers that ``stage3_max_reuse_distance`` keeps for the
    backward pass, and the output layer.

    Args:
        layer: elements of the largest decoder layer
        head: elements of the output weight
    """
    config = copy.deepcopy(ds_config)
    for key, value in zip(_OF_THE_MODEL, (layer, 2 * layer + head + reused(config, layer, head)), strict=True):
        if _get(config, key) == "auto":
            _set(config, key, value)
    return config


def fetches_layers(ds_config: dict[str, Any]) -> bool:
    """Return whether each decoder layer is fetched as a whole, unless the JSON says itself which modules are."""
    return "leaf_module" not in ds_config["zero_optimization"]


def reused(ds_config: dict[str, Any], layer: int, head: int) -> int:
    """Return the elements of decoder layers that stay gathered between forward and backward, if there are as many.

    DeepSpeed keeps what is used again before ``stage3_max_reuse_distance`` elements have passed. Of a layer that is
    fetched whole, it counts the layers and the output layer from there to the end of the forward pass, since the model
    around the layers, whose backward pass comes next, has all of their weights; else each module's way there and back.

    Args:
        layer: elements of the largest decoder layer
        head: elements of the output weight
    """
    zero = ds_config["zero_optimization"]
    distance = int(zero.get("stage3_max_reuse_distance", 1e9))
    if not fetches_layers(ds_config):
        return distance // 2
    return -(-max(0, distance - head) // layer) * layer


def dtype(ds_config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the computation: bf16 if that is enabled, else fp32."""
    return torch.bfloat16 if _get(ds_config, "bf16.enabled") else torch.float32


def _get(config: dict[str, Any], dotted: str) -> Any:
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _autos(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys that are still "auto"."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def _set(config: dict[str, Any], dotted: str, value: Any) -> None:
    *path, last = dotted.split(".")
    for key in path:
        config = config.setdefault(key, {})
    config[last] = value
