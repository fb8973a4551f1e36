"""The batch scripts, submitted unchanged to a real SLURM. Its nodes only claim to have GPUs: the ranks run on CPUs.

Where there are fewer than 8 cores, sbatch is told to start fewer ranks than the 8 that the scripts ask for.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, environment, run_python
from drill import losses, weights

SCRIPTS = ROOT / "launch" / "slurm"
RANKS = min(8, len(os.sched_getaffinity(0)))
FEWER = [] if RANKS == 8 else [f"--ntasks-per-node={RANKS}", f"--gpus-per-node={RANKS}"]
STEPS = 24
TRAINING = [f"--steps={STEPS}", "--lr=1e-3", "--w_bits=3", "--save_every=7"]

ENDED = ("FAILED", "CANCELLED")

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of what is submitted: it says where SLURM is, and that there is no GPU."""
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "tests" / "slurm_cluster.sh")
    subprocess.run([script, "start", str(folder)], check=True)
    places = {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    yield environment() | places | {"DEEPSPEED_JSON": "ds_configs/zero3_cpu.json"}
    subprocess.run([script, "stop", str(folder)], check=True)


class Job:
    """A submitted batch script; ``flags`` go to the command, ``options`` to sbatch."""

    def __init__(self, script: str, cluster: dict[str, str], log: Path, flags: list[str], options=FEWER, **variables):
        self.environment = cluster | {name: str(value) for name, value in variables.items()}
        self.log = log
        submit = ["sbatch", "--parsable", f"--output={log}", *options, str(SCRIPTS / script), *flags]
        self.number = self.slurm(*submit).strip()

    def slurm(self, *command: str) -> str:
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    def state(self) -> str:
        return self.field("JobState")

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.slurm("scontrol", "show", "job", self.number))
        assert found
        return found[1]

    def wait(self, what: Callable[[], bool], seconds: int = 900, never: tuple[str, ...] = ENDED) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, self.log.read_text()
            assert self.state() not in never, self.log.read_text()
            time.sleep(0.2)

    def finish(self) -> None:
        self.wait(lambda: self.state() == "COMPLETED")


def steps_of(output: Path) -> int:
    log = output / "log.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


@pytest.fixture(scope="module")
def whole(cluster, tiny_directory, tiny_data, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    places = {"MODEL": tiny_directory, "DATA": tiny_data, "OUTPUT": folder / "run"}
    Job("train.sbatch", cluster, folder / "log", TRAINING, **places).finish()
    return folder / "run"


def test_a_signalled_job_saves_requeues_itself_and_ends_as_if_nothing_had_been(
    whole, cluster, tiny_directory, tiny_data, tmp_path
):
    output = tmp_path / "run"
    places = {"MODEL": tiny_directory, "DATA": tiny_data, "OUTPUT": output}
    job = Job("train.sbatch", cluster, tmp_path / "log", TRAINING, **places)
    job.wait(lambda: steps_of(output) >= 3)
    job.slurm("scancel", "--batch", "--signal=USR1", job.number)  # as --signal does before the time is up
    job.wait(lambda: job.state() == "PENDING")
    saved = (output / "checkpoints" / "latest").read_text()
    assert int(saved.removeprefix("step-")) == steps_of(output) < STEPS
    job.finish()
    assert job.field("Restarts") == "1"
    assert losses(output) == losses(whole)
    assert weights(output) == weights(whole)


def test_a_cancelled_job_ends(cluster, tiny_directory, tiny_data, tmp_path):
    """SLURM tells it by the signal that preemption has."""
    output = tmp_path / "run"
    places = {"MODEL": tiny_directory, "DATA": tiny_data, "OUTPUT": output}
    job = Job("train.sbatch", cluster, tmp_path / "log", TRAINING, **places)
    job.wait(lambda: steps_of(output) >= 3)
    job.slurm("scancel", job.number)
    job.wait(lambda: job.state() == "CANCELLED", 200, never=())
    assert "was cancelled, or SLURM has requeued it" in job.log.read_text()
    assert job.field("Restarts") == "0"


def test_a_job_whose_time_is_up_again_and_again_before_it_can_save_ends(cluster, tiny_directory, tiny_data, tmp_path):
    """With a --time that is hardly longer than the seconds of --signal. It has begun twice already."""
    places = {"MODEL": tiny_directory, "DATA": tiny_data, "OUTPUT": tmp_path / "run", "SLURM_RESTART_COUNT": 2}
    job = Job("train.sbatch", cluster, tmp_path / "log", TRAINING, **places)
    job.wait(lambda: job.state() == "RUNNING", 200)
    time.sleep(1)
    job.slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: job.state() == "FAILED", 200, never=())
    assert "Make --time at least some minutes longer than the seconds in --signal" in job.log.read_text()
    assert job.field("Restarts") == "0"


def test_four_nodes_take_the_same_batches(whole, cluster, tiny_directory, tiny_data, tmp_path):
    """One rank on each of 4 nodes, each with two sequences of a step."""
    one_rank_each = ["--ntasks-per-node=1", "--gpus-per-node=1"]
    places = {"MODEL": tiny_directory, "DATA": tiny_data, "OUTPUT": tmp_path / "run"}
    Job("train_multinode.sbatch", cluster, tmp_path / "log", TRAINING, one_rank_each, **places).finish()
    for four, one in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert four[0] == pytest.approx(one[0], rel=1e-3)


def test_a_signalled_evaluation_goes_on_with_what_is_missing(whole, cluster, tmp_path):
    """Stopped when the first of two texts is measured."""
    texts = [f"--text={ROOT / 'LICENSE'},{ROOT / 'README.md'}", "--window=64", "--windows=100"]
    result = tmp_path / "result.json"
    job = Job("evaluate.sbatch", cluster, tmp_path / "log", texts, MODEL=whole / "final", OUTPUT=result)
    job.wait(result.exists)
    job.slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.wait(lambda: job.state() == "PENDING")
    first = json.loads(result.read_text())
    assert len(first["texts"]) == 1
    job.finish()
    assert job.field("Restarts") == "1"
    both = json.loads(result.read_text())
    assert len(both["texts"]) == 2
    assert both["seconds"].items() > first["seconds"].items(), "what was measured is not measured again"
    again = run_python("evaluate", f"--model={whole / 'final'}", *texts, f"--output={result}")
    assert "already in" in again.stdout


def test_two_generations_one_of_them_signalled_share_the_shards(cluster, tiny_directory, tmp_path):
    """Together they write what one process writes, byte for byte."""
    sizes = ["--sequences=400", "--max_length=24", "--batch_size=1", "--sequences_per_shard=4"]
    places = {"MODEL": tiny_directory, "OUTPUT": tmp_path / "shards"}
    jobs = [
        Job("generate.sbatch", cluster, tmp_path / f"log{number}", sizes, [*FEWER, "--array=0"], **places)
        for number in range(2)
    ]
    jobs[0].wait(lambda: any((tmp_path / "shards").glob("shard-*.parquet")))
    jobs[0].slurm("scancel", "--batch", "--signal=USR1", jobs[0].number)
    for job in jobs:
        job.finish()
    assert [job.field("Restarts") for job in jobs] == ["1", "0"]
    run_python("generate", f"--model={tiny_directory}", f"--output={tmp_path / 'alone'}", *sizes)
    for shard in (tmp_path / "alone").glob("shard-*.parquet"):
        assert (tmp_path / "shards" / shard.name).read_bytes() == shard.read_bytes()
