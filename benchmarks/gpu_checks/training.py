"""Training under ZeRO-3 on one rank: equal to plain PyTorch, resumable, and where its time goes."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from gpu_checks.bench import Bench, profiled, seconds, whereabouts
from gpu_checks.waits import ours, waits
from qat.data.sequences import Sample
from qat.quant.config import QuantConfig
from qat.quant.forward import predicting
from qat.quant.prepare import prepare
from qat.runtime import memory
from qat.runtime.machine import be_deterministic
from qat.store import models
from qat.train import checkpoint, deepspeed_json, engines, plan
from qat.train.checkpoint import TrainState
from qat.train.config import TrainConfig
from qat.train.distill import Distiller, TeacherTargets
from qat.train.loop import Taken, read, take_step

_QUANT = QuantConfig(4, 8, 4)
_CONFIG = TrainConfig(steps=100, lr=1e-3, batch_size=1)
_JSON = Path(__file__).parents[2] / "ds_configs" / "zero3.json"
_STEPS = 6


@dataclass
class _Sequences:
    """Random sequences in place of shards: sample n has the n-th of ``lengths``."""

    bench: Bench
    lengths: list[int]

    def sample(self, number: int) -> Sample:
        return Sample(number, self.bench.ids(self.lengths[number % len(self.lengths)], number))


class _Run:
    """A student and a teacher in their engines, and where the student is."""

    def __init__(self, bench: Bench, model: Path, zero: dict[str, Any] | None = None):
        self.ds_config = deepspeed_json.resolve(_JSON, _CONFIG.ds_settings(1))
        self.ds_config["zero_optimization"] |= zero or {}
        self.teacher = engines.Teacher(str(model), deepspeed_json.for_teacher(self.ds_config))
        settings = (_CONFIG.lr_factor, _CONFIG.gradient_checkpointing)
        self.student = engines.student_engine(str(model), _QUANT, self.ds_config, *settings)
        self.state = TrainState()
        self._stop: Any = SimpleNamespace(received=False)

    def steps(self, data: Any, count: int) -> list[float]:
        """The losses of the next steps."""
        return [read(self.take(data), _CONFIG, self.state, Path())[0]["loss"] for _ in range(count)]

    def take(self, data: Any) -> Taken:
        """Take a step without reading its figures."""
        return take_step(self.student, self.teacher, data, _CONFIG, self.state, self._stop)

    @property
    def frequencies(self) -> Tensor:
        return self.student.module.student.base_model.rotary_emb.inv_freq

    def close(self) -> None:
        self.student.destroy()
        self.teacher._run.destroy()
        del self.student, self.teacher
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def zero3(bench: Bench) -> tuple[dict, dict]:
    """``zero3.json`` with 7B's layers: RoPE, losses beside plain PyTorch's, other lengths, memory, and time."""
    engines.init_distributed()
    s = bench.shapes
    with bench.directory() as model:
        bench.model(s.layers).save_pretrained(model)
        plain = _plain_losses(bench, model, [s.tokens] * _STEPS)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run = _Run(bench, model)
        found = run.steps(_Sequences(bench, [s.tokens]), _STEPS)
        peak = memory.peak()
        counters.clear()
        lengths = torch.linspace(s.shorter, s.tokens, 7).int().tolist()
        run.steps(_Sequences(bench, lengths), len(lengths))
        recompiled = counters["stats"]["unique_graphs"]
        step = profiled(lambda: run.steps(_Sequences(bench, [s.tokens]), 1))
        host = whereabouts(lambda: run.steps(_Sequences(bench, [s.tokens]), 1), s.enough)
        frequencies = str(run.frequencies.dtype)
        teacher_json = deepspeed_json.for_teacher(run.ds_config)
        run.close()
    machine = plan.Machine(gpus=1)
    planned = plan.training(s.config(s.layers), run.ds_config, teacher_json, machine, s.tokens, bench.device.type)
    expected = memory.planned_peak(planned.needs)
    off = max(abs(a - b) / b for a, b in zip(found, plain, strict=True))
    figures = {
        "frequencies": frequencies,
        "losses": found,
        "plain_losses": plain,
        "loss_off_by": off,
        "recompilations_for_7_lengths": recompiled,
        "peak_GB": peak / 1e9,
        "planned_GB": expected / 1e9,
        "peak_over_planned": peak / expected,
        "step": step,
        "host": host,
    }
    return figures, {
        "float32": frequencies == "torch.float32",
        "losses": off <= 1e-2,
        "recompilations": recompiled <= 8,
    }


def leaf_modules(bench: Bench) -> tuple[dict, dict]:
    """A step with each decoder layer fetched as a whole, beside one with each of its 13 modules fetched alone; and who
    waits for the device in it."""
    engines.init_distributed()
    s = bench.shapes
    figures: dict = {}
    with bench.directory() as model:
        bench.model(s.layers).save_pretrained(model)
        for name, zero in {"modules": {"leaf_module": {"classes": []}}, "layers": {}}.items():
            run = _Run(bench, model, zero)
            data = _Sequences(bench, [s.tokens])
            losses = run.steps(data, 3)
            figures[name] = {"losses": losses, **profiled(lambda: run.steps(data, 1), 0)}  # noqa: B023
            figures[name]["waits"] = waits(lambda: run.take(data))  # noqa: B023
            run.close()
    off = max(abs(a - b) for a, b in zip(figures["layers"]["losses"], figures["modules"]["losses"], strict=True))
    return figures | {"loss_off_by": off}, {
        "losses": off < 1e-2,
        "none of our own waits": not ours(figures["layers"]["waits"]),
    }


def resume(bench: Bench) -> tuple[dict, dict]:
    """Save, load, go on, as torch chooses its algorithms and with deterministic ones; a universal checkpoint, then a
    step. The length that comes first after the checkpoint is not the one that came first of all."""
    engines.init_distributed()
    s = bench.shapes
    data = _Sequences(bench, [s.shorter, s.tokens, s.tokens, s.shorter])
    figures: dict = {}
    with bench.directory() as folder:
        model, checkpoints = folder / "model", folder / "checkpoints"
        bench.model(2, s.resumed_hidden).save_pretrained(model)
        for mode in ("default", "deterministic"):
            if mode == "deterministic":
                be_deterministic()
            with _compiling_anew():
                run = _Run(bench, model)
                run.steps(data, 2)
                checkpoint.save(run.student, checkpoints, run.state, keep=1)
                whole = run.steps(data, 2)
                took = seconds(lambda: run.steps(data, 2), 3)  # noqa: B023
                run.close()
            resumed = _resumed(bench, model, checkpoints, data)
            figures[f"{mode}_off_by"] = max(abs(a - b) for a, b in zip(whole, resumed, strict=True))
            figures[f"{mode}_ms"] = 1e3 * took / 2
        (manifest,) = checkpoints.glob("step-*/manifest.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"ranks": 2}))  # not true: so it converts
        converted = _resumed(bench, model, checkpoints, data)
        figures["universal_off_by"] = max(abs(a - b) for a, b in zip(whole, converted, strict=True))
    return figures, {
        "resumed": figures["default_off_by"] < 1e-2,
        "deterministic": figures["deterministic_off_by"] == 0,
        "universal": figures["universal_off_by"] < 1e-2,
    }


def _resumed(bench: Bench, model: Path, checkpoints: Path, data: Any) -> list[float]:
    """Two steps from the checkpoint on, in new engines."""
    with _compiling_anew():
        run = _Run(bench, model)
        run.state = checkpoint.resume(run.student, checkpoints)
        losses = run.steps(data, 2)
        run.close()
    return losses


@contextmanager
def _compiling_anew() -> Iterator[None]:
    """Forget, as a new process has, what was compiled: the compiler chooses how it reduces by the first shape that it
    meets, and another way adds in another order."""
    torch._dynamo.reset()
    with fresh_cache():
        yield


def _plain_losses(bench: Bench, model: Path, lengths: list[int]) -> list[float]:
    """The same steps in plain PyTorch: bf16 weights, fp32 masters, AdamW; no DeepSpeed."""
    teacher = models.load(str(model), bench.dtype).to(bench.device).requires_grad_(False)
    student = Distiller(prepare(models.load(str(model), bench.dtype).to(bench.device), _QUANT).train())
    masters = [parameter.detach().float() for parameter in student.parameters()]
    optimizer = torch.optim.AdamW(masters, _CONFIG.lr, weight_decay=0.0, fused=True)
    losses = []
    for step, length in enumerate(lengths):
        optimizer.param_groups[0]["lr"] = _CONFIG.lr * _CONFIG.lr_factor(step)
        ids = bench.ids(length, step).to(bench.device)
        with torch.no_grad():
            targets = TeacherTargets(predicting(teacher, ids), teacher.lm_head.weight)
        loss, _ = student(ids, targets)
        loss.backward()
        for master, parameter in zip(masters, student.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, _CONFIG.gradient_clipping)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, student.parameters(), strict=True):
                parameter.copy_(master)
        losses.append(loss.item())
    return losses
