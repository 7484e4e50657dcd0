"""Draw results again: every part of a results.json, a recall.json, or a training log (one JSON object a line) that has a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..common.files import inside, read_json, read_log
from ..common.results import RESULTS, checked_part, read_results
from ..errors_moshi_ttt import MoshiTTTError
from .drawing import STYLE, line_style, new_figure, provenance, save
from .task import shapes, task

LETTERS = 20  # below a picture, of an inch of its width


def draw(part: dict[str, Any]) -> Figure | None:
    """The picture of one part, with what was found and on what it was measured below it; None where its evaluation has none."""
    with matplotlib.rc_context(STYLE):
        figure = task(part["kind"]).figure(part)
        if figure is not None:
            found = wrap(task(part["kind"]).finding(part), round(LETTERS * figure.get_figwidth()))
            said = "\n".join(filter(None, [*found, provenance(part)]))
            figure.text(0.0, -0.01, said, ha="left", va="top", fontsize=7, color="#444444")
        return figure


def training_figure(panels: dict[str, dict[str, Any]]) -> Figure:
    """Training curves: a panel for each group of series {name: {"step": [...], "value": [...]}}."""
    with matplotlib.rc_context(STYLE):
        columns = min(4, len(panels))
        rows = -(-len(panels) // columns)
        figure = new_figure(3.4 * columns, 2.6 * rows)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, (title, series) in zip(grid, panels.items()):
            for index, (name, points) in enumerate(series.items()):
                look = line_style(index) | ({} if len(points["step"]) < 20 else {"marker": None})  # evaluations are few
                axes.plot(points["step"], points["value"], label=name, **look)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("step")
            if len(series) > 1:
                axes.legend(fontsize=7, frameon=False)
        for axes in grid[len(panels) :]:
            axes.remove()
        return figure


def training_panels(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every number logged against "step", in panels by what its name says: losses together, each other number alone."""
    panels: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if name == "step" or "step" not in record or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            points = panels.setdefault("loss" if "loss" in name else name, {}).setdefault(name, {"step": [], "value": []})
            points["step"].append(record["step"])
            points["value"].append(value)
    return panels


def figures(path: Path) -> Iterator[tuple[str, Figure]]:
    """(name, picture) of everything in a file that has one. Raises MoshiTTTError where the file is not as it was written."""
    if path.is_dir():
        path = path / RESULTS
    if path.suffix == ".jsonl":
        panels = training_panels(read_log(path))
        if panels:
            yield path.stem, training_figure(panels)
        return
    data = read_json(path)
    parts = {path.stem: checked_part(data, shapes(), path)} if "kind" in data else read_results(path, shapes())["tasks"]
    for name, part in parts.items():
        if (figure := draw(part)) is not None:
            yield name, figure


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="result files or their folders (results.json, recall.json, a training log.jsonl)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the pictures (default: beside each file)")


def run(args: argparse.Namespace) -> int:
    places: dict[Path, Path] = {}
    for path in map(Path, args.results):
        found = list(figures(path))
        if not found:
            raise MoshiTTTError(
                f"{path}: holds nothing that can be drawn; give a log with numbers beside `step`, or results that have pictures."
            )
        for name, figure in found:
            stem = inside(args.output or path.parent, name)
            before = places.setdefault(stem, path)
            if before != path:
                raise MoshiTTTError(
                    f"{before} and {path} would both be drawn to {name} in {args.output}; give each an --output of its own."
                )
            print(*save(figure, stem), sep="\n")
    return 0
