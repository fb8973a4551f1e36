"""The main job on the real model: half an hour. Run with ``make test-slow``."""

import json
import subprocess
import sys
import time

import pytest
import torch
from commands import ROOT, kill

from qat.quant.config import QuantConfig
from qat.quant.prepare import prepare
from qat.store import models, smollm2

pytestmark = pytest.mark.slow


def start(output) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch" / "quickstart.py"), f"--output={output}"]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def test_sixteen_bits_give_the_teachers_logits_exactly():
    name = models.resolve(smollm2.EMBEDDED)
    teacher, student = (models.load(name, torch.float32) for _ in range(2))
    prepare(student, QuantConfig(16, 16, 16))
    ids = torch.arange(1000, 1100)[None]
    with torch.inference_mode():
        assert torch.equal(student(ids).logits, teacher(ids).logits)


def test_quickstart_killed_and_started_again_closes_most_of_the_gap(tmp_path):
    output = tmp_path / "quickstart"
    first = start(output)
    while first.poll() is None and not (output / "train" / "checkpoints" / "latest").exists():
        time.sleep(0.2)
    steps_done = len((output / "train" / "log.jsonl").read_text().splitlines())
    kill(first)
    assert start(output).wait() == 0
    results = json.loads((output / "results.json").read_text())
    assert results["steps"] > steps_done
    assert results["teacher_ppl"] < results["qat_ppl"] < results["rtn_ppl"]
    assert results["gap_closed"] >= 0.7
    assert results["export_bytes"] < 85e6
    for picture in ("training.png", "comparison.png"):
        assert (output / picture).stat().st_size > 10_000
