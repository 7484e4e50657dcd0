"""Batches from cached codes: aligned frames, labels where something is to be learned, and the rows that start anew.

Shapes: B rows of a micro-batch, T frames, K codebooks a channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.prepared import Prepared, PreparedSet
from ..data.settings import DataSettings
from ..errors_moshi_ttt import MoshiTTTOSError
from ..tokens_moshi_ttt import IGNORED, ZERO
from .lanes import EMPTY, Lanes, Plan, ShuffledWindows, WeightedOrder, Window


@dataclass
class Batch:
    """One micro-batch: what the model's forward takes, the rows that start anew, and each row's number in the whole step."""

    input_ids: torch.Tensor  # [B, T]
    moshi_audio_codes: torch.Tensor  # [B, K, T]
    user_audio_codes: torch.Tensor  # [B, K, T]
    text_labels: torch.Tensor  # [B, T]
    audio_labels: torch.Tensor  # [B, K, T], or [B, 2 K, T] with the user's after Moshi's
    attention_mask: torch.Tensor  # [B, T]
    reset: torch.Tensor  # [B] bool
    names: list[str]
    asked: torch.Tensor | None = None  # [B, T] bool, words that answer a question about what was heard before; None where it is not known

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return Batch(**moved, names=self.names)

    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Keyword arguments of the model's forward; the mask is left out where every frame is there."""
        names = ("input_ids", "moshi_audio_codes", "user_audio_codes", "text_labels", "audio_labels")
        mask = None if bool(self.attention_mask.all()) else self.attention_mask
        return {**{name: getattr(self, name) for name in names}, "attention_mask": mask}

    @property
    def frames(self) -> int:
        """Frames that are there, without padding."""
        return int(self.attention_mask.sum())


class WindowReader(Dataset[Batch]):
    """Turns the windows of one micro-batch into a Batch, with labels of the user's codebooks where asked for; picklable, so that workers can
    do it.
    """

    def __init__(self, recordings: Sequence[Prepared], delays: Sequence[int], num_codebooks: int, user_labels: bool = False):
        self.recordings, self.num_codebooks = recordings, num_codebooks
        self.delays = list(delays) if user_labels else list(delays)[:num_codebooks]

    def __getitem__(self, windows: Sequence[Window]) -> Batch:  # type: ignore[override]
        reset = torch.tensor([window.reset for window in windows])
        names = [self.recordings[w.recording].name if w.recording >= 0 else "" for w in windows]
        return make_batch([self._row(window) for window in windows], self.delays, reset, names)

    def _row(self, window: Window) -> Row:
        if window.frames == 0:
            return np.zeros(0, np.int32), np.zeros((2, self.num_codebooks, 0), np.int16), window.last
        recording = self.recordings[window.recording]
        return *recording.read(window.start, window.frames), window.last


Row = tuple[np.ndarray, np.ndarray, bool]  # text [T], codes [2, K, T] of Moshi and the user, whether nothing comes after


def make_batch(rows: Sequence[Row], delays: Sequence[int], reset: torch.Tensor, names: list[str]) -> Batch:
    """Rows of any length side by side. `delays` are those of the codebooks that get labels: Moshi's K, or those of both."""
    k, labelled, frames = rows[0][1].shape[1], len(delays), max(*(len(text) for text, _, _ in rows), 1)
    text = torch.full((len(rows), frames), ZERO, dtype=torch.long)
    codes = torch.full((len(rows), 2 * k, frames), ZERO, dtype=torch.long)
    mask = torch.zeros(len(rows), frames, dtype=torch.long)
    labels = torch.full((len(rows), labelled, frames), IGNORED, dtype=torch.long)
    for row, (ids, stereo, last) in enumerate(rows):
        there = len(ids)
        text[row, :there] = torch.from_numpy(ids.astype(np.int64))
        codes[row, :, :there] = torch.from_numpy(stereo.reshape(2 * k, there).astype(np.int64))
        mask[row, :there] = 1
        labels[row, :, :there] = codes[row, :labelled, :there]
        if last:
            # nothing comes after the window in which a delayed codebook's last frames would be predicted
            for codebook, delay in enumerate(delays):
                labels[row, codebook, max(there - delay, 0) :] = IGNORED
    text_labels = text.masked_fill(text < 0, IGNORED)
    return Batch(text, codes[:, :k], codes[:, k:], text_labels, labels, mask, reset, names)


