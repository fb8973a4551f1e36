"""What the two ranks of test_ranks.py do: the likeness of a training run, without a model."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from launch import cli
from qat.runtime import ranks
from qat.runtime.errors import UserError
from qat.runtime.preemption import RESUMABLE_EXIT

LATE = 50
"""The step at which nothing is done for the first time any more."""


def run(part: str, rank: int, environment: dict[str, str], output: str) -> None:
    """Do ``part`` as rank ``rank``; what it prints is appended to the file ``output``."""
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": "2"}
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    cli.run(PARTS[part])


def join(timeout: float = 600) -> None:
    ranks.join(cli.rank(), 2)
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def train(second_rank: Callable[[], None] = lambda: None) -> None:
    """For ever. ``second_rank`` is called in the second rank's late step, before a collective."""
    join()
    for step in range(1, 1_000_000):
        ranks.announce("reading a sample", step)
        ranks.announce("forward and backward")
        if step == LATE:
            print("late", flush=True)
            if cli.rank() == 1:
                second_rank()
        dist.all_reduce(torch.ones(1))
        ranks.announce("optimizer step")
        time.sleep(0.01)


def hang() -> None:
    threading.Event().wait()


def fail() -> None:
    raise ValueError("of one rank\nand more")


def refuse() -> None:
    join()
    raise UserError("of all ranks")


def refuse_one(met: bool) -> None:
    """The second rank refuses a mistake that it alone has, before or after it has found the first one."""
    if cli.rank() == 1 and not met:
        raise UserError("of one rank")
    join()
    if cli.rank() == 1:
        raise UserError("of one rank")
    dist.barrier()


def wait() -> None:
    """The second rank waits for the first one for longer than a collective, or a step, may take."""
    join(timeout=1)
    if cli.rank() == 0:
        with ranks.doing("writing final/"):
            time.sleep(2.5)
    ranks.meet("final/ is written")
    if cli.rank() == 1:  # two at once would mix their lines
        print("all have come", flush=True)


def write(then: Callable[[], None] = lambda: None) -> None:
    """The second rank writes 64 MB every half second, for longer than it may go without progress; ``then``
    comes before the file is whole."""
    join()
    if cli.rank() == 1:
        with ranks.doing("writing final/", patience=1), open(os.devnull, "wb") as file:
            for _ in range(12):
                file.write(bytes(2**26))
                time.sleep(0.5)
            then()
    ranks.meet("final/ is written")
    if cli.rank() == 1:
        print("all have come", flush=True)


def share(folder: str) -> None:
    """Check whether all see one folder."""
    from qat.train import engines

    join()
    engines._OF_NFS = 1.0
    engines.check_shared(Path(os.environ["FOLDER"]) / folder)
    if cli.rank() == 1:
        print("all have come", flush=True)


def stop(last: int) -> int:
    """As after a signal; rank ``last`` takes its time."""
    join()
    if cli.rank() == last:
        time.sleep(1)
    return RESUMABLE_EXIT


PARTS: dict[str, Callable[[], int | None]] = {
    "train": train,
    "hang": lambda: train(hang),
    "fail": lambda: train(fail),
    "refuse": refuse,
    "refuse one": lambda: refuse_one(met=True),
    "refuse one unmet": lambda: refuse_one(met=False),
    "wait": wait,
    "write": write,
    "hang while writing": lambda: write(hang),
    "share": lambda: share("one"),
    "share nothing": lambda: share(str(cli.rank())),
    "stop, first rank last": lambda: stop(0),
    "stop, second rank last": lambda: stop(1),
}
