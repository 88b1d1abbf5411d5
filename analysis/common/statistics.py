"""Means with bootstrap intervals, paired differences, areas under curves, rank correlation.

Intervals are 95% percentile bootstrap intervals over examples. The resamples depend on the seed and
the number of values only, so that differences of two methods on the same examples are paired.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lenslrp.errors import InputError

RESAMPLES = 10_000

Numbers = NDArray[np.float64]


def bootstrap(values: Numbers, seed: int) -> tuple[float, float, float]:
    """Mean of ``values`` [n] and its 95% percentile bootstrap interval.

    Raises:
        InputError: no values at all.
    """
    if len(values) == 0:
        raise InputError("no values to average: an interval needs at least one")
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def interval(values: Numbers, seed: int, sign: str = "") -> str:
    """`bootstrap` as text; ``sign="+"`` for differences."""
    mean, low, high = bootstrap(values, seed)
    return f"{mean:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def area(curve: Numbers, shares: Numbers | None = None) -> float:
    """Under a curve, by the trapezoid rule.

    Args:
        curve: [n] values.
        shares: [n] the position of each on the axis, from 0 to 1; equally spaced if not given.
    """
    if shares is None:
        shares = np.linspace(0, 1, len(curve))
    return float(np.trapezoid(curve, shares))


def spearman(a: Numbers, b: Numbers) -> float:
    """Rank correlation of two vectors [n], ties at their mean rank; NaN if one is constant."""
    ranks = np.stack([_ranks(a), _ranks(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.all() else float("nan")


def _ranks(values: Numbers) -> Numbers:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Numbers = last - (counts - 1) / 2
    return means[inverse]
