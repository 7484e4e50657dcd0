"""Does it remember what it was told, and what it was told last? Facts are told in speech, then other things, then the model is asked, up to
an hour later. Every condition and every model beside hears the same dialogues."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NotRequired

import numpy as np
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from ..common.results import MORE, Part
from ..data.facts import DIGITS, NUMBER, VALUES
from ..errors_moshi_ttt import MoshiTTTError
from ..tokens_moshi_ttt import FRAME_RATE
from . import drawing
from .formatting import duration, percent
from .kept_numbers import recording_line
from .long_context import FROZEN, GATE_ZERO, TTT
from .memory_probe import Memory, draw_memory, probe, said_of_memory
from .spoken_inputs import SpokenRecallSettings, batches, recordings, told_once
from .spoken_listening import FULL, WINDOW, Heard, answers
from .statistics import bootstrap_interval
from .task import Context, Measure, Table, Task

TIMES = (0, 8, 35, 120, 480, 1620, 3600)  # seconds at which the columns begin
TICKS = (2, *TIMES[1:])
APART = 1.03  # between the points of two lines at one time, so that their intervals do not hide one another


# ---------------------------------------------------------------- numbers


def chance(section: SpokenRecallSettings) -> float:
    """Share of right answers of who knows the kind of a fact, but not its value."""
    low, high = section.digits
    numbers = float(np.mean([float(len(DIGITS)) ** -count for count in range(low, high + 1)]))
    return float(np.mean([numbers if kind == NUMBER else 1 / len(VALUES[kind]) for kind in section.kinds]))


def bucket(seconds: float) -> int:
    """The time in `TIMES` at which the column of these seconds begins."""
    return max(time for time in TIMES if time <= seconds)


def share_right(found: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy of some answers, with an interval over their dialogues, and the share of values from before a correction; of the answers of
    several checkpoints the accuracy of the worst, too."""
    each: dict[str, list[bool]] = {}
    checkpoints: dict[int, list[bool]] = {}
    for one in found:
        each.setdefault(one["dialogue"], []).append(one["right"])
        checkpoints.setdefault(one.get("checkpoint", 0), []).append(one["right"])
    interval = bootstrap_interval([float(np.mean(rights)) for rights in each.values()], seed, weights=list(map(len, each.values())))
    shares = {"accuracy": float(np.mean([one["right"] for one in found])), "old": float(np.mean([one["old"] for one in found]))}
    if len(checkpoints) > 1:
        shares["worst"] = min(float(np.mean(rights)) for rights in checkpoints.values())
    return shares | {"interval": list(interval), "questions": len(found), "dialogues": len(each)}


