"""Does it remember? Trains tiny Moshis with and without TTT to recall what was heard longer ago than their attention window, in minutes on
a CPU, without data. Writes recall.json (resumed where it stopped) and the picture recall.png / recall.svg."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..common.files import atomic_write
from ..common.settings import ABOVE_ZERO, SEEDS, check_entries, check_numbers, describe, load_settings
from ..errors_moshi_ttt import MoshiTTTError

KEYS = 50  # that there are, and so the most pairs
LAYERS = 2  # of every model that is trained


def reach(window: int) -> int:
    """Frames that window attention sees through all layers together, the newest among them: layers × (window − 1) + 1."""
    return LAYERS * (window - 1) + 1


def share_within_reach(pairs: int, distance: int, window: int) -> float:
    """Share of the answers whose value, `distance` frames of noise before the first question, attention can still reach at the question.

    Every pair is asked at every place alike. The value of pair i is 2 (pairs − i) − 1 + `distance` + j frames older than question j.
    """
    ages = [2 * (pairs - i) - 1 + distance + j for i in range(pairs) for j in range(pairs)]
    return sum(age < reach(window) for age in ages) / len(ages)


@dataclass
class VariantSettings:
    """One model.

    mixer: of its TTT layers; none is window attention alone.
    mini_batch_size: frames of an inner mini-batch.
    base_lr: inner learning rate; null: the default of the task.
    """

    mixer: Literal["none", "linear", "mlp"] = "linear"
    mini_batch_size: int = 16
    base_lr: float | None = None

    def __post_init__(self) -> None:
        check_numbers(self, mini_batch_size=1, base_lr=ABOVE_ZERO)

    @property
    def name(self) -> str:
        """As the picture shows it."""
        if self.mixer == "none":
            return "window attention alone"
        return f"TTT-{self.mixer}, b = {self.mini_batch_size}" + (f", lr {self.base_lr:g}" if self.base_lr else "")


def _variants() -> list[VariantSettings]:
    return [VariantSettings("none"), VariantSettings("mlp"), VariantSettings("linear")]


@dataclass
class RecallSettings:
    """What `moshi-ttt recall` runs; every field can be given as key=value.

    output: folder of recall.json and of the picture.
    window: frames that attention sees in each of two layers.
    pairs, distances: pairs of key and value, and frames of noise before they are asked for, that are measured.
    train_distances: lowest and highest in training.
    told_after: frames of noise before the pairs, measured.
    train_told_after: lowest and highest in training.
    sequences: measured for each number of pairs and distance.
    steps, batch_size, learning_rate: of training; it stops early once the task is learned.
    seconds: of training for each model, at the most.
    seed: of weights and sequences.
    threads: 0: as many as torch takes by itself.
    variants: the models.
    """

    output: Path = Path("runs/recall")
    window: int = 16
    pairs: list[int] = field(default_factory=lambda: [4, 8])
    distances: list[int] = field(default_factory=lambda: [24, 32, 48, 64, 96])
    train_distances: list[int] = field(default_factory=lambda: [24, 40])
    told_after: list[int] = field(default_factory=lambda: [0])
    train_told_after: list[int] = field(default_factory=lambda: [0, 0])
    sequences: int = 512
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    seconds: float = 600.0
    seed: int = 0
    threads: int = 0
    variants: list[VariantSettings] = field(default_factory=_variants)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            window=1,
            pairs=(1, KEYS),
            distances=0,
            train_distances=0,
            told_after=0,
            train_told_after=0,
            sequences=1,
            steps=1,
            batch_size=1,
        )
        check_numbers(self, learning_rate=ABOVE_ZERO, seconds=ABOVE_ZERO, seed=SEEDS, threads=0)
        check_entries("pairs", self.pairs)
        check_entries("distances", self.distances)
        check_entries("told_after", self.told_after)
        check_entries("variants", [variant.name for variant in self.variants])
        for name in ("train_distances", "train_told_after"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or bounds[0] > bounds[1]:
                raise MoshiTTTError(f"{name} is {bounds}, it must be a lowest and a highest.")


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


def run_recall(settings: RecallSettings, show_progress: bool = True) -> dict[str, Any]:
    """Train and measure every variant that recall.json does not hold yet; the file is whole after each."""
    from .kept import kept_shape
    from .plots import draw, save

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
    with kept_shape(target):
        save(draw(results), settings.output / "recall")
    return results


def resume(settings: RecallSettings) -> dict[str, Any]:
    """What is there of a run with these very settings, or an empty result."""
    from .kept import kept_shape, read_kept

    target = settings.output / "recall.json"
    kept = {key: value for key, value in asdict(settings).items() if key not in ("output", "variants", "threads", "seconds")}
    if not target.is_file():
        from .recall_task import CHANCE

        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        about = {"hardware": f"CPU, {os.cpu_count()} cores", "command": command, "settings": kept}
        facts = {"kind": "recall", "window": settings.window, "reach": reach(settings.window), "chance": CHANCE}
        return {**facts, "runs": [], **about}
    results = read_kept(target)
    if {"told_after": [0], "train_told_after": [0, 0]} | (results.get("settings") or {}) != kept:
        raise MoshiTTTError(f"{target}: holds results of other settings; choose another output folder, or remove the file to start anew")
    with kept_shape(target):
        summary(results)  # reads most of it
    return results


def _out_of_time(run: dict[str, Any]) -> bool:
    return bool(run["training"].get("out_of_time"))


def _stands(run: dict[str, Any], seconds: float) -> bool:
    """What ran out of time is trained again where it now has more."""
    return not _out_of_time(run) or bool(run["training"]["seconds"] >= seconds)


def _run_variant(variant: VariantSettings, settings: RecallSettings, show_progress: bool) -> dict[str, Any]:
    import torch
    from tqdm import tqdm

    from .recall_task import TrainSettings, Variant, make_model, measure_all, train

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
        seed=settings.seed,
    )
    with tqdm(total=settings.steps, desc=variant.name, disable=not show_progress) as bar:

        def report(step: int, loss: float, accuracy: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", recall=f"{100 * accuracy:.1f}%", refresh=False)

        trained = train(model, training, report)
    cells = measure_all(model, settings.pairs, settings.distances, settings.sequences, settings.told_after)
    return {"name": variant.name, "variant": asdict(variant), "training": trained, "results": cells}


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each model, number of pairs and time of telling; then the reach, and what the numbers are of."""
    lines = []
    for (name, pairs, told_after), cells in panels(results).items():
        shown = "  ".join(f"{label(results, cell)}: {100 * cell['accuracy']:5.1f}%" for cell in cells)
        lines.append(f"{name:<24} {pairs} pairs told after {told_after:>3}   {shown}")
    lines += [f"{done['name']} ran out of time; give more seconds" for done in results["runs"] if _out_of_time(done)]
    return [*lines, note(results)]


def panels(results: dict[str, Any]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """(model, pairs, told after) -> its cells, one for each distance."""
    found: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for done in results["runs"]:
        for cell in done["results"]:  # earlier files have no `told_after`: pairs were told first
            found.setdefault((done["name"], cell["pairs"], cell.get("told_after", 0)), []).append(cell)
    return found


def label(results: dict[str, Any], cell: dict[str, Any]) -> str:
    """The distance, with a star where attention reaches some of the pairs itself."""
    within = share_within_reach(cell["pairs"], cell["distance"], results["window"])
    return f"{cell['distance']}{'*' if within else ''}"


def note(results: dict[str, Any]) -> str:
    """What the star and the numbers mean."""
    frames = reach(results["window"])
    return (
        f"{LAYERS} layers of window {results['window']} reach {frames} frames: {LAYERS} × ({results['window']} − 1) + 1. * some pairs lie "
        "within that reach, so window attention could know them. Accuracy over fresh sequences, 95% intervals over these; one model each."
    )
