"""Training on 1 and 2 ranks: tokens per second, bytes on the wire, memory, and what our loop and a checkpoint cost.

python benchmarks/scaling.py

The model has random weights and, by default, the widths of SmolLM2-135M. A step takes one sequence per rank. "Bare" is
teacher, forward, backward and optimizer step and nothing else: no figures, checks or log. Bytes are those that TCP
says each rank has received, so on CPU ranks alone: between GPUs they take NVLink. The formula is qat/train/plan.py's.

--compare true also measures two ranks without each of what makes a step cheaper, and counts, in a step: fetches (each
is DeepSpeed's hooks around a module), collectives, and what would make a GPU wait. Counts do not depend on the machine.
"""

import json
import os
import socket
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import common
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from gpu_checks.waits import ours as ours_alone
from gpu_checks.waits import waits
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from launch import cli
from launch.stages import free_port
from qat.data.sequences import Row, Sample
from qat.quant.config import QuantConfig
from qat.runtime import memory
from qat.runtime.machine import device
from qat.runtime.preemption import StopSignal
from qat.store import manifest
from qat.train import checkpoint, deepspeed_json, engines, loop, plan
from qat.train.config import TrainConfig
from qat.train.log import RunLog

_SHARDED, _ONE_BY_ONE = {"stage3_param_persistence_threshold": 100_000}, {"leaf_module": {"classes": []}}
WAYS: dict[str, dict[str, Any]] = {
    "now": {},
    "modules fetched one by one": _ONE_BY_ONE,
    "student sharded": _SHARDED,
    "weights as values": _SHARDED,
    "student sharded, modules one by one": _SHARDED | _ONE_BY_ONE,
    "both sharded": _SHARDED,
    "both sharded, modules one by one": _SHARDED | _ONE_BY_ONE,
}
"""Changes to the DeepSpeed JSON, by what is done without. "Weights as values" is beside "student sharded"."""

_RECEIVED = slice(128, 136)
"""Where TCP_INFO holds the bytes that a connection has received, in Linux's tcp.h."""


@dataclass(frozen=True)
class ScalingBenchmark:
    """What is measured.

    Args:
        layers: decoder blocks of the model
        hidden: its width
        vocabulary: its tokens
        tokens: length of a sequence
        micro_batch_size: sequences in one row of a forward pass
        compare: also measure without each of what makes a step cheaper
        repeats: steps of each kind, of which the median counts
        deepspeed: how to run
        json: file for the figures
        worker: set for the ranks that this command starts: the folder of the model
        way: set for them: one of WAYS
    """

    layers: int = 30
    hidden: int = 576
    vocabulary: int = 49152
    tokens: int = 256
    micro_batch_size: int = 1
    compare: bool = False
    repeats: int = 5
    deepspeed: Path = Path("ds_configs/zero3_cpu.json")
    json: Path | None = None
    worker: Path | None = None
    way: str = "now"


