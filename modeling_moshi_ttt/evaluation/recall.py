"""Does it remember? Trains tiny Moshis with and without TTT to recall what was heard longer ago than their attention window, in minutes on
a CPU, without data. Writes recall.json (resumed where it stopped) and the picture recall.png / recall.svg."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import MISSING, asdict, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from typing_extensions import TypedDict

from ..common.files import atomic_write, read_json
from ..common.progress import progress_bar
from ..common.results import MORE, Part, checked, command
from ..common.settings import DISTINCT, Bounds, Count, CountOrZero, Positive, Seed, check_entries, describe, load_settings, settings_group
from ..errors_moshi_ttt import MoshiTTTError
from . import drawing
from .formatting import percent
from .plots import draw
from .recall_task import CHANCE, KEYS, LAYERS, TrainSettings, Variant, make_model, measure_all, reach, share_within_reach, train
from .task import Context, Measure, Table, Task

UNKEPT = ("output", "variants", "threads", "seconds")  # settings that may change while a recall.json goes on


@settings_group
class VariantSettings:
    """One model."""

    mixer: Literal["none", "linear", "mlp"] = "linear"
    """Inner model of its TTT layers; none is window attention alone."""
    mini_batch_size: Count = 16
    """Frames of an inner mini-batch."""
    base_lr: Positive | None = None
    """Inner learning rate; null: the default of the task."""

    @property
    def name(self) -> str:
        """As the picture shows it."""
        if self.mixer == "none":
            return "window attention alone"
        return f"TTT-{self.mixer}, b = {self.mini_batch_size}" + (f", lr {self.base_lr:g}" if self.base_lr else "")


def _variants() -> list[VariantSettings]:
    return [VariantSettings("none"), VariantSettings("mlp"), VariantSettings("linear")]


@settings_group
class RecallSettings:
    """What `moshi-ttt recall` runs; every field can be given as key=value."""

    output: Path = Path("runs/recall")
    """Folder of recall.json and of the picture."""
    window: Count = 16
    """Frames that attention sees in each of two layers."""
    pairs: Annotated[list[Annotated[Count, Field(le=KEYS)]], DISTINCT] = field(default_factory=lambda: [4, 8])
    """Numbers of pairs of key and value that are measured."""
    distances: Annotated[list[CountOrZero], DISTINCT] = field(default_factory=lambda: [24, 32, 48, 64, 96])
    """Frames of noise before the pairs are asked for, measured."""
    train_distances: Bounds = field(default_factory=lambda: [24, 40])
    """Lowest and highest distance in training."""
    told_after: Annotated[list[CountOrZero], DISTINCT] = field(default_factory=lambda: [0])
    """Frames of noise before the pairs, measured."""
    train_told_after: Bounds = field(default_factory=lambda: [0, 0])
    """Lowest and highest in training."""
    corrections: Annotated[list[CountOrZero], DISTINCT] = field(default_factory=lambda: [0])
    """Pairs that are told anew with other values, measured; the newest value is right."""
    train_corrections: Bounds = field(default_factory=lambda: [0, 0])
    """Lowest and highest in training."""
    sequences: Count = 512
    """Sequences measured for each number of pairs and distance."""
    steps: Count = 1500
    """Steps of training at the most; it stops early once the task is learned."""
    batch_size: Count = 64
    """Sequences of a step."""
    learning_rate: Positive = 3e-3
    """Learning rate of training."""
    seconds: Positive = 600.0
    """Seconds of training for each model, at the most."""
    seed: Seed = 0
    """Seed of weights and sequences."""
    threads: CountOrZero = 0
    """Threads; 0: as many as torch takes by itself."""
    variants: list[VariantSettings] = field(default_factory=_variants)
    """The models."""

    def __post_init__(self) -> None:
        check_entries("variants", [variant.name for variant in self.variants])
        for name in ("corrections", "train_corrections"):
            if max(getattr(self, name)) > min(self.pairs):
                raise MoshiTTTError(f"`{name}={getattr(self, name)}` must be at most the fewest pairs, {min(self.pairs)}.")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=[], help="key=value pairs, such as steps=500 or output=runs/mine")
    parser.epilog = describe(RecallSettings)


def run(args: argparse.Namespace) -> int:
    settings = load_settings(RecallSettings, None, args.overrides)
    results = run_recall(settings)
    for line in summary(results):
        print(line)
    print(settings.output / "recall.png")
    return 0


def run_recall(settings: RecallSettings, show_progress: bool = True) -> Any:
    """Train and measure every variant that recall.json does not hold yet; the file is whole after each."""
    target = settings.output / "recall.json"
    settings.output.mkdir(parents=True, exist_ok=True)  # what cannot be written is found out before hours of training
    results = resume(settings)
    for variant in settings.variants:
        earlier = [run for run in results["runs"] if run.get("variant") == asdict(variant)]
        if not any(_stands(run, settings.seconds) for run in earlier):
            new = _run_variant(variant, settings, show_progress)
            results["runs"] = [run for run in results["runs"] if run not in earlier] + [new]
            results["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
            atomic_write(target, json.dumps(results, indent=1) + "\n")
    picture = draw(results)
    if picture is not None:
        drawing.save(picture, settings.output / "recall")
    return results


def resume(settings: RecallSettings) -> Any:
    """What is there of a run with these very settings, or an empty result."""
    target = settings.output / "recall.json"
    kept = {name: value for name, value in asdict(settings).items() if name not in UNKEPT}
    if not target.is_file():
        about = {"hardware": f"CPU, {os.cpu_count()} cores", "command": command(), "settings": kept}
        facts = {"kind": "recall", "window": settings.window, "reach": reach(settings.window), "chance": CHANCE}
        return {**facts, "runs": [], **about}
    results = checked(RecallPart, read_json(target), target)
    # a setting that there was not yet had its default of today
    defaults = {one.name: one.default_factory() for one in fields(settings) if one.default_factory is not MISSING}
    if {name: defaults.get(name) for name in kept} | results.get("settings", {}) != kept:
        raise MoshiTTTError(f"{target}: holds results of other settings; choose another `output`, or remove the file to start anew.")
    return results


def _out_of_time(run: Run) -> bool:
    return bool(run["training"].get("out_of_time"))


def _stands(run: Run, seconds: float) -> bool:
    """What ran out of time is trained again where it now has more."""
    return not _out_of_time(run) or bool(run["training"]["seconds"] >= seconds)


def _run_variant(variant: VariantSettings, settings: RecallSettings, show_progress: bool) -> dict[str, Any]:
    if settings.threads:
        torch.set_num_threads(settings.threads)
    chosen = Variant(None if variant.mixer == "none" else variant.mixer, variant.mini_batch_size, variant.base_lr)
    model = make_model(chosen, settings.window, settings.seed)
    training = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seconds=settings.seconds,
        pairs=tuple(settings.pairs),
        distances=(settings.train_distances[0], settings.train_distances[1]),
        told_after=(settings.train_told_after[0], settings.train_told_after[1]),
        corrections=(settings.train_corrections[0], settings.train_corrections[1]),
        seed=settings.seed,
    )
    with progress_bar(total=settings.steps, desc=variant.name, disable=not show_progress) as bar:

        def report(step: int, loss: float, accuracy: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", recall=f"{100 * accuracy:.1f}%", refresh=False)

        trained = train(model, training, report)
    cells = measure_all(model, settings.pairs, settings.distances, settings.sequences, settings.told_after, settings.corrections)
    return {"name": variant.name, "variant": asdict(variant), "training": trained, "results": cells}


class Cell(TypedDict):
    """Share of the answers that are right, for one number of pairs, time of telling and distance; rights: of each sequence, how many."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    pairs: int
    distance: int
    accuracy: float
    told_after: NotRequired[int]
    corrections: NotRequired[int]
    interval: NotRequired[list[float]]
    rights: NotRequired[str]


