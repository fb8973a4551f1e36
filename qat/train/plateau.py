"""A stopping rule: a run at constant learning rate continues while its KL falls significantly.

After every ``stop_when_flat`` steps, the KL of these steps is regressed on the step. It falls if the slope is below
zero by more than two of its standard errors; else it is flat, the learning rate decays, and the run ends. Each step is
judged once, so that chance has few opportunities to end a run: where the KL falls by four standard errors, one in 40
for each judgement. With noise of s nats from step to step, the least fall over n steps that counts is 7 s / sqrt(n)
nats.
"""

from collections.abc import Sequence
from math import sqrt

from qat.train.checkpoint import TrainState

FEWEST = 10
"""Least number of steps that can be judged."""

_SURE = 2.0
"""Number of standard errors by which the slope must be below zero."""


def found(state: TrainState, steps: int) -> bool:
    """Judge the KL of the steps since the last judgement, if they are ``steps``: a run that continued from a checkpoint
    may have taken fewer; return whether it was found flat."""
    recent, state.recent = state.recent, []
    if len(recent) == steps and is_flat(recent):
        state.flat_at = state.step
    return bool(state.flat_at)


def is_flat(values: Sequence[float]) -> bool:
    """Return whether values, one for each step, fall by no more than chance."""
    slope, stderr = slope_of(values)
    return slope >= -_SURE * stderr


def slope_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of the regression of three or more values on their place, and its standard error."""
    n = len(values)
    places = [place - (n - 1) / 2 for place in range(n)]
    mean, spread = sum(values) / n, sum(place**2 for place in places)
    slope = sum(place * (value - mean) for place, value in zip(places, values, strict=True)) / spread
    left = sum((value - mean - slope * place) ** 2 for place, value in zip(places, values, strict=True))
    return slope, sqrt(left / (n - 2) / spread)
