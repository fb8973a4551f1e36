"""Ranks that work together: how they find each other, wait for one another, and learn that one has died or hangs.

A collective waits for the slowest rank, gives up after a fixed time, and does not report which rank it waited for. So
wherever ranks come from long work that differs between them, they first meet by polling the store (``meet``). And each
announces its work (``announce``, ``doing``, ``progress``) to the threads of qat.runtime.watch, which end the run if one
dies or hangs. Announcing costs microseconds. With one rank all of this does nothing.
"""

import atexit
import json
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from qat.runtime.errors import UserError
from qat.runtime.watch import FirstRank, OtherRank, Sign, Watch

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Timeout of collectives. The last resort: a hang is found earlier."""

LONG = 900.0
"""Seconds that reading or writing a model may go on without moving 64 MB. Where the system does not count what a
process reads and writes, it may take as long as a collective."""

PATIENCE = "QAT_PATIENCE"
"""Environment variable: seconds that a rank may go without progress, or without a sign of life."""

_PATIENCE = 180.0
_FIRST_TIME = 10
"""Factor on the patience for work that a rank does for the first time, when it may compile."""
_SLOWEST = 5
"""Factor on the longest time that the same work has taken, if the result exceeds the patience."""
_SECOND_TIME = 2
"""Factor on the first time that work took, which may have included a compilation."""
_ENOUGH = 2**26
"""Bytes that count as progress of work that moves many, for each 128 ranks: more than what the first rank's store moves
in ``LONG`` while so many ranks poll it."""
_COUNTERS = Path("/proc/self/io")
_JOINING = timedelta(minutes=10)
_OURS = tuple(str(Path(__file__).parents[2] / package) + os.sep for package in ("qat", "launch", "datagen"))
_INNERMOST = 4


def join(rank: int, size: int, group: str = "all") -> None:
    """Find the other ranks, once, and watch them from then on.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT must be set.

    Args:
        rank: this process's rank in its group
        size: ranks in the group
        group: name of the group, if there are several

    Raises UserError if the others do not come within ten minutes, or another run has the port.
    """
    global _self, _watch
    if size == 1 or _watch is not None:
        return
    patience = _patience(os.environ.get(PATIENCE, str(_PATIENCE)))
    try:
        meeting = dist.PrefixStore(f"ranks-{group}", launchers_store(_JOINING))
        if meeting.add(f"rank {rank}", 1) > 1:  # this store belongs to another run, which has a rank of this number
            raise _port_in_use()
        _self = _Self(size, meeting, patience)
        _watch = _watching(_self, rank, size)
    except (dist.DistError, OSError) as error:
        if "EADDRINUSE" in str(error):
            raise _port_in_use() from error
        raise UserError(
            f"Rank {os.environ['RANK']} did not find the others ({error}): check whether one of them failed earlier; "
            "between hosts, ranks need open ports, as NCCL and gloo do."
        ) from error
    _watch.start()
    atexit.register(_watch.leave)


def launchers_store(timeout: timedelta) -> dist.Store:
    """Return the store at MASTER_ADDR and MASTER_PORT, through which all ranks of the launcher find each other."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=timeout)))
    return store


def count() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T) -> list[T]:
    """Return every rank's value, in the order of the ranks, on all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T) -> list[T]:
    """Return the first rank's value, in a list."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values


def announce(what: str, step: int | None = None) -> None:
    """Announce the work that this rank does from now on. All ranks of a group must announce the same, in the same
    order.

    The time it may take: the patience, or 5 times the longest that it has taken (2 times, if it was done once), and 10
    times the patience when it is done for the first time.

    Args:
        what: the work, in the same words whenever it is the same
        step: the training step, from 1; later announcements belong to it too
    """
    if _self is not None:
        _self.announce(what, step)


def progress() -> None:
    """Report that this rank has made progress with its work; the ranks need not do so equally often."""
    if _self is not None:
        _self.enter(_self.phase)


@contextmanager
def doing(what: str, patience: float | None = None) -> Iterator[None]:
    """Announce, for this context, work that not all ranks need to do. Every 64 MB that this process reads or
    writes in it are progress.

    Args:
        what: the work
        patience: seconds that it may go without progress, at least those of QAT_PATIENCE; by default ``LONG``
    """
    if _self is None:
        yield
        return
    if patience is None:
        patience = TIMEOUT.total_seconds() if _moved() is None else LONG
    before = _self.phase
    _self.enter(_Phase(what, max(patience, _self.patience), moves=True))
    yield
    _self.enter(before)  # not after an error, which ends the run: the last line then names this work


def meet(what: str) -> None:
    """Wait until all ranks have reached this point. None of them waits in a collective for another's work.

    Args:
        what: what has happened by then
    """
    if _self is not None:
        _self.meet(what)
    # Short, as all ranks are here. The first rank, whose process may hold the store, must not end while others poll it.
    dist.barrier()


def are_watched() -> bool:
    """Return whether there are other ranks, which must be told when this one fails."""
    return _watch is not None and not _watch.over


def fail(message: str, code: int) -> tuple[str, int]:
    """Report a failure to all ranks, see ``Watch.fail``; only if ``are_watched``."""
    assert _watch is not None
    return _watch.fail(message, code)


class _Phase(NamedTuple):
    what: str
    patience: float | None = None
    waits: bool = False
    moves: bool = False