def grouped(found: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> dict[Any, list[dict[str, Any]]]:
    """The answers by a key, in its order."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault(key(one), []).append(one)
    return dict(sorted(groups.items()))


def cells(found: Sequence[dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Accuracy for each time since told, of facts told once and of corrected ones."""
    groups = grouped(found, lambda one: (one["corrected"] > 0, bucket(one["since"])))
    return [
        {"corrected": corrected, "from": low, "mean_since": round(float(np.mean([one["since"] for one in there])), 1)}
        | share_right(there, seed)
        for (corrected, low), there in groups.items()
    ]


AXES: dict[str, tuple[str, Callable[[Any], Any]]] = {  # its name -> the field of an answer that it groups by, and how
    "facts": ("facts", int),
    "corrections": ("corrected", int),
    "told from s": ("told", bucket),
    "seed": ("seed", int),
    "checkpoint": ("checkpoint", int),
}


def numbers(found: Sequence[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """The `Run` of some answers."""
    by = {}
    for axis, (field, key) in AXES.items():
        if all(field in one for one in found):
            groups = grouped(found, lambda one, field=field, key=key: key(one[field]))  # type: ignore[misc]
            by[axis] = [{"value": value} | share_right(there, seed) for value, there in groups.items()]
    grid = grouped(found, lambda one: (bucket(one["told"]), bucket(one["told"] + one["since"])))
    told_asked = [{"told": t, "asked": a} | share_right(there, seed) for (t, a), there in grid.items()]
    return {"cells": cells(found, seed), "by": by, "grid": told_asked, "answers": list(found)}


def measure(
    models: Mapping[str, tuple[Any, Sequence[str]]],
    processor: Any,
    dialogues: Iterable[Sequence[Heard]],
    modes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of every model under its conditions.

    Args:
        models: name -> (model, conditions); "" is the model under evaluation.
        dialogues: a few at a time, which are heard side by side and then forgotten.
        seed: of the resamples for the intervals.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    count = frames = 0
    for heard in dialogues:
        count, frames = count + len(heard), frames + sum(one.user.shape[1] for one in heard)
        for (name, (model, conditions)), mode in itertools.product(models.items(), modes):
            for condition in conditions:
                label = f"{name or condition}, {mode}" if len(modes) > 1 else name or condition
                found.setdefault(label, []).extend(answers(model, processor, heard, condition, mode))
    runs = {label: numbers(there, seed) for label, there in found.items()}
    return {"kind": "spoken_recall", "dialogues": count, "hours": frames / FRAME_RATE / 3600, "modes": list(modes), "runs": runs}


# ---------------------------------------------------------------- the evaluation


class Cell(TypedDict):
    """Share of right answers. Those of `Run.cells` are of a time since told; of `by`, of a `value`; of `grid`, of `told` and `asked`. worst: of the
    worst of several checkpoints."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    accuracy: float
    interval: list[float]
    questions: int
    corrected: NotRequired[bool]
    mean_since: NotRequired[float]
    value: NotRequired[int]
    told: NotRequired[int]
    asked: NotRequired[int]
    worst: NotRequired[float]


class Run(TypedDict):
    """One condition or model. by: number of facts, number of corrections, time of telling, or seed -> cells."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    cells: list[Cell]
    answers: list[dict[str, Any]]
    by: NotRequired[dict[str, list[Cell]]]
    grid: NotRequired[list[Cell]]


class SpokenRecallPart(Part):
    """runs: condition or model -> its numbers, all of the same dialogues. memory: what its TTT layers did. checkpoints: how many were merged."""

    dialogues: int
    modes: list[str]
    runs: dict[str, Run]
    chance: NotRequired[float]
    memory: NotRequired[Memory]
    checkpoints: NotRequired[int]


class SpokenRecall(Task):
    name, settings, shape = "spoken_recall", SpokenRecallSettings, SpokenRecallPart
    question = "Does it remember what it was told?"
    reading = "Facts are told in speech, then other things, then it is asked; some facts are corrected."
    drawn_by = ("seeds", "voices", "ways", "kinds", "facts", "digits")

    def inputs(self, section: SpokenRecallSettings) -> Iterable[str]:
        if section.manifest is None:
            return ()
        found = recordings(section)
        return (f"{recording_line(one)} {questions}" for one, questions in found)

    def models(self, section: SpokenRecallSettings) -> dict[str, str]:
        return {f"beside.{name}": model for name, model in section.beside.items()}

    def check(self, section: SpokenRecallSettings, subject: Any) -> None:
        needs = {FROZEN: "ttt_layers", GATE_ZERO: "ttt_layers", WINDOW: "sliding_window", FULL: "sliding_window"}
        for condition in section.conditions:
            setting = needs.get(condition)
            if setting and not subject.config.get(setting, "ttt" not in setting):
                left = [one for one in section.conditions if needs.get(one) != setting]
                raise MoshiTTTError(
                    f"`spoken_recall.conditions={section.conditions}` must not hold {condition!r} for a model of `{setting}="
                    f"{subject.config.get(setting)}`, with which it changes nothing; give spoken_recall.conditions=[{', '.join(left)}]."
                )
        if section.memory and not subject.ttt.get("ttt_layers"):
            raise MoshiTTTError(f"`spoken_recall.memory={section.memory}` must be 0 for a model without TTT layers.")

    def run(self, subject: Any, section: SpokenRecallSettings, context: Context) -> dict[str, Any]:
        model, processor = subject.load()
        models: dict[str, tuple[Any, Sequence[str]]] = {"": (model, section.conditions)}
        models |= {name.removeprefix("beside."): (one.model, [TTT]) for name, one in context.others.items()}
        longest: deque[Heard] = deque(maxlen=section.memory)

        def heard() -> Iterator[list[Heard]]:
            for make in context.bar("spoken recall")(batches(section, processor, context.seed, context.batch_size)):
                yield (some := make())
                longest.extend(one for one in some if told_once(one.questions))

        part = measure(models, processor, heard(), section.modes, context.seed)
        if section.manifest is None:
            part |= {"chance": chance(section), "data": f"{part['dialogues']} made dialogues, {section.voices.replace('_', ' ')} voices"}
        if section.memory:
            part["memory"] = probe(model, context.bar("memory")(longest))
        return part

    def merged(self, parts: Sequence[Any]) -> dict[str, Any]:
        first = parts[0]
        runs = {}
        for label in first["runs"]:
            if all(label in part["runs"] for part in parts):
                each = [part["runs"][label]["answers"] for part in parts]
                runs[label] = numbers([one | {"checkpoint": number} for number, there in enumerate(each) for one in there])
        kept = {name: first[name] for name in ("kind", "dialogues", "hours", "modes", "chance", "data") if name in first}
        return kept | {"runs": runs, "checkpoints": len(parts)}

    def figure(self, part: SpokenRecallPart) -> Figure:
        """Accuracy against time since told, facts told once beside corrected ones, a line for each condition and model; below, where facts
        were told at several times, told-at × asked-at for each; at last what the memory did."""
        kinds = sorted({cell["corrected"] for run in part["runs"].values() for cell in run["cells"]})
        maps = {label: run.get("grid", []) for label, run in part["runs"].items()}
        told = sorted({cell["told"] for grid in maps.values() for cell in grid})
        rows = [3.2] + ([0.9 + 0.35 * len(told)] if len(told) > 1 else []) + ([2.4] if "memory" in part else [])
        figure = drawing.new_figure(max(7.2, 2.2 * len(maps) if len(told) > 1 else 0), sum(rows) + 0.3)
        bands: Any = figure.subfigures(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
        first = bands[0].subplots(1, len(kinds), squeeze=False, sharey=True)[0]
        for axes, corrected in zip(first, kinds):
            self._against_time(axes, part, corrected)
        first[0].set_ylabel("questions answered right, %")
        drawing.legend_below(bands[0], first[0], 4)
        if len(told) > 1:
            self._maps(bands[1], maps, told)
        if "memory" in part:
            draw_memory(part["memory"], bands[-1])
        return figure

    @staticmethod
    def _against_time(axes: Any, part: SpokenRecallPart, corrected: bool) -> None:
        for index, (label, run) in enumerate(part["runs"].items()):
            there = [cell for cell in run["cells"] if cell["corrected"] == corrected]
            beside = APART ** (index - (len(part["runs"]) - 1) / 2)
            x, y = [cell["mean_since"] * beside for cell in there], [100 * cell["accuracy"] for cell in there]
            drawing.curve(axes, x, y, index, label, [[100 * bound for bound in cell["interval"]] for cell in there])
            worst = [100 * cell["worst"] for cell in there if "worst" in cell]
            if worst:
                look = drawing.line_style(index) | {"linestyle": "none", "fillstyle": "none", "markersize": 6}
                axes.plot(x, worst, label=f"{label}, worst of {part.get('checkpoints')} checkpoints", **look)
        if "chance" in part:
            axes.axhline(100 * part["chance"], color=drawing.GREY, linewidth=0.8, linestyle=":", label="chance")
        drawing.seconds_axis(axes, TICKS)
        axes.set_xlabel("time since told" + (" anew" if corrected else ""))
        axes.set_title("corrected: the newest value" if corrected else "told once", fontsize=9)
        axes.set_ylim(-3, 103)

    @staticmethod
    def _maps(band: Any, maps: Mapping[str, Sequence[Cell]], told: Sequence[int]) -> None:
        asked = sorted({cell["asked"] for grid in maps.values() for cell in grid})
        for axes, (label, grid) in zip(band.subplots(1, len(maps), squeeze=False, sharey=True)[0], maps.items()):
            values = np.full((len(told), len(asked)), np.nan)
            for cell in grid:
                values[told.index(cell["told"]), asked.index(cell["asked"])] = 100 * cell["accuracy"]
            drawing.heat_map(axes, values, list(map(duration, asked)), [f"told from {duration(time)}" for time in told])
            axes.set_title(label, fontsize=8)
            axes.set_xlabel("asked from")

    def table(self, part: SpokenRecallPart) -> Table:
        """A row for each condition and model; a column for each time since told, and for each value of what else was varied."""
        columns: dict[tuple[Any, ...], str] = {}
        rows: dict[str, dict[tuple[Any, ...], Cell]] = {label: {} for label in part["runs"]}
        for label, run in part["runs"].items():
            for cell in run["cells"]:
                key = (cell["corrected"], cell["from"])  # type: ignore[typeddict-item]
                columns[key] = f"{'corrected' if cell['corrected'] else 'told'}, from {cell['from']} s"  # type: ignore[typeddict-item]
                rows[label][key] = cell
        for axis in AXES:
            for label, run in part["runs"].items():
                for cell in run.get("by", {}).get(axis, []) if len(run.get("by", {}).get(axis, [])) > 1 else []:
                    columns[2, axis, cell["value"]] = f"{axis}: {cell['value']}"
                    rows[label][2, axis, cell["value"]] = cell
        keys = sorted(columns, key=lambda key: key if key[0] < 2 else (2,))
        note = (
            f"Share of questions answered right, percent, with 95% intervals over dialogues; {part['dialogues']} dialogues "
            f"({', '.join(part['modes'])})" + (f", mean of {part['checkpoints']} checkpoints." if "checkpoints" in part else ".")
        )
        memory = " " + said_of_memory(part["memory"]) if "memory" in part else ""
        shown = [[label, *[_shown(there.get(key)) for key in keys]] for label, there in rows.items()]
        return Table(["", *[columns[key] for key in keys]], shown, note + memory)

    def finding(self, part: SpokenRecallPart) -> str:
        said = []
        for corrected, what in ((False, "told once"), (True, "corrected")):
            last = {label: [cell for cell in run["cells"] if cell["corrected"] == corrected][-1:] for label, run in part["runs"].items()}
            shares = [
                f"{label} {percent(there[0]['accuracy'], 0)}%"
                + (f" (worst {percent(there[0]['worst'], 0)}%)" if "worst" in there[0] else "")
                for label, there in last.items()
                if there
            ]
            if shares:
                since = next(there[0]["mean_since"] for there in last.values() if there)
                said.append(f"{what} {duration(since)} before: {', '.join(shares)}")
        known = f" (chance {percent(part['chance'], 0)}%)" if "chance" in part else ""
        return f"Right answers: {'; '.join(said)}{known}."

    def measures(self, part: SpokenRecallPart) -> list[Measure]:
        found = []
        for label, run in part["runs"].items():
            groups = grouped(run["answers"], lambda one: (one["corrected"] > 0, bucket(one["since"])))
            for (corrected, low), there in groups.items():
                each = {name: 100 * float(np.mean([one["right"] for one in rights])) for name, rights in grouped(there, _dialogue).items()}
                mean = 100 * float(np.mean([one["right"] for one in there]))
                found.append(
                    Measure("corrected" if corrected else "told once", label, max(low, 1), mean, "%", each, axis="seconds since told")
                )
        return found


def _dialogue(answer: dict[str, Any]) -> str:
    return str(answer["dialogue"])


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    low, high = cell["interval"]
    worst = f", worst {100 * cell['worst']:.0f}" if "worst" in cell else ""
    return f"{100 * cell['accuracy']:.0f} ({100 * low:.0f} to {100 * high:.0f}){worst}"


TASK = SpokenRecall()
