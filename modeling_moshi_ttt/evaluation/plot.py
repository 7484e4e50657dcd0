"""Draw results again: every part of a result file, of recall.json, or of a training log (one JSON object a line) that has a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..common.files import inside, of_shape, read_json, read_log
from ..errors_moshi_ttt import MoshiTTTError
from .plots import FIGURES, draw, drawable, save

UNDRAWN = "it cannot be drawn; give a file as `moshi-ttt` evaluate, recall or train wrote it"


def read_results(path: str | Path) -> dict[str, Any]:
    """A result file; a trainer's log (one JSON object a line) becomes a "training" result."""
    source = Path(path)
    if source.is_dir():
        raise MoshiTTTError(f"{source} is a folder; name the result file in it")
    if source.suffix != ".jsonl":
        return read_json(source)
    result = training_result(read_log(source))
    if not result["panels"]:
        raise MoshiTTTError(f"{source}: the log holds no numbers with a step; it cannot be drawn")
    return result


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
    return {"kind": "training", "panels": panels}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", help="result files (results.json, recall.json, a training log.jsonl)")
    parser.add_argument("--output", type=Path, default=None, help="folder of the pictures (default: beside each file)")


def run(args: argparse.Namespace) -> int:
    places: dict[Path, Path] = {}
    for name in args.results:
        path = Path(name)
        results = read_results(path)
        with of_shape(str(path), UNDRAWN):
            parts = list(drawable(results, path.stem))
        if not parts:
            raise MoshiTTTError(f"{path}: holds nothing that can be drawn (kinds: {', '.join(FIGURES)})")
        for part, data in parts:
            stem = inside(args.output or path.parent, part)
            before = places.setdefault(stem, path)
            if before != path:
                raise MoshiTTTError(f"{before} and {path} would both be drawn to {part} in {args.output}; give each an --output of its own")
            with of_shape(f"{path}, {part}", UNDRAWN):
                written = save(draw(data), stem)
            print(*written, sep="\n")
    return 0
