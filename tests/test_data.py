"""The order of the training sequences."""

import pytest

from qat.data.sequences import TrainingData


@pytest.fixture
def order(tiny_data, tokenizer):
    """The numbers of the sequences that samples ``first`` and on are, of a run with a seed."""

    def numbers(seed: int, first: int, count: int = 12) -> list[int]:
        data = TrainingData(tiny_data, tokenizer, seed)
        return [data.sample(number).sequence for number in range(first, first + count)]

    return numbers


def test_every_pass_has_every_sequence_once_in_an_order_of_its_own(order):
    passes = [order(0, first) for first in (0, 12, 24)]
    assert all(sorted(numbers) == list(range(12)) for numbers in passes)
    assert len({tuple(numbers) for numbers in [*passes, order(7, 0), list(range(12))]}) == 5


def test_a_sample_is_the_same_whenever_it_is_asked_for(tiny_data, tokenizer, order):
    data = TrainingData(tiny_data, tokenizer, 0)
    backwards = [data.sample(number).sequence for number in reversed(range(36))]
    assert backwards[::-1] == order(0, 0, 36)
    assert data.sample(17).input_ids.tolist() == data.sequence(order(0, 17, 1)[0]).input_ids.tolist()
