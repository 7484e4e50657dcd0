"""The layout of a run folder: what `moshi-ttt train` writes into it, and where everything else looks for it.

    run/
    ├── run_config.json            {"format", "run": every setting, "fixed": those that a resume may not change}
    ├── metrics.jsonl              one record a line: each step, each evaluation
    ├── loss.png                   the curve of both
    ├── checkpoints/               checkpoint-00000100/ …, what the run goes on from (training/checkpoint.py)
    ├── exports/                   step-00000100/ …, checkpoints that `moshi-ttt export` made what `final` is
    ├── final/                     the model or adapter with its processor; run.json says of which step and settings
    ├── codes/  tracking/          Mimi codes where data.cache is null; the trackers' files
    └── .lock                      held while a process trains here (common/lock.py)

An evaluation of the run may lie beside it: results.json and pictures/.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors_moshi_ttt import MoshiTTTError, MoshiTTTFileNotFoundError
from .files import atomic_write, read_json

# 1: versions 0.1.0 and 0.2.0, which wrote no number; their checkpoints hold whole tensors, or one unmarked part a rank.
# 2: checkpoints in torch.distributed.checkpoint's safetensors, for any number of ranks.
FORMAT = 2

RUN_CONFIG, METRICS, CURVE = "run_config.json", "metrics.jsonl", "loss.png"
CHECKPOINTS, EXPORTS, CODES, TRACKING = "checkpoints", "exports", "codes", "tracking"
FINAL, FINAL_RUN = "final", "run.json"
RESULTS, PICTURES = "results.json", "pictures"


def write_settings(run_dir: Path, run: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Say what the run does, and which settings a resume must leave as they are."""
    atomic_write(run_dir / RUN_CONFIG, json.dumps({"format": FORMAT, "run": run, "fixed": fixed}, indent=1))


def read_settings(run_dir: Path) -> dict[str, Any]:
    """What `write_settings` wrote, or version 0.1.0 or 0.2.0 did.

    Raises:
        ValueError, FileNotFoundError: no run was trained here, or a later version of the package did.
    """
    path = run_dir / RUN_CONFIG
    content = read_json(path)
    if not (isinstance(content.get("run"), dict) and isinstance(content.get("fixed"), dict)):
        raise MoshiTTTError(f"{path} was not written by a training run here; use another run_dir.")
    check_format(content, path)
    return content


def check_format(content: dict[str, Any], path: Path) -> int:
    """The format that a file of a run names; ValueError where it is none that this version reads."""
    number = content.get("format", 1)
    if number not in range(1, FORMAT + 1):
        raise MoshiTTTError(
            f"{path} has `format={number!r}`, this version reads 1 to {FORMAT}; install the version that wrote it, or a later one."
        )
    return int(number)


def write_final_run(folder: Path, step: int, run: dict[str, Any]) -> None:
    """Beside a final or exported model: the step and the settings that it is of."""
    atomic_write(folder / FINAL_RUN, json.dumps({"format": FORMAT, "step": step, "run": run}, indent=1))


def final_step(run_dir: Path) -> int | None:
    """The step that `final` is of; None where there is none, or it does not say."""
    path = run_dir / FINAL / FINAL_RUN
    step = read_json(path).get("step") if path.is_file() else None
    return step if isinstance(step, int) else None


def final_of(path: Path, tell: bool = True) -> Path:
    """The `final` of a run's folder, which is what a command takes where a model or an adapter is asked for; of any other path, itself.

    Args:
        tell: say so on stderr.

    Raises:
        FileNotFoundError: the run has no `final` yet.
    """
    if not (path / RUN_CONFIG).is_file() or any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return path
    final = path / FINAL
    if not final.is_dir():
        raise MoshiTTTFileNotFoundError(
            f"{path} is the folder of a run that has no {FINAL!r} yet; let it end, or take a checkpoint of it with `moshi-ttt export {path}`."
        )
    if tell:
        print(f"{path} is the folder of a run: its {FINAL!r} is taken", file=sys.stderr)
    return final
