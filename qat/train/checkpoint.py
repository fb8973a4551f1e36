"""The state that must survive a preemption: DeepSpeed's checkpoint and one TrainState.

A checkpoint is a folder ``step-N``. It is complete when its manifest is: that is written last, after all ranks have
written their files, and holds the size and the checksum of each. Then ``latest`` is moved, by an atomic rename, and
only then are older checkpoints deleted: a rank killed while saving costs nothing. When a run resumes, folders that are
half-written or damaged are skipped.

A checkpoint is for a fixed number of ranks. Another number loads it by way of DeepSpeed's universal checkpoints.
Whatever its files hold, reading them runs no code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from qat.runtime import ranks
from qat.runtime.errors import UserError, first_line
from qat.runtime.files import MANIFEST, appearing_folder, write_atomically
from qat.store import manifest
from qat.store.pickles import as_data
from qat.store.run_folder import LATEST

if TYPE_CHECKING:
    import deepspeed

_UNIVERSAL = "universal-"
_NAME = re.compile(r"step-\d{6,}")
_CONVERTED = re.compile(rf"{_UNIVERSAL}({_NAME.pattern}(\.partial)?|partial)")
_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """The progress of a run.

    Args:
        step: optimizer steps taken
        samples: sequences consumed, over all ranks
        tokens: tokens predicted, over all ranks
        seconds: wall time spent training
        average_loss: average of the losses so far, the newest weigh most
        measured: the step of the last measurement on held-out sequences
        flat_at: the step at which the KL was found to fall no more; 0 if it was not
        recent: the KL of the steps since it was last judged
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    average_loss: float = 0.0
    measured: int = 0
    flat_at: int = 0
    recent: list[float] = field(default_factory=list)