class Run(TypedDict):
    """One model."""

    __pydantic_config__ = MORE  # type: ignore[misc]
    name: str
    variant: dict[str, Any]
    training: dict[str, Any]
    results: list[Cell]


class RecallPart(Part):
    """window: frames that attention sees in a layer. chance: share of right answers of who knows nothing."""

    window: int
    chance: float
    runs: list[Run]


Panel = tuple[int, int, int]  # pairs, told after, corrections


def panels(part: RecallPart) -> dict[tuple[str, Panel], list[Cell]]:
    """(model, panel) -> its cells, one for each distance."""
    found: dict[tuple[str, Panel], list[Cell]] = {}
    for done in part["runs"]:
        for cell in done["results"]:  # earlier files have no `told_after` and no `corrections`: there were none
            key = (cell["pairs"], cell.get("told_after", 0), cell.get("corrections", 0))
            found.setdefault((done["name"], key), []).append(cell)
    return found


def panel_name(panel: Panel) -> str:
    pairs, told_after, corrections = panel
    return f"{pairs} pairs told after {told_after:>3}" + (f", {corrections} corrected" if corrections else "")


def summary(part: RecallPart) -> list[str]:
    """A line for each model, number of pairs and time of telling; then the reach, and what the numbers are of."""
    lines = []
    for (name, panel), cells in panels(part).items():
        shown = "  ".join(f"{label(part, cell)}: {100 * cell['accuracy']:5.1f}%" for cell in cells)
        lines.append(f"{name:<24} {panel_name(panel)}   {shown}")
    lines += [f"{done['name']} ran out of time; give more seconds" for done in part["runs"] if _out_of_time(done)]
    return [*lines, note(part)]


