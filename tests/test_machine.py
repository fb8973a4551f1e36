"""Which GPU is a process's own, and when it takes it."""

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
