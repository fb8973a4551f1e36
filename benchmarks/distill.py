"""The distillation loss with its gradients: fused and in chunks, beside whole logits.

python benchmarks/distill.py; the peak is of the memory allocated above what was there before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import released
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from launch import cli
from qat.train.distill import DistillationHead, TeacherTargets


@dataclass(frozen=True)
class DistillBenchmark:
    """What is measured.

    Args:
        tokens: of the sequence
        hidden: size of the final hidden states; 0 for LLaMA-7B's on a GPU, SmolLM2-135M's on a CPU
        vocabulary: size of the output layer; 0 likewise
        repeats: runs of each, of which the median counts
        json: file for the figures
    """

    tokens: int = 1024
    hidden: int = 0
    vocabulary: int = 0
    repeats: int = 5
    json: Path | None = None


def main() -> None:
    (config,) = cli.parse(__doc__, DistillBenchmark)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    usual_size, usual_vocabulary = (4096, 32000) if device.type == "cuda" else (576, 49152)
    size, vocabulary = config.hidden or usual_size, config.vocabulary or usual_vocabulary
    torch.manual_seed(0)

    def states() -> Tensor:
        return torch.randn(config.tokens, size, device=device, dtype=dtype)

    def head() -> nn.Linear:
        return nn.Linear(size, vocabulary, bias=False, device=device, dtype=dtype)

    hidden, teacher_hidden, student, teacher = states().requires_grad_(), states(), head(), head().requires_grad_(False)
    fused = DistillationHead.convert(nn.Linear(1, 1, bias=False))
    fused.weight = student.weight
    targets = TeacherTargets(teacher_hidden, teacher.weight)

    def naive() -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher(teacher_hidden)
        return released.loss(student(hidden), teacher_logits)

    def clear() -> None:
        hidden.grad = student.weight.grad = None

    losses: dict[str, Callable[[], Tensor]] = {"naive": naive, "ours": lambda: fused(hidden, targets)[0]}
    values = [loss().item() for loss in losses.values()]
    assert abs(values[0] - values[1]) < 1e-3 * values[0], f"the two losses differ: {values}"
    seconds = common.median_seconds(
        {name: lambda f=f: (clear(), f().backward()) for name, f in losses.items()}, config.repeats
    )
    peaks = {}
    for name, loss in losses.items():
        clear()
        peaks[name] = peak_bytes(lambda loss=loss: loss().backward(), device)
        print(f"{name:6} {seconds[name]:.3f} s  peak {peaks[name] / 2**20:.0f} MiB")
    print(f"{common.machine()}; {config.tokens} tokens, {size} x {vocabulary}, {dtype}")
    figures = {
        "time_vs_naive": seconds["ours"] / seconds["naive"],
        "peak_memory_vs_naive": peaks["ours"] / peaks["naive"],
    }
    common.write(config.json, figures)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``call`` holds at one time, above what was allocated before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = peak = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    cli.run(main)
