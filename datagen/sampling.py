"""Choosing the next token: the paper's three strategies and dialogues, each token from its own random number.

``top1`` takes the most likely token, ``sample`` draws from the full softmax, ``hybrid`` takes the first 3 to 5 tokens
greedily and samples the rest (LLM-QAT, section 2.1; its Generated data 1, 2 and 3). ``chat`` draws every token of a
dialogue that is not given.

Random numbers are a function of (seed, sequence, position) only, so what a sequence draws does not depend on the batch
that it is decoded in.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

STRATEGIES = ("hybrid", "sample", "top1", "chat")

_GREEDY_CHOICES = (3, 4, 5)
_GREEDY, _SEED = 2**32 - 1, 2**32 - 2
"""Positions that no sequence reaches: the counters of draws that are made once per sequence."""

_BLOCK = 512
"""Sampling sums the distribution in blocks of this many tokens, and searches in one block only."""

_BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class Truncation:
    """The part of the distribution that is sampled from; by default all of it.

    Args:
        temperature: divides the logits
        top_k: only the k most likely tokens; 0 for all
        top_p: only the most likely tokens that together have this probability; 1 for all
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def uniform(seed: int, sequence: Tensor, position: Tensor | int) -> Tensor:
    """Return uniform fp64 numbers in [0, 1), one per sequence: a hash of (seed, sequence, position)."""
    bits = _mix(_mix(_mix(torch.full_like(sequence, seed)) + sequence) + position)
    return _shift(bits, 11).double() / 2**53


def seeds(seed: int, sequence: Tensor) -> list[int]:
    """Return a seed for each sequence of ``sequence`` [sequences], for engines that draw their own random numbers."""
    return (uniform(seed, sequence, _SEED) * 2**31).long().tolist()


def start_tokens(vocabulary: list[int], seed: int, first: int, count: int) -> list[int]:
    """Return the start tokens of sequences ``first`` to ``first + count``.

    Each pass over the vocabulary is a permutation of its own: every token starts one sequence before any
    starts two.
    """
    size = len(vocabulary)
    passes = range(first // size, (first + count - 1) // size + 1)
    orders = {i: torch.randperm(size, generator=torch.Generator().manual_seed(seed + i)).tolist() for i in passes}
    return [vocabulary[orders[i // size][i % size]] for i in range(first, first + count)]


def greedy_tokens(strategy: str, seed: int, sequence: Tensor, max_length: int) -> Tensor:
    """Return the number of tokens [sequences] after the start token that each sequence of ``sequence`` [sequences]
    takes greedily, if it is no dialogue."""
    if strategy == "top1":
        return torch.full_like(sequence, max_length)
    if strategy == "sample":
        return torch.zeros_like(sequence)
    choice = (uniform(seed, sequence, _GREEDY) * len(_GREEDY_CHOICES)).long()
    return torch.tensor(_GREEDY_CHOICES, device=sequence.device)[choice]


def choose(
    logits: Tensor, greedy: Tensor, draw: Tensor, truncation: Truncation = Truncation()
) -> tuple[Tensor, Tensor]:
    """Choose the next token of each row of fp32 logits [rows, vocabulary]; return it and its -log probability in nats.

    Args:
        greedy: [rows], True where the most likely token is taken
        draw: [rows], fp64 in [0, 1): where the softmax's cumulative distribution passes it, a token is sampled
        truncation: truncation of the distribution that is sampled from, and whose probabilities are reported
    """
    logits = _truncated(logits, truncation)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(-1).double()
    cumulative = sums.cumsum(-1)
    # The total is 1 only up to rounding: scaling the draw by it keeps the target below the last entry.
    target = draw[:, None] * cumulative[:, -1:]
    # NaN never passes the target: the clamps keep the indices valid, and the surprisal is NaN, which tells the caller.
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=sums.shape[1] - 1)
    before = (cumulative - sums).gather(1, block)
    inside = blocks.take_along_dim(block[:, :, None], 1)[:, 0].double().cumsum(-1)
    share = ((target - before) / sums.gather(1, block)).clamp(0, _BELOW_ONE)
    chosen = block * _BLOCK + torch.searchsorted(inside, share * inside[:, -1:], right=True)
    chosen = chosen.clamp(max=logits.shape[1] - 1)
    if greedy.is_cuda or greedy.any():  # to look at a GPU's is to wait for it, and cannot be captured as a graph
        chosen = torch.where(greedy[:, None], logits.argmax(-1, keepdim=True), chosen)
    surprisal = cumulative[:, -1:].log() - weights.gather(1, chosen).double().log()
    return chosen[:, 0], surprisal[:, 0]


def _truncated(logits: Tensor, truncation: Truncation) -> Tensor:
    """Return the logits divided by the temperature, with -inf for the tokens that are excluded."""
    if truncation.temperature != 1:
        logits = logits / truncation.temperature
    if 0 < truncation.top_k < logits.shape[-1]:
        least = logits.topk(truncation.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if truncation.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1, dtype=torch.float64)
        surplus = probabilities.cumsum(-1) - probabilities >= truncation.top_p  # the tokens before it suffice
        logits = logits.masked_fill(surplus.gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def _mix(x: Tensor) -> Tensor:
    """Apply the splitmix64 finalizer in int64 (wrapping) arithmetic: a bijection that scatters its input."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right logically, filling with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
