"""Ranks that die, hang, fail or wait: two real processes each. Here they are impatient."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import rank_worker
from commands import ROOT, environment
from forked import processes
from training import flags, log_of

from launch.stages import free_port
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.preemption import RESUMABLE_EXIT
from qat.runtime.watch import Seen, Sign, hanging, silent

PATIENCE = 2.0


class Ranks:
    """``part`` of rank_worker.py, by two ranks."""

    def __init__(self, part: str, log: Path, port: str):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, ranks.PATIENCE: str(PATIENCE)}
        variables["FOLDER"] = str(log.parent)
        self.log = log
        self.log.touch()
        self.processes = [
            processes().Process(target=rank_worker.run, args=(part, rank, variables, str(self.log)))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def wait_until(self, what: Callable[[], bool]) -> None:
        until = time.monotonic() + 60
        while not what():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.01)

    def wait_until_late(self) -> None:
        self.wait_until(lambda: self.log.read_text().count("late") == 2)

    def end(self, *those: int) -> tuple[list[int], str]:
        """Exit codes of the ranks, and the last line of all that they said."""
        processes = [self.processes[rank] for rank in those or (0, 1)]
        for process in processes:
            process.join(60)
        *_, line = ["", *self.log.read_text().splitlines()]
        return [process.exitcode for process in processes], line

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.kill()


@pytest.fixture
def start(tmp_path):
    """Ranks that are gone after the test."""
    started = []

    def begin(part: str, port: str | None = None) -> Ranks:
        started.append(Ranks(part, tmp_path / f"log{len(started)}", port or free_port()))
        return started[-1]

    yield begin
    for each in started:
        each.close()


def test_a_stopped_first_rank_ends_the_run_and_is_named(start):
    """The one that judges the others; the slow test stops one of these."""
    run = start("train")
    run.wait_until_late()
    run.signal(0, signal.SIGSTOP)
    codes, line = run.end(1)
    assert codes == [1]
    assert re.fullmatch(r"error: rank 0 \(.+\): no sign of life for \d+ s; last seen at step \d+, .+", line)


def test_an_output_on_the_nodes_own_disks_is_refused(start, tmp_path):
    for folder in ("one", "0"):
        (tmp_path / folder).mkdir()
    assert start("share").end() == ([0, 0], "all have come")
    codes, line = start("share nothing").end()
    assert codes == [2, 2]
    assert "is not the same folder on all nodes: give an --output" in line
    assert not list((tmp_path / "one").iterdir())


def test_what_took_long_once_may_take_long_again(monkeypatch):
    """A first time may have compiled: from then on five times the longest count, after it only two."""
    monkeypatch.setenv("RANK", "0")
    own = ranks._Self(2, None, 10.0)
    for expected, took in ((100, 60), (120, 60), (300, 4), (300, 4)):
        own.announce("optimizer step", 1)
        assert own.sign().patience == pytest.approx(expected, rel=0.01)
        own._began -= took
        own.announce("reading a sample", None)


def test_a_launcher_that_ends_all_ranks_after_the_first_does_not_cut_off_the_reason(start):
    """As deepspeed's and torchrun do; the first rank prints it, and ends last."""
    run = start("refuse")
    run.wait_until(lambda: not run.processes[1].is_alive())
    with suppress(ProcessLookupError):
        run.signal(0, signal.SIGTERM)
    assert run.end() == ([2, 2], "error: of all ranks")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_at_once_and_is_named(victim, start):
    run = start("train")
    run.wait_until_late()
    run.signal(victim, signal.SIGKILL)
    codes, line = run.end(1 - victim)
    assert codes == [1]
    assert re.fullmatch(rf"error: rank {victim} \(.+\): it died; last seen at step \d+, .+", line)


def test_of_two_ranks_in_the_same_phase_the_one_outside_of_the_collective_is_named(start):
    codes, line = start("hang").end()
    assert codes == [1, 1]
    where = rf"step {rank_worker.LATE}, forward and backward"
    assert re.fullmatch(rf"error: rank 1 \(.+\): no progress for \d+ s at {where} \(\S+:\d+\); if the work .*", line)


