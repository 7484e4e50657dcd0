"""Intervals and tests that every task shares, over independent units: recordings, pairs of files, sequences; never parts of one of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent `values` [N], N of 1 or more; the same seed gives the same interval.

    Values that depend on one another, as windows of one recording do, are averaged first: one value for each independent unit.

    Args:
        weights: [N] how much each unit weighs in the mean, such as the number of questions of a dialogue; all alike where None.
    """
    sample = np.asarray(values, dtype=np.float64)  # [N]
    if sample.size == 1:  # which scipy refuses
        return float(sample[0]), float(sample[0])
    # as many resamples at a time as fit in a few megabytes: N may be 40,000 pairs
    options = {"n_resamples": resamples, "batch": max(1, 2**20 // sample.size), "confidence_level": level, "method": "percentile"}
    if weights is None:
        found = stats.bootstrap((sample,), np.mean, rng=np.random.default_rng(seed), **options)
    else:
        found = stats.bootstrap((sample, np.asarray(weights)), _weighted, paired=True, rng=np.random.default_rng(seed), **options)
    interval = found.confidence_interval
    return float(interval.low), float(interval.high)


def _weighted(values: np.ndarray, weights: np.ndarray, axis: int = -1) -> np.ndarray:
    mean: np.ndarray = (values * weights).sum(axis) / weights.sum(axis)
    return mean


def paired_test(
    differences: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 20000
) -> dict[str, float | int | list[float] | None]:
    """Mean of independent paired `differences` [N], finite, its bootstrap interval, and the two-sided p value of a sign-flip test.

    Every sign pattern is tried when there are no more than `resamples`, else that many random ones, with p never 0. With fewer than 2
    pairs there is no test: p and the interval are None.
    """
    sample = np.asarray(differences, dtype=np.float64)  # [N]
    mean, pairs = float(sample.mean()), int(sample.size)
    if pairs < 2:
        return {"mean": mean, "interval": None, "p": None, "pairs": pairs}
    options = {"permutation_type": "samples", "n_resamples": resamples, "batch": max(1, 2**20 // pairs)}
    test = stats.permutation_test((sample,), np.mean, rng=np.random.default_rng(seed), **options)
    return {"mean": mean, "interval": list(bootstrap_interval(sample, seed)), "p": float(test.pvalue), "pairs": pairs}
