"""Put results of several checkpoints of one training (other seeds) together: means with intervals over dialogues, and the worst checkpoint.
Writes results.json, pictures and a report, which `plot` and `compare` take as those of one model."""

from __future__ import annotations

import argparse
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.files import atomic_write
from ..common.results import FORMAT, RESULTS, read_results, stamp, written
from ..errors_moshi_ttt import MoshiTTTError
from .compare import check_same
from .report import write_report
from .task import shapes, task


def merge(places: list[Path]) -> dict[str, Any]:
    """What results.json holds of the mean of several.

    Raises:
        MoshiTTTError: fewer than two; one that is of other evaluations, of other data, or of the same model as another; nothing that can be
            averaged.
    """
    held = [read_results(place / RESULTS if place.is_dir() else place, shapes()) for place in places]
    for place, one in zip(places[1:], held[1:]):
        check_same([places[0], place], held[0]["tasks"], one["tasks"])
    models = [one["model"] for one in held]
    digests = [one["fingerprint"] for one in models]
    if len(set(digests)) < max(2, len(places)):
        said = ", ".join(f"{place} ({model['name']})" for place, model in zip(places, models))
        raise MoshiTTTError(f"`results={said}` must be of two models or more, each of its own; name one result of each checkpoint.")
    about = {"name": f"{len(models)} checkpoints: " + ", ".join(one["name"] for one in models), "ttt": models[0]["ttt"]}
    about["fingerprint"] = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    now, tasks = datetime.now(UTC), {}
    for name, part in held[0]["tasks"].items():
        if (mean := task(part["kind"]).merged([one["tasks"][name] for one in held])) is not None:
            tasks[name] = mean | stamp(now) | {"model_name": about["name"], "settings": part.get("settings", {})}
    if not tasks:
        raise MoshiTTTError(
            f"{places[0]} holds {', '.join(held[0]['tasks'])}; one of them must be spoken_recall, which alone can be averaged."
        )
    return {"format": FORMAT, "model": about, "written": written(now), "tasks": tasks}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, help="two results.json or more, or their folders")
    parser.add_argument("--output", type=Path, default=Path("runs/merged"), help="folder of what is written (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    merged = merge(args.results)
    atomic_write(args.output / RESULTS, json.dumps(merged, indent=1, allow_nan=False) + "\n")
    for part in merged["tasks"].values():
        print(task(part["kind"]).finding(part))
    print(write_report(merged, args.output))
    return 0
