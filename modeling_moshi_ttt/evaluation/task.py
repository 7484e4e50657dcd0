"""What an evaluation is: one file of this package that ends in `TASK`, and its name in `TASKS`. Settings, help, runner, report, plots and
comparisons have it from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..common.progress import progress_bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .subject import Subject

TASKS = ["zero_shot", "long_context", "inner_loss", "dialogue", "spoken_recall", "recall"]  # in the order in which they run


@dataclass(frozen=True)
class Context:
    """What a run gives every evaluation.

    Attributes:
        output: the folder for what is kept between runs.
        seed: of all that is drawn.
        batch_size: recordings at once.
        show_progress: whether bars are shown.
        others: the models of `Task.models`, by the same names.
    """

    output: Path
    seed: int = 0
    batch_size: int = 16
    show_progress: bool = True
    others: Mapping[str, Subject] = field(default_factory=dict)

    def bar(self, name: str) -> Callable[[Any], Any]:
        """Wraps an iterable in a progress bar."""
        return lambda items: progress_bar(items, desc=name, disable=not self.show_progress)


@dataclass(frozen=True)
class Table:
    """A table of the report, with what its numbers are in the note."""

    head: list[str]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """One number of a result, for comparing it with the same number of another result.

    Attributes:
        panel, line: the axes and the curve that it is drawn in.
        x: where on the axis; None: under a name of its own.
        mean: the number.
        unit: of it; those of one panel share one.
        values: its parts by independent unit (dialogue, recording, item), of which it is the mean; empty where they were not kept.
        higher_is_better: None where neither is.
        axis: what x is, with its unit.
    """

    panel: str
    line: str
    x: float | None
    mean: float
    unit: str
    values: Mapping[str, float] = field(default_factory=dict)
    higher_is_better: bool | None = True
    axis: str = ""

    @property
    def name(self) -> str:
        return ", ".join([self.panel, self.line] + ([] if self.x is None else [f"{self.x:g}"]))


class Task(Protocol):
    """One evaluation. A subclass is instantiated once, as `TASK` of its module.

    Attributes:
        name: of its section in settings, results and report.
        settings: the dataclass of that section; its docstring says what each field means.
        shape: the TypedDict of what `run` gives; a result file is held against it when it is read.
        question, reading: what it asks, and how to read the answer, for the report.
        needs_model: whether there is a model under evaluation.
        drawn_by: settings that say, beside the seed, what data are drawn where none are read; results of others are not compared.
    """

    name: str
    settings: type[Any]
    shape: type[Any]
    question: str
    reading: str
    needs_model: bool = True
    drawn_by: tuple[str, ...] = ()

    def inputs(self, section: Any) -> Iterable[str]:
        """Read the folders and manifests of a section; what it gives are lines over the contents of all that it reads, hashed as they
        are asked for.

        Raises:
            MoshiTTTError: something is not there, or cannot be read.
        """
        return ()

    def models(self, section: Any) -> dict[str, str]:
        """Other models (folders or Hub names) that a section sets beside the one under evaluation, by the setting that names each."""
        return {}

    def check(self, section: Any, subject: Subject) -> None:
        """Refuse what this model cannot do, before anything runs."""
        return None

    def run(self, subject: Subject, section: Any, context: Context) -> dict[str, Any]:
        """The numbers, as JSON holds them."""
        ...

    def figure(self, part: Any) -> Figure | None:
        """The picture of what `run` gave; None: there is none."""
        return None

    def table(self, part: Any) -> Table:
        """The table of what `run` gave."""
        ...

    def finding(self, part: Any) -> str:
        """What was found, in a sentence."""
        ...

    def measures(self, part: Any) -> list[Measure]:
        """The numbers that two results are compared by."""
        ...

    def merged(self, parts: Sequence[Any]) -> dict[str, Any] | None:
        """The mean over checkpoints of what `run` gave for each, with the worst; None: this evaluation has no such numbers."""
        return None


def task(name: str) -> Task:
    """The evaluation of this name."""
    found: Task = import_module(f"{__package__}.{name}").TASK
    return found


def tasks() -> dict[str, Task]:
    """Every evaluation by its name."""
    return {name: task(name) for name in TASKS}


def shapes() -> dict[str, type[Any]]:
    """What each evaluation's part of results.json is like."""
    return {name: one.shape for name, one in tasks().items()}
