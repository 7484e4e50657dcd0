"""How pictures look: colors that color-blind readers tell apart (Okabe and Ito), a mark and a dash for each besides, files that are the same
for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..common.files import atomic_write
from .formatting import duration

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)
MARKS = ("o", "s", "^", "D", "v", "P", "X")  # shapes as well as colors, for prints in grey
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))  # of no common length with the others: 42 lines before two are alike
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "moshi-ttt",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
DPI = 160
FEW = 10  # points of a curve


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Color, mark and dash of the line of this number."""
    look = {"color": PALETTE[index % len(PALETTE)], "marker": MARKS[index % len(MARKS)], "linestyle": DASHES[index % len(DASHES)]}
    return look | {"markersize": 4, "linewidth": 1.2}


def curve(axes: Any, x: Sequence[float], y: Sequence[float], index: int, label: str, bounds: Sequence[Any] = ()) -> None:
    """A line, with its intervals (low, high) where every one is known: bars of a few points, a band of many."""
    look = line_style(index)
    axes.plot(x, y, label=label, **look)
    if len(bounds) and all(bound is not None and None not in bound for bound in bounds):
        low, high = np.array(bounds, float).T
        if len(x) < FEW:
            axes.errorbar(x, y, [np.array(y) - low, high - np.array(y)], fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=2)
        else:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)


def seconds_axis(axes: Any, times: Sequence[float]) -> None:
    """A log axis of seconds, with ticks at those of these times that are near what is drawn, in seconds, minutes or hours."""
    axes.set_xscale("log")
    times = [t for t in times if axes.dataLim.x0 / 2 <= t <= 2 * axes.dataLim.x1]
    axes.set_xticks(times, list(map(duration, times)))
    axes.minorticks_off()


def legend_below(figure: Figure, axes: Any, columns: int = 3) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=7, frameon=False)


def heat_map(axes: Any, values: np.ndarray, columns: Sequence[Any], rows: Sequence[Any]) -> Any:
    """Percentages [rows, columns] as colors and numbers; NaN stays empty."""
    image = axes.imshow(values, vmin=0, vmax=100, cmap="cividis", aspect="auto")
    for row, column in np.ndindex(values.shape):
        if np.isfinite(values[row, column]):
            color = "black" if values[row, column] > 55 else "white"
            axes.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def provenance(part: Mapping[str, Any]) -> str:
    """The model of a part, its data, how much of it, its seeds, and the version, date and time of its measuring, as far as it says so."""
    settings = part.get("settings") or {}
    sources = [settings.get(name) for name in ("manifest", "folder")] + [one.get("folder") for one in settings.get("tasks") or ()]
    names = list(dict.fromkeys(Path(source).name for source in sources if source))
    said = ["model: " + part["model_name"]] if "model_name" in part else []
    said += ["data: " + (", ".join(names) or part["data"])] if names or "data" in part else []
    if part.get("hours"):
        said.append(f"{part['hours']:.2f} hours of recordings")
    seeds = settings.get("seeds") or [settings["seed"]] if "seed" in settings else []
    if seeds:
        said.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    if "version" in part:
        said.append(f"moshi-ttt {part['version']}, {part.get('date', '')}")
    if "seconds" in part:
        said.append(f"measured in {part['seconds'] / 3600:.2f} hours")
    return "; ".join(said)


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
