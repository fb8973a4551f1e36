"""What the checks share: the shapes, timing on a device, a random model on disk, a profile of one call."""

import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from qat.runtime.machine import device

SYNCHRONIZING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Shapes:
    """LLaMA-7B's on a GPU; tiny ones let the same checks run on a CPU in seconds.

    Args:
        layers: decoder layers of the model that is trained
        written_layers: of the model that generates
        tokens: of a sequence
        shorter: another length, for what depends on it
        rows: numbers of rows that integer products are tried with
        slots, max_length: of generation
        resumed_hidden: width of the model that is saved and resumed: its checkpoint is written to disk
        enough: seconds in which to look where Python is
    """

    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000
    layers: int = 4
    written_layers: int = 32
    tokens: int = 1024
    shorter: int = 200
    rows: tuple[int, ...] = (1, 16, 17, 33, 777, 1000, 1023, 1024, 2047)
    slots: int = 64
    max_length: int = 1024
    resumed_hidden: int = 1024
    enough: float = 8

    def config(self, layers: int, hidden: int = 0) -> LlamaConfig:
        hidden = hidden or self.hidden
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=self.intermediate * hidden // self.hidden, head_dim=self.hidden // self.heads,
            num_attention_heads=self.heads * hidden // self.hidden, tie_word_embeddings=False,
            max_position_embeddings=max(2048, self.max_length),
        )  # fmt: skip


SMALL = Shapes(
    hidden=128, intermediate=192, heads=4, vocabulary=1280, layers=2, written_layers=2, tokens=96, shorter=40,
    rows=(1, 16, 17, 33), slots=4, max_length=160, resumed_hidden=64, enough=0.5,
)  # fmt: skip


@dataclass
class Bench:
    """One run of the checks.

    Attributes:
        folder: where large files may lie for a while
    """

    shapes: Shapes
    folder: Path
    device: torch.device = field(default_factory=device)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def model(self, layers: int, hidden: int = 0, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Random weights, the same for the same arguments, on the device."""
        torch.manual_seed(0)
        with self.device:
            config = self.shapes.config(layers, hidden)
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype or self.dtype, attn_implementation="sdpa"
            ).eval()

    def ids(self, tokens: int, number: int = 0) -> Tensor:
        """Token ids [1, tokens] on the CPU, the same for the same arguments."""
        generator = torch.Generator().manual_seed(number)
        return torch.randint(3, self.shapes.vocabulary, (1, tokens), generator=generator)

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A folder for large files that goes away."""
        with tempfile.TemporaryDirectory(dir=self.folder) as path:
            yield Path(path)


def seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds of one call, the median of ``repeats``; one call comes first and is not counted."""
    call()
    found = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def device_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    """Seconds that the device spends on one call: the mean of ``repeats`` in a row, so that launches hide."""
    if not torch.cuda.is_available():
        return seconds(call, min(repeats, 3))
    for _ in range(2):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def read_rate(bench: Bench) -> float:
    """Bytes/s at which the device reads a large tensor."""
    x = torch.empty(2**28 if bench.device.type == "cuda" else 2**20, device=bench.device)
    return x.nbytes / device_seconds(lambda: x.sum())


def product_rate(bench: Bench, rows: int, inner: int, columns: int) -> float:
    """FLOP/s of a product of such matrices."""
    a = torch.randn(rows, inner, device=bench.device, dtype=bench.dtype)
    b = torch.randn(inner, columns, device=bench.device, dtype=bench.dtype)
    return 2 * rows * inner * columns / device_seconds(lambda: a @ b)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most device memory that ``call`` holds above what was allocated; 0 on a CPU, where nobody counts."""
    if not torch.cuda.is_available():
        call()
        return 0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def whereabouts(call: Callable[[], object], enough: float, functions: int = 25) -> dict[str, Any]:
    """Where Python is while ``call`` is repeated for ``enough`` seconds: shares of the samples, by package and by
    function, of the thread that computes: autograd's while it runs Python, else the main one."""
    main, over, packages, places = threading.main_thread().ident, threading.Event(), Counter[str](), Counter[str]()

    def look() -> None:
        while not over.wait(0.002):
            frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != watcher.ident}
            others = [frame for thread, frame in frames.items() if thread != main and thread not in before]
            frame = others[0] if others else frames[main]
            path = Path(frame.f_code.co_filename)
            places[f"{'/'.join(path.parts[-2:])}:{frame.f_code.co_name}"] += 1
            packages[_package_of(path)] += 1

    call()
    synchronize()
    before = {thread.ident for thread in threading.enumerate()} - {main}  # threads that only wait
    watcher = threading.Thread(target=look)
    watcher.start()
    began, calls = time.monotonic(), 0
    while time.monotonic() - began < enough:
        call()
        calls += 1
    took = time.monotonic() - began
    over.set()
    watcher.join()
    total = max(1, sum(places.values()))
    return {
        "ms_of_a_call": 1e3 * took / calls,
        "samples": total,
        "packages": {name: round(count / total, 3) for name, count in packages.most_common()},
        "functions": {name: round(count / total, 3) for name, count in places.most_common(functions)},
    }


def _package_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return next((part for part in ("qat", "deepspeed", "transformers", "triton", "torch") if part in parts), parts[-1])


def profiled(call: Callable[[], object], kernels: int = 12) -> dict[str, Any]:
    """One call under the profiler: wall milliseconds without it, the device's busy ones, launches, synchronizations,
    and the kernels that take longest."""
    call()
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    wall = time.perf_counter() - began
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        call()
        synchronize()
    events = found.key_averages()
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    on_device.sort(key=lambda event: -event.self_device_time_total)
    counts = {event.key: event.count for event in events}
    return {
        "wall_ms": 1e3 * wall,
        "device_ms": sum(event.self_device_time_total for event in on_device) / 1e3,
        "kernel_launches": counts.get("cudaLaunchKernel", 0) + counts.get("cuLaunchKernel", 0)
        + counts.get("cuLaunchKernelEx", 0) + counts.get("cudaLaunchKernelExC", 0),
        "synchronizations": {name: counts[name] for name in SYNCHRONIZING if name in counts},
        "kernels_ms": {
            f"{event.count} x {event.key[:90]}": round(event.self_device_time_total / 1e3, 3)
            for event in on_device[:kernels]
        },
    }  # fmt: skip
