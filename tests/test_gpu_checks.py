"""What benchmarks/gpu.py runs on a GPU runs here, small, so that it cannot rot: every check must succeed."""

import json
import os
import subprocess
import sys

from conftest import ROOT


def test_every_gpu_check_succeeds_in_its_small_form(tmp_path):
    """Eagerly, as compiling takes minutes; with more than one thread, as users run it."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), f"--json={record}", f"--folder={tmp_path}"]
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    environment = os.environ | on_cpu | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    checks = json.loads(record.read_text())["checks"]
    assert {name: check.get("error") for name, check in checks.items() if "error" in check} == {}
    assert [name for name, check in checks.items() if not all(check["holds"].values())] == []
    assert done.returncode == 0, done.stderr
    assert "quantizers" in checks
    assert "resume" in checks
