"""Means with 95% percentile bootstrap intervals, as every benchmark here gives them.

The resamples depend on the seed and the number of values only, so that differences of two methods
on the same items are paired.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000


def bootstrap(values: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """Mean of `values` [n] and its 95% percentile bootstrap interval."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval(values: NDArray[np.float64], seed: int, sign: str = "") -> str:
    """`bootstrap` as text."""
    mean, low, high = bootstrap(values, seed)
    return f"{mean:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"