class _Self:
    """This rank's current work. Its main thread changes it, the watching thread reads it."""

    store: dist.Store

    def __init__(self, size: int, meeting: dist.Store, patience: float):
        self.patience, self.phase = patience, _Phase("starting")
        self.meeting = meeting  # kept alive: the first rank's may serve the others
        self._size = size
        self._rank, self._host = int(os.environ["RANK"]), socket.gethostname()
        self._step: int | None = None
        self._place = self._beat = self._meetings = self._moved = 0
        self._began = time.monotonic()
        self._first, self._longest = dict[str, float](), dict[str, float]()  # times of work; the longest but the first

    def announce(self, what: str, step: int | None) -> None:
        if step is not None:
            self._step = step
        self._place += 1
        self.enter(_Phase(what))

    def enter(self, phase: _Phase) -> None:
        now, what = time.monotonic(), self.phase.what
        if what in self._first:
            self._longest[what] = max(self._longest.get(what, 0.0), now - self._began)
        else:
            self._first[what] = now - self._began
        self._began = now
        self._beat += 1  # before the phase: or the other thread would blame the new phase for the time
        self.phase = phase

    def meet(self, what: str) -> None:
        before, key = self.phase, f"meeting-{self._meetings}"
        self._meetings += 1
        self._place += 1
        self.enter(_Phase(f"waiting until {what}", self.patience, waits=True))
        there, pause = self.store.add(key, 1), 0.005
        while there < self._size:
            time.sleep(pause)
            there, pause = self.store.add(key, 0), min(2 * pause, 0.2)
        self.enter(before)

    def sign(self) -> Sign:
        phase, main = self.phase, sys._current_frames().get(threading.main_thread().ident or 0)
        patience = phase.patience
        if patience is None and phase.what not in self._first:
            patience = self.patience * _FIRST_TIME
        elif patience is None:
            usual = self._longest.get(phase.what)
            expected = _SECOND_TIME * self._first[phase.what] if usual is None else _SLOWEST * usual
            patience = max(self.patience, expected)
        what = phase.what if self._step is None else f"step {self._step}, {phase.what}"
        if phase.moves and (moved := _moved() or 0) - self._moved >= _ENOUGH * -(-self._size // 128):
            self._moved = moved
        beat = self._beat + self._moved  # the one is the main thread's, the other this one's
        at, in_collective = _whereabouts(main)
        return Sign(self._rank, self._host, what, patience, self._place, beat, phase.waits, at, in_collective)


_self: _Self | None = None
_watch: Watch | None = None


def _watching(own: _Self, rank: int, size: int) -> Watch:
    """Return this rank's watching thread; give ``own`` its store. Both connect to the first rank, whose ports are
    exchanged through the meeting's store: that store may be torchrun's, and end with it."""
    tick, number = min(1.0, own.patience / 10), int(os.environ["RANK"])
    if rank == 0:
        others = [Sign(number + other, "host unknown", "starting", own.patience) for other in range(1, size)]
        first = FirstRank(own.sign, tick, others)
        own.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        ports = first.port, own.store.port
        own.meeting.set("first", json.dumps([asdict(own.sign()), _own_address(), *ports, first.token]))
        return first
    sign, host, port, store_port, token = json.loads(own.meeting.get("first"))
    host = host or os.environ["MASTER_ADDR"]
    own.store = dist.TCPStore(host, store_port, is_master=False, wait_for_workers=False)
    return OtherRank(own.sign, tick, (host, port), token, Sign(**sign))


def _own_address() -> str:
    """Return the address at which other hosts reach this one; empty on the host of MASTER_ADDR, which they know by
    that."""
    family, kind, _, _, master = socket.getaddrinfo(os.environ["MASTER_ADDR"], 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(master)  # sends nothing
        own, there = probe.getsockname()[0], probe.getpeername()[0]
    return "" if own == there or own.startswith("127.") else own


def _port_in_use() -> UserError:
    port = int(os.environ["MASTER_PORT"])
    return UserError(
        f"Port {port} is in use, perhaps by another run on this host: give the launcher another one, say --master_port "
        f"{port + 1} (MASTER_PORT, where there is no launcher)."
    )


def _patience(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{PATIENCE}={given} is invalid: choose seconds above 0, or leave it out for 180.")
    return seconds


def _moved() -> int | None:
    """Return how many bytes this process has read and written so far, or more: what reaches a disk counts twice, and a
    page of a mapped file that had to be read counts too. None where the system does not tell."""
    try:
        counts = [int(line.split()[1]) for line in _COUNTERS.read_text().splitlines()]
    except OSError:
        return None
    return sum(counts) + resource.getrusage(resource.RUSAGE_SELF).ru_majflt * resource.getpagesize()


def _whereabouts(frame: FrameType | None) -> tuple[str, bool]:
    """Return the line of our code that a thread is in, and whether it is in a collective."""
    in_collective, depth = False, 0
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if depth < _INNERMOST and (
            file.endswith("distributed_c10d.py") or ("deepspeed" in file and (function == "wait" or "comm" in file))
        ):
            in_collective = True
        if file.startswith(_OURS):
            return f"{Path(file).name}:{frame.f_lineno}", in_collective
        frame, depth = frame.f_back, depth + 1
    return "outside of our code", in_collective
