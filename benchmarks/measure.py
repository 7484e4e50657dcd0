"""Time and peak memory of one piece of work on the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(*work: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.process_time) -> list[float]:
    """Median time of each piece of work. They take turns, so that whatever else the machine does falls on all of them alike.

    Processor time is the right clock for one thread; with more of them take `time.perf_counter`."""
    for piece in work:
        piece()
    times: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for piece, taken in zip(work, times):
            begin = clock()
            piece()
            taken.append(clock() - begin)
    return [statistics.median(taken) for taken in times]


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that torch's CPU allocator holds for this work at any moment, over what was there before it."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    results = run.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]" and e.device_type() == torch.profiler.DeviceType.CPU
    )
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


def fitted_line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line, and its R^2."""
    fit = statistics.linear_regression(x, y)
    return fit.slope, statistics.correlation(x, y) ** 2
