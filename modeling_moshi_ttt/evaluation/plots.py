"""Pictures of results, drawn from JSON alone (PNG and SVG), in colours that colour-blind readers tell apart (Okabe and Ito).

`draw` gives the matplotlib figure of one result by its "kind"; `moshi-ttt plot` is the command around it.
"""

from __future__ import annotations

import difflib
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..common.files import atomic_write
from ..errors_moshi_ttt import MoshiTTTError
from . import recall, spoken_recall

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
MARKS = ("o", "s", "^", "D", "v", "P", "X")  # shapes as well as colours, for prints in grey
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moshi-ttt",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 160


def draw(data: dict[str, Any]) -> Figure:
    """The figure of one result, by its "kind". Raises ValueError for a kind that is unknown."""
    kind = data.get("kind")
    if kind not in FIGURES:
        near = difflib.get_close_matches(str(kind), FIGURES, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"it must be one of {', '.join(FIGURES)}."
        raise MoshiTTTError(f"kind: {kind!r} cannot be drawn; {hint}")
    with matplotlib.rc_context(STYLE):
        return FIGURES[kind](data)


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`."""
    paths = []
    for suffix, options in ((".png", {"dpi": DPI}), (".svg", {"metadata": {"Date": None}})):
        buffer = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(buffer, format=suffix[1:], bbox_inches="tight", facecolor="white", **options)  # type: ignore[arg-type]
        path = Path(f"{stem}{suffix}")
        atomic_write(path, buffer.getvalue())
        paths.append(path)
    return paths


# ---------------------------------------------------------------- one function a kind


def recall_figure(data: dict[str, Any]) -> Figure:
    """Heat maps: a panel for each number of pairs and time of telling, a row for each model, a column for each distance; accuracy in
    percent.

    A star marks distances at which attention itself reaches some of the pairs.
    """
    found = recall.panels(data)
    names = list(dict.fromkeys(name for name, _, _ in found))
    counts, told = sorted({pairs for _, pairs, _ in found}), sorted({after for _, _, after in found})
    figure = Figure(figsize=(2.4 + 2.6 * len(counts), 0.4 + len(told) * (0.8 + 0.36 * len(names))), layout="constrained")
    grid = figure.subplots(len(told), len(counts), sharey=True, squeeze=False)
    for axes, (after, pairs) in zip(grid.flat, itertools.product(told, counts)):
        rows = [{recall.label(data, cell): cell["accuracy"] for cell in found.get((name, pairs, after), [])} for name in names]
        labels = sorted({label for row in rows for label in row}, key=lambda label: int(label.rstrip("*")))
        values = np.array([[100.0 * row.get(label, np.nan) for label in labels] for row in rows])
        image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        _annotate(axes, values)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(f"{pairs} pairs told after {after} frames", fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("frames between hearing and asking")
    reach = (
        f"attention reaches {recall.reach(data['window'])} frames: {recall.LAYERS} layers of window {data['window']}   * partly within that"
    )
    figure.text(0.5, -0.01, reach, ha="center", va="top", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label=f"recall, % (chance {100 * data['chance']:.0f})")
    return figure


def _annotate(axes: Any, grid: np.ndarray) -> None:
    for row, column in np.ndindex(grid.shape):
        value = grid[row, column]
        if np.isfinite(value):
            colour = "black" if value > 55 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)


def long_context_figure(data: dict[str, Any]) -> Figure:
    """Above: loss against position (log scale) for each stream and condition, with intervals and the attention window marked. Below: how
    much higher the loss of each control in the same order is than TTT's."""
    streams, names = data["streams"], list(data["conditions"])
    figure = Figure(figsize=(max(3.6 * len(streams), 5.6), 5.2), layout="constrained")
    grid = figure.subplots(2, len(streams), squeeze=False, sharex=True)
    for (above, below), stream in zip(grid.T, streams):
        for index, name in enumerate(names):
            _curve(above, data["conditions"][name][stream], index, name)
            if name in data["differences"]:
                _curve(below, data["differences"][name][stream], index, name)
        below.axhline(0, color=GREY, linewidth=0.8)
        for axes in (above, below):
            axes.axvline(data["window"], color=GREY, linestyle="--", linewidth=1)
        above.text(data["window"], 1.0, " window", color=GREY, fontsize=7, transform=above.get_xaxis_transform(), va="top")
        below.set_xscale("log")
        below.xaxis.set_major_formatter("{x:,.0f}")
        below.set_xlabel("position, frames (750 a minute)")
        above.set_title(stream, fontsize=9)
    grid[0, 0].set_ylabel("loss, nats a token")
    grid[1, 0].set_ylabel("loss − loss with TTT, nats")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def _curve(axes: Any, curve: dict[str, Any], index: int, name: str) -> None:
    """One condition's mean in each bucket, with its interval where there is one."""
    x, colour = np.array(curve["position"], float), PALETTE[index % 7]
    axes.plot(x, np.array(curve["loss"], float), color=colour, marker=MARKS[index % 7], markersize=3, linewidth=1.2, label=name)
    if all(value is not None for value in curve["low"]):
        axes.fill_between(x, np.array(curve["low"], float), np.array(curve["high"], float), color=colour, alpha=0.12, linewidth=0)


def inner_loss_figure(data: dict[str, Any]) -> Figure:
    """The three inner losses of each TTT layer against position, smoothed, as in figure 5 of the TTT paper (arXiv:2407.04620)."""
    layers = data["layers"]
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(3.0 * columns, 4.0), 2.5 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (layer, curves) in zip(grid, layers.items()):
        for colour, key, label in ((GREY, "initial", "ℓ(W₀; xₜ)"), (ORANGE, "before", "ℓ(Wₜ₋₁; xₜ)"), (BLUE, "after", "ℓ(Wₜ; xₜ)")):
            axes.plot(curves["position"], curves[key], color=colour, linewidth=1.2, label=label)
        axes.set_title(f"layer {layer}, drift {curves['drift'][-1]:.2g}, gate {curves['gate']['mean_abs']:.2g}", fontsize=8)
        axes.set_xlabel("token t (750 a minute)")
    for axes in grid[len(layers) :]:
        axes.remove()
    grid[0].set_ylabel("inner loss")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def zero_shot_figure(data: dict[str, Any]) -> Figure:
    """Accuracy bars with intervals, the published rows as marks, chance as a line."""
    tasks = data["tasks"]
    figure = Figure(figsize=(1.6 + 1.3 * max(len(tasks), 2), 3.2), layout="constrained")
    axes = figure.subplots()
    values = np.array([100.0 * task["accuracy"] for task in tasks.values()])
    spread = np.array([[100.0 * bound for bound in task["interval"]] for task in tasks.values()]).T  # [2, tasks]
    axes.bar(range(len(tasks)), values, 0.6, color=SKY, label="this model", zorder=1)
    axes.errorbar(range(len(tasks)), values, np.abs(spread - values), fmt="none", color="black", linewidth=1, capsize=3)
    for index, (name, row) in enumerate(data["published"].items()):
        points = [(i, row[task]) for i, task in enumerate(tasks) if row.get(task) is not None]
        if points:
            at, height = zip(*points)
            colour = (BLUE, ORANGE, GREEN, PURPLE, RED)[index % 5]
            axes.scatter(at, height, marker=MARKS[index % 7], s=22, color=colour, label=name, zorder=3)
    axes.axhline(50, color=GREY, linestyle="--", linewidth=1, label="chance")
    axes.set_xticks(range(len(tasks)), [f"{name}\n{task['items']:,} items" for name, task in tasks.items()], fontsize=8)
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 100)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def spoken_recall_figure(data: dict[str, Any]) -> Figure:
    """See `spoken_recall.draw`."""
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    spoken_recall.draw(data, figure, PALETTE, MARKS)
    return figure


def training_figure(data: dict[str, Any]) -> Figure:
    """Training curves: a panel for each group of series {name: {"step": [...], "value": [...]}}."""
    panels = data["panels"]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, series) in zip(grid, panels.items()):
        for index, (name, curve) in enumerate(series.items()):
            mark = MARKS[index % 7] if len(curve["step"]) < 20 else None  # evaluations are few
            axes.plot(curve["step"], curve["value"], color=PALETTE[index % 7], linewidth=1.2, marker=mark, markersize=3, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step")
        if len(series) > 1:
            axes.legend(fontsize=7, frameon=False)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


FIGURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "recall": recall_figure,
    "long_context": long_context_figure,
    "inner_loss": inner_loss_figure,
    "zero_shot": zero_shot_figure,
    "spoken_recall": spoken_recall_figure,
    "training": training_figure,
}


def drawable(results: dict[str, Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, part) of everything in a result file that has a picture: the file itself, or each of its tasks."""
    if results.get("kind") in FIGURES:
        yield name, results
    for task, part in results.get("tasks", {}).items() if "kind" not in results else ():
        if part.get("kind") in FIGURES:
            yield task, part
