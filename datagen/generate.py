"""The teacher writes sequences: batched decoding over a static KV cache whose slots are refilled.

Every sequence starts from one token, so there is no prefill: all slots decode one token a step, each at
its own position, and a slot whose sequence ends takes the next sequence at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from datagen import sampling
from datagen.decoder import Decoder
from qat.data.shards import Sequence
from qat.runtime.errors import UserError, check_choice, check_least
from qat.store.model_folder import read_config
from qat.store.models import load_generation_config

ENGINES = ("torch", "vllm")


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of the text that the teacher writes.

    Args:
        sequences: how many sequences in all (the paper: 100,000)
        max_length: longest sequence, in tokens, start token included
        strategy: hybrid (first 3 to 5 tokens greedy, the rest sampled), sample or top1
        temperature: of the sampled tokens; divides the logits
        top_k: sample from the k most likely tokens only; 0 samples from all
        top_p: sample only from the most likely tokens that together have this probability; 1 samples from all
        batch_size: sequences decoded at one time
        sequences_per_shard: size of a shard, the unit of work and of restart
        seed: of the start tokens and of the sampling
        engine: torch (ours) or vllm (to be installed beside)
        tensor_parallel: ranks that hold one copy of the model together, for models that do not fit one GPU
    """

    sequences: int = 100_000
    max_length: int = 1024
    strategy: str = "hybrid"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 64
    sequences_per_shard: int = 1024
    seed: int = 0
    engine: str = "torch"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        check_choice(self, strategy=sampling.STRATEGIES, engine=ENGINES)
        check_least(self, sequences=1, max_length=8, batch_size=1, sequences_per_shard=1, top_k=0, tensor_parallel=1)
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} is invalid: choose 0 to {2**31 - 1}.")
        if not self.temperature > 0:
            raise UserError(
                f"temperature={self.temperature} is invalid: choose a positive number, or strategy=top1 for the "
                "most likely tokens."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} is invalid: choose a probability above 0, or 1 for all tokens.")
        if self.strategy == "top1" and self.truncation != sampling.Truncation():
            raise UserError(
                "strategy=top1 draws nothing, so temperature, top_k and top_p mean nothing: leave them out, or give "
                "strategy=sample or hybrid."
            )

    @property
    def truncation(self) -> sampling.Truncation:
        return sampling.Truncation(self.temperature, self.top_k, self.top_p)

    @property
    def shards(self) -> int:
        return -(-self.sequences // self.sequences_per_shard)

    def shard_range(self, index: int) -> range:
        """Return the indices of the sequences in shard ``index``."""
        first = index * self.sequences_per_shard
        return range(first, min(first + self.sequences_per_shard, self.sequences))


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer that decoding treats specially.

    Args:
        start: ids that may start a sequence: all of the model's tokens but the special ones
        prefix: what comes before the start token: [BOS] or nothing
        stop: ids that end a sequence; none if the tokenizer has none: then its length ends it
    """

    start: list[int]
    prefix: list[int]
    stop: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, directory: str) -> "Vocabulary":
        """Return the vocabulary of the model in ``directory``, whose configuration names the tokens that end a
        sequence."""
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        stop = load_generation_config(directory).eos_token_id
        if stop is None or stop == []:
            stop = tokenizer.eos_token_id
        known = read_config(directory).vocab_size
        prefix = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        return cls(
            start=sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < known),
            prefix=prefix,
            stop=[stop] if isinstance(stop, int) else list(stop or []),
        )


@dataclass(frozen=True)
class Beginnings:
    """The beginnings of the sequences numbered ``indices``, the same for every engine.

    Args:
        prefix: the given tokens of each: BOS, where there is one, and the start token
        greedy: how many tokens after them are taken greedily
    """

    indices: range
    prefix: list[list[int]]
    greedy: list[int]

    @classmethod
    def of(cls, vocabulary: Vocabulary, config: GenerateConfig, indices: range) -> "Beginnings":
        starts = sampling.start_tokens(vocabulary.start, config.seed, indices.start, len(indices))
        greedy = sampling.greedy_tokens(
            config.strategy, config.seed, torch.arange(indices.start, indices.stop), config.max_length
        )
        return cls(indices, [[*vocabulary.prefix, start] for start in starts], greedy.tolist())

    def sequence(self, place: int, input_ids: list[int], surprisal: float, vocabulary: Vocabulary) -> Sequence:
        """Return the finished sequence at ``place`` among ``indices``."""
        given = self.prefix[place]
        greedy = min(self.greedy[place], len(input_ids) - len(given))
        return Sequence(
            input_ids=input_ids,
            start_token=given[-1],
            greedy_tokens=greedy,
            finish="eos" if input_ids[-1] in vocabulary.stop and len(input_ids) > len(given) else "length",
            surprisal=surprisal if len(input_ids) > len(given) + greedy else None,
        )


def write_sequences(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    config: GenerateConfig,
    indices: range,
    progress: Callable[[int, int], None] = lambda tokens, spared: None,
) -> list[Sequence]:
    """Decode the sequences numbered ``indices``, in order.

    The result depends on the arguments alone (on one type of machine): batches are formed the same way
    every time, and a random number belongs to a sequence and a position.

    Args:
        progress: called once a step with the numbers of tokens decoded in it, and of tokens that sequences
            which ended in it stayed short of max_length
    """
    begin = Beginnings.of(vocabulary, config, indices)
    numbers, greedy = torch.arange(indices.start, indices.stop), torch.tensor(begin.greedy)
    stop = torch.tensor(vocabulary.stop, dtype=torch.int64)
    first_choice = len(begin.prefix[0])  # the first position whose token is chosen, not given
    tokens = torch.zeros(len(indices), config.max_length, dtype=torch.int64)
    tokens[:, :first_choice] = torch.tensor(begin.prefix)
    lengths, surprisal = torch.zeros_like(numbers), torch.zeros(len(indices), dtype=torch.float64)

    # All of this is on the CPU: per step, two numbers per slot go to the device, and two come back.
    slots = min(config.batch_size, len(indices))
    decoder = Decoder(model, slots, config.max_length)
    row = torch.arange(slots)  # the sequence that each slot decodes
    position = torch.zeros_like(row)  # of the input token
    busy = torch.ones_like(row, dtype=torch.bool)
    next_row = slots

    while busy.any():
        at = position + 1
        is_greedy = at - first_choice < greedy[row]
        draw = sampling.uniform(config.seed, numbers[row], at)
        chosen, information = decoder.choose(tokens[row, position], position, is_greedy, draw, config.truncation)
        given = at < first_choice
        chosen = torch.where(given, tokens[row, at], chosen)
        tokens[row[busy], at[busy]] = chosen[busy]
        surprisal[row] += torch.where(given | is_greedy | ~busy, 0.0, information)
        ended = busy & ((torch.isin(chosen, stop) & ~given) | (at + 1 == config.max_length))
        lengths[row[ended]] = at[ended] + 1
        progress(int(busy.sum()), int((config.max_length - 1 - at[ended]).sum()))

        position = torch.where(busy & ~ended, at, 0)
        free = ended.nonzero()[:, 0]
        refilled = free[: len(indices) - next_row]
        row[refilled] = torch.arange(next_row, next_row + len(refilled))
        next_row += len(refilled)
        busy[free[len(refilled) :]] = False  # an idle slot decodes nothing of use, at position 0
        if 0 < busy.sum() <= len(busy) // 2:
            decoder.keep(busy.nonzero()[:, 0])
            row, position, busy = row[busy], position[busy], busy[busy]
    return [
        begin.sequence(place, ids[:length], information, vocabulary)
        for place, (ids, length, information) in enumerate(
            zip(tokens.tolist(), lengths.tolist(), surprisal.tolist(), strict=True)
        )
    ]
