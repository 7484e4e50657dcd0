"""What `moshi-ttt evaluate` can be told: which model, and a section for each evaluation that is to run."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ..common.settings import settings_group
from ..errors_moshi_ttt import MoshiTTTError
from .subject import ModelSettings
from .task import task, tasks


@settings_group
class SectionSettings(ModelSettings):
    """The model, and at least one section."""

    def __post_init__(self) -> None:
        if not self.sections:
            raise MoshiTTTError(
                f"no section is given, so nothing would run; give some of {', '.join(tasks())} (recall={{}} needs no more)."
            )
        if self.model is None and (self.adapter is not None or any(task(name).needs_model for name in self.sections)):
            raise MoshiTTTError("`model=null` must name a model; give model=FOLDER (a checkpoint in our layout) or a Hub name.")

    @property
    def sections(self) -> dict[str, Any]:
        """The sections that are given, by name."""
        return {name: section for name in tasks() if (section := getattr(self, name)) is not None}


def _settings() -> Any:
    """The settings with a section for each evaluation, which means what the evaluation asks."""
    known = tasks()
    fields: dict[str, Any] = {name: Field(default=None, description=one.question) for name, one in known.items()}
    hints = {name: one.settings | None for name, one in known.items()}
    about = {"__doc__": "What `moshi-ttt evaluate` runs: every section that is given.", "__module__": __name__, "__annotations__": hints}
    return settings_group(type("EvaluateSettings", (SectionSettings,), fields | about))


EvaluateSettings: Any = _settings()
