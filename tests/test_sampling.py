import torch
from hypothesis import given
from hypothesis import strategies as st

from datagen import sampling

SEEDS = st.integers(0, 2**31 - 1)


@given(SEEDS, st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(0, 4096))
def test_draws_depend_on_seed_sequence_and_position_alone(seed, sequences, position):
    together = sampling.uniform(seed, torch.tensor(sequences), torch.full((len(sequences),), position))
    alone = [sampling.uniform(seed, torch.tensor([s]), position).item() for s in sequences]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_draws_are_uniform_and_uncorrelated():
    sequences, positions = torch.arange(2000)[:, None], torch.arange(50)[None]
    draws = sampling.uniform(3, sequences.expand(2000, 50), positions)
    counts = torch.histc(draws.float(), 100, 0, 1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert 50 < chi_square < 160, "99 degrees of freedom: this far out once in ten thousand"
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.02


@given(SEEDS, st.integers(1, 30), st.integers(0, 50), st.integers(1, 50))
def test_every_token_starts_one_sequence_before_any_starts_two(seed, size, first, count):
    vocabulary = list(range(100, 100 + size))
    starts = sampling.start_tokens(vocabulary, seed, 0, first + count)
    for i in range(0, len(starts) - size + 1, size):
        assert sorted(starts[i : i + size]) == vocabulary
    assert sampling.start_tokens(vocabulary, seed, first, count) == starts[first:]


def test_hybrid_is_greedy_for_three_to_five_tokens():
    counts = sampling.greedy_tokens("hybrid", 0, torch.arange(3000), 100).bincount()
    assert counts[:3].tolist() == [0, 0, 0]
    assert (counts[3:] - 1000).abs().max() < 120
    assert len(counts) == 6


def test_sampling_follows_the_softmax():
    logits = torch.tensor([2.0, -1.0, 0.5, -30.0])
    draws = sampling.uniform(1, torch.arange(40000), 0)
    chosen = sampling.choose(logits.expand(40000, 4), torch.tensor(False).expand(40000), draws)
    frequencies = chosen.bincount(minlength=4) / 40000
    torch.testing.assert_close(frequencies, logits.softmax(-1), rtol=0, atol=0.01)


def test_extreme_draws_stay_inside_the_vocabulary():
    logits = torch.randn(2, 1000)
    draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen = sampling.choose(logits, torch.tensor([False, False]), draws)
    assert chosen.tolist() == [0, 999]
    assert sampling.choose(logits, torch.tensor([True, True]), draws).tolist() == logits.argmax(-1).tolist()