def test_an_error_of_one_rank_ends_the_other_and_is_the_last_line(start):
    codes, line = start("fail").end()
    assert codes == [1, 1]
    assert re.fullmatch(r"error: ValueError: of one rank \(rank 1 \(.+\), at step 50, forward and backward\)", line)


def test_a_mistake_of_one_rank_ends_the_other_and_is_one_line(start):
    run = start("refuse one")
    run.end(1)
    run.processes[0].join(2)
    assert run.end()[0] == [2, 2]
    assert re.fullmatch(r"error: of one rank \(rank 1 \(.+\), at starting\)", run.log.read_text().strip())


def test_a_mistake_before_the_ranks_have_met_is_one_line_and_the_launchers_signal_ends_the_other(start):
    """Which waits for the first one outside of Python."""
    run = start("refuse one unmet")
    codes, line = run.end(1)
    assert (codes, line) == ([2], "error: of one rank (rank 1)")
    assert run.processes[0].is_alive()
    run.signal(0, signal.SIGTERM)
    assert run.end(0) == ([-signal.SIGTERM], line)


def test_the_port_of_another_run_is_refused_and_that_run_goes_on(start):
    port = free_port()
    run = start("train", port)
    run.wait_until_late()
    other = start("refuse", port)
    assert other.end() == ([2, 2], other.log.read_text().splitlines()[0] + " (rank 1)")
    assert f"error: Port {port} is in use" in other.log.read_text()
    assert f"--master_port {int(port) + 1}" in other.log.read_text()
    time.sleep(PATIENCE + 2)
    assert all(process.is_alive() for process in run.processes), run.log.read_text()


def test_a_port_that_something_else_has_is_refused(start):
    with socket.create_server(("", int(free_port()))) as taken:
        port = str(taken.getsockname()[1])
        codes, line = start("refuse", port).end(0)
    assert codes == [2]
    assert line.startswith(f"error: Port {port} is in use")


def test_an_error_of_all_ranks_is_told_once(start):
    run = start("refuse")
    assert run.end() == ([2, 2], "error: of all ranks")
    assert run.log.read_text().count("of all ranks") == 1


@pytest.mark.parametrize("last", ["first", "second"])
def test_ranks_that_end_one_after_the_other_keep_their_exit_code(last, start):
    """By it launch/slurm/resumable.sh knows that a run can go on: an end must not pass for a death."""
    run = start(f"stop, {last} rank last")
    codes, line = run.end()
    assert codes == [RESUMABLE_EXIT] * 2, line


def test_who_waits_for_long_work_of_another_outlives_the_timeout_of_collectives(start):
    assert start("wait").end() == ([0, 0], "all have come")


def test_who_still_writes_may_take_as_long_as_it_does_and_who_hangs_in_it_is_named(start):
    assert start("write").end() == ([0, 0], "all have come")
    codes, line = start("hang while writing").end()
    assert codes == [1, 1]
    assert re.fullmatch(r"error: rank 1 \(.+\): no progress for \d+ s at writing final/ \(.+\); if the work .*", line)


def test_a_system_that_does_not_count_bytes_gets_two_hours_for_them(monkeypatch, tmp_path):
    assert ranks._moved() > 0
    monkeypatch.setattr(ranks, "_COUNTERS", tmp_path / "none")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks, "_self", ranks._Self(2, None, PATIENCE))
    with ranks.doing("writing final/"):
        assert ranks._self.sign().patience == 7200
    with ranks.doing("writing final/", patience=1):
        assert ranks._self.sign().patience == PATIENCE, "the user's is the least"


def test_a_run_that_was_stopped_as_a_whole_goes_on(start):
    """As by Ctrl-Z, for longer than anyone's patience."""
    run = start("train")
    run.wait_until_late()
    for number, seconds in ((signal.SIGSTOP, PATIENCE + 0.5), (signal.SIGCONT, 1)):
        for rank in range(2):
            run.signal(rank, number)
        time.sleep(seconds)
    assert all(process.is_alive() for process in run.processes), run.log.read_text()


