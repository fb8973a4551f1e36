"""How the next token is chosen: the paper's three strategies, each token from its own random number.

``top1`` takes the most likely token, ``sample`` draws from the full softmax, ``hybrid`` takes the first
3 to 5 tokens greedily and samples the rest (LLM-QAT, section 2.1; its Generated data 1, 2 and 3).

Random numbers are a function of (seed, sequence, position) and of nothing else, so what a sequence
draws does not depend on the batch it is decoded in.
"""

import torch
from torch import Tensor

STRATEGIES = ("hybrid", "sample", "top1")

_GREEDY_CHOICES = (3, 4, 5)
_GREEDY = 2**32 - 1
"""A position that no sequence reaches: the counter of the draw that is made once."""


def uniform(seed: int, sequence: Tensor, position: Tensor | int) -> Tensor:
    """Uniform fp64 numbers in [0, 1), one per sequence: a hash of (seed, sequence, position)."""
    bits = _mix(_mix(_mix(torch.full_like(sequence, seed)) + sequence) + position)
    return _shift(bits, 11).double() / 2**53


def start_tokens(vocabulary: list[int], seed: int, first: int, count: int) -> list[int]:
    """The start tokens of sequences ``first`` to ``first + count``.

    Each pass over the vocabulary is a permutation of its own: every token starts one sequence before any
    starts two.
    """
    size = len(vocabulary)
    passes = range(first // size, (first + count - 1) // size + 1)
    orders = {i: torch.randperm(size, generator=torch.Generator().manual_seed(seed + i)).tolist() for i in passes}
    return [vocabulary[orders[i // size][i % size]] for i in range(first, first + count)]


def greedy_tokens(strategy: str, seed: int, sequence: Tensor, max_length: int) -> Tensor:
    """How many tokens after the start token each sequence takes greedily."""
    if strategy == "top1":
        return torch.full_like(sequence, max_length)
    if strategy == "sample":
        return torch.zeros_like(sequence)
    choice = (uniform(seed, sequence, _GREEDY) * len(_GREEDY_CHOICES)).long()
    return torch.tensor(_GREEDY_CHOICES, device=sequence.device)[choice]


def choose(logits: Tensor, greedy: Tensor, draw: Tensor) -> Tensor:
    """The next token of each row of logits [rows, vocabulary].

    Args:
        greedy: [rows], True where the most likely token is taken
        draw: [rows], fp64 in [0, 1): where the softmax's cumulative distribution passes it, a token is sampled
    """
    cumulative = torch.softmax(logits, -1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
    # The sum is 1 only up to rounding: scaling the draw keeps it below the last entry.
    target = draw[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return torch.where(greedy, logits.argmax(-1), sampled)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer on int64 (wrapping) arithmetic: a bijection that scatters its input."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
