"""Precompute the teacher's predictions on the training data, so that training runs without a teacher.

deepspeed launch/cache_teacher.py --model DIR --data DIR --output DIR, then launch/train.py --teacher_cache DIR.
If the output folder exists, the run resumes.
"""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
import torch.distributed as dist

from launch import cli
from qat.data.sequences import Row, Sample, TrainingData
from qat.runtime import memory, progress, ranks
from qat.runtime.errors import UserError, check_least
from qat.runtime.machine import device
from qat.store import models
from qat.store.model_folder import read_config, skeleton
from qat.train import deepspeed_json, plan
from qat.train.teacher_cache import SEQUENCES_PER_FILE, TeacherCache, entry_of


@dataclass(frozen=True)
class CacheConfig:
    """The teacher, the data and the folder of the cache.

    Args:
        model: the teacher: a Hugging Face directory or hub name
        data: folder of training shards, made by launch/generate.py
        output: folder of the cache
        top_k: how many of the most likely tokens to keep for every position (6 bytes each); 0 for the final hidden
            states, which are lossless
        deepspeed: DeepSpeed configuration of the teacher, by which it is sharded if a rank cannot hold all of it
    """

    model: str
    data: Path
    output: Path
    top_k: int = 64
    deepspeed: Path = Path("ds_configs/zero3.json")

    def __post_init__(self) -> None:
        check_least(self, top_k=0)


def main() -> None:
    ranks.join(cli.rank(), cli.ranks())
    memory.let_segments_grow()
    (config,) = cli.parse(__doc__, CacheConfig)
    model = models.resolve_full_precision(config.model)
    config_of_model = read_config(model)
    if config.top_k > (vocabulary := config_of_model.vocab_size):
        raise UserError(f"top_k={config.top_k} is more than the {vocabulary} tokens of the vocabulary: give 0, or 64.")
    data = TrainingData(config.data, models.load_tokenizer(model), seed=0)
    models.check_sequences(config_of_model, data.longest, data.largest, str(config.data))
    ds_config = deepspeed_json.read_for_here(config.deepspeed)
    cache, made_with = TeacherCache(config.output), settings(model, data) | {"top_k": config.top_k}
    if cli.is_first_rank():
        cache.reserve(made_with)

    from qat.train import engines  # with DeepSpeed, whose import no refusal above has to wait for

    engines.init_distributed()
    with ranks.doing("checking existing files"):
        missing = [cache.missing(len(data)) if cli.is_first_rank() else []]
    ranks.meet("existing files are checked")
    dist.broadcast_object_list(missing, 0)
    if not missing[0]:
        cli.say(f"{config.output} is already complete: predictions of {config.model} for {len(data)} sequences")
        return
    room = engines.least(memory.of_rank())
    whole = plan.holds_teacher(skeleton(Path(model)), ds_config, data.longest, device().type, room)
    with ranks.doing("loading the teacher"):
        teacher = engines.Teacher(model, deepspeed_json.for_teacher(ds_config), whole=whole)
    with ranks.doing("writing the settings of the cache"):
        if cli.is_first_rank():
            cache.record(made_with)
            if config.top_k == 0:
                cache.write_head(teacher.head)
        ranks.meet("the settings of the cache are written")
    turns = list(zip_longest(*(missing[0][rank :: cli.ranks()] for rank in range(cli.ranks()))))
    total = sum(steps_of(turn, len(data)) for turn in turns)
    with progress.bar(desc="teacher", total=total, unit="seq", disable=not cli.is_first_rank()) as bar:
        for turn in turns:
            number = turn[cli.rank()]
            sequences = range(0) if number is None else sequences_of(number, len(data))
            entries = []
            for place in range(steps_of(turn, len(data))):  # in lockstep: ranks may share the teacher
                ranks.announce("the teacher's forward pass")
                busy = place < len(sequences)
                sample = data.sequence(sequences[place]) if busy else Sample(-1, torch.zeros(1, 2, dtype=torch.long))
                entry = entry_of(teacher(Row.of(sample).to(device())), config.top_k)
                if busy:
                    entries.append(entry)
                bar.update()
            with ranks.doing("writing targets"):
                if entries:
                    cache.write(number, entries)
            ranks.meet("the targets are written")
    cli.say(f"{config.output}: predictions of {config.model} for {len(data)} sequences; train with --teacher_cache")


def settings(model: str, data: TrainingData) -> dict[str, object]:
    """Return the settings that a cache must have been made with to serve a training run."""
    return {"teacher": models.weights_fingerprint(model), "data": data.fingerprint}


def sequences_of(number: int, sequences: int) -> range:
    """Return the indices of the sequences in file ``number``."""
    return range(number * SEQUENCES_PER_FILE, min((number + 1) * SEQUENCES_PER_FILE, sequences))


def steps_of(turn: tuple[int | None, ...], sequences: int) -> int:
    """Return the number of sequences in the longest of the files that the ranks write at the same time."""
    return max(len(sequences_of(number, sequences)) for number in turn if number is not None)


if __name__ == "__main__":
    cli.run(main)
