"""Let a model write training sequences into a folder of Parquet shards.

python launch/generate.py --model DIR --output DIR; under deepspeed, torchrun or srun, the ranks share the shards. If
the output folder exists, the run resumes. --strategy chat writes dialogues, --prompts answers yours; --corpus makes the
same shards from real text.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from datagen import card, decoder, plan
from datagen.corpus import HUB, Corpus
from datagen.dialogues import Dialogues
from datagen.generate import GenerateConfig, Vocabulary, Watch, write_sequences
from datagen.parallel import Group, ranks_from_slurm
from launch import cli
from qat.data.shards import Sequence, ShardFolder
from qat.quant.rotated import check_plain
from qat.runtime import machine, memory, progress, ranks
from qat.runtime.errors import UserError
from qat.runtime.preemption import RESUMABLE_EXIT, StopSignal
from qat.store import dialogues, models
from qat.train.teacher_cache import SEQUENCES_PER_FILE, Observed, TeacherCache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


Writer = Callable[[range, Watch | None], list[Sequence]]
"""Writes the sequences of a range of indices, and shows what the model predicts."""

CACHE = "teacher_cache"
"""Folder of the teacher's predictions, in that of the shards."""

_OF_TEXT = ("sequences", "max_length", "sequences_per_shard")
"""The settings that apply when the text comes from a corpus."""


@dataclass(frozen=True)
class Paths:
    """The model that writes, and where its text goes.

    Args:
        model: the model that writes: a Hugging Face directory or hub name
        output: folder of the shards
        corpus: make the shards from this text instead, with the model's tokenizer: a txt, jsonl or parquet file, a
            folder of them, wikitext or c4
        prompts: with --strategy chat, the dialogues begin with these, and the model answers: a jsonl file of objects
            with "prompt" or "messages", or a txt file with a prompt per line
    """

    model: str
    output: Path
    corpus: str | None = None
    prompts: Path | None = None


