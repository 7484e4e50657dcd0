"""Intervals and tests that every task shares: seeded bootstrap means and a paired sign-flip test."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of independent `values` [N]; the same seed gives the same interval."""
    sample = np.asarray(values, dtype=np.float64)  # [N]
    if sample.size == 0:
        raise ValueError("bootstrap_interval: values is empty; there is nothing to average")
    generator = np.random.default_rng(seed)
    # as many resamples at a time as fit in a few megabytes: N may be 40,000 pairs
    rows = max(1, 2**20 // sample.size)
    means = [
        sample[generator.integers(0, sample.size, (min(rows, resamples - start), sample.size))].mean(1)
        for start in range(0, resamples, rows)
    ]
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail])
    return float(low), float(high)


def paired_test(
    differences: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 20000
) -> dict[str, float | int | list[float] | None]:
    """Mean of paired `differences` [N], its bootstrap interval, and the two-sided p value of a sign-flip test.

    Every sign pattern is tried when N <= 12, else `resamples` random ones (with the +1 correction, so p is never 0).
    With fewer than 2 pairs there is no test: p and the interval are None.
    """
    sample = np.asarray(differences, dtype=np.float64)  # [N]
    if sample.size == 0 or not np.isfinite(sample).all():
        raise ValueError(f"paired_test: differences must be finite and not empty, got {sample.tolist()[:5]}")
    mean = float(sample.mean())
    if sample.size < 2:
        return {"mean": mean, "interval": None, "p": None, "pairs": int(sample.size)}
    if sample.size <= 12:
        patterns = np.array(np.meshgrid(*[[-1.0, 1.0]] * sample.size)).reshape(sample.size, -1).T  # [2^N, N]
        extra = 0
    else:
        patterns = np.random.default_rng(seed).choice([-1.0, 1.0], (resamples, sample.size))
        extra = 1
    flipped = np.abs((patterns * sample).mean(1))
    hits = int((flipped >= abs(mean) * (1 - 1e-12)).sum())
    p = (hits + extra) / (len(patterns) + extra)
    return {"mean": mean, "interval": list(bootstrap_interval(sample, seed)), "p": float(p), "pairs": int(sample.size)}
