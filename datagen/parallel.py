"""Who makes which shard: processes from any launcher, alone or in groups that hold one model together."""

import os
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qat.data.shards import ShardFolder
from qat.runtime.errors import UserError
from qat.runtime.machine import device, take_gpu
from qat.runtime.ranks import TIMEOUT, announce, join


def ranks_from_slurm(environment: MutableMapping[str, str]) -> None:
    """Under srun, which knows nothing of RANK and WORLD_SIZE, set them from what it does know."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    # Not in the batch script itself, which is one process and has a SLURM_PROCID too.
    if "RANK" not in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        environment.update({ours: environment[theirs] for ours, theirs in names.items() if theirs in environment})


@dataclass(frozen=True)
class Group:
    """The ranks that hold one copy of the model: one, or ``size`` of them by tensor parallelism.

    Args:
        number: of this group, and
        count: of all groups; those of the other tasks of a SLURM array count too
        size: ranks in it
        rank: of this process in it
    """

    number: int
    count: int
    size: int
    rank: int

    @classmethod
    def of(cls, rank: int, world_size: int, size: int) -> "Group":
        """Of rank ``rank`` among ``world_size``; raises UserError if they cannot form groups of ``size``."""
        if world_size % size:
            raise UserError(
                f"tensor_parallel={size} needs a multiple of {size} ranks, not {world_size}: start as many."
            )
        task, tasks = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", value)) for name, value in _ALONE.items())
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        groups = world_size // size
        return cls((task - first) % tasks * groups + rank // size, tasks * groups, size, rank % size)

    @property
    def leads(self) -> bool:
        """Whether this is the rank of the group that writes."""
        return self.rank == 0

    def agree(self, value: bool) -> bool:
        """Whether any rank of the group says so. All must ask."""
        if self.size == 1:
            return value
        announce("writing text")
        answer = torch.tensor(int(value), device=device())
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def shards(self, folder: ShardFolder, missing: list[int]) -> Iterator[int]:
        """The shards that this group makes: each is claimed while the caller makes it.

        First every count-th, so that the groups seldom meet; then what the others have left.
        """
        turn = {offset: (self.number + offset) % self.count for offset in range(self.count)}
        for index in [index for offset in turn for index in missing if index % self.count == turn[offset]]:
            if not self.leads:
                if self.agree(False):
                    yield index
                continue
            with folder.claimed(index) as ours:  # and it may have been made since the caller looked
                if self.agree(ours and folder.missing(index)):
                    yield index

    def init(self) -> None:
        """Let the ranks of the group meet, if there are more than one."""
        if self.size == 1:
            return
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "tensor_parallel needs MASTER_ADDR and MASTER_PORT, which torchrun and deepspeed set: use one of "
                "them, or export both before srun."
            )
        take_gpu()
        join(self.rank, self.size, f"group-{self.number}")
        store, _, _ = next(iter(dist.rendezvous("env://")))
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"group-{self.number}", store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )


_ALONE = {"ID": "0", "COUNT": "1"}