def test_an_impossible_patience_is_refused(monkeypatch):
    for given in ("-1", "soon"):
        monkeypatch.setenv(ranks.PATIENCE, given)
        with pytest.raises(UserError, match=f"QAT_PATIENCE={given} is invalid"):
            ranks.join(0, 2)


def seen(rank: int, **changes) -> Seen:
    return Seen(replace(Sign(rank, "host", "work", patience=10), **changes))


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ([seen(0), seen(1, place=1)], "rank 0"),  # the one that has come least far
        ([seen(0), seen(1, in_collective=True)], "rank 0"),
        ([seen(0, in_collective=True), seen(1, in_collective=True)], "rank 0 (host), rank 1 (host)"),
        ([seen(0, waits=True), seen(1)], "rank 1"),
        ([seen(0, waits=True, place=1), seen(1, patience=100)], None),  # what rank 1 does may take so long
        ([seen(0, place=1), seen(1, patience=100)], None),
        ([seen(0), seen(1, patience=100)], None),
        ([seen(0, waits=True), seen(1, waits=True)], None),
    ],
)
def test_who_is_to_blame(others, named):
    assert hanging(others, now=9) is None
    found = hanging(others, now=11)
    assert found is None if named is None else found.startswith(f"error: {named}")


def test_whoever_speaks_or_may_be_silent_is_alive():
    speaking, busy = seen(0), seen(1, patience=100)
    speaking.hear(speaking.sign, now=50)
    assert silent([speaking, busy], now=55) is None
    assert "rank 0 (host): no sign of life for 11 s; last seen at work" in silent([busy, speaking], now=61)


# Of the real training: 30 seconds each to start.


def start_training(*command: object, **variables: str) -> list[subprocess.Popen]:
    """Two ranks, as srun starts them: nobody else ends the one when the other has died."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"} | variables
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)], env=environment() | shared | {"RANK": number, "LOCAL_RANK": number},
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for number in ("0", "1")
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("number", "found"), [(signal.SIGSTOP, "no sign of life"), (signal.SIGKILL, "it died")])
def test_training_ends_when_a_rank_does(number, found, tiny_directory, tiny_data, tmp_path):
    command = [*flags(tiny_directory, tiny_data, tmp_path / "run"), "--steps=100000", "--save_every=100000"]
    first, second = start_training(ROOT / "launch" / "train.py", *command, QAT_PATIENCE="10")
    try:
        while not (tmp_path / "run" / "log.jsonl").exists() or len(log_of(tmp_path / "run")) < 30:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.05)
        second.send_signal(number)
        *_, line = first.communicate(timeout=60)[0].splitlines()
        assert first.returncode == 1
        assert re.fullmatch(rf"error: rank 1 \(.+\): {found}.* last seen at step \d+, .+", line)
    finally:
        first.kill()
        second.kill()


SLOW_DISK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from launch import cli, train
from qat.runtime import ranks
from qat.store import student_folder
from qat.train import deepspeed_internals

ranks.TIMEOUT = timedelta(seconds=20)

def slowly(rank, function):
    def call(*arguments, **named):
        if dist.get_rank() == rank:
            time.sleep(30)
        return function(*arguments, **named)
    return call

student_folder.write = slowly(0, student_folder.write)
deepspeed_internals.Writer.save = slowly(1, deepspeed_internals.Writer.save)
cli.run(train.main)
"""


@pytest.mark.slow
def test_training_outlives_a_disk_that_is_slower_than_collectives_may_be(tiny_directory, tiny_data, tmp_path):
    command = [*flags(tiny_directory, tiny_data, tmp_path / "run"), "--steps=2"]
    both = start_training("-c", SLOW_DISK, *command, QAT_PATIENCE="20")
    outputs = [each.communicate(timeout=400)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], outputs
    assert (tmp_path / "run" / "final").is_dir()
