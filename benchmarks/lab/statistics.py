"""Means over seeds, with intervals."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t


class Mean(NamedTuple):
    value: float
    half: float
    """Half the width of the 95 % interval; nan of one value."""


def mean_of(values: Sequence[float]) -> Mean:
    """The mean over seeds with Student's 95 % interval, which takes seeds for independent and the spread
    over them for normal.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    n = len(values)
    if n == 1:
        return Mean(float(values[0]), float("nan"))
    error = float(np.std(values, ddof=1)) / n**0.5
    return Mean(float(np.mean(values)), float(t.ppf(0.975, n - 1)) * error)


def difference_of(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """Of ours - theirs, paired by seed. Raises ValueError: not as many values, or none."""
    return mean_of([a - b for a, b in zip(ours, theirs, strict=True)])
