from pathlib import Path

import pytest

from qat.checkpoint import _superseded


@pytest.mark.parametrize(
    ("there", "newest", "keep", "deleted"),
    [
        ([5, 10, 15], 15, 2, [5]),
        ([5, 10, 15], 15, 1, [5, 10]),
        ([10, 15, 20], 15, 1, [20, 10]),  # 20 is what a killed run left behind: it must not count
        ([5], 5, 2, []),
    ],
)
def test_what_latest_names_is_never_deleted(there, newest, keep, deleted):
    paths = {step: Path(f"step-{step:06d}") for step in there}
    assert _superseded(list(paths.values()), paths[newest], keep) == [paths[step] for step in deleted]
