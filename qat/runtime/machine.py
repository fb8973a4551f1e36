"""The hardware: this process's GPU, and a description of the machine for measured figures."""

import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor


def device() -> torch.device:
    """Return this process's GPU, if there is one, else the CPU: the GPU of its local rank, or the only one, if the
    launcher shows each process only its own (srun --gpus-per-task=1); without a launcher, the current one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() == 1:
        return torch.device("cuda", 0)
    rank = os.environ.get("LOCAL_RANK")  # asking for the current device would initialize CUDA on the first one
    return torch.device("cuda", torch.cuda.current_device() if rank is None else int(rank))


def take_gpu() -> None:
    """Make this process's ``device``, if it is a GPU, the current one. A process does so once, before it computes.

    If it sees only one, LOCAL_RANK becomes 0, so that DeepSpeed and transformers find it too.
    """
    if not torch.cuda.is_available():
        return
    if torch.cuda.device_count() == 1:
        os.environ["LOCAL_RANK"] = "0"
    torch.cuda.set_device(device())


def current(x: Tensor) -> AbstractContextManager:
    """Make the GPU of x the current one in this context: Triton starts kernels on that."""
    other = x.device.type == "cuda" and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if other else nullcontext()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU to ``device``; to a GPU from pinned memory, so that neither waits for the other."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Moment:
    """The time at which this process's device has finished the work queued so far: on a CPU now, on a GPU later."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else None
        if self._event:
            self._event.record()
        self._time = time.monotonic()

    def since(self, earlier: "Moment") -> float:
        """Wait for the moment; return the seconds since an earlier one."""
        if not self._event:
            return self._time - earlier._time
        self._event.synchronize()
        assert earlier._event
        return earlier._event.elapsed_time(self._event) / 1e3


def local_ranks() -> int:
    """Return the number of ranks that the launcher (torchrun or deepspeed) reports for this node; else, of all
    ranks."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def be_deterministic() -> None:
    """Make torch use algorithms that give the same bits every time.

    On GPUs, attention's backward pass adds with atomics by default. Flash attention has a deterministic mode; torch
    has none for cuDNN's attention, which it prefers on some GPUs.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Do not fill new memory, which would only reveal reads of it: filling takes a pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)


def machine() -> str:
    """Describe processor or GPU, cores, memory and threads."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    host = f"{_processor()}, {cores} cores, {memory:.0f} GiB, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} on {host}"
    return host


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    isa = "AVX512" if any("avx512f" in line for line in lines) else "AVX2" if any("avx2" in x for x in lines) else ""
    return " ".join(filter(None, [names[0] if names else platform.machine(), isa]))


def place(model: torch.nn.Module) -> None:
    """Move a model to this process's GPU, if there is one."""
    model.to(device())


def inference_dtype() -> torch.dtype:
    """Return bf16 on a GPU; fp32 on a CPU, where it is faster."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
