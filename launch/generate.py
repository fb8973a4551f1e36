"""Let a model write training sequences into a folder of Parquet shards.

python launch/generate.py --model DIR --output DIR; under a launcher, the ranks share the shards. A folder
that is there already is gone on with.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from datagen.generate import GenerateConfig, Vocabulary, write_sequences
from datagen.shards import ShardFolder
from launch import cli
from qat import models
from qat.errors import UserError


@dataclass(frozen=True)
class Paths:
    """Where things are.

    Args:
        model: the model that writes: a Hugging Face directory or hub name
        output: folder of the shards
    """

    model: str
    output: Path


def main() -> None:
    paths, config = cli.parse(__doc__, Paths, GenerateConfig)
    name = models.resolve_full_precision(paths.model)
    tokenizer = models.load_tokenizer(name)
    folder = ShardFolder(paths.output)
    folder.claim(
        {
            **asdict(config),
            "teacher": models.weights_fingerprint(name),
            "tokenizer": models.tokenizer_fingerprint(tokenizer),
        }
    )
    missing = [i for i in range(cli.rank(), config.shards, cli.ranks()) if not folder.path(i).exists()]
    if not missing:
        print(f"{paths.output} is complete: {config.sequences} sequences.")
        return
    model = models.load(name, models.inference_dtype())
    models.place(model)
    models.check_length(model, config.max_length, "max_length")
    sliding_window = getattr(model.config, "sliding_window", None)
    if sliding_window and config.max_length > sliding_window:
        raise UserError(
            f"max_length={config.max_length} is longer than the model's sliding window: give {sliding_window}."
        )
    vocabulary = Vocabulary.of(tokenizer, model)

    longest = sum(len(config.shard_range(i)) for i in missing) * (config.max_length - 1)
    with tqdm(desc="generate", total=longest, unit="tok", dynamic_ncols=True, disable=not cli.is_first_rank()) as bar:

        def progress(tokens: int, spared: int) -> None:
            bar.total -= spared  # sequences that ended early
            bar.update(tokens)

        for index in missing:
            folder.write(index, write_sequences(model, vocabulary, config, config.shard_range(index), progress))


if __name__ == "__main__":
    cli.run(main)
