"""Distribution of shards over processes from any launcher, alone or in groups that hold one model together."""

import os
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from qat.data.shards import ShardFolder
from qat.runtime.errors import UserError
from qat.runtime.machine import device, take_gpu
from qat.runtime.ranks import TIMEOUT, announce, join, launchers_store


def ranks_from_slurm(environment: MutableMapping[str, str]) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables under srun, which does not set them."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    # Not in the batch script itself, which is a single process and also has SLURM_PROCID.
    if "RANK" not in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        environment.update({ours: environment[theirs] for ours, theirs in names.items() if theirs in environment})


@dataclass(frozen=True)
class Group:
    """The ranks that hold one copy of the model: one, or ``size`` of them by tensor parallelism.

    Args:
        number: number of this group
        count: number of all groups, including those of the other tasks of a SLURM array
        size: ranks in a group
        rank: this process's rank in its group
    """

    number: int
    count: int
    size: int
    rank: int

    @classmethod
    def of(cls, rank: int, world_size: int, size: int) -> "Group":
        """Return the group of rank ``rank`` among ``world_size``; raise UserError if they cannot form groups of
        ``size``."""
        if world_size % size:
            raise UserError(
                f"tensor_parallel={size} needs a multiple of {size} ranks, not {world_size}: start a multiple of "
                f"{size}."
            )
        task, tasks = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", value)) for name, value in _ALONE.items())
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        groups = world_size // size
        return cls((task - first) % tasks * groups + rank // size, tasks * groups, size, rank % size)

    @property
    def leads(self) -> bool:
        """Return whether this is the rank of the group that writes."""
        return self.rank == 0

    def agree(self, value: bool) -> bool:
        """Return whether ``value`` is true on any rank of the group; all must call this together."""
        if self.size == 1:
            return value
        announce("writing text")
        answer = torch.tensor(int(value), device=device())
        dist.all_reduce(answer, op=dist.ReduceOp.MAX)
        return bool(answer)

    def shards(self, folder: ShardFolder, missing: list[int]) -> Iterator[int]:
        """Yield the shards that this group makes; each is claimed while the caller makes it.

        The group starts with every count-th shard, so that groups rarely compete for one, then takes what the others
        have left.
        """
        turn = {offset: (self.number + offset) % self.count for offset in range(self.count)}
        damaged = {index for index in missing if folder.path(index).is_file()}
        for index in [index for offset in turn for index in missing if index % self.count == turn[offset]]:
            if not self.leads:
                if self.agree(False):
                    yield index
                continue
            with folder.claimed(index) as ours:  # another group may have made it since ``missing`` was listed
                if self.agree(ours and _lacks(folder, index, read=index in damaged)):
                    yield index

    def lacks(self, folder: ShardFolder, index: int) -> bool:
        """Return whether shard ``index`` has to be made. Only a group's own shards are read, by its leader: all of
        them, and the teacher's predictions with them, would be read by each rank."""
        return self.agree(self.leads and _lacks(folder, index, read=index % self.count == self.number))

    def init(self) -> None:
        """Take this rank's GPU, and set up communication between the ranks of the group, if there is more than one."""
        take_gpu()
        if self.size == 1:
            return
        if "MASTER_ADDR" not in os.environ:
            raise UserError(
                "tensor_parallel needs MASTER_ADDR and MASTER_PORT, which torchrun and deepspeed set: use one of "
                "them, or export both before srun."
            )
        join(self.rank, self.size, f"group-{self.number}")
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            store=dist.PrefixStore(f"group-{self.number}", launchers_store(TIMEOUT)),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )


def _lacks(folder: ShardFolder, index: int, read: bool) -> bool:
    """Return whether a shard has to be made: by its content if it is ``read``, else by whether it is there."""
    return folder.missing(index) if read else not folder.path(index).is_file()


_ALONE = {"ID": "0", "COUNT": "1"}
