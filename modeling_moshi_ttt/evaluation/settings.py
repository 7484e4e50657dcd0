"""What `moshi-ttt evaluate` can be told: which model, and a section for each evaluation that is to run."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal

from ..common.settings import SEEDS, check_numbers
from ..errors_moshi_ttt import MoshiTTTError
from .task import task, tasks


@dataclass
class ModelSettings:
    """The model, and what holds for every section.

    output: folder of the report, of results.json and of the pictures.
    model: a folder or a Hub name.
    adapter: a PEFT folder or Hub name, to be put into the model.
    device: auto (a GPU where there is one), cpu, cuda, or one of several by its number, as in cuda:1.
    dtype: of the weights.
    batch_size: recordings that are scored at once.
    seed: of what is drawn: answers, shuffled windows, resamples for the intervals.
    """

    output: Path = Path("runs/evaluate")
    model: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, batch_size=1, seed=SEEDS)
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


def _settings() -> type[Any]:
    """The settings with a section for each evaluation, which means what the evaluation asks."""
    known = tasks()
    meanings = "".join(f"\n{name}: {one.question}" for name, one in known.items())
    about = {"__doc__": f"What `moshi-ttt evaluate` runs: every section that is given.\n{meanings}", "__module__": __name__}
    fields = [(name, one.settings | None, field(default=None)) for name, one in known.items()]
    return make_dataclass("EvaluateSettings", fields, bases=(ModelSettings,), namespace=about)


EvaluateSettings: Any = _settings()
