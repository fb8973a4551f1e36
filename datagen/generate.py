"""The teacher writes sequences: batched decoding over a static KV cache whose slots are refilled.

A sequence starts from one token, or from the beginning of a dialogue, which is given. There is no prefill: all slots
decode one token a step, each at its own position, also where the token is given; and a slot whose sequence ends takes
the next sequence at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from datagen import sampling
from datagen.decoder import Decoder
from datagen.dialogues import Dialogues
from qat.data.shards import Sequence
from qat.runtime.errors import UserError, check_least, check_one_of
from qat.runtime.settings import LATER, recorded
from qat.store.model_folder import read_config
from qat.store.models import load_generation_config, special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

ENGINES = ("torch", "vllm")

_NOT_OF_TEXT = ("teacher_cache",)
"""Settings that change nothing in the shards."""


Watch = Callable[[Tensor, Tensor, Tensor], None]
"""Sees what the model predicts: logits [some, vocabulary] of the next tokens of some sequences, the places [some] of
these among all that are written, and the positions [some] of their last tokens."""


@dataclass(frozen=True)
class GenerateConfig:
    """The settings of the text that the teacher writes.

    Args:
        sequences: how many sequences in all (the paper: 100,000)
        max_length: longest sequence, in tokens, start token included
        strategy: hybrid (first 3 to 5 tokens greedy, the rest sampled), sample, top1, or chat (dialogues by the
            tokenizer's chat template: the model writes the user's turns and the answers, all sampled)
        chat_share: with chat, the share of the sequences that are dialogues; the rest use hybrid
        turns: with chat, questions and answers in a dialogue
        system: with chat, a system prompt; by default the template's own, or none
        temperature: sampling temperature
        top_k: sample from the k most likely tokens only; 0 samples from all
        top_p: sample only from the most likely tokens that together have this probability; 1 samples from all
        batch_size: sequences decoded in parallel
        sequences_per_shard: sequences per shard file; a restart redoes unfinished shards
        seed: seed for start tokens and sampling
        engine: torch (ours) or vllm (install it in its own environment)
        tensor_parallel: ranks that share one copy of the model, for models larger than one GPU
        teacher_cache: how many of the most likely tokens of every position to keep (6 bytes each) in the folder
            teacher_cache of the output, from which launch/train.py trains without a teacher; 0 for none
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
    chat_share: float = field(default=1.0, metadata=LATER)
    turns: int = field(default=1, metadata=LATER)
    system: str = field(default="", metadata=LATER)
    teacher_cache: int = 0

    def __post_init__(self) -> None:
        check_one_of(self, strategy=sampling.STRATEGIES, engine=ENGINES)
        check_least(self, sequences=1, max_length=8, batch_size=1, sequences_per_shard=1, top_k=0, tensor_parallel=1)
        check_least(self, turns=1, teacher_cache=0)
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
                "strategy=top1 does not sample, so temperature, top_k and top_p do not apply: leave them out, or give "
                "strategy=sample or hybrid."
            )
        if not 0 < self.chat_share <= 1:
            raise UserError(
                f"chat_share={self.chat_share} is invalid: choose a share above 0, or 1 for dialogues only."
            )
        if self.strategy != "chat" and (self.chat_share, self.turns, self.system) != (1, 1, ""):
            raise UserError(
                f"strategy={self.strategy} writes no dialogues, so chat_share, turns and system do not apply: "
                "leave them out, or give strategy=chat."
            )
        if self.engine == "vllm" and (self.strategy == "chat" or self.teacher_cache):
            raise UserError(
                "engine=vllm writes neither dialogues (strategy=chat) nor a teacher_cache: give engine=torch."
            )

    def record(self) -> dict[str, Any]:
        """Return the settings that make the shards: the later ones only if they are not the default."""
        return {name: value for name, value in recorded(self).items() if name not in _NOT_OF_TEXT}

    @property
    def truncation(self) -> sampling.Truncation:
        return sampling.Truncation(self.temperature, self.top_k, self.top_p)

    def dialogues_before(self, index: int) -> int:
        """Return how many of the sequences before ``index`` are dialogues; they are spread evenly."""
        return math.floor(index * self.chat_share) if self.strategy == "chat" else 0

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
        prefix: tokens before the start token: [BOS] or none
        stop: ids that end a sequence; none if the tokenizer has none: then its length ends it
    """

    start: list[int]
    prefix: list[int]
    stop: list[int]

    @classmethod
    def of(cls, tokenizer: "Tokenizer", directory: str) -> "Vocabulary":
        """Return the vocabulary of the model in ``directory``, whose configuration names the tokens that end a
        sequence."""
        stop = load_generation_config(directory).eos_token_id
        if stop is None:
            stop = tokenizer.eos_token_id
        known = read_config(directory).vocab_size
        prefix = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        return cls(
            start=sorted(i for i in set(tokenizer.get_vocab().values()) - special_ids(tokenizer) if i < known),
            prefix=prefix,
            stop=[stop] if isinstance(stop, int) else list(stop or []),
        )


@dataclass(frozen=True)
class Beginnings:
    """The beginnings of the sequences numbered ``indices``, the same for every engine.

    Args:
        prefix: the given tokens of each: BOS, where there is one, and the start token; or a dialogue's opening
        greedy: number of tokens after them that are taken greedily
        between: the given tokens after each turn but the last; None for a sequence that is not a dialogue
    """

    indices: range
    prefix: list[list[int]]
    greedy: list[int]
    between: list[list[list[int]] | None]

    @classmethod
    def of(
        cls, vocabulary: Vocabulary, config: GenerateConfig, indices: range, dialogues: Dialogues | None = None
    ) -> "Beginnings":
        """``dialogues`` are needed for strategy=chat. Texts and dialogues are numbered apart."""
        before = [config.dialogues_before(index) for index in (*indices, indices.stop)]
        is_dialogue = [after > number for number, after in pairwise(before)]
        count = before[-1] - before[0]
        starts = iter(
            sampling.start_tokens(vocabulary.start, config.seed, indices.start - before[0], len(indices) - count)
        )
        openings = iter(dialogues.begin(config.seed, before[0], count) if dialogues else [])
        greedy = sampling.greedy_tokens(
            config.strategy, config.seed, torch.arange(indices.start, indices.stop), config.max_length
        )
        return cls(
            indices,
            prefix=[next(openings) if chats else [*vocabulary.prefix, next(starts)] for chats in is_dialogue],
            greedy=greedy.where(~torch.tensor(is_dialogue), 0).tolist(),
            between=[dialogues.between if dialogues and chats else None for chats in is_dialogue],
        )

    def sequence(
        self, place: int, input_ids: list[int], surprisal: float, ended: bool, chosen: list[bool] | None = None
    ) -> Sequence:
        """Return the finished sequence at ``place`` among ``indices``.

        Args:
            ended: whether a token that ends a text ended it
            chosen: of a dialogue, which tokens the model chose
        """
        given, is_dialogue = self.prefix[place], self.between[place] is not None
        greedy = min(self.greedy[place], len(input_ids) - len(given))
        sampled = any(chosen or ()) if is_dialogue else len(input_ids) > len(given) + greedy
        return Sequence(
            input_ids=input_ids,
            start_token=None if is_dialogue else given[-1],
            greedy_tokens=greedy,
            finish="eos" if ended else "length",
            surprisal=surprisal if sampled else None,
            chosen=chosen if is_dialogue else None,
        )


class _Writing:
    """The tokens of sequences while they are written, [sequences, max_length], and how far each has come.

    Attributes:
        until: [sequences], the first position of the present turn, whose token is chosen, not given
    """

    def __init__(self, begin: Beginnings, max_length: int, stop: list[int]):
        self.tokens = torch.zeros(len(begin.prefix), max_length, dtype=torch.int64)
        self.until = torch.zeros(len(begin.prefix), dtype=torch.int64)
        self._stop = torch.tensor(stop, dtype=torch.int64)
        self._ending = torch.full_like(self.until, -1)  # the token that ends the present turn, besides ``_stop``
        self._spans: list[list[range]] = [[] for _ in begin.prefix]  # the positions that are given
        self._between = [between or [] for between in begin.between]
        self._has_dialogues = any(self._between)
        for place, prefix in enumerate(begin.prefix):
            self._give(place, 0, prefix)

    def put(self, row: Tensor, at: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Put the chosen tokens of some sequences at their positions, unless tokens are given there; if one ends a turn
        and another turn follows, put the given tokens between the two from its position on.

        Args:
            row, at, chosen: [some]; a sequence occurs once

        Returns which sequences end, and for which the token is given, each [some].
        """
        is_given = at < self.until[row]
        chosen = torch.where(is_given, self.tokens[row, at], chosen)
        self.tokens[row, at] = chosen
        over = torch.isin(chosen, self._stop)
        if not self._has_dialogues:
            return over & ~is_given, is_given
        over = (over | (chosen == self._ending[row])) & ~is_given
        for slot in over.nonzero()[:, 0].tolist():
            place, position = int(row[slot]), int(at[slot])
            if following := self._between[place][len(self._spans[place]) - 1 :]:
                by_itself = int(chosen[slot]) == following[0][0]
                self._give(place, position, following[0], chosen=by_itself)
                is_given[slot], over[slot] = not by_itself, False
        return over, is_given

    def chosen(self, place: int, length: int) -> list[bool]:
        """Return which of the first ``length`` tokens of a sequence the model chose."""
        marks = [True] * length
        for span in self._spans[place]:
            marks[span.start : span.stop] = [False] * len(span)
        return marks[:length]

    def _give(self, place: int, position: int, text: list[int], chosen: bool = False) -> None:
        """Put given tokens at ``position`` and after it, as far as there is room. The first counts as the model's if it
        has ``chosen`` it."""
        text = text[: self.tokens.shape[1] - position]
        self.tokens[place, position : position + len(text)] = torch.tensor(text)
        self.until[place] = position + len(text)
        following = self._between[place][len(self._spans[place]) :]
        self._ending[place] = following[0][0] if following else -1
        self._spans[place].append(range(position + chosen, position + len(text)))


