"""What benchmarks/gpu.py runs on a GPU runs here, small, so that it cannot rot: every check must succeed."""

import json
import os

from commands import ROOT, environment
from forked import Command


def test_every_gpu_check_succeeds_in_its_small_form(tmp_path):
    """Eagerly, as compiling takes minutes; with more than one thread, as users run it."""
    record = tmp_path / "record.json"
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": str(ROOT)}
    flags = [f"--json={record}", f"--folder={tmp_path}"]
    done = Command(ROOT / "benchmarks" / "gpu.py", flags, 0, environment() | threads, ROOT)
    done.wait()
    checks = json.loads(record.read_text())["checks"]
    assert {name: check.get("error") for name, check in checks.items() if "error" in check} == {}
    assert [name for name, check in checks.items() if not all(check["holds"].values())] == []
    assert done.returncode == 0, done.said
    assert "quantizers" in checks
    assert "resume" in checks