@dataclass
class Step:
    """What one rank does in one step: for each micro-batch the windows one after another, and the place in the data after it."""

    micro_batches: list[list[Batch]]
    state: dict[str, Any]


class Loader:
    """Gives each rank its steps, in the order of a plan.

    Args:
        plan: over all rows of a step, row r of micro-batch m of rank p being `(p * accumulation + m) * batch_size + r`.
        reader: makes batches of what the plan gives.
        batch_size, accumulation, turns: rows of a micro-batch, micro-batches of a step, windows one after another in a micro-batch.
        rank: which slice of the rows to take.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(self, plan: Plan, reader: Dataset[Batch], batch_size: int, accumulation: int, turns: int, rank: int, workers: int = 0):
        self.plan, self.reader = plan, reader
        self.batch_size, self.accumulation, self.turns, self.rank, self.workers = batch_size, accumulation, turns, rank, workers

    def __iter__(self) -> Iterator[Step]:
        states: deque[dict[str, Any]] = deque()
        batches = iter(self._batches(states))
        while True:
            step: list[list[Batch]] = []
            try:
                for _ in range(self.accumulation):
                    step.append([next(batches) for _ in range(self.turns)])
            except StopIteration:
                return
            yield Step(step, states.popleft())

    def _batches(self, states: deque[dict[str, Any]]) -> Any:
        if self.workers == 0:
            return (self.reader[windows] for windows in self._windows(states))
        return DataLoader(
            self.reader,
            sampler=_Once(self._windows(states)),
            batch_size=None,
            num_workers=self.workers,
            multiprocessing_context="spawn",
            generator=torch.Generator(),  # else the workers' seed is drawn from the model's generator, and dropout with it is another one
        )

    def _windows(self, states: deque[dict[str, Any]]) -> Iterator[Sequence[Any]]:
        while True:
            turns = [self.plan.turn() for _ in range(self.turns)]
            given = [turn for turn in turns if turn is not None]
            if not given:
                return
            rows = len(given[0])
            states.append(self.plan.state_dict())
            for micro in range(self.accumulation):
                first = (self.rank * self.accumulation + micro) * self.batch_size
                for turn in turns:
                    yield ([EMPTY] * rows if turn is None else turn)[first : first + self.batch_size]


@contextmanager
def worker_errors() -> Iterator[None]:
    """Around a loop over a Loader with workers: torch tells a worker's death at any moment, in the middle of a step too. OSError with the
    cure.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MoshiTTTOSError(
            f"A data worker died ({error}). The same command goes on from the last checkpoint; data.workers=0 does without them."
        ) from None


class _Once:
    """A sampler over an iterator that is read once."""

    def __init__(self, windows: Iterator[Sequence[Any]]):
        self.windows = windows

    def __iter__(self) -> Iterator[Sequence[Any]]:
        return self.windows


def make_plan(data: PreparedSet, settings: DataSettings, rows: int, window: int, seed: int) -> Plan:
    """The endless plan of training: lanes where memory is carried, shuffled windows where it is not."""
    if settings.carry == "none":
        return ShuffledWindows(data.lengths, data.sizes, data.weights, seed, rows, window)
    return Lanes(data.lengths, WeightedOrder(data.sizes, data.weights, seed), rows, window)


def evaluation_plan(data: PreparedSet, settings: DataSettings, rows: int, window: int) -> Plan:
    """Every recording once and in order."""
    if settings.carry == "none":
        return ShuffledWindows(data.lengths, data.sizes, data.weights, None, rows, window, epochs=1)
    return Lanes(data.lengths, WeightedOrder(data.sizes, data.weights, None, epochs=1), rows, window)
