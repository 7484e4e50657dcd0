"""Runs the sections of an evaluation one after the other, keeps what is done, and writes results.json, pictures and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..common.files import atomic_write
from ..common.results import FORMAT, RESULTS, read_results, stamp, written
from ..errors_moshi_ttt import MoshiTTTError
from .kept_numbers import digest
from .report import write_report
from .settings import SectionSettings
from .subject import Subject
from .task import Context, shapes, task

Others = dict[str, dict[str, Subject]]  # section -> setting -> the model that it names


def check(settings: SectionSettings) -> tuple[Subject, Others]:
    """The models, after all has been looked at that needs no weights: a mistake in the last section must not come out after hours."""
    subject, others = Subject(settings), {}
    for name, section in settings.sections.items():
        task(name).inputs(section)
        others[name] = {label: _other(settings, f"{name}.{label}", model) for label, model in task(name).models(section).items()}
        if subject.folder is not None:
            task(name).check(section, subject)
    settings.output.mkdir(parents=True, exist_ok=True)
    return subject, others


def _other(settings: SectionSettings, setting: str, model: str) -> Subject:
    try:
        return Subject(replace(settings, model=model, adapter=None))
    except ValueError as error:
        raise MoshiTTTError(f"{setting}: {error}") from None


def run_evaluation(settings: SectionSettings, show_progress: bool = True) -> Path:
    """Run every section of the settings that results.json does not hold yet, and write the report; returns the report's path."""
    subject, others = check(settings)
    results = _open_results(settings.output, subject)
    torch.manual_seed(settings.seed)
    keys = {name: _key(name, section, settings, others[name]) for name, section in settings.sections.items()}
    for name, section in settings.sections.items():
        if results["tasks"].get(name, {}).get("settings") == keys[name]:
            continue
        begin = time.perf_counter()
        context = Context(settings.output, settings.seed, settings.batch_size, show_progress, others[name])
        part = task(name).run(subject, section, context)
        now = datetime.now(UTC)
        results["tasks"][name] = part | {
            "kind": name,
            "model_name": results["model"]["name"],
            "settings": keys[name],
            "seconds": round(time.perf_counter() - begin, 1),
            **stamp(now),
        }
        results["written"] = written(now)
        atomic_write(settings.output / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    return write_report(results, settings.output)


def _key(name: str, section: Any, settings: SectionSettings, others: Mapping[str, Subject]) -> dict[str, Any]:
    """What a section's numbers depend on: its settings, and the data and weights that lie under the names in them by now."""
    # recall has a seed of its own, which counts
    key: dict[str, Any] = json.loads(json.dumps({"seed": settings.seed} | asdict(section), default=str))
    if others:
        key["others"] = {label: one.digest for label, one in others.items()}
    if data := digest(task(name).inputs(section)):
        key["inputs"] = data
    return key


def _open_results(output: Path, subject: Subject) -> dict[str, Any]:
    path = output / RESULTS
    about = subject.about()
    if not path.is_file():
        return {"format": FORMAT, "model": about, "written": "", "tasks": {}}
    results = read_results(path, shapes()) | {"format": FORMAT}
    held = results["model"]
    if not held["fingerprint"]:
        results["model"] = about  # so far the folder holds what needs no model
    elif about["fingerprint"] and held["fingerprint"] != about["fingerprint"]:
        raise MoshiTTTError(
            f"{path}: holds results of another model ({held['name']}, {held['fingerprint'][:12]}; "
            f"this one is {about['name']}, {about['fingerprint'][:12]}); choose another output folder"
        )
    return results
