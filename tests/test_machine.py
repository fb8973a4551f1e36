"""Which GPU is a process's own, and when it takes it; which memory it returns."""

import platform
import subprocess
import sys

import pytest
import torch

from datagen.parallel import Group
from qat.runtime.machine import device, take_gpu


@pytest.mark.parametrize(("gpus", "local_rank", "own"), [(4, "2", 2), (1, "2", 0), (4, None, 3)])
def test_asking_for_the_gpu_does_not_take_it(gpus, local_rank, own, monkeypatch):
    """Without a launcher it is the current one, 3, of several."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank or "")
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK")
    gpu = torch.device("cuda", own)
    assert device() == gpu
    assert taken == []
    take_gpu()
    Group.of(0, 1, 1).init()
    assert taken == [gpu, gpu]
    assert device() == gpu


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_between_what_is_held_is_returned():
    """In a process of its own: the setting cannot be undone."""
    program = """
import psutil, torch
from qat.runtime import malloc

malloc.keep_freed_memory()
process, held = psutil.Process(), []
for _ in range(100):
    gap = torch.ones(1_000_000)
    held.append(torch.ones(100))
    held.append(gap)
del held[1::2]
del gap
before = process.memory_info().rss
malloc.return_freed_memory()
print(before - process.memory_info().rss)
"""
    returned = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert int(returned) > 300e6
