"""Bars in log files, and what a lost terminal does to a run."""

import logging
import os
import pty
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from io import StringIO

import pytest
from commands import environment

from qat.runtime import progress

RUN = """
import sys, time
from qat.runtime.preemption import StopSignal
stop = StopSignal()
print("ready", flush=True)
while not stop.received:
    time.sleep(0.01)
print("saving", flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_a_log_file_gets_a_line_at_the_start_and_at_the_end():
    with redirect_stderr(StringIO()) as log, progress.bar(desc="train", total=10_000, unit="step") as bar:
        for step in range(10_000):
            bar.set_postfix({"loss": step}, refresh=False)
            bar.update()
    first, last = log.getvalue().splitlines()
    assert first.startswith("train:   0%")
    assert last.startswith("train: 100%")
    assert "10000/10000" in last
    assert "loss=9999" in last


def test_a_bar_that_was_left_open_does_not_move_the_next():
    with redirect_stderr(StringIO()) as log:
        left = progress.bar(desc="left", total=10)
        with progress.bar(desc="train", total=2) as bar:
            bar.update(2)
        left.close()
    assert [line.split("%")[0] for line in log.getvalue().splitlines()] == [
        "left:   0", "train:   0", "train: 100", "left:   0"
    ]  # fmt: skip


def test_what_is_logged_stands_above_the_bar(monkeypatch):
    """On a terminal, that is: the bar is wiped, and drawn anew below."""
    with redirect_stderr(StringIO()) as terminal:
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        with progress.bar(desc="train", total=2) as bar:
            bar.update()
            progress.LogHandler().emit(logging.makeLogRecord({"msg": "a warning"}))
    before, after = terminal.getvalue().split("a warning\n")
    assert before.endswith(" \r")
    assert after.startswith("\rtrain:  50%")


def test_a_lost_terminal_stops_a_run_which_saves(tmp_path):
    """As a lost ssh connection does: the terminal hangs up, and printing to it has become an error."""
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        os.execve(sys.executable, [sys.executable, "-c", RUN, str(tmp_path / "file")], environment())
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / "file").read_text() == "saved"


def test_nohup_goes_on(tmp_path):
    command = ["nohup", sys.executable, "-c", RUN, str(tmp_path / "file")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.terminate()
    assert process.wait(10) == 0
