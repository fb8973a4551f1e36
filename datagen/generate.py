"""The teacher writes sequences: batched decoding over a static KV cache whose slots are refilled.

Every sequence starts from one token, so there is no prefill: all slots decode one token a step, each at
its own position, and a slot whose sequence ends takes the next sequence at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from datagen import sampling
from datagen.shards import Sequence
from qat.errors import UserError

ATTENTION = "datagen_slots"
"""The name under which the decoder's attention is registered with transformers."""


@dataclass(frozen=True)
class GenerateConfig:
    """What the teacher writes.

    Args:
        sequences: how many sequences in all (the paper: 100,000)
        max_length: longest sequence, in tokens, start token included
        strategy: hybrid (first 3 to 5 tokens greedy, the rest sampled), sample or top1
        batch_size: sequences decoded at one time
        sequences_per_shard: size of a shard, the unit of work and of restart
        seed: of the start tokens and of the sampling
    """

    sequences: int = 100_000
    max_length: int = 1024
    strategy: str = "hybrid"
    batch_size: int = 64
    sequences_per_shard: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strategy not in sampling.STRATEGIES:
            raise UserError(f"strategy={self.strategy!r} is not possible: give {', '.join(sampling.STRATEGIES)}.")
        for name, least in {
            "sequences": 1,
            "max_length": 8,
            "batch_size": 1,
            "sequences_per_shard": 1,
        }.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} is not possible: give {least} or more.")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} is not possible: give 0 to {2**31 - 1}.")

    @property
    def shards(self) -> int:
        return -(-self.sequences // self.sequences_per_shard)

    def shard_range(self, index: int) -> range:
        """The sequences of shard ``index``."""
        first = index * self.sequences_per_shard
        return range(first, min(first + self.sequences_per_shard, self.sequences))


@dataclass(frozen=True)
class Vocabulary:
    """What decoding needs to know of a tokenizer.

    Args:
        start: ids that may start a sequence: all but the special tokens
        prefix: what comes before the start token: [BOS] or nothing
        stop: ids that end a sequence
    """

    start: list[int]
    prefix: list[int]
    stop: list[int]

    @classmethod
    def of(cls, tokenizer, model: PreTrainedModel) -> "Vocabulary":
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        stop = model.generation_config.eos_token_id
        prefix = [i for i in tokenizer("").input_ids if i == tokenizer.bos_token_id]
        return cls(
            start=sorted(set(tokenizer.get_vocab().values()) - special),
            prefix=prefix,
            stop=[stop] if isinstance(stop, int) else list(stop or [tokenizer.eos_token_id]),
        )


@torch.inference_mode()
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
    starts = sampling.start_tokens(vocabulary.start, config.seed, indices.start, len(indices))
    numbers = torch.arange(indices.start, indices.stop, device=model.device)
    greedy = sampling.greedy_tokens(config.strategy, config.seed, numbers, config.max_length)
    prefix = torch.tensor([[*vocabulary.prefix, start] for start in starts], device=model.device)
    tokens = prefix.new_zeros(len(indices), config.max_length)
    tokens[:, : prefix.shape[1]] = prefix
    stop = torch.tensor(vocabulary.stop, device=model.device)

    slots = min(config.batch_size, len(indices))
    decoder = _SlotDecoder(model, slots, config.max_length)
    row = torch.arange(slots, device=model.device)  # the sequence that each slot decodes
    position = torch.zeros_like(row)  # of the token that goes in
    lengths, next_row = [0] * len(indices), slots
    first_choice = prefix.shape[1]  # the first position that is chosen, not given

    while len(row):
        logits = decoder.step(tokens[row, position], position)
        chosen_at = position + 1
        chosen = sampling.choose(
            logits,
            greedy=chosen_at - first_choice < greedy[row],
            draw=sampling.uniform(config.seed, numbers[row], chosen_at),
        )
        chosen = torch.where(chosen_at < first_choice, tokens[row, chosen_at], chosen)
        tokens[row, chosen_at] = chosen
        ended = (torch.isin(chosen, stop) & (chosen_at >= first_choice)) | (chosen_at + 1 == config.max_length)
        position = chosen_at
        ended_slots = ended.nonzero()[:, 0].tolist()
        progress(len(row), sum(config.max_length - 1 - int(position[slot]) for slot in ended_slots))
        idle = []
        for slot in ended_slots:
            lengths[int(row[slot])] = int(position[slot]) + 1
            if next_row < len(indices):
                row[slot], position[slot] = next_row, 0
                next_row += 1
            else:
                idle.append(slot)
        if idle:
            busy = [slot for slot in range(len(row)) if slot not in set(idle)]
            row, position = row[busy], position[busy]
            decoder.keep(busy)
    return [
        Sequence(
            input_ids=ids[:length],
            start_token=start,
            greedy_tokens=min(int(k), length - first_choice),
            finish="eos" if ids[length - 1] in vocabulary.stop else "length",
        )
        for ids, length, start, k in zip(tokens.tolist(), lengths, starts, greedy, strict=True)
    ]


class _SlotDecoder:
    """One decoding step for all slots, over a static KV cache."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int):
        AttentionInterface.register(ATTENTION, _slot_attention)
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
        self.model = model
        self.columns = torch.arange(max_length, device=model.device)
        self.batch = _Batch(torch.empty(0), torch.empty(0), 0, torch.empty(0))
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (slots, config.num_key_value_heads, max_length, head_dim)
        self.layers = [_SlotLayer(shape, model, self.batch) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))

    def step(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Tokens [slots] at their positions [slots] -> fp32 logits [slots, vocabulary] of the next ones."""
        self.batch.rows = torch.arange(len(tokens), device=tokens.device)
        self.batch.position = position
        self.batch.columns = int(position.max()) + 1
        self.batch.mask = (self.columns[: self.batch.columns] <= position[:, None])[:, None, None]
        implementation = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION)
        try:
            output = self.model(
                input_ids=tokens[:, None],
                position_ids=position[:, None],
                past_key_values=self.cache,
                use_cache=True,
                slots=self.batch,
            )
        finally:
            self.model.set_attn_implementation(implementation)
        return output.logits[:, -1].float()

    def keep(self, slots: list[int]) -> None:
        """Drop all slots but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[slots], layer.values[slots]


@dataclass
class _Batch:
    """Where this step's tokens go, and what they see: shared by all layers."""

    rows: Tensor
    position: Tensor
    columns: int
    mask: Tensor


class _SlotLayer(CacheLayerMixin):
    """Keys and values [slots, kv_heads, max_length, head_dim] of one layer, written at each slot's position."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, ...], model: PreTrainedModel, batch: _Batch):
        super().__init__()
        self.batch = batch
        self.keys = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        at, columns = (self.batch.rows, slice(None), self.batch.position), self.batch.columns
        self.keys[at], self.values[at] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:, :, :columns], self.values[:, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.columns, 0

    def get_seq_length(self) -> int:
        return self.batch.columns

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _slot_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling: float, slots: _Batch, **kwargs
) -> tuple[Tensor, None]:
    """Attention of one token per slot. The query heads of a KV head stand as its rows, so nothing is repeated."""
    grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
    out = scaled_dot_product_attention(grouped, key, value, attn_mask=slots.mask, scale=scaling)
    return out.reshape(query.shape[0], 1, -1, query.shape[-1]), None