def label(part: RecallPart, cell: Cell) -> str:
    """The distance, with a star where attention reaches some of the pairs itself."""
    within = share_within_reach(cell["pairs"], cell["distance"], part["window"])
    return f"{cell['distance']}{'*' if within else ''}"


def note(part: RecallPart) -> str:
    """What the star and the numbers mean."""
    return (
        f"{LAYERS} layers of window {part['window']} reach {reach(part['window'])} frames: {LAYERS} × ({part['window']} − 1) + 1. * some pairs "
        "lie within that reach, so window attention could know them. Accuracy over fresh sequences, 95% intervals over these; one model each."
    )


class Recall(Task):
    name, settings, shape = "recall", RecallSettings, RecallPart
    question = "Can it recall symbols?"
    reading = "Pairs are heard, then noise, then the keys again: small models trained for this alone, not the model above."
    needs_model = False

    def inputs(self, section: RecallSettings) -> tuple[()]:
        resume(section)
        return ()

    def run(self, subject: Any, section: RecallSettings, context: Context) -> dict[str, Any]:
        return run_recall(section, context.show_progress)

    def figure(self, part: RecallPart) -> Figure:
        """Heat maps: a column of panels for each number of pairs, a row of them for each time of telling and number of corrections; in each
        a row for each model, a column for each distance; accuracy in percent. A star marks distances at which attention reaches some."""
        found = panels(part)
        names = list(dict.fromkeys(name for name, _ in found))
        counts = sorted({panel[0] for _, panel in found})
        kinds = sorted({panel[1:] for _, panel in found})
        figure = drawing.new_figure(2.4 + 2.6 * len(counts), 0.4 + len(kinds) * (0.8 + 0.36 * len(names)))
        grid = figure.subplots(len(kinds), len(counts), sharey=True, squeeze=False)
        for axes, (kind, pairs) in zip(grid.flat, itertools.product(kinds, counts)):
            rows = [{label(part, cell): cell["accuracy"] for cell in found.get((name, (pairs, *kind)), [])} for name in names]
            labels = sorted({one for row in rows for one in row}, key=lambda one: int(one.rstrip("*")))
            values = np.array([[100.0 * row.get(one, np.nan) for one in labels] for row in rows])
            image = drawing.heat_map(axes, values, labels, names)
            axes.set_title(f"{panel_name((pairs, *kind))} (frames)", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("frames between hearing and asking (12.5 a second)")
        reached = f"attention reaches {reach(part['window'])} frames: {LAYERS} layers of window {part['window']}   * partly within that"
        figure.supxlabel(reached, fontsize=8)
        figure.colorbar(image, ax=figure.axes, label=f"recall, % (chance {100 * part['chance']:.0f})")
        return figure

    def table(self, part: RecallPart) -> Table:
        """Accuracy of every model at every distance, with what attention reaches by itself in the note."""
        found = panels(part)
        labels = list(dict.fromkeys(label(part, cell) for cells in found.values() for cell in cells))
        rows = []
        for (name, panel), cells in found.items():
            shown = {label(part, cell): percent(cell["accuracy"]) for cell in cells}
            rows.append([name, *panel, *[shown.get(one, "") for one in labels]])
        return Table(["", "pairs", "told after", "corrected", *labels], rows, note(part))

    def finding(self, part: RecallPart) -> str:
        shares: dict[str, list[float]] = {}
        for (name, _), cells in panels(part).items():
            shares.setdefault(name, []).extend(cell["accuracy"] for cell in cells if not label(part, cell).endswith("*"))
        said = [f"{name} {percent(sum(one) / len(one), 0)}%" for name, one in shares.items() if one]
        return f"Beyond the reach of attention, recalled on average: {', '.join(said) or 'nothing was asked'} (chance {percent(part['chance'], 0)}%)."

    def measures(self, part: RecallPart) -> list[Measure]:
        found = []
        for (name, panel), cells in panels(part).items():
            for cell in cells:
                rights = [100 * int(count) / cell["pairs"] for count in cell.get("rights", "").split()]
                each = {f"sequence {number}": right for number, right in enumerate(rights)}
                found.append(
                    Measure(
                        panel_name(panel),
                        name,
                        cell["distance"],
                        100 * cell["accuracy"],
                        "%",
                        each,
                        axis="frames between hearing and asking",
                    )
                )
        return found


TASK = Recall()
