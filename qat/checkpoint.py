"""Everything that must survive a preemption: DeepSpeed's checkpoint and one TrainState.

``latest`` names the newest whole checkpoint. It moves by an atomic rename, after every rank has written
its part, and the checkpoint before it is deleted only then: a rank killed while saving costs nothing.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import deepspeed
import torch.distributed as dist

from qat.errors import UserError
from qat.files import write_atomically

LATEST = "latest"


@dataclass
class TrainState:
    """Where a run is.

    Args:
        step: optimizer steps taken
        samples: sequences consumed, over all ranks
        tokens: tokens predicted, over all ranks
        seconds: wall time spent training
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(engine: deepspeed.DeepSpeedEngine, directory: Path, state: TrainState, keep: int) -> None:
    """Write a checkpoint, make it the latest, and delete all but the newest ``keep``."""
    tag = f"step-{state.step:06d}"
    engine.save_checkpoint(str(directory), tag=tag, client_state=asdict(state), save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        write_atomically(directory / LATEST, tag)
        for superseded in _superseded(sorted(directory.glob("step-*")), directory / tag, keep):
            shutil.rmtree(superseded)
    dist.barrier()


def resume(engine: deepspeed.DeepSpeedEngine, directory: Path) -> TrainState:
    """Load the latest checkpoint into ``engine``; without one, the state of a new run."""
    pointer = directory / LATEST
    if not pointer.is_file():
        return TrainState()
    tag = pointer.read_text()
    path, client_state = engine.load_checkpoint(str(directory), tag=tag)
    if path is None:
        raise UserError(f"The checkpoint {directory / tag} is not there: give another --output, or put it back.")
    return TrainState(**{name: client_state[name] for name in TrainState.__dataclass_fields__})


def _superseded(checkpoints: list[Path], newest: Path, keep: int) -> list[Path]:
    """All but the last ``keep`` up to ``newest``; what is later was left broken by a killed run."""
    whole = [path for path in checkpoints if path <= newest]
    return [path for path in checkpoints if path > newest] + whole[:-keep]