class TaughtShards(ShardFolder):
    """Shards with the teacher's predictions: a shard without them counts as missing."""

    def __init__(self, directory: Path, config: GenerateConfig):
        """Raise UserError if the files of the predictions are not divided as the shards are."""
        if config.shards > 1 and config.sequences_per_shard % SEQUENCES_PER_FILE:
            raise UserError(
                f"sequences_per_shard={config.sequences_per_shard} does not fit --teacher_cache, whose files hold "
                f"{SEQUENCES_PER_FILE} sequences each: give a multiple of that."
            )
        super().__init__(directory)
        self.cache, self._config = TeacherCache(directory / CACHE), config

    def missing(self, index: int) -> bool:
        return super().missing(index) or any(self.cache.lacks(number) for number in self._files(index))

    def observed(self, index: int) -> Observed:
        """Return where the predictions of shard ``index`` are kept until they are written."""
        return Observed(len(self._config.shard_range(index)), self._config.max_length, self._config.teacher_cache)

    def write_targets(self, index: int, sequences: list[Sequence], observed: Observed) -> None:
        """Write the predictions of shard ``index``, which must be claimed and is to be written next. An older one is
        deleted first: where a shard is, the predictions are those on its sequences."""
        self.path(index).unlink(missing_ok=True)
        entries = observed.entries([len(sequence.input_ids) for sequence in sequences])
        for place, number in enumerate(self._files(index)):
            first = place * SEQUENCES_PER_FILE
            self.cache.write(number, entries[first : first + SEQUENCES_PER_FILE])

    def _files(self, index: int) -> range:
        sequences = self._config.shard_range(index)
        return range(sequences.start // SEQUENCES_PER_FILE, -(-sequences.stop // SEQUENCES_PER_FILE))


class Stopped(Exception):
    """Raised when a signal asks to stop: the current shard is abandoned."""


def main() -> int:
    paths, config = cli.parse(__doc__, Paths, GenerateConfig)
    directory = models.resolve_full_precision(paths.model)
    tokenizer = models.load_tokenizer(directory)
    folder = TaughtShards(paths.output, config) if config.teacher_cache else ShardFolder(paths.output)
    if paths.corpus and not cli.is_first_rank():
        return 0  # tokenizing is quick: the first rank does it alone
    was_complete = cli.is_first_rank() and (paths.output / card.CARD).exists()
    if paths.prompts and (paths.corpus or config.strategy != "chat"):
        raise UserError(
            "--prompts requires --strategy chat and excludes --corpus: give --strategy chat without --corpus, or no "
            "--prompts."
        )
    try:
        if paths.corpus:
            write_corpus(Corpus(paths.corpus), folder, directory, tokenizer, config)
        else:
            group = group_of(config)
            if group.number >= config.shards and folder.is_new:
                return 0  # there is no shard for it, and the others decide whether the folder gets these settings
            write_generated(folder, directory, tokenizer, config, paths.prompts, group)
    except Stopped:
        cli.say(f"stopped by a signal: the same command resumes {paths.output}")
        return RESUMABLE_EXIT
    if all(folder.path(index).exists() for index in range(config.shards)):  # true on the rank that finishes last
        name = Path(paths.model).name if Path(paths.model).exists() else paths.model
        if card.write(folder, tokenizer, name) or was_complete:
            print(f"{paths.output} is complete: {config.sequences} sequences; {card.CARD} describes them.", flush=True)
            if isinstance(folder, TaughtShards):
                print(f"train with --teacher_cache {folder.cache.directory}, without a teacher", flush=True)
    return 0


def group_of(config: GenerateConfig) -> Group:
    """Return the ranks that hold one copy of the model with this one."""
    vllm = config.engine == "vllm"
    if vllm and cli.ranks() > 1:
        raise UserError("engine=vllm starts its own ranks (--tensor_parallel): start it with plain python.")
    return Group.of(cli.rank(), cli.ranks(), 1 if vllm else config.tensor_parallel)


def write_generated(
    folder: ShardFolder,
    directory: str,
    tokenizer: "Tokenizer",
    config: GenerateConfig,
    prompts: Path | None,
    group: Group,
) -> None:
    vllm = config.engine == "vllm"
    given = dialogues_of(tokenizer, config, prompts)
    check(directory, tokenizer, config, given, group.size)
    if not vllm:  # whose own ranks take the GPUs
        group.init()
    needs: Mapping[str, float] = {}

    def loaded() -> Writer:
        nonlocal needs
        if cli.is_first_rank() and not vllm:  # which takes all the memory there is
            needs = planned(directory, config)
            warn_if_short(needs, config)
        # vLLM writes a shard in one call, and reports progress when it is done: too late to abandon the shard.
        return writer(directory, tokenizer, config, given, group, advance if vllm else advance_unless_stopped)

    def advance(tokens: int, spared: int) -> None:
        bar.total -= spared  # tokens of sequences that ended early
        bar.update(tokens)

    def advance_unless_stopped(tokens: int, spared: int) -> None:
        if group.agree(stop.received):
            raise Stopped
        advance(tokens, spared)

    stop = StopSignal()
    # A new folder gets its settings when the model is loaded: one that is refused must not decide them.
    write = loaded() if group.agree(folder.is_new) else None
    teacher = models.weights_fingerprint(directory)
    folder.begin(
        {
            **config.record(),
            "teacher": teacher,
            "tokenizer": models.tokenizer_fingerprint(tokenizer),
            **({"prompts": prompts.name} if prompts else {}),
            **({"dialogues": given.fingerprint()} if given else {}),
        }
    )
    if isinstance(folder, TaughtShards):
        with folder.alone():
            folder.cache.record({"teacher": teacher, "data": folder.fingerprint(), "top_k": config.teacher_cache})
    missing = [index for index in range(config.shards) if group.lacks(folder, index)]
    longest = sum(len(config.shard_range(index)) for index in missing) * (config.max_length - 1) // group.count
    unseen = not missing or not cli.is_first_rank()
    with progress.bar(desc="generate", total=longest, unit="tok", disable=unseen) as bar:
        for index in group.shards(folder, missing):
            advance_unless_stopped(0, 0)
            write = write or loaded()
            observed = folder.observed(index) if isinstance(folder, TaughtShards) and group.leads else None
            sequences = write(config.shard_range(index), observed.keep if observed else None)
            if group.leads:
                with ranks.doing("writing a shard"):
                    if isinstance(folder, TaughtShards) and observed:
                        folder.write_targets(index, sequences, observed)
                    folder.write(index, sequences)
        bar.total = bar.n  # other ranks may have written more shards than this one
    if needs:
        print(memory.beside_plan(needs))


def planned(directory: str, config: GenerateConfig) -> Mapping[str, float]:
    """Return the bytes that each rank will need, by purpose."""
    kind = machine.device().type
    return {**plan.needs(models.read_config(directory), config, kind), "process": memory.PROCESS[kind]}


def warn_if_short(needs: Mapping[str, float], config: GenerateConfig) -> None:
    """Warn if this rank's device has less memory than the plan needs."""
    memory.check_rank(
        "generation",
        needs,
        f"give less than --batch_size {config.batch_size} or --max_length {config.max_length}, or more than "
        f"--tensor_parallel {config.tensor_parallel}.",
    )


def dialogues_of(tokenizer: "Tokenizer", config: GenerateConfig, prompts: Path | None) -> Dialogues | None:
    """Return what is given of the dialogues, if there are any; raise UserError if that cannot be found out."""
    if config.strategy != "chat":
        return None
    if prompts is None:
        return Dialogues.of(tokenizer, config.turns, config.system, config.max_length)
    asked = dialogues.read(prompts)
    given = Dialogues.of_prompts(tokenizer, asked, config.turns, config.system, config.max_length)
    if left_out := len(asked) - len(given.openings):
        cli.say(
            f"{left_out} of the {len(asked)} prompts are left out: they ask nothing, or leave no room for an answer in "
            f"max_length={config.max_length} tokens"
        )
    return given


def writer(
    directory: str,
    tokenizer: "Tokenizer",
    config: GenerateConfig,
    given: Dialogues | None,
    group: Group,
    progress: Callable[[int, int], None],
) -> Writer:
    """Return a function that writes the sequences of a range of indices, with the model loaded into the chosen
    engine."""
    from transformers.distributed import DistributedConfig

    vocabulary = Vocabulary.of(tokenizer, directory)
    if config.engine == "vllm":
        from datagen.vllm_engine import VllmEngine

        engine = VllmEngine(directory, machine.inference_dtype(), config)
        return lambda indices, watch: engine.write_sequences(vocabulary, config, indices, progress)
    with ranks.doing("loading the model"):
        if group.size > 1:
            each_its_part = DistributedConfig(tp_size=group.size)
            model = models.load(directory, machine.inference_dtype(), distributed_config=each_its_part)
        else:
            model = models.load_here(directory, machine.inference_dtype())
    return lambda indices, watch: write_sequences(model, vocabulary, config, indices, progress, given, watch)


def write_corpus(
    corpus: Corpus, folder: ShardFolder, directory: str, tokenizer: "Tokenizer", config: GenerateConfig
) -> None:
    """Write the shards from a corpus; raise UserError for settings that apply only when a model writes."""
    useless = [f.name for f in fields(config) if f.name not in _OF_TEXT and getattr(config, f.name) != f.default]
    if useless:
        raise UserError(f"--corpus, which is real text, does not take {' or '.join(useless)}: remove the flags.")
    model = models.read_config(directory)
    models.check_length(model, config.max_length, "max_length")
    prefix = Vocabulary.of(tokenizer, directory).prefix
    ids = corpus.rows(tokenizer, prefix, config.sequences, config.max_length)
    models.check_ids(model, int(ids.max()), f"The text of {corpus.source}")
    folder.begin(
        {
            **{setting: getattr(config, setting) for setting in _OF_TEXT},
            "corpus": corpus.source if corpus.source in HUB else Path(corpus.source).name,
            "text": corpus.fingerprint(),
            "tokenizer": models.tokenizer_fingerprint(tokenizer),
        }
    )
    stop = StopSignal()
    group = Group.of(0, 1, 1)
    for index in group.shards(folder, [index for index in range(config.shards) if folder.missing(index)]):
        if stop.received:
            raise Stopped
        rows = config.shard_range(index)
        sequences = ids[rows.start : rows.stop].tolist()
        folder.write(index, [Sequence(row, row[len(prefix)], 0, "length", None) for row in sequences])


def check(
    directory: str, tokenizer: "Tokenizer", config: GenerateConfig, given: Dialogues | None, tensor_parallel: int
) -> None:
    """Raise UserError if the model cannot write sequences with these settings, or what is ``given`` of dialogues."""
    model = models.read_config(directory)
    models.check_length(model, config.max_length, "max_length")
    models.check_ids(model, max(Vocabulary.of(tokenizer, directory).prefix, default=0), "The beginning of a text")
    if given:
        models.check_ids(model, max(map(max, [*given.openings, *given.between])), "The text of the chat template")
    if config.teacher_cache > model.vocab_size:
        raise UserError(
            f"teacher_cache={config.teacher_cache} is more than the {model.vocab_size} tokens of the vocabulary: give "
            "64."
        )
    if config.engine == "torch":
        decoder.check(model, config.max_length)
    else:
        check_plain(model, f"engine={config.engine}")
    parts = {"key-value heads": model.num_key_value_heads, "vocabulary": model.vocab_size}
    for part, size in parts.items():
        if size % tensor_parallel:
            raise UserError(
                f"tensor_parallel={tensor_parallel} does not divide the model's {size} {part}: give a number that does."
            )


if __name__ == "__main__":
    ranks_from_slurm(os.environ)
    cli.run(main)
