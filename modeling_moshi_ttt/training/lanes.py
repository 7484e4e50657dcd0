"""Which window of which recording stands in which row of which step: pure arithmetic over lengths, the same on every rank.

Rows are those of the whole step, over all ranks and micro-batches; a rank takes its own slice. So nothing overlaps, nothing is lost, and
the order does not change when ranks are exchanged for accumulation. Everything that must be remembered is a few whole numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors_moshi_ttt import MoshiTTTError


@dataclass(frozen=True)
class Window:
    """Frames [start, start + frames) of a recording. reset: the row holds nothing of what comes before. last: the recording ends here.

    `recording` is -1, and `frames` 0, in a row that has run out of recordings.
    """

    recording: int
    start: int
    frames: int
    reset: bool
    last: bool


EMPTY = Window(-1, 0, 0, True, True)


class Plan(Protocol):
    """An endless or finite sequence of turns; each turn is one window for every row, or what else the plan's reader makes batches of."""

    def turn(self) -> Sequence[Any] | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WeightedOrder:
    """Draws items of several sources in exact proportion to their weights; within a source each item once an epoch, in a new order.

    Args:
        sizes: number of items of each source; items are numbered through, source after source.
        weights: how often each source is drawn, relative to the others.
        seed: of the order; None keeps the items in place.
        epochs: stop when every item was drawn this often; None goes on for ever (weights count then).
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int | None, epochs: int | None = None):
        if not sizes or min(sizes) < 1:
            raise MoshiTTTError(f"Every source must hold at least one recording; the sizes are {list(sizes)}.")
        if len(weights) != len(sizes) or min(weights) <= 0:
            raise MoshiTTTError(f"Every source needs a weight > 0; the weights are {list(weights)}.")
        self.sizes, self.seed, self.epochs = list(sizes), seed, epochs
        self.shares = [weight / sum(weights) for weight in weights]
        self.offsets = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self.drawn = [0] * len(self.sizes)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def draw(self) -> int | None:
        """The next item, or None at the end."""
        source = self._next_source()
        if source is None:
            return None
        epoch, place = divmod(self.drawn[source], self.sizes[source])
        self.drawn[source] += 1
        return self.offsets[source] + int(self._order(source, epoch)[place])

    def _next_source(self) -> int | None:
        if self.epochs is not None:
            left = [i for i, size in enumerate(self.sizes) if self.drawn[i] < size * self.epochs]
            return left[0] if left else None
        total = sum(self.drawn) + 1
        # the source that is furthest behind its share; no chance is involved, so nothing but the counts must be kept
        behind = [share * total - drawn for share, drawn in zip(self.shares, self.drawn)]
        return int(np.argmax(behind))

    def _order(self, source: int, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.sizes[source])
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            order = np.random.default_rng([self.seed, source, epoch]).permutation(self.sizes[source])
            known = self._orders[source] = (epoch, order)
        return known[1]


class Lanes:
    """Each row follows one recording window by window, then takes the next recording; `reset` marks exactly these changes.

    Args:
        lengths: frames of every recording.
        order: which recording comes next.
        rows: rows of a step over all ranks and micro-batches.
        window: frames of a window; a recording's last window may be shorter.
    """

    def __init__(self, lengths: Sequence[int], order: WeightedOrder, rows: int, window: int):
        if order.epochs is None and len(lengths) < rows:
            raise MoshiTTTError(
                f"There are {len(lengths)} recordings for {rows} lanes (batch_size x accumulation x processes), so one would stand "
                "in two lanes at once; add recordings, lower data.batch_size or data.accumulation, or set data.carry: none."
            )
        self.lengths, self.order, self.window = list(lengths), order, window
        self.current: list[int] = [-1] * rows
        self.start: list[int] = [0] * rows

    def turn(self) -> list[Window] | None:
        """One window for every row; None when the recordings are at an end."""
        windows = [self._advance(row) for row in range(len(self.current))]
        return None if all(window is EMPTY for window in windows) else windows

    def _advance(self, row: int) -> Window:
        if self.current[row] < 0:
            drawn = self.order.draw()
            if drawn is None:
                return EMPTY
            self.current[row], self.start[row] = drawn, 0
        recording, start = self.current[row], self.start[row]
        frames = min(self.window, self.lengths[recording] - start)
        last = start + frames >= self.lengths[recording]
        self.current[row], self.start[row] = (-1, 0) if last else (recording, start + frames)
        return Window(recording, start, frames, reset=start == 0, last=last)

    def state_dict(self) -> dict[str, Any]:
        """Whole numbers, ready for JSON."""
        return {"drawn": list(self.order.drawn), "current": list(self.current), "start": list(self.start)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError when it belongs to other data or another number of rows."""
        _check_state(self, state, len(self.current), len(self.order.drawn))
        for recording, start in zip(state["current"], state["start"]):
            # -1 is a row that takes its next recording; what a row stands in must still be there, and as long
            if recording >= len(self.lengths) or (recording >= 0 and start >= self.lengths[recording]):
                raise MoshiTTTError(
                    f"The saved place in the data is frame {start} of recording {recording}, which these {len(self.lengths)} recordings do "
                    "not have: data.train gives others than before. Give the same recordings, or start with a new run_dir."
                )
        self.order.drawn = list(state["drawn"])
        self.current, self.start = list(state["current"]), list(state["start"])


class ShuffledWindows:
    """Windows of all recordings, each on its own (every row resets), shuffled anew every epoch."""

    def __init__(
        self,
        lengths: Sequence[int],
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int | None,
        rows: int,
        window: int,
        epochs: int | None = None,
    ):
        self.lengths, self.rows, self.window = np.asarray(lengths), rows, window
        self.firsts = np.concatenate([[0], np.cumsum(-(-self.lengths // window))])  # number of each recording's first window
        counts = np.diff(self.firsts[np.concatenate([[0], np.cumsum(sizes)])])
        self.order = WeightedOrder(counts.tolist(), weights, seed, epochs)

    def turn(self) -> list[Window] | None:
        """One window for every row; None when the recordings are at an end."""
        drawn = [self.order.draw() for _ in range(self.rows)]
        if drawn[0] is None:
            return None
        return [EMPTY if item is None else self.window_of(item) for item in drawn]

    def window_of(self, item: int) -> Window:
        """The window of a number in the order of the recordings."""
        recording = int(np.searchsorted(self.firsts, item, side="right")) - 1
        start = (item - int(self.firsts[recording])) * self.window
        return Window(recording, start, min(self.window, int(self.lengths[recording]) - start), reset=True, last=True)

    def state_dict(self) -> dict[str, Any]:
        """Whole numbers, ready for JSON."""
        return {"drawn": list(self.order.drawn)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; ValueError when it belongs to other data."""
        _check_state(self, {"current": [], **state}, 0, len(self.order.drawn))
        self.order.drawn = list(state["drawn"])


def _check_state(plan: Plan, state: dict[str, Any], rows: int, sources: int) -> None:
    if len(state.get("drawn", ())) != sources or len(state.get("current", ())) != rows:
        raise MoshiTTTError(
            f"The saved place in the data ({len(state.get('current', ()))} rows, {len(state.get('drawn', ()))} sources) does not fit "
            f"this run's {type(plan).__name__} of {rows} rows and {sources} sources; resume with the run's settings, or start a new run_dir."
        )
