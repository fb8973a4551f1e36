"""The drill in its short form; ``python tests/drill.py --kills 20`` is the long one."""

import drill


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path):
    assert drill.run(drill.Drill(kills=2, seed=3), tmp_path) == 0
