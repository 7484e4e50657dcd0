"""Compare two results of the same evaluations, number by number: paired differences with intervals, a verdict in words, and overlaid curves.
Writes comparison.json and a picture for each evaluation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy import stats

from ..common.files import atomic_write, read_json
from ..common.results import RESULTS, checked_part, read_results
from ..errors_moshi_ttt import MoshiTTTError
from .drawing import STYLE, legend_below, line_style, new_figure, save
from .formatting import interval, p_value
from .statistics import LEVEL, paired_test
from .task import Measure, shapes, task

SIDES = ("A", "B")
Parts = dict[str, dict[str, Any]]


@dataclass
class Difference:
    """B minus A of one number.

    Attributes:
        a, b, unit: both numbers.
        mean, interval, p, pairs: of the differences of the units that both have, None and 0 where there are fewer than two. p is of a sign-flip
            test, corrected for the number of tests (Benjamini and Hochberg).
        verdict: "better", "worse", "different" (neither is better), "undecided" (no difference can be told), or "not tested".
    """

    task: str
    name: str
    a: float
    b: float
    unit: str
    mean: float | None = None
    interval: list[float] | None = None
    p: float | None = None
    pairs: int = 0
    verdict: str = "not tested"


def read(path: Path) -> Parts:
    """The parts of a results.json, of the folder that holds one, or of a recall.json."""
    file = path / RESULTS if path.is_dir() else path
    data = read_json(file)
    return {data["kind"]: checked_part(data, shapes(), file)} if "kind" in data else read_results(file, shapes())["tasks"]


def check_same(places: Sequence[Path], a: Parts, b: Parts) -> None:
    """Refuse results that cannot be compared: of other evaluations, or measured on other data."""
    if a.keys() != b.keys():
        held = "; ".join(f"{place} holds {', '.join(parts) or 'nothing'}" for place, parts in zip(places, (a, b)))
        raise MoshiTTTError(f"{held}: both must hold results of the same tasks; give --task NAME for one that both hold.")
    for name in a:
        first, second = (parts[name].get("settings", {}) for parts in (a, b))
        read = "inputs" in first or "inputs" in second
        for field in ("inputs",) if read else ("seed", *task(name).drawn_by):
            if (first.get(field) or None) != (second.get(field) or None):
                raise MoshiTTTError(
                    f"`tasks.{name}.settings.{field}={first.get(field)}` of {places[0]} must be that of {places[1]} ({second.get(field)}); "
                    "evaluate both on the same data."
                )


def differences(name: str, a: dict[str, Any], b: dict[str, Any], seed: int = 0) -> list[Difference]:
    """Every number that both parts have, in the order of A."""
    second = {measure.name: measure for measure in task(name).measures(b)}
    found, tests = [], []
    for first in task(name).measures(a):
        if first.name not in second:
            continue
        other = second[first.name]
        one = Difference(name, first.name, first.mean, other.mean, first.unit)
        units = [unit for unit in first.values if unit in other.values]
        if len(units) > 1:
            test: dict[str, Any] = paired_test([other.values[unit] - first.values[unit] for unit in units], seed)
            one.mean, one.interval, one.p, one.pairs = test["mean"], test["interval"], test["p"], test["pairs"]
            tests.append((one, first.higher_is_better))
        found.append(one)
    if tests:
        corrected = stats.false_discovery_control([one.p for one, _ in tests])
        for (one, higher_is_better), p in zip(tests, corrected):
            one.p = float(p)
            one.verdict = verdict_of(one, higher_is_better)
    return found


def verdict_of(one: Difference, higher_is_better: bool | None) -> str:
    if one.p is None or one.mean is None or one.p >= 1 - LEVEL:
        return "undecided"
    if higher_is_better is None:
        return "different"
    return "better" if (one.mean > 0) == higher_is_better else "worse"


def verdict(name: str, found: Sequence[Difference]) -> str:
    """What the differences of one evaluation say, in words."""
    tested = [one for one in found if one.verdict != "not tested"]
    if not tested:
        return (
            f"{name}: the results hold no values of single recordings, or of one alone, so nothing can be tested; evaluate again, on more."
        )
    counts = {word: sum(one.verdict == word for one in tested) for word in ("better", "worse", "different", "undecided")}
    if counts["better"] and not counts["worse"]:
        said = "B is better"
    elif counts["worse"] and not counts["better"]:
        said = "A is better"
    elif counts["better"]:
        said = "each is better in something"
    else:
        said = "no difference can be told" if not counts["different"] else "they differ"
    largest = max(tested, key=lambda one: (one.verdict != "undecided", abs(one.mean or 0.0)))
    low_high = f" ({interval(largest.interval, digits=2)})" if largest.interval else ""
    return (
        f"{name}: {said}: of {len(tested)} numbers B is better in {counts['better']}, worse in {counts['worse']}, otherwise different in "
        f"{counts['different']}, and undecided in {counts['undecided']}. Largest: {largest.name}, B − A {largest.mean:+.2f}{low_high} {largest.unit}."
    )


def overlay(a: Sequence[Measure], b: Sequence[Measure], labels: Sequence[str]) -> Figure:
    """A panel for each group of numbers; of each line A is solid and filled, B dashed and open."""
    panels = list(dict.fromkeys(one.panel for one in a))
    with matplotlib.rc_context(STYLE):
        columns = min(3, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(max(3.4 * columns, 5.0), 2.8 * rows + 0.4)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, panels):
            _panel(axes, panel, a, b)
        for axes in grid[len(panels) :]:
            axes.remove()
        legend_below(figure, grid[0])
        figure.suptitle("   ".join(f"{side}: {label}" for side, label in zip(SIDES, labels)), fontsize=8)
        return figure


def _panel(axes: Any, panel: str, a: Sequence[Measure], b: Sequence[Measure]) -> None:
    names = list(dict.fromkeys(one.line for one in [*a, *b] if one.panel == panel))
    there = [one for one in [*a, *b] if one.panel == panel]
    lines = any(one.x is not None for one in there)
    for side, measures, filled in zip(SIDES, (a, b), (True, False)):
        for index, name in enumerate(names):
            points = [one for one in measures if one.panel == panel and one.line == name]
            look = line_style(index) | {"linestyle": "-" if filled else "--", "fillstyle": "full" if filled else "none"}
            x = [one.x if one.x is not None else index for one in points]
            axes.plot(x, [one.mean for one in points], label=f"{name}, {side}", **look)
    if lines and min(one.x for one in there if one.x is not None) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if not lines:
        axes.set_xticks(range(len(names)), names, fontsize=7, rotation=20)
    axes.set_title(panel, fontsize=8)
    axes.set_ylabel(there[0].unit)
    axes.set_xlabel(there[0].axis)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a results.json, its folder, or a recall.json")
    parser.add_argument("b", type=Path, metavar="B", help="the other")
    parser.add_argument("--task", default=None, help="compare this evaluation alone")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare"), help="folder of comparison.json and pictures (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    places = (args.a, args.b)
    a, b = (read(place) for place in places)
    if args.task is not None:
        for place, parts in zip(places, (a, b)):
            if args.task not in parts:
                raise MoshiTTTError(f"`--task {args.task}` must be one that {place} holds ({', '.join(parts)}).")
        a, b = {args.task: a[args.task]}, {args.task: b[args.task]}
    check_same(places, a, b)
    written: dict[str, Any] = {"kind": "comparison", "a": str(args.a), "b": str(args.b), "tasks": {}}
    for name in a:
        found = differences(name, a[name], b[name])
        if not found:
            raise MoshiTTTError(f"{args.a} and {args.b}: `tasks.{name}` must hold some of the same numbers; they have none in common.")
        said = verdict(name, found)
        for one in found:
            if one.verdict != "not tested":
                print(f"  {one.name}: {one.a:.2f} → {one.b:.2f} {one.unit}, B − A {one.mean:+.2f} ({_tested(one)}): {one.verdict}")
        print(said)
        written["tasks"][name] = {"verdict": said, "differences": [vars(one) for one in found]}
        first, second = (task(name).measures(part[name]) for part in (a, b))
        print(*save(overlay(first, second, [str(place) for place in places]), args.output / name), sep="\n")
    atomic_write(args.output / "comparison.json", json.dumps(written, indent=1, allow_nan=False) + "\n")
    return 0


def _tested(one: Difference) -> str:
    return f"{interval(one.interval, digits=2)}, p {p_value(one.p)}, {one.pairs} pairs"
