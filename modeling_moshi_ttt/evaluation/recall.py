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

KEYS = 50  # that there are, and so the most pairs


@dataclass
class VariantSettings:
    """One model: `mixer` none is window attention alone; `base_lr` null takes the default of the task."""

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
    """What `moshi-ttt recall` runs; every field can be given as key=value."""

    output: Path = Path("runs/recall")
    window: int = 16
    pairs: list[int] = field(default_factory=lambda: [4, 8])
    distances: list[int] = field(default_factory=lambda: [24, 32, 48, 64, 96])
    train_distances: list[int] = field(default_factory=lambda: [24, 40])
    sequences: int = 512  # measured for each number of pairs and distance
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 3e-3
    seconds: float = 600.0  # of training for each model, at the most
    seed: int = 0
    threads: int = 0  # 0: as many as torch takes by itself
    variants: list[VariantSettings] = field(default_factory=_variants)

    def __post_init__(self) -> None:
        check_numbers(self, window=1, pairs=(1, KEYS), distances=0, train_distances=0, sequences=1, steps=1, batch_size=1)
        check_numbers(self, learning_rate=ABOVE_ZERO, seconds=ABOVE_ZERO, seed=SEEDS, threads=0)
        check_entries("pairs", self.pairs)
        check_entries("distances", self.distances)
        check_entries("variants", [variant.name for variant in self.variants])
        if len(self.train_distances) != 2 or self.train_distances[0] > self.train_distances[1]:
            raise ValueError(f"train_distances is {self.train_distances}, it must be a lowest and a highest.")


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
        return {"kind": "recall", "window": settings.window, "chance": CHANCE, "runs": [], **about}
    results = read_kept(target)
    if results.get("settings") != kept:
        raise ValueError(f"{target}: holds results of other settings; choose another output folder, or remove the file to start anew")
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
    low, high = settings.train_distances
    training = TrainSettings(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seconds=settings.seconds,
        pairs=tuple(settings.pairs),
        distances=(low, high),
        seed=settings.seed,
    )
    with tqdm(total=settings.steps, desc=variant.name, disable=not show_progress) as bar:

        def report(step: int, loss: float, accuracy: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", recall=f"{100 * accuracy:.1f}%", refresh=False)

        trained = train(model, training, report)
    cells = measure_all(model, settings.pairs, settings.distances, settings.sequences)
    return {"name": variant.name, "variant": asdict(variant), "training": trained, "results": cells}


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each model and number of pairs."""
    lines = []
    for done in results["runs"]:
        for pairs in sorted({cell["pairs"] for cell in done["results"]}):
            cells = [cell for cell in done["results"] if cell["pairs"] == pairs]
            shown = "  ".join(f"{cell['distance']}: {100 * cell['accuracy']:5.1f}%" for cell in cells)
            cut = "   (ran out of time; give more seconds)" if _out_of_time(done) else ""
            lines.append(f"{done['name']:<24} {pairs} pairs   {shown}{cut}")
    return lines
