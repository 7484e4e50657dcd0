"""Draw results again: every part of a result file, of recall.json, or of a training log (one JSON object a line) that has a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..common.files import read_log
from .plots import FIGURES, draw, drawable, save


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file; a trainer's log (one JSON object a line) becomes a "training" result."""
    source = Path(path)
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if source.suffix == ".jsonl":
        return training_result(read_log(source))
    try:
        results = json.loads(source.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: not JSON ({error})") from None
    if not isinstance(results, dict):
        raise ValueError(f"{source}: must hold one JSON object, it holds a {type(results).__name__}")
    return results


def training_result(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Every number logged against "step", in panels by what its name says: losses together, each other number alone."""
    panels: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if name == "step" or "step" not in record or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            curve = panels.setdefault("loss" if "loss" in name else name, {}).setdefault(name, {"step": [], "value": []})
            curve["step"].append(record["step"])
            curve["value"].append(value)
    if not panels:
        raise ValueError("the log holds no numbers with a step; it cannot be drawn")
    return {"kind": "training", "panels": panels}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="result files (results.json, recall.json, a training log.jsonl)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the pictures (default: beside each file)")


def run(args: argparse.Namespace) -> int:
    places: dict[Path, Path] = {}
    for name in args.results:
        path = Path(name)
        parts = list(drawable(read_results(path), path.stem))
        if not parts:
            raise ValueError(f"{path}: holds nothing that can be drawn (kinds: {', '.join(FIGURES)})")
        for part, data in parts:
            before = places.setdefault((args.output or path.parent) / part, path)
            if before != path:
                raise ValueError(f"{before} and {path} would both be drawn to {part} in {args.output}; give each an --output of its own")
            for written in save(draw(data), (args.output or path.parent) / part):
                print(written)
    return 0
