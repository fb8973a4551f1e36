import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from datagen import sampling

SEEDS = st.integers(0, 2**31 - 1)


@given(SEEDS, st.lists(st.integers(0, 10**6), min_size=1, max_size=8), st.integers(0, 4096))
def test_draws_depend_on_seed_sequence_and_position_alone(seed, sequences, position):
    together = sampling.uniform(seed, torch.tensor(sequences), torch.full((len(sequences),), position))
    alone = [sampling.uniform(seed, torch.tensor([s]), position).item() for s in sequences]
    assert together.tolist() == alone
    assert ((together >= 0) & (together < 1)).all()


def test_no_two_seeds_sequences_or_positions_share_a_draw():
    sequences, positions = torch.arange(40)[:, None].expand(40, 30), torch.arange(30)[None]
    draws = torch.stack([sampling.uniform(seed, sequences, positions) for seed in range(5)])
    assert len(draws.unique()) == draws.numel()


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
    chosen, surprisal = sampling.choose(logits.expand(40000, 4), torch.tensor(False).expand(40000), draws)
    frequencies = chosen.bincount(minlength=4) / 40000
    torch.testing.assert_close(frequencies, logits.softmax(-1), rtol=0, atol=0.01)
    torch.testing.assert_close(surprisal.float(), -logits.log_softmax(-1)[chosen])


def test_extreme_draws_stay_inside_the_vocabulary():
    for size in (1000, 1024):
        logits = torch.randn(2, size)
        draws = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert sampling.choose(logits, torch.tensor([False, False]), draws)[0].tolist() == [0, size - 1]
        assert sampling.choose(logits, torch.tensor([True, True]), draws)[0].tolist() == logits.argmax(-1).tolist()


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=1100)
TRUNCATIONS = st.builds(
    sampling.Truncation,
    temperature=st.floats(0.1, 4),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.05, 1, exclude_min=True),
)


@given(LOGITS, TRUNCATIONS, st.floats(0, 1, exclude_max=True))
@example([0.0, 1.1754943508222875e-38], sampling.Truncation(top_p=0.25), 0.0)
def test_a_draw_lands_where_the_truncated_distribution_passes_it(logits, truncation, draw):
    """The definition in plain Python and fp64; what is nearer to a border than fp32 can tell is left out."""
    row = torch.tensor([logits], dtype=torch.float32)
    scaled = (row[0] / truncation.temperature).double()
    if truncation.top_k:
        scaled[scaled < sorted(scaled.tolist())[-truncation.top_k :][0]] = -torch.inf
    probabilities = scaled.softmax(-1).tolist()
    mass, kept = 0.0, [0.0] * len(logits)
    order = (-scaled).tolist()  # of the logits: two that differ may have the same probability
    for token in sorted(range(len(logits)), key=order.__getitem__):
        if truncation.top_p < 1:
            assume(abs(mass - truncation.top_p) > 1e-4)
        if mass < truncation.top_p:
            kept[token] = probabilities[token]
        mass += probabilities[token]
    expected = torch.tensor(kept, dtype=torch.float64) / sum(kept)

    draws = torch.tensor([draw], dtype=torch.float64)
    token, surprisal = sampling.choose(row, torch.tensor([False]), draws, truncation)
    end = expected.cumsum(0)[token]
    assert end - expected[token] - 1e-5 <= draw <= end + 1e-5
    assert expected[token] > 0
    torch.testing.assert_close(surprisal, -expected[token].log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [100, 512, 1300])
def test_nan_is_reported_and_breaks_no_index(size):
    """An index out of range would end a GPU's process with an error that names neither the model nor the step."""
    logits = torch.full((2, size), torch.nan)
    chosen, surprisal = sampling.choose(logits, torch.tensor([False, True]), torch.tensor([0.3, 0.9]).double())
    assert ((chosen >= 0) & (chosen < size)).all()
    assert surprisal.isnan().all()
