"""Generation by several processes: launchers, groups that hold one model, claims, kills, signals."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
from commands import ROOT, finish, kill, run_python, start_command, start_training
from forked import Command
from tiny import tiny_model
from transformers import Qwen2Config

from datagen.parallel import Group, ranks_from_slurm
from qat.data.shards import Sequence, ShardFolder
from qat.runtime.errors import UserError
from qat.runtime.preemption import RESUMABLE_EXIT

FLAGS = ["--sequences=160", "--max_length=96", "--batch_size=8", "--sequences_per_shard=8", "--strategy=sample"]
"""20 shards, in a second or so."""


def start(model: Path, output: Path) -> Command:
    return commands.start(0, "generate", f"--model={model}", f"--output={output}", *FLAGS)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def wait_for(path: Path, process: Command) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(tiny_directory, tmp_path_factory) -> Path:
    """A folder that one process made without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    assert "peak memory of a rank: " in finish(start(tiny_directory, folder))
    shards = {f"shard-{i:05d}.parquet{end}" for i in range(20) for end in ("", ".crc32")}
    assert set(content(folder)) == {"README.md", "lengths.png", "lock", "manifest.json"} | shards
    return folder


@pytest.fixture(scope="module")
def seconds(whole) -> float:
    """How long the shards took, from the manifest to the last of them."""
    times = [(whole / name).stat().st_mtime for name in ("manifest.json", "shard-00019.parquet")]
    return times[1] - times[0]


def kill_and_restart(kills: int, model: Path, folder: Path, seconds: float) -> int:
    """Start, SIGKILL at a random moment between the manifest and the end, ``kills`` times, then to the end.

    Returns how many kills met unfinished work.
    """
    random.seed(0)
    unfinished = 0
    for _ in range(kills):
        process = start(model, folder)
        wait_for(folder / "manifest.json", process)
        before = len(list(folder.glob("shard-*.parquet")))
        # The model is loaded first; then about the same share of the shards per kill.
        while (
            len(list(folder.glob("shard-*.parquet"))) == before and process.poll() is None and random.random() > 0.002
        ):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 1.5 * seconds / kills))
        unfinished += process.poll() is None and not (folder / "README.md").exists()
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for shard in ShardFolder(folder).shards():  # never half a file under a final name
            assert not ShardFolder(folder).missing(int(shard.stem.removeprefix("shard-")))
    finish(start(model, folder))
    return unfinished


def test_killed_and_restarted_is_uninterrupted(tiny_directory, whole, seconds, tmp_path):
    assert kill_and_restart(3, tiny_directory, tmp_path / "data", seconds) > 0
    assert content(tmp_path / "data") == content(whole)


@pytest.mark.slow
def test_killed_twenty_times_is_uninterrupted(tiny_directory, whole, seconds, tmp_path):
    assert kill_and_restart(20, tiny_directory, tmp_path / "data", seconds) >= 10
    assert content(tmp_path / "data") == content(whole)


def test_two_launches_at_once_make_one_folder(tiny_directory, whole, tmp_path):
    for process in [start(tiny_directory, tmp_path / "data") for _ in range(2)]:
        finish(process)
    assert content(tmp_path / "data") == content(whole)