def write_sequences(
    model: "PreTrainedModel",
    vocabulary: Vocabulary,
    config: GenerateConfig,
    indices: range,
    progress: Callable[[int, int], None] = lambda tokens, spared: None,
    dialogues: Dialogues | None = None,
    watch: Watch | None = None,
) -> list[Sequence]:
    """Decode the sequences numbered ``indices``, in order.

    The result depends on the arguments alone (on one type of machine): batches are formed the same way
    every time, and a random number belongs to a sequence and a position.

    Args:
        progress: called once a step with the number of tokens decoded in it, and the number that the sequences which
            ended in it fell short of max_length
        dialogues: the given texts of dialogues, for strategy=chat
        watch: called once a step
    """
    begin = Beginnings.of(vocabulary, config, indices, dialogues)
    numbers, greedy = torch.arange(indices.start, indices.stop), torch.tensor(begin.greedy)
    text = _Writing(begin, config.max_length, vocabulary.stop)
    lengths, surprisal = torch.zeros_like(numbers), torch.zeros(len(indices), dtype=torch.float64)
    has_ended = torch.zeros(len(indices), dtype=torch.bool)

    # All of this is on the CPU.
    slots = min(config.batch_size, len(indices))
    decoder = Decoder(model, slots, config.max_length, config.truncation)
    row = torch.arange(slots)  # the sequence that each slot decodes
    position = torch.zeros_like(row)  # of the input token
    busy = torch.ones_like(row, dtype=torch.bool)
    next_row = slots

    while busy.any():
        at = position + 1
        is_greedy = at - text.until[row] < greedy[row]
        draw = sampling.uniform(config.seed, numbers[row], at)
        chosen, information, logits = decoder.step(text.tokens[row, position], position, is_greedy, draw)
        active = busy.nonzero()[:, 0]
        rows = row[active]
        if information[active].isnan().any():
            raise UserError(
                "The model predicts NaN: its weights are damaged, or its activations overflow in "
                f"{str(model.dtype).removeprefix('torch.')}. Give another model."
            )
        if watch:
            watch(logits[active.to(logits.device)], rows, position[active])
        has_ended[rows], is_given = text.put(rows, at[active], chosen[active])
        surprisal[rows] += torch.where(is_greedy[active] | is_given, 0.0, information[active])
        ended = busy & (has_ended[row] | (at + 1 == config.max_length))
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
        begin.sequence(place, ids[:length], information, ended, text.chosen(place, length))
        for place, (ids, length, information, ended) in enumerate(
            zip(text.tokens.tolist(), lengths.tolist(), surprisal.tolist(), has_ended.tolist(), strict=True)
        )
    ]
