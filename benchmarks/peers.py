"""Beside the code that users would pick instead: torchao's QAT, ModelOpt's, AutoRound and GPTQModel, at W4A8.

    python -m venv peers && peers/bin/pip install -r requirements-peers.txt
    peers/bin/pip install --no-deps gptqmodel==7.7.0 -r requirements-data.txt -e .
    peers/bin/python benchmarks/peers.py --data runs/reproduce/data/hybrid-200x256-seed0

Same teacher, same generated data in the same order, same steps, optimizer and schedule. Each arm runs in a process of
its own, one after the other, per channel and in groups of 32; those that are in the output are not run again. Tokens/s
are those of the steps but the first; seconds are those of all that the arm does until the measurement, and the peak is
that of the process until then. It includes the teacher, which is there in every arm, though post-training methods do
not use it.
"""

import importlib.metadata
import json
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import peer_arms
import torch
from peer_arms import ARMS, Given, Student

from launch import cli
from qat.data.sequences import TrainingData
from qat.evaluate import heldout
from qat.evaluate.perplexity import TextScore, score_windows, text_windows
from qat.quant.products import speed_up
from qat.runtime import malloc, memory
from qat.runtime.errors import UserError, check_least
from qat.runtime.files import write_atomically
from qat.runtime.machine import machine
from qat.store import models, smollm2
from qat.train.config import TrainConfig

GRIDS = {0: "per channel", 32: "groups of 32"}


@dataclass(frozen=True)
class Peers:
    """What is measured.

    Args:
        data: folder of training shards, made by launch/generate.py
        model: a full-precision model
        arms: which, with commas between
        steps: of training
        batch_size: sequences per step
        lr: peak learning rate
        warmup_steps: its linear warm-up
        calibration: sequences that the post-training methods calibrate on
        text: held-out text to measure
        window: its tokens per window
        windows: how many
        output: JSON file of the figures
    """

    data: Path
    model: str = smollm2.EMBEDDED
    arms: str = ",".join(ARMS)
    steps: int = 40
    batch_size: int = 2
    lr: float = 2e-4
    warmup_steps: int = 4
    calibration: int = 64
    text: str = heldout.ENCYCLOPEDIA
    window: int = 512
    windows: int = 12
    output: Path = Path("docs/results/peers.json")

    def __post_init__(self) -> None:
        check_least(self, steps=2, batch_size=1, calibration=1, window=2, windows=2)
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise UserError(f"arms={min(unknown)!r} is invalid: choose {', '.join(ARMS)}, with commas between.")


def main() -> None:
    (settings,) = cli.parse(__doc__, Peers)
    own = {key: value for key, value in asdict(settings).items() if key not in ("data", "arms", "output")}
    found: dict[str, Any] = {"bits": "W4A8", **own, "machine": machine(), "versions": {}, "arms": []}
    if settings.output.exists():
        found = json.loads(settings.output.read_text())
        if {key: found.get(key) for key in own} != own or found["machine"] != machine():
            raise UserError(f"{settings.output} is of other settings, or another machine: give another --output.")
    done = {(arm["name"], arm["grid"]) for arm in found["arms"]}
    failed = []
    for name in settings.arms.split(","):
        for group, grid in GRIDS.items():
            if (name, grid) in done:
                continue
            print(f"\n===== {name}, {grid} =====", flush=True)
            try:
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    figures = fresh.submit(run_arm, settings, name, group).result()
            except Exception:  # one that fails must not stop the others
                traceback.print_exc()
                failed.append(f"{name}, {grid}")
                continue
            arm = ARMS[name]
            found["arms"].append({"name": name, "grid": grid, "method": arm.method, "exports": arm.exports, **figures})
            found["versions"] |= {package: importlib.metadata.version(package) for package in ("torch", *arm.packages)}
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(settings.output, json.dumps(found, indent=1) + "\n")
    for arm in found["arms"]:
        speed = f"{arm['tokens_per_second']:.0f} tokens/s, " if arm["tokens_per_second"] else ""
        score = f"KL {arm['kl']:.4f} ± {arm['kl_stderr']:.4f}, perplexity {arm['perplexity']:.2f}"
        print(f"{arm['name']:24} {arm['grid']:12} {score}, {speed}{arm['peak_gb']:.1f} GB")
    if failed:
        raise UserError(f"These failed, with the reason above: {'; '.join(failed)}.")


def run_arm(settings: Peers, name: str, group: int) -> dict[str, Any]:
    """Run an arm in this process; return its figures."""
    malloc.keep_freed_memory()  # as launch/train.py does
    directory = models.resolve_full_precision(settings.model)
    tokenizer = models.load_tokenizer(directory)
    data = TrainingData(settings.data, tokenizer, seed=0)
    teacher = peer_arms.load(directory).requires_grad_(False)
    speed_up(teacher)  # as launch/train.py does
    calibration = [data.sample(number).input_ids for number in range(settings.calibration)]
    torch.manual_seed(0)
    began = time.monotonic()
    student = ARMS[name].make(Given(directory, teacher, calibration, group))
    speed = train(student, data, settings) if student.loss else None
    seconds, peak = time.monotonic() - began, memory.peak()
    student.finish()
    windows = text_windows(heldout.paragraphs(settings.text), tokenizer, settings.window, settings.windows)
    score = TextScore.of(score_windows(student.model.eval(), windows, teacher))
    figures = {key: getattr(score, key) for key in ("kl", "kl_stderr", "kl_p99", "top1", "perplexity", "window_kl")}
    return figures | {"tokens_per_second": speed, "seconds": round(seconds, 1), "peak_gb": round(peak / 1e9, 2)}


def train(student: Student, data: TrainingData, settings: Peers) -> float:
    """Train the student; return the tokens that it predicted per second, in all steps but the first."""
    assert student.loss
    schedule = TrainConfig(steps=settings.steps, lr=settings.lr, warmup_steps=settings.warmup_steps)
    learning = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, settings.lr, weight_decay=0.0, fused=True)
    tokens, seconds = [], []
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.lr * schedule.lr_factor(step)
        began, losses = time.monotonic(), []
        tokens.append(0)
        for place in range(settings.batch_size):
            ids = data.sample(step * settings.batch_size + place).input_ids
            loss = student.loss(ids) / settings.batch_size
            loss.backward()
            losses.append(loss.item())
            tokens[-1] += ids.shape[1] - 1
        torch.nn.utils.clip_grad_norm_(learning, schedule.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.monotonic() - began)
        print(f"step {step + 1}: loss {sum(losses):.4f}, {tokens[-1] / seconds[-1]:.0f} tokens/s", flush=True)
    return sum(tokens[1:]) / sum(seconds[1:])


if __name__ == "__main__":
    cli.run(main)
