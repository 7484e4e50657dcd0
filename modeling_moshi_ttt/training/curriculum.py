"""A curriculum that follows what the model knows: dialogues grow once it answers well."""

from __future__ import annotations

from typing import Any

from .run_config import CurriculumSettings

SMOOTHING = 0.95  # of the accuracy, a step


class Curriculum:
    """`level` goes from 0 to 1 in `settings.steps` steps whose smoothed accuracy is above `settings.threshold`.

    What it holds is two numbers, which are part of a run's progress: a run that goes on does so at the same level.
    """

    def __init__(self, settings: CurriculumSettings):
        self.settings = settings
        self.level, self.accuracy = 0.0, 0.0

    def update(self, accuracy: float) -> None:
        """Take one step's share of right answers into account."""
        self.accuracy = SMOOTHING * self.accuracy + (1 - SMOOTHING) * accuracy
        if self.accuracy > self.settings.threshold:
            self.level = min(1.0, self.level + 1 / self.settings.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.level, self.accuracy = state["level"], state["accuracy"]