def save(engine: deepspeed.DeepSpeedEngine, directory: Path, state: TrainState, keep: int) -> None:
    """Write a checkpoint, make it the latest, and delete all but the newest ``keep``; log its size and duration.

    Raises UserError on all ranks, and deletes what was written of it, if any rank cannot write its part.
    """
    from qat.train import deepspeed_internals

    began = time.monotonic()
    folder = at(directory, state.step)
    if dist.get_rank() == 0:
        with ranks.doing("deleting a broken checkpoint"):
            shutil.rmtree(folder, ignore_errors=True)  # left by an earlier start, half-written or damaged
    ranks.meet("a broken checkpoint is deleted")
    writer = deepspeed_internals.Writer()
    deepspeed_internals.write_with(engine, writer)
    with ranks.doing("writing a checkpoint"), _meeting(engine, "the checkpoint is written"):
        try:
            engine.save_checkpoint(
                str(directory),
                tag=folder.name,
                client_state=asdict(state),
                save_latest=False,
                exclude_frozen_parameters=True,  # they stay what the run began with
            )
        except OSError as error:  # in copying what is on NVMe; the other ranks may be anywhere, and end with this one
            raise _unwritten(folder, first_line(error)[:200]) from error
    _agree(writer.failure, folder)
    with ranks.doing("reading the checkpoint back"):
        entries = manifest.entries(folder, dist.get_rank(), dist.get_world_size())
    ranks.meet("the checkpoint is read back")
    files = {name: entry for part in ranks.gather(entries) for name, entry in part.items()}
    failure = ""
    if dist.get_rank() == 0:
        size, seconds = sum(entry["bytes"] for entry in files.values()), time.monotonic() - began
        content = {"ranks": dist.get_world_size(), "bytes": size, "seconds": round(seconds, 2), "files": files}
        try:
            write_atomically(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
            write_atomically(directory / LATEST, folder.name)
        except OSError as error:
            failure = str(error)
    _agree(failure, folder)
    if dist.get_rank() == 0:
        with ranks.doing("deleting old checkpoints"):
            for superseded in _superseded(checkpoints(directory), folder, keep):
                _delete(superseded)
            for converted in _folders(directory, _CONVERTED):
                _delete(converted)
        _log.info("checkpoint %s: %.3g GB in %.1f s", folder.name, size / 1e9, seconds)
    ranks.meet("old checkpoints are deleted")


def resume(engine: deepspeed.DeepSpeedEngine, directory: Path, begin: Path | None = None) -> TrainState:
    """Load the newest complete checkpoint in ``directory`` into ``engine``; without one, return the state of a new run,
    which continues from ``begin``, a checkpoint of another run, if it is given.

    Raises UserError if there was a complete one, and none is left, or if ``begin`` is damaged.
    """
    (names,) = ranks.broadcast([path.name for path in reversed(checkpoints(directory))])
    for name in names:
        if damage := _damage(directory / name):
            _log.warning("warning: the checkpoint %s is skipped: %s", directory / name, damage)
        else:
            return _load(engine, directory / name)
    if (directory / LATEST).is_file():
        raise UserError(f"Every checkpoint in {directory} is damaged: restore one, or delete the folder to start over.")
    if begin is None:
        return TrainState()
    if damage := _damage(begin):
        raise UserError(f"{begin} is damaged: {damage}. Give another checkpoint.")
    # Whether the KL still falls is judged from scratch: the settings of this may differ.
    return replace(_load(engine, begin), flat_at=0, recent=[])


def _damage(folder: Path) -> str:
    """Describe, on all ranks, the first damage that one of them finds in its share of a checkpoint; "" for none."""
    with ranks.doing(f"checking {folder.name}"):
        damage = manifest.damage(folder, dist.get_rank(), dist.get_world_size())
    ranks.meet(f"{folder.name} is checked")
    return next(filter(None, ranks.gather(damage)), "")


def checkpoints(directory: Path) -> list[Path]:
    """Return the run's checkpoints, complete or not, oldest first. Other files and folders among them are the
    user's."""
    return _folders(directory, _NAME)


def at(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` steps."""
    return directory / f"step-{step:06d}"


def delete_all(directory: Path) -> None:
    """Delete a run's checkpoints, and their folder, unless it contains something else."""
    for folder in [*checkpoints(directory), *_folders(directory, _CONVERTED)]:
        _delete(folder)
    (directory / LATEST).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()


def _folders(directory: Path, name: re.Pattern[str]) -> list[Path]:
    """Return the folders whose names match, in order."""
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in found if name.fullmatch(path.name) and path.is_dir())


def latest(directory: Path) -> str:
    """Return the path of the checkpoint that ``latest`` names; "none" without one."""
    pointer = directory / LATEST
    return str(directory / pointer.read_text()) if pointer.is_file() else "none"


def _load(engine: deepspeed.DeepSpeedEngine, folder: Path) -> TrainState:
    from qat.train import deepspeed_internals

    writers = json.loads((folder / MANIFEST).read_text())["ranks"]
    universal = writers != dist.get_world_size()
    if universal:
        if engine.zero_nvme_offload_optimizer():
            raise UserError(
                f"{folder} was written by {writers} ranks with the optimizer on NVMe, which DeepSpeed cannot convert "
                f"for {dist.get_world_size()}: resume with {writers} ranks."
            )
        folder = _converted(folder, writers)
    with (
        ranks.doing(f"loading {folder.name}"),
        as_data(folder),
        _meeting(engine, f"the weights of {folder.name} are loaded"),
        deepspeed_internals.universal_loading(engine, universal),
    ):
        whole = all(parameter.requires_grad for parameter in engine.module.parameters())  # as ``save`` wrote it
        _, client_state = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=whole)
    ranks.meet(f"{folder.name} is loaded")
    known = TrainState.__dataclass_fields__.keys() & client_state.keys()  # runs of earlier versions lack the newest
    state = TrainState(**{name: client_state[name] for name in known})
    if engine.zero_nvme_offload_optimizer():
        deepspeed_internals.resume_adam_on_nvme(engine, state.step)
    return state


def _converted(folder: Path, writers: int) -> Path:
    """Return the checkpoint as DeepSpeed's universal one, made by the first rank."""
    universal = folder.with_name(_UNIVERSAL + folder.name)
    if dist.get_rank() == 0 and not universal.exists():
        # By a child, whose reads and writes are not this process's.
        with ranks.doing(f"converting {folder.name}", ranks.TIMEOUT.total_seconds()):
            _convert(folder, universal, writers)
    ranks.meet(f"{folder.name} is converted")
    return universal


def _convert(folder: Path, universal: Path, writers: int) -> None:
    from qat.train.universal import REFUSED

    _log.info("converting %s, written by %d ranks, for %d ...", folder, writers, dist.get_world_size())
    workers = ["--num_extract_workers=1", f"--num_merge_workers={min(8, len(os.sched_getaffinity(0)))}"]
    with appearing_folder(universal) as partial:
        places = ["--input_folder", str(folder), "--output_folder", str(partial)]
        command = [sys.executable, "-m", "qat.train.universal", *places, *workers]
        # The converter forks: a child of a process that has computed with OpenMP's threads would wait for them forever.
        done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            reason = (done.stderr.strip() or "killed").splitlines()[-1]
            if done.returncode == REFUSED:
                raise UserError(reason)
            raise UserError(
                f"{folder}, written by {writers} ranks, could not be converted for {dist.get_world_size()} ({reason}): "
                f"make room for twice its size, or resume with {writers} ranks."
            )


def _meeting(engine: deepspeed.DeepSpeedEngine, what: str) -> AbstractContextManager[None]:
    """Make every rank wait, in this context, for all others before weights are gathered."""
    from qat.train import deepspeed_internals

    return deepspeed_internals.before_the_gathering(engine, lambda: ranks.meet(what))


def _agree(failure: str, folder: Path) -> None:
    """Raise UserError on all ranks if one has a failure, and delete the incomplete checkpoint."""
    failures = [failure for failure in ranks.gather(failure) if failure]
    if not failures:
        return
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    raise _unwritten(folder, failures[0])


def _unwritten(folder: Path, failure: str) -> UserError:
    return UserError(
        f"{folder} could not be written ({failure}): make room and start again. "
        f"The last complete checkpoint is {latest(folder.parent)}."
    )


def _superseded(checkpoints: list[Path], newest: Path, keep: int) -> list[Path]:
    """Return the checkpoints to delete: all but the last ``keep`` up to ``newest`` that are complete. Half-written and
    later ones were left by a killed run, or are damaged."""
    complete = [path for path in checkpoints if path <= newest and (path / MANIFEST).is_file()]
    return [path for path in checkpoints if path not in complete[-keep:]]


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, manifest first: a half-deleted one must not be taken for damaged. The target of a user's
    link is kept."""
    if checkpoint.is_symlink():
        return
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
