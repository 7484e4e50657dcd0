"""How many callers a machine holds: the memory of a row, the time of a tick, and the most rows whose ticks stay within a budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..cache_moshi_ttt import MoshiTTTCache
from ..errors_moshi_ttt import MoshiTTTError
from .session import MoshiTTTSession

logger = logging.getLogger(__name__)


def full_session(model: Any, processor: Any, rows: int) -> MoshiTTTSession:
    """A session that holds all the memory it will ever need, so that what does not fit fails now."""
    session = MoshiTTTSession(model, processor, rows, processor.sampling_rate)
    session.stream.past_key_values.fill(model)
    return session


def row_bytes(session: MoshiTTTSession) -> int:
    """Memory of one row: what the model's cache and the codec's streams hold of it."""
    audio = sum(x.numel() * x.element_size() for x in session.audio.state_dict().values())
    return audio // session.batch_size + cache_bytes(session.stream.past_key_values)


def cache_bytes(cache: MoshiTTTCache) -> int:
    """Of one row: keys and values, fast weights and the open mini-batch."""
    tensors = [x for pair in cache.state.key_values if pair is not None for x in pair]
    tensors += [x for ttt in cache.state.ttt_states if ttt is not None for x in ttt.tensors().values()]
    return sum(x.numel() * x.element_size() for x in tensors) // cache.batch_size


def quantile(times: Sequence[float], share: float) -> float:
    """0 where there is none."""
    return float(np.quantile(times, share)) if times else 0.0


def tick_times(model: Any, processor: Any, rows: int, ticks: int = 30) -> list[float]:
    """Seconds of each tick in which all of so many rows talk."""
    session, generator, times = full_session(model, processor, rows), torch.Generator().manual_seed(0), []
    for _ in range(ticks + 3):
        pcm = 0.1 * torch.randn(rows, processor.frame_size, generator=generator)
        begin = time.perf_counter()
        session.step(pcm)
        times.append(time.perf_counter() - begin)
    return times[3:]


def measured_rows(model: Any, processor: Any, budget: float, most: int = 256) -> int:
    """The most callers whose ticks stay within `budget` seconds (p99), by measuring: doubled while it holds, then halved in between.

    Raises:
        ValueError: not even one does.
    """

    def holds(rows: int) -> bool:
        try:
            times = tick_times(model, processor, rows)
        except torch.OutOfMemoryError:
            logger.info("warm-up", extra={"rows": rows, "fits": False})
            return False
        logger.info("warm-up", extra={"rows": rows, "tick": round(quantile(times, 0.99), 4)})
        return quantile(times, 0.99) <= budget

    if not holds(1):
        raise MoshiTTTError(
            f"this model does not fit, or takes longer than {budget * 1e3:.0f} ms for 80 ms of one caller; take a faster device or a smaller "
            "model (`moshi-ttt serve --rows 1` serves it all the same)."
        )
    good, bad = 1, 2
    while bad <= most and holds(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(good // 8, 1):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if middle <= most and holds(middle) else (good, middle)
    return min(good, most)
