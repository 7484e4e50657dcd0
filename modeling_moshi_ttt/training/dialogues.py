"""Batches of dialogues that are made as they are needed: no two are the same, and each follows from the seed, its number and its level."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.facts import ScriptSettings
from ..data.spoken_dialogues import Phrasebook
from .curriculum import Curriculum
from .windows import Batch, make_batch


@dataclass(frozen=True)
class Draw:
    """A dialogue's number in the run, and the curriculum's level when it was drawn."""

    number: int
    level: float


class DialoguePlan:
    """Numbers dialogues through: `rows` of them a turn, without end."""

    def __init__(self, rows: int, curriculum: Curriculum | None):
        self.rows, self.curriculum, self.drawn = rows, curriculum, 0

    def turn(self) -> list[Draw]:
        """One dialogue for every row."""
        level = 1.0 if self.curriculum is None else self.curriculum.level
        self.drawn += self.rows
        return [Draw(number, level) for number in range(self.drawn - self.rows, self.drawn)]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class DialogueReader(Dataset[Batch]):
    """Makes the dialogues of one micro-batch."""

    def __init__(self, book: Phrasebook, settings: ScriptSettings, seed: int, delays: Sequence[int]):
        self.book, self.settings, self.seed, self.delays = book, settings, seed, list(delays)

    def __getitem__(self, draws: Sequence[Draw]) -> Batch:  # type: ignore[override]
        dialogues = [self.book.stitch(self.settings, random.Random(f"{self.seed} {draw.number}"), draw.level) for draw in draws]
        rows = [(one.text.numpy(), np.stack([one.moshi.numpy(), one.user.numpy()]), True) for one in dialogues]
        batch = make_batch(rows, self.delays, torch.ones(len(rows), dtype=torch.bool), [f"dialogue {draw.number}" for draw in draws])
        batch.asked = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for row, one in enumerate(dialogues):
            batch.asked[row, : len(one.asked)] = one.asked
        return batch