def test_a_signal_ends_it_with_the_resumable_code(tiny_directory, whole, tmp_path):
    process = start(tiny_directory, tmp_path / "data")
    wait_for(tmp_path / "data" / "shard-00001.parquet", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == RESUMABLE_EXIT
    assert not (tmp_path / "data" / "README.md").exists()
    finish(start(tiny_directory, tmp_path / "data"))
    assert content(tmp_path / "data") == content(whole)


def test_two_ranks_killed_and_restarted_make_the_bytes_of_one(tiny_directory, whole, tmp_path):
    flags = [f"--model={tiny_directory}", f"--output={tmp_path / 'data'}", *FLAGS]
    killed = start_training(2, *flags, script="generate")
    wait_for(tmp_path / "data" / "shard-00002.parquet", killed)
    kill(killed)
    assert not (tmp_path / "data" / "README.md").exists(), "the kill was to come before the end"
    said = finish(start_training(2, *flags, script="generate"))
    assert said.count(f"{tmp_path / 'data'} is complete") == 1, "whichever rank is the last says so"
    assert content(tmp_path / "data") == content(whole)


def test_a_model_split_over_two_ranks_writes_the_same_tokens(tokenizer, tmp_path):
    """Qwen2 has biases; its head here shares the embedding's weight, which is then split too."""
    model = tmp_path / "model"
    tiny_model(Qwen2Config, tie_word_embeddings=True).save_pretrained(model)
    tokenizer.save_pretrained(model)
    sizes = ["--sequences=12", "--max_length=24", "--batch_size=3", "--sequences_per_shard=4"]
    run_python("generate", f"--model={model}", f"--output={tmp_path / 'one'}", *sizes)
    launcher = ["torchrun", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    flags = [f"--model={model}", f"--output={tmp_path / 'two'}", *sizes, "--tensor_parallel=2"]
    finish(start_command(*launcher, ROOT / "launch" / "generate.py", *flags))
    one, two = (ShardFolder(tmp_path / name).table(["input_ids", "finish"]).to_pylist() for name in ("one", "two"))
    assert one == two


def test_groups_share_the_work(monkeypatch):
    assert [Group.of(rank, 6, 2) for rank in range(6)] == [
        Group(number, 3, 2, rank) for number in range(3) for rank in range(2)
    ]
    with pytest.raises(UserError, match="multiple of 4"):
        Group.of(0, 6, 4)
    for name, value in {"ID": 7, "MIN": 5, "COUNT": 3}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert Group.of(1, 2, 1) == Group(5, 6, 1, 0)


def test_every_shard_is_made_once_whatever_is_claimed(tmp_path):
    folders = [ShardFolder(tmp_path) for _ in range(3)]
    for folder in folders:
        folder.begin({"sequences": 10, "sequences_per_shard": 1})
    made = []
    for number, folder in enumerate(folders):
        mine = []
        for index in Group(number, 3, 1, 0).shards(folder, list(range(10))):
            folder.write(index, [Sequence([1], 1, 0, "eos", None)])
            mine.append(index)
        made += mine
        assert mine == sorted(mine, key=lambda index: (index - number) % 3)
    assert sorted(made) == list(range(10))


def test_shards_are_read_once_by_the_group_that_they_belong_to(tmp_path, monkeypatch):
    """With the teacher's predictions they are tens of GB. One that another group has damaged, or not made, is seen."""
    folder = ShardFolder(tmp_path)
    folder.begin({"sequences": 6, "sequences_per_shard": 1})
    for index in range(5):
        folder.write(index, [Sequence([1], 1, 0, "eos", None)])
    folder.path(3).write_bytes(b"")
    read, check = [], folder.missing
    monkeypatch.setattr(folder, "missing", lambda index: read.append(index) or check(index))
    group = Group(1, 2, 1, 0)
    missing = [index for index in range(6) if group.lacks(folder, index)]
    assert (missing, read) == ([3, 5], [1, 3, 5])
    read.clear()
    mine = group.shards(folder, missing)
    assert next(mine) == 3
    folder.write(5, [Sequence([1], 1, 0, "eos", None)])  # by another group
    assert list(mine) == []
    assert read == [3]


def test_a_claim_keeps_other_processes_out_until_its_process_ends(tmp_path):
    folder = ShardFolder(tmp_path)
    folder.begin({})
    script = (
        "import sys, time; from pathlib import Path; from qat.data.shards import Sequence, ShardFolder\n"
        f"folder = ShardFolder(Path({str(tmp_path)!r})); folder.begin({{}})\n"
        "with folder.claimed(3) as ours: print(ours, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "True\n"
        with folder.claimed(3) as ours:
            assert not ours
        with folder.claimed(2) as ours:
            assert ours
        other.kill()
        other.wait()
    with folder.claimed(3) as ours:
        assert ours


def test_srun_says_the_rank():
    inside = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    for before, after in ((inside, inside | expected), (inside | {"RANK": "0"},) * 2):
        environment = dict(before)
        ranks_from_slurm(environment)
        assert environment == after
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    ranks_from_slurm(unchanged := dict(batch_script))
    assert unchanged == batch_script