def main() -> None:
    (config,) = cli.parse(__doc__, ScalingBenchmark)
    if config.worker:
        rank(config, config.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(config, model)
        measured = {ranks: start(config, model, ranks) for ranks in (1, 2)}
        others = {way: start(config, model, 2, way) for way in WAYS if way != "now"} if config.compare else {}
        ways = {"now": measured[2], **others} if others else {}
    one, two = measured[1], measured[2]
    figures = {
        "tokens_per_second_1_rank": config.micro_batch_size * config.tokens / one["ours"],
        "tokens_per_second_2_ranks": 2 * config.micro_batch_size * config.tokens / two["ours"],
        "speedup_of_2_ranks": 2 * one["ours"] / two["ours"],
        "loop_over_bare_engine": two["ours"] / two["bare"],
        "checkpoint_gb": two["saved"] / 1e9,
        "checkpoint_seconds": two["saving"],
        "peak_gb_per_rank_1": one["peak"] / 1e9,
        "peak_gb_per_rank_2": two["peak"] / 1e9,
        "peak_over_plan_1_rank": one["peak"] / one["planned"],
        "peak_over_plan_2_ranks": two["peak"] / two["planned"],
    }
    if torch.cuda.is_available():
        print("Bytes received are not measured: GPUs exchange them over NVLink or InfiniBand, where TCP counts none.")
    else:
        figures["gb_received_per_rank_and_step"] = two["received"] / 1e9
        figures["received_over_formula"] = two["received"] / two["formula"]
    for way, found in ways.items():
        figures[f"{way}: tokens_per_second"] = 2 * config.micro_batch_size * config.tokens / found["ours"]
        figures[f"{way}: gb_received"] = found["received"] / 1e9
        figures[f"{way}: received_over_formula"] = found["received"] / found["formula"]
        figures[f"{way}: peak_gb_per_rank"] = found["peak"] / 1e9
        figures |= {f"{way}: {name}": found[name] for name in ("fetches", "collectives", "waits", "waits_of_ours")}
    common.write(config.json, figures)


def write_model(config: ScalingBenchmark, directory: Path) -> None:
    shape = LlamaConfig(
        vocab_size=config.vocabulary, hidden_size=config.hidden, intermediate_size=config.hidden * 8 // 3,
        num_hidden_layers=config.layers, num_attention_heads=config.hidden // 64,
        num_key_value_heads=config.hidden // 192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(directory)


def start(config: ScalingBenchmark, model: Path, ranks: int, way: str = "now") -> dict[str, Any]:
    """The figures of ``ranks`` ranks, from a process for each."""
    flags = [f"--{name}={getattr(config, name)}" for name in ("tokens", "micro_batch_size", "repeats", "deepspeed")]
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", ranks, "--master_port", free_port()]
    command = [str(part) for part in (*launcher, __file__, *flags, f"--worker={model}", f"--way={way}")]
    subprocess.run(command, check=True)
    return json.loads((model / f"{ranks}.json").read_text())


def rank(config: ScalingBenchmark, model: Path) -> None:
    """One rank's part: the two kinds of steps take turns."""
    stop, ranks = StopSignal(), cli.ranks()
    size = config.micro_batch_size
    settings = TrainConfig(steps=1000, batch_size=ranks * size, micro_batch_size=size)
    ds_config = deepspeed_json.resolve(config.deepspeed, settings.ds_settings(ranks))
    ds_config["zero_optimization"] |= WAYS[config.way]
    whole_teacher = not config.way.startswith("both")
    engines.init_distributed()
    data = RandomSequences(config.tokens, LlamaConfig.from_pretrained(model).vocab_size)
    teacher = engines.Teacher(str(model), deepspeed_json.for_teacher(ds_config), whole=whole_teacher)
    as_codes = config.way != "weights as values"
    planned = plan.training(
        LlamaConfig.from_pretrained(model), ds_config, ds_config, plan.Machine(gpus=ranks), config.tokens,
        device().type, sequences=size, quant=QuantConfig() if as_codes else QuantConfig(16, 16, 16),
        whole_teacher=whole_teacher, memory=engines.least(memory.of_rank()),
    )  # fmt: skip
    student = engines.student_engine(
        str(model), QuantConfig(), ds_config, settings.lr_factor, settings.gradient_checkpointing,
        as_codes=as_codes, room_for_codes=planned.kept_codes,
    )  # fmt: skip
    state = checkpoint.TrainState()
    log = RunLog(model / "log.jsonl", student, state, settings.steps) if cli.is_first_rank() else None

    def ours() -> None:
        taken = loop.take_step(student, teacher, data, settings, state, stop)
        figures, _ = loop.read(taken, settings, state, model)
        if log:
            log.step(state, figures)

    def bare() -> None:
        rows = [data.sample(cli.rank() + number * ranks) for number in range(settings.micro_batch_size)]
        row = Row.of(*rows).to(device())
        loss, _ = student(row.input_ids, teacher(row))
        student.backward(loss)
        student.step()

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    received = []
    for turn in range(config.repeats + 2):  # the first two of each compile and trace
        for name, step in (("ours", ours), ("bare", bare)):
            taken, came = measured(step)
            if turn > 1:
                seconds[name].append(taken)
                received.append(came)
    with Counts() as counts:
        found = waits(bare)
    checkpoint.save(student, model / "checkpoints", state, keep=1)
    if cli.is_first_rank():
        figures: dict[str, Any] = {name: statistics.median(values) for name, values in seconds.items()}
        figures |= {"received": statistics.median(received), "peak": memory.peak()}
        figures |= {"formula": planned.received_per_step, "planned": memory.planned_peak(planned.needs)}
        saved = json.loads(next((model / "checkpoints").glob(f"*/{manifest.MANIFEST}")).read_text())
        figures |= {"saved": saved["bytes"], "saving": saved["seconds"]}
        figures |= {"fetches": counts.fetches, "collectives": counts.collectives}
        figures |= {"waits": sum(found.values()), "waits_of_ours": sum(ours_alone(found).values())}
        (model / f"{ranks}.json").write_text(json.dumps(figures))


class Counts(TorchDispatchMode):
    """In its context: how often DeepSpeed fetches a module's weights, and the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.fetches = self.collectives = 0

    def __enter__(self) -> Self:
        fetch = PartitionedParameterCoordinator.fetch_sub_module

        def counting(coordinator: Any, module: Any, forward: bool) -> None:
            self.fetches += 1
            fetch(coordinator, module, forward)

        self._patch = patch.object(PartitionedParameterCoordinator, "fetch_sub_module", counting)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.collectives += operator.namespace == "c10d"
        return operator(*args, **(kwargs or {}))


class RandomSequences:
    """In the place of TrainingData."""

    def __init__(self, tokens: int, vocabulary: int):
        self._tokens, self._vocabulary = tokens, vocabulary

    def sample(self, number: int) -> Sample:
        generator = torch.Generator().manual_seed(number)
        return Sample(number, torch.randint(self._vocabulary, (1, self._tokens), generator=generator))


def measured(step: Callable[[], None]) -> tuple[float, int]:
    """Seconds of a step that all ranks begin together, and the bytes that this rank received in it."""
    common.synchronize()
    dist.barrier()
    before, began = received_bytes(), time.perf_counter()
    step()
    common.synchronize()
    return time.perf_counter() - began, received_bytes() - before


def received_bytes() -> int:
    """What all TCP connections of this process have received so far."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            is_socket = stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode)
        except OSError:
            continue  # the listing's own, closed by now
        if not is_socket:
            continue
        with socket.socket(fileno=os.dup(int(descriptor))) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += int.from_bytes(info[_RECEIVED], sys.byteorder)
    return total


if __name__ == "__main__":
    cli.run(main)
